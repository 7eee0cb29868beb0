"""prime.py as a program: every setting, numbers of processes, resume, what it learns, bad input."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

import prime
import sft
from conftest import ROOT, SFT, call, read_jsonl, run, torchrun, two_nodes, write_jsonl


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_close(a, b):
    """Weights equal to 1e-5, but for a few elements whose gradient is so small that Adam's first steps follow its rounding."""
    far = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert (far > 1e-5).double().mean() < 1e-4 and far.max() < 1e-4


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def arguments(guesser, guess_data):
    return [f"--data={guess_data[1]}", f"--model={guesser}", "--engine=hf", "--device=cpu", "--prompts_per_step=6", "--samples_per_prompt=4",
            "--max_prompt_tokens=40", "--max_tokens=12", "--batch_rows=12", "--prm_batch_rows=12", "--max_steps=2", "--beta=1",
            "--learning_rate=1e-4", "--prm_learning_rate=1e-4", "--save_interval=0", "--grade_workers=1", "--checkpointing=False",
            "--seed=3"]         # with which no random number is so near to a token's border that rounding decides


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Drawing is half the time of a run this small: one test draws, the others do without."""
    if "output" not in request.node.name:
        monkeypatch.setattr(prime, "plot_curves", lambda *paths: None)


@pytest.fixture(scope="module")
def result(arguments, tmp_path_factory):
    """result(*changes): metrics rows and weights of policy and PRM after a short run; one run for each set of changes."""
    seen = {}

    def go(*changes):
        if changes not in seen:
            out = tmp_path_factory.mktemp("run")
            call(prime, *arguments, *changes, f"--out_dir={out}")
            seen[changes] = read_jsonl(out / "metrics.jsonl"), weights(out / "policy"), weights(out / "prm"), out
        return seen[changes]

    return go


def test_the_same_command_gives_the_same_run(arguments, result, tmp_path):
    call(prime, *arguments, f"--out_dir={tmp_path}")
    assert same(weights(tmp_path / "policy"), result()[1]) and same(weights(tmp_path / "prm"), result()[2])


# What a setting must change: P policy weights, R PRM weights (R only when the policy's reward path cannot tell), M metrics.
@pytest.mark.parametrize("change, what", [
    ("--seed=1", "PR"), ("--samples_per_prompt=3", "PR"), ("--temperature=0.8", "PR"), ("--max_tokens=5", "PR"),
    ("--filter_low=0.5", "PR"), ("--filter_high=0.3", "PR"), ("--collect=once", "PR"), ("--oversample=3", "PR"),
    ("--prm_update=before", "P"), ("--prm_update=none", "PR"), ("--granularity=whole", "P"), ("--normalize=None", "P"),
    ("--normalize_chunks=3", "P"), ("--last_token_reward=False", "P"), ("--beta=0.1", "PR"), ("--prm_learning_rate=1e-2", "PR"),
    ("--prm_grad_clip=1e-4", "R"), ("--prm_batch_rows=24", "R"), ("--prm_weight_decay=9", "R"), ("--outcome_coef=0", "P"),
    ("--process_coef=0", "P"), ("--outcome_gamma=0.5", "P"), ("--process_gamma=0.5", "P"), ("--whiten=False", "P"),
    ("--learning_rate=1e-3", "P"), ("--warmup_steps=3", "PR"), ("--weight_decay=9", "P"), ("--beta1=0.5", "P"), ("--beta2=0.5", "P"),
    ("--grad_clip=1e-3", "P"), ("--batch_rows=24", "P"), ("--ppo_epochs=2", "P"), ("--clip=1e-4", "P"), ("--entropy_coef=1", "P"), ("--importance_cap=0.5", "P"),
    ("--ref_type=policy", "PR"), ("--max_steps=1", "PR"), ("--prompts_per_step=8", "PR"), ("--user_suffix=1", "PR"),
    ("--system_prompt=brief", "PR"),
])
def test_every_setting_does_something(result, change, what):
    base, other = result(), result(change)
    assert not ("P" in what and same(base[1], other[1])), f"{change} does not change the policy"
    assert not ("R" in what and same(base[2], other[2])), f"{change} does not change the PRM"


@pytest.mark.parametrize("change", ["--checkpointing=True", "--micro_batch_tokens=30", "--attention=padded", "--grade_workers=2",
                                    "--grade_timeout=9", "--shard=1", "--offload=True", "--tir=True"])      # this model never calls its tool
def test_what_must_not_change_the_result(result, change):
    for a, b in zip(result()[1:3], result(change)[1:3]):
        assert_close(a, b)


def test_what_is_offloaded_is_back_when_it_is_needed(arguments, tmp_path, monkeypatch):
    """On one device moving changes nothing, so: no model runs and no optimizer steps that was sent to the host and not fetched."""
    away, seen, ran, move, step = set(), set(), [], prime.move, prime.optimizer_step

    def watched_move(device, *parts):
        for part in parts:
            if isinstance(part, torch.nn.Module) and part not in seen:
                seen.add(part)
                part.register_forward_pre_hook(lambda net, _: ran.append(net in away))
            (away.add if device == "cpu" else away.discard)(part)
        move(device, *parts)

    def watched_step(net, optimizer, *more):
        ran.append(net in away or optimizer in away)
        return step(net, optimizer, *more)

    monkeypatch.setattr(prime, "move", watched_move)
    monkeypatch.setattr(prime, "optimizer_step", watched_step)
    call(prime, *arguments, "--offload=True", "--max_steps=1", f"--out_dir={tmp_path}")
    assert len(away) == 3 and len(ran) > 6 and not any(ran)             # in the end: its optimizer, the reference, the policy's


def test_moving_takes_weights_and_moments(guesser):
    """To another device, "meta" for want of a second real one; the optimizer still has the model's own parameters."""
    sft.setup_distributed(torch.device("cpu"))
    try:
        net = sft.load_model(str(guesser), torch.device("cpu"), torch.float32)
        optimizer = sft.make_optimizer(net, 1e-3)
        net(**sft.pack([([5, 6, 7], [1, 1, 1])], "cpu"))[0].sum().backward()
        sft.optimizer_step(net, optimizer, 1e-3, 0)
        prime.move("meta", net, None, optimizer)
        own = list(net.parameters())
        moments = [m for state in optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
        assert len(moments) == 2 * len(own) and all(tensor.device.type == "meta" for tensor in own + moments)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in own} == set(map(id, optimizer.state))
    finally:
        torch.distributed.destroy_process_group()


def test_settings_of_models_and_output(result, arguments, guesser, tmp_path):
    """prm_model, ref_model, filter_truncated, max_prompt_tokens, evaluation, samples, checkpoints, dtype, max_mismatch."""
    prm = result()[3] / "prm"                               # a trained PRM: another start, another reference
    assert not same(result(f"--prm_model={prm}")[2], result()[2])
    row = result(f"--ref_model={prm}")[0][0]
    assert row["prm_loss"] != result()[0][0]["prm_loss"]
    problems = f"--eval_data={arguments[0].removeprefix('--data=')}"
    rows, *_, out = result(problems, "--eval_problems=7", "--eval_samples=2", "--eval_interval=1", "--samples_logged=3", "--save_interval=1",
                           "--keep_checkpoints=1", "--filter_truncated=True", "--max_tokens=8")
    assert [r["step"] for r in rows] == [-1, 0, 1] and all(0 <= r["eval_greedy"] <= 1 for r in rows)
    assert all((r["eval_greedy"] * 7) % 1 == pytest.approx(0) and (r["eval_sampled"] * 14) % 1 == pytest.approx(0) for r in rows)
    samples = read_jsonl(out / "samples.jsonl")
    assert len(samples) == 6 and [p.name for p in (out / "checkpoints").iterdir()] == ["step_000002"]
    for s in samples:
        assert len(s["tokens"]) == len(s["process_rewards"]) == len(s["advantages"]) and s["finish_reason"] == "stop"
    assert (out / "curves.png").stat().st_size > 10000
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["max_tokens"] == 8 and torch.__version__.startswith(config["torch"])
    call(prime, *arguments, "--dtype=bfloat16", "--max_steps=1", f"--out_dir={tmp_path}/bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16/policy").dtype == torch.bfloat16
    with pytest.raises(prime.UserError, match="max_mismatch"):
        call(prime, *arguments, "--max_mismatch=1e-12", f"--out_dir={tmp_path}/strict")


def test_data_settings(result, arguments, guess_data, tmp_path):
    """Columns, splits and configurations of a data set, a chat template of one's own."""
    rows = read_jsonl(guess_data[1])
    folder = tmp_path / "set"
    folder.mkdir()
    for split, part in (("train", rows[:20]), ("rl", rows)):
        write_jsonl(folder / f"{split}.jsonl", [dict(text=r["problem"], gold=r["ground_truth"], problem_id=r["problem_id"]) for r in part])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: mine\n  data_files:\n  - split: rl\n    path: rl.jsonl\n"
                                      "  - split: train\n    path: train.jsonl\n---\n")
    columns = [f"--data={folder}", "--data_config=mine", "--split=rl", "--problem_column=text", "--answer_column=gold"]
    call(prime, *arguments, *columns, f"--out_dir={tmp_path}/a")
    assert same(weights(tmp_path / "a/policy"), result()[1])        # the same problems by another way
    call(prime, *arguments, *columns, "--split=train", f"--eval_data={folder}", "--eval_split=rl", f"--out_dir={tmp_path}/b")
    assert not same(weights(tmp_path / "b/policy"), result()[1])
    assert (read_jsonl(tmp_path / "b/metrics.jsonl")[0]["eval_greedy"] * 40) % 1 == pytest.approx(0)       # all 40 of split rl
    template = tmp_path / "t.jinja"
    template.write_text("1" + AutoTokenizer.from_pretrained(result()[3] / "policy").chat_template)
    assert not same(result(f"--chat_template={template}")[1], result()[1])


def test_no_setting_is_without_a_test():
    """Each name in prime.py's settings stands in this file; what only a GPU or a hung network can show is named here."""
    import configurator
    elsewhere = {"gpu_memory": "a card's memory", "compile": "test_sft.py", "dry_run": "test_plan.py"} | dict.fromkeys(
        ("tir", "tir_rounds", "tir_timeout", "sandbox"), "test_tir.py")
    text = open(__file__, encoding="utf-8").read()
    untested = [name for name in configurator.values(vars(prime)) if f"--{name}=" not in text and name not in elsewhere]
    assert not untested


def test_metrics_of_the_first_step(result):
    rows, _, _, out = result()
    row = rows[0]
    assert result("--prm_batch_rows=24")[0][0]["prm_loss"] == pytest.approx(0.693147, abs=1e-5)     # PRM = reference at the start
    assert row["mismatch"] < 1e-5 and row["prompts_kept"] == 6 and row["prompts_drawn"] >= 6
    assert row["advantage_std"] == pytest.approx(1.0, abs=1e-3)       # whitened
    assert 0.2 <= row["outcome_kept"] <= 0.8 and row["samples"] == 4 * row["prompts_drawn"]
    assert rows[1]["samples"] == row["samples"] + 4 * rows[1]["prompts_drawn"]
    assert set(row["seconds"]) >= {"rollout", "old", "ref", "prm", "policy", "sync", "step"}


def test_what_the_prm_is_measured_on(result):
    """Its accuracy is that of weights which have not seen the outcomes, also where rewards come from those that have. With the policy before
    its update as the reference, PRM and reference agree at the start, also where the policy samples at another temperature than 1."""
    first = result("--prm_batch_rows=24")[0][0]
    before = result("--prm_batch_rows=24", "--prm_update=before")[0][0]
    assert before["prm_pair_accuracy"] == first["prm_pair_accuracy"] and before["process_return"] > 10 * first["process_return"]
    self_reference = result("--prm_batch_rows=24", "--ref_type=policy", "--temperature=0.8", "--max_steps=1")[0][0]
    assert self_reference["prm_loss"] == pytest.approx(0.693147, abs=1e-5) and self_reference["process_return"] < 1e-3


def test_a_prompt_that_is_drawn_again_is_answered_anew(tmp_path, arguments):
    problem = write_jsonl(tmp_path / "one.jsonl", [dict(problem="10?", ground_truth="2")])
    call(prime, *arguments, f"--data={problem}", "--filter_low=0", "--filter_high=1", "--max_steps=1", "--samples_logged=24", f"--out_dir={tmp_path}/out")
    said = [row["response"] for row in read_jsonl(tmp_path / "out/samples.jsonl")]
    assert len({tuple(said[i:i + 4]) for i in range(0, 24, 4)}) > 3


def test_started_again_before_the_first_checkpoint(tmp_path, arguments, capsys, monkeypatch):
    """No row twice, the one before the first step neither; other settings are told; what saving takes is in the next step's seconds."""
    args = [*arguments, f"--eval_data={arguments[0].removeprefix('--data=')}", "--eval_problems=4", "--max_steps=2", f"--out_dir={tmp_path}"]
    call(prime, *args)
    assert "begun with" not in capsys.readouterr().out
    save = prime.save_checkpoint
    monkeypatch.setattr(prime, "save_checkpoint", lambda *a: time.sleep(1) or save(*a))
    call(prime, *args, "--clip=0.3", "--save_interval=1")
    assert "begun with clip=0.2, now it is 0.3" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [-1, 0, 1] and rows[2]["seconds"]["save"] >= 1 > rows[1]["seconds"]["save"]
    assert sum(v for k, v in rows[2]["seconds"].items() if k != "step") == pytest.approx(rows[2]["seconds"]["step"], abs=0.5)


def test_one_two_and_four_processes(tmp_path, arguments, result):
    """The same prompts, samples and numbers on 1, 2 and 4 processes and on two nodes (weights to 1e-5 after 2 steps of 2 + 2 updates), also
    when 5 prompts of 4 samples are shared by 4 processes, which keep different numbers of them."""
    changes = ["--prompts_per_step=5", "--learning_rate=2e-5", "--prm_learning_rate=2e-5"]
    runs = {1: result(*changes)[:3]}
    for n, start, more in ((2, partial(torchrun, 2), []), (4, partial(torchrun, 4), []),
                           ("nodes", partial(two_nodes, 2), ["--shard=2"])):    # a copy of the weights on each node
        out = tmp_path / str(n)
        start("prime.py", *arguments, *changes, *more, f"--out_dir={out}")
        runs[n] = read_jsonl(out / "metrics.jsonl"), weights(out / "policy"), weights(out / "prm")
        for key in ("outcome", "prompts_drawn", "response_tokens", "prm_loss", "prm_pair_accuracy", "process_return", "outcome_return",
                    "policy_loss", "clipfrac", "approx_kl", "ratio_max", "entropy", "grad_norm", "prm_grad_norm", "advantage_std"):
            assert [r[key] for r in runs[n][0]] == pytest.approx([r[key] for r in runs[1][0]], abs=2e-4, rel=1e-3), key
        for a, b in zip(runs[1][1:], runs[n][1:]):
            assert_close(a, b)


def test_killed_and_started_again(tmp_path, arguments, result):
    """SIGKILL at any moment, then the same command: from the last checkpoint on the run is the uninterrupted one, bit for bit."""
    args = [*arguments, "--max_steps=6", "--save_interval=1", "--eval_interval=2", f"--eval_data={arguments[0].removeprefix('--data=')}",
            "--eval_problems=4"]
    call(prime, *args, f"--out_dir={tmp_path}/whole")
    child = subprocess.Popen([sys.executable, "prime.py", *args, f"--out_dir={tmp_path}/killed"], cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    while child.poll() is None and not (tmp_path / "killed/checkpoints/step_000003").exists():
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed/policy").exists()
    call(prime, *args, f"--out_dir={tmp_path}/killed")
    for name in ("policy", "prm"):
        assert same(weights(tmp_path / "killed" / name), weights(tmp_path / "whole" / name))
    clock = ("seconds", "peak_memory_gb")
    whole, killed = ([{k: v for k, v in r.items() if k not in clock} for r in read_jsonl(tmp_path / n / "metrics.jsonl")]
                     for n in ("whole", "killed"))
    assert whole == killed
    assert read_jsonl(tmp_path / "killed/samples.jsonl") == read_jsonl(tmp_path / "whole/samples.jsonl")


def test_a_checkpoint_is_written_during_the_next_rollout(tmp_path, arguments, monkeypatch):
    """A slow disk: the next rollout has begun before the first checkpoint is written, and what it holds is the state of its step."""
    order, save, roll = [], sft.dcp.save, prime.rollout

    def slow(*args, **kwargs):
        time.sleep(1)
        save(*args, **kwargs)
        order.append("written")

    def rollout(*args, **kwargs):
        order.append("rollout")
        return roll(*args, **kwargs)
    monkeypatch.setattr(prime, "rollout", rollout)
    one = [*arguments, "--collect=once", "--filter_low=0", "--filter_high=1", "--save_interval=1"]
    call(prime, *one, "--max_steps=1", f"--out_dir={tmp_path}/plain")
    assert order == ["rollout"]
    monkeypatch.setattr(sft.dcp, "save", slow)
    call(prime, *one, "--max_steps=2", f"--out_dir={tmp_path}/slow")
    assert order[1:] == ["rollout", "rollout", "written", "written"]
    for name in ("plain", "slow"):
        dcp_to_torch_save(tmp_path / name / "checkpoints/step_000001", tmp_path / f"{name}.pt")
    plain, slowly = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("plain", "slow"))
    leaves = torch.utils._pytree.tree_leaves
    assert len(leaves(plain)) > 50 and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                                           for a, b in zip(leaves(plain), leaves(slowly), strict=True))

    def broken(*args, **kwargs):
        if order[-1] == "rollout":
            raise prime.UserError("no more")
        return rollout(*args, **kwargs)
    monkeypatch.setattr(prime, "rollout", broken)       # a mistake meanwhile: what is being written is not lost
    with pytest.raises(prime.UserError, match="no more"):
        call(prime, *one, "--max_steps=2", f"--out_dir={tmp_path}/broken")
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == ["step_000001"]


def test_sigterm_saves_and_ends_with_0(tmp_path, arguments):
    child = subprocess.Popen([sys.executable, "prime.py", *arguments, "--max_steps=500", f"--out_dir={tmp_path}"], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while child.poll() is None and not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 10:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 0, out
    assert "start again" in out and len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("script, processes", [("prime.py", 2), ("sft.py", 4)])
def test_a_process_that_hangs_ends_the_run_and_the_phase_is_named(tmp_path, arguments, guesser, guess_data, script, processes):
    """One of the processes is stopped (SIGSTOP) in the middle of the run: the others end, rank 0 says so in a line, with code 2; so it is
    with groups of two, which get the time-out of the settings, too. And one that is aborted, as by NCCL's watchdog, says where it was."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = os.environ | dict(OMP_NUM_THREADS="1", WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    own = arguments if script == "prime.py" else [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--epochs=1000", "--shard=2"]
    ranks = [subprocess.Popen([sys.executable, script, *own, "--max_steps=500", "--timeout_minutes=0.2", f"--out_dir={tmp_path}"],
                              cwd=ROOT, env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)), stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True) for rank in range(processes)]
    log = tmp_path / "metrics.jsonl"
    while ranks[0].poll() is None and not (log.exists() and log.stat().st_size > 10):
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    errors = ranks[0].communicate(timeout=120)[1]
    ranks[1].send_signal(signal.SIGABRT)
    ranks[1].send_signal(signal.SIGCONT)
    trace = ranks[1].communicate(timeout=60)[1]
    for rank in ranks[2:]:
        rank.communicate(timeout=60)
    assert ranks[0].returncode == 2 and "Traceback" not in errors, errors
    assert re.search(r"^error: step \d+, \w+: .*timeout_minutes=0.2$", errors, re.M), errors
    assert re.search(rf"{script}\", line \d+ in main", trace), trace


def test_settings_that_would_lose_something(tmp_path, arguments, guess_data):
    """A trained PRM is not thrown away by prm_update=none; prompts put back for the next step may be none of other data."""
    args = [*arguments, "--save_interval=1", f"--out_dir={tmp_path}"]
    call(prime, *args, "--max_steps=1", "--oversample=3", "--filter_low=0", "--filter_high=1")
    with pytest.raises(prime.UserError, match="step_000001 has a trained prm, which would be lost"):
        call(prime, *args, "--prm_update=none")
    few = write_jsonl(tmp_path / "few.jsonl", read_jsonl(guess_data[1])[:6])
    call(prime, *args, f"--data={few}", "--filter_low=0", "--filter_high=1")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_one_prompt_that_fits(guess_data):
    """First in one epoch, last in the next: all the others lie between."""
    problems = prime.load_problems(guess_data[1])
    for problem in problems[1:]:
        problem["messages"][0]["content"] *= 50

    class Words:
        apply_chat_template = staticmethod(lambda messages, **_: messages[0]["content"])
        bos_token_id = None

        def __call__(self, text, **_):
            return types.SimpleNamespace(input_ids=list(text))
    for seed in range(20):
        stream = prime.PromptStream(problems, Words(), 10, seed)
        assert [index for _ in range(6) for index, _ in stream.draw(1)] == [0] * 6


def test_it_learns_what_only_outcomes_tell(tmp_path, arguments):
    """A model that guesses among three numbers; the outcome says that 2 is right. Accuracy rises from a third."""
    problems = write_jsonl(tmp_path / "two.jsonl", [dict(problem=f"{k}?", ground_truth="2") for k in range(10, 50)])
    call(prime, *arguments, f"--data={problems}", "--prompts_per_step=8", "--batch_rows=16", "--prm_batch_rows=16", "--max_steps=3",
         "--learning_rate=1e-3", "--prm_learning_rate=1e-3", f"--eval_data={problems}", "--eval_interval=3", f"--out_dir={tmp_path}/out")
    rows = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert rows[0]["eval_sampled"] < 0.5 and rows[-1]["eval_sampled"] > 0.75


def test_it_ends_when_the_problems_are_solved(tmp_path, arguments, capsys):
    """Two problems, learned by heart: no group has contrast any more, and what was learned is written."""
    problems = write_jsonl(tmp_path / "two.jsonl", [dict(problem=f"{k}?", ground_truth="2") for k in (10, 11)])
    call(prime, *arguments, f"--data={problems}", "--prompts_per_step=2", "--samples_per_prompt=8", "--max_steps=300", "--max_draws=3",
         "--learning_rate=1e-3", "--prm_learning_rate=1e-3", "--save_interval=1000", f"--out_dir={tmp_path}/out")
    rows, said = read_jsonl(tmp_path / "out/metrics.jsonl"), capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == [f"step_{len(rows):06d}"]     # nothing is lost
    assert "these problems are solved" in said and len(rows) < 300 and rows[0]["outcome"] < 0.6
    assert weights(tmp_path / "out/policy") and weights(tmp_path / "out/prm")


@pytest.mark.parametrize("change, words", [
    (["--data=nowhere.jsonl"], ["nowhere.jsonl"]), (["--answer_column=gold"], ["gold"]), (["--samples_per_prompt=1"], ["samples_per_prompt"]),
    (["--filter_low=0.9", "--filter_high=0.95", "--max_draws=2"], ["passed the filter", "max_draws"]), (["--prm_update=later"], ["prm_update"]),
    (["--temperature=0"], ["temperature"]), (["--outcome_coef=0", "--process_coef=0"], ["outcome_coef"]), (["--normalize_chunks=5"], ["24 rows"]),
    (["--max_prompt_tokens=1"], ["max_prompt_tokens"]), (["--eval_samples=0"], ["eval_samples=0", "at least 1"]), (["--batch_rows=0"], ["batch_rows"]),
    (["--wandb_project=x"], ["wandb"]), (["--model=out/nowhere"], ["out/nowhere"]), (["--device=tpu"], ["tpu"]),
    (["--collect=once", "--oversample=0.5"], ["oversample=0.5"]),
])
def test_mistakes(tmp_path, arguments, change, words):
    with pytest.raises(prime.UserError) as e:
        call(prime, *arguments, *change, f"--out_dir={tmp_path}")
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_maths_and_code_in_one_run(tmp_path, arguments, guess_data):
    """A code row's outcome is that of its tests, and each ability has its own suffix and its own metric."""
    tests = json.dumps(dict(fn_name="f", inputs=[[1]], outputs=[1]))
    rows = read_jsonl(guess_data[1]) + [dict(problem=f"{k}?", ability="code", ground_truth=tests, problem_id=f"c{k}") for k in range(10, 50)]
    call(prime, *arguments, f"--data={write_jsonl(tmp_path / 'mixed.jsonl', rows)}", "--filter_low=0", "--filter_high=1", "--max_steps=1",
         "--prompts_per_step=20", "--code_suffix=+", f"--out_dir={tmp_path}/out", "--samples_logged=80")
    row, = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert row["outcome_code"] == 0 < row["outcome_math"]       # this model writes no program
    found = prime.load_problems(tmp_path / "mixed.jsonl", user_suffix="", code_suffix="+")
    assert [p["messages"][-1]["content"] for p in (found[0], found[-1])] == ["10?", "49?+"]


def test_malformed_rows(tmp_path, arguments, guess_data, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(guess_data[1].read_text() + '{"problem": "cut')
    with pytest.raises(prime.UserError, match="line 41"):
        call(prime, *arguments, f"--data={bad}", f"--out_dir={tmp_path}/out")
    call(prime, *arguments, f"--data={bad}", "--max_bad_share=0.1", "--max_steps=1", f"--out_dir={tmp_path}/out")
    assert "1 of 41 rows skipped" in capsys.readouterr().out


def test_a_mistake_ends_with_2_and_one_line(tmp_path, arguments):
    done = run("prime.py", *arguments, "--ref_type=old", f"--out_dir={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ref_type='old'") and "Traceback" not in done.stderr
