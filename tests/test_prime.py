"""prime.py as a program: every setting, numbers of processes, resume, what it learns, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import (
    ROOT,
    SFT,
    call,
    free_port,
    read_jsonl,
    run,
    torchrun,
    two_nodes,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import lib.report
import model
import prime
from configurator import UserError
from lib.problems import load_problems
from lib.run import setup_distributed

# Metrics that must be the same on any number of processes.
NUMBERS = [
    "outcome",
    "prompts_drawn",
    "response_tokens",
    "prm_loss",
    "prm_pair_accuracy",
    "process_return",
    "outcome_return",
    "policy_loss",
    "clipfrac",
    "approx_kl",
    "ratio_max",
    "entropy",
    "grad_norm",
    "prm_grad_norm",
    "advantage_std",
]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b):
    """Equal to 1e-5, but for the few weights whose gradient is so small that Adam follows its
    rounding in the first steps.
    """
    far = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert (far > 1e-5).double().mean() < 1e-4
    assert far.max() < 1e-4


@pytest.fixture(scope="module")
def arguments(guesser, guess_data):
    """A run of two small steps. No random number of seed 3 is so near to a token's border that
    rounding decides between two tokens.
    """
    return [
        f"--data={guess_data[1]}",
        f"--model={guesser}",
        "--engine=hf",
        "--device=cpu",
        "--prompts_per_step=6",
        "--samples_per_prompt=4",
        "--max_prompt_tokens=40",
        "--max_tokens=12",
        "--batch_rows=12",
        "--prm_batch_rows=12",
        "--max_steps=2",
        "--beta=1",
        "--learning_rate=1e-4",
        "--prm_learning_rate=1e-4",
        "--save_interval=0",
        "--grade_workers=1",
        "--checkpointing=False",
        "--seed=3",
    ]


def data_of(arguments):
    """The file of problems in `arguments`."""
    return arguments[0].removeprefix("--data=")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing is half the time of a run this small; tests/test_report.py draws."""
    monkeypatch.setattr(lib.report, "plot_curves", lambda *paths: None)


@pytest.fixture(scope="module")
def result(arguments, tmp_path_factory):
    """result(*changes): what a short run gave; one run for each set of changes."""
    seen = {}

    def go(*changes):
        if changes not in seen:
            out = tmp_path_factory.mktemp("run")
            call(prime, *arguments, *changes, f"--out_dir={out}")
            seen[changes] = types.SimpleNamespace(
                rows=read_jsonl(out / "metrics.jsonl"),
                policy=weights(out / "policy"),
                prm=weights(out / "prm"),
                out=out,
            )
        return seen[changes]

    return go


# ----------------------------------------------------------------------------------------------
# settings


def test_metrics_of_the_first_step(result):
    first, second = result().rows
    assert first["mismatch"] < 1e-5
    assert first["prompts_kept"] == 6
    assert first["prompts_drawn"] >= 6
    assert first["advantage_std"] == pytest.approx(1.0, abs=1e-3)  # whitened
    assert 0.2 <= first["outcome_kept"] <= 0.8
    assert first["samples"] == 4 * first["prompts_drawn"]
    assert second["samples"] == first["samples"] + 4 * second["prompts_drawn"]
    assert set(first["seconds"]) >= {"rollout", "old", "ref", "prm", "policy", "sync", "step"}


@pytest.mark.slow
def test_the_same_command_gives_the_same_run(arguments, result, tmp_path):
    call(prime, *arguments, f"--out_dir={tmp_path}")
    assert equal(weights(tmp_path / "policy"), result().policy)
    assert equal(weights(tmp_path / "prm"), result().prm)


# What a setting must change: P the policy's weights, R the PRM's.
CHANGES = [
    ("--seed=1", "PR"),
    ("--samples_per_prompt=3", "PR"),
    ("--temperature=0.8", "PR"),
    ("--max_tokens=5", "PR"),
    ("--filter_low=0.5", "PR"),
    ("--filter_high=0.3", "PR"),
    ("--collect=once", "PR"),
    ("--oversample=3", "PR"),
    ("--prm_update=before", "P"),
    ("--prm_update=none", "PR"),
    ("--granularity=whole", "P"),
    ("--normalize=None", "P"),
    ("--normalize_chunks=3", "P"),
    ("--last_token_reward=False", "P"),
    ("--beta=0.1", "PR"),
    ("--prm_learning_rate=1e-2", "PR"),
    ("--prm_grad_clip=1e-4", "R"),
    ("--prm_batch_rows=24", "R"),
    ("--prm_weight_decay=9", "R"),
    ("--estimator=grpo", "P"),
    ("--estimator=dr_grpo", "P"),
    ("--estimator=reinforce", "P"),
    ("--outcome_coef=0", "P"),
    ("--process_coef=0", "P"),
    ("--outcome_gamma=0.5", "P"),
    ("--process_gamma=0.5", "P"),
    ("--whiten=False", "P"),
    ("--learning_rate=1e-3", "P"),
    ("--warmup_steps=3", "PR"),
    ("--weight_decay=9", "P"),
    ("--beta1=0.5", "P"),
    ("--beta2=0.5", "P"),
    ("--grad_clip=1e-3", "P"),
    ("--batch_rows=24", "P"),
    ("--ppo_epochs=2", "P"),
    ("--clip=1e-4", "P"),
    ("--entropy_coef=1", "P"),
    ("--importance_cap=0.5", "P"),
    ("--ref_type=policy", "PR"),
    ("--max_steps=1", "PR"),
    ("--prompts_per_step=8", "PR"),
    ("--user_suffix=1", "PR"),
    ("--system_prompt=brief", "PR"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change, what", CHANGES)
def test_every_setting_does_something(result, change, what):
    base = result()
    other = result(change)
    if "P" in what:
        assert not equal(base.policy, other.policy), f"{change} does not change the policy"
    if "R" in what:
        assert not equal(base.prm, other.prm), f"{change} does not change the PRM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "--checkpointing=True",
        "--micro_batch_tokens=30",
        "--attention=padded",
        "--grade_workers=2",
        "--grade_timeout=9",
        "--shard=1",
        "--offload=True",
        "--tir=True",  # this model never calls its tool
    ],
)
def test_what_must_not_change_the_result(result, change):
    assert_close(result().policy, result(change).policy)
    assert_close(result().prm, result(change).prm)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--importance_cap=1.01", "--entropy_coef=0.1")])
def test_a_single_update_needs_no_pass_before_it(arguments, result, monkeypatch, tmp_path, more):
    """Its own passes give the log-probabilities of the policy before it."""
    once = result("--batch_rows=24", *more)
    monkeypatch.setattr(prime, "updates_once", lambda: False)
    call(prime, *arguments, "--batch_rows=24", *more, f"--out_dir={tmp_path}")
    assert_close(once.policy, weights(tmp_path / "policy"))
    assert_close(once.prm, weights(tmp_path / "prm"))
    for row, separate in zip(once.rows, read_jsonl(tmp_path / "metrics.jsonl")):
        assert "old" not in row["seconds"]
        assert "old" in separate["seconds"]
        for name in [*NUMBERS, "mismatch", "outcome_kept"]:
            assert row[name] == pytest.approx(separate[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_models_to_start_from(result):
    """A trained PRM as prm_model or ref_model: another start, another reference."""
    prm = result().out / "prm"
    assert not equal(result(f"--prm_model={prm}").prm, result().prm)
    row = result(f"--ref_model={prm}").rows[0]
    assert row["prm_loss"] != result().rows[0]["prm_loss"]


@pytest.mark.slow
def test_evaluation_samples_checkpoints_and_config(result, arguments):
    run = result(
        f"--eval_data={data_of(arguments)}",
        "--eval_problems=7",
        "--eval_samples=2",
        "--eval_interval=1",
        "--samples_logged=3",
        "--save_interval=1",
        "--keep_checkpoints=1",
        "--filter_truncated=True",
        "--max_tokens=8",
    )
    assert [row["step"] for row in run.rows] == [-1, 0, 1]
    for row in run.rows:
        # Seven problems, one greedy answer and two samples of each.
        assert 0 <= row["eval_greedy"] <= 1
        assert (row["eval_greedy"] * 7) % 1 == pytest.approx(0)
        assert (row["eval_sampled"] * 14) % 1 == pytest.approx(0)

    samples = read_jsonl(run.out / "samples.jsonl")
    # All four answers to a prompt, of two steps.
    assert len(samples) == 8
    names = ["process_rewards", "prm_logprobs", "ref_logprobs", "returns", "advantages"]
    for row in samples:
        for name in ["token_texts", *names]:
            assert len(row[name]) == len(row["tokens"]), name
        assert row["finish_reason"] == "stop"

    assert (run.out / "tokens.html").exists()

    assert [path.name for path in (run.out / "checkpoints").iterdir()] == ["step_000002"]
    config = json.loads((run.out / "config.json").read_text())
    assert config["settings"]["max_tokens"] == 8
    assert torch.__version__.startswith(config["torch"])


@pytest.mark.slow
def test_bfloat16(arguments, tmp_path):
    call(prime, *arguments, "--dtype=bfloat16", "--max_steps=1", f"--out_dir={tmp_path}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").dtype == torch.bfloat16


def test_a_mismatch_of_engine_and_trainer_ends_the_run(arguments, tmp_path):
    with pytest.raises(UserError, match="max_mismatch"):
        call(prime, *arguments, "--max_mismatch=1e-12", f"--out_dir={tmp_path}")


@pytest.mark.slow
def test_columns_splits_and_configurations_of_a_data_set(result, arguments, guess_data, tmp_path):
    rows = []
    for row in read_jsonl(guess_data[1]):
        renamed = dict(text=row["problem"], gold=row["ground_truth"], problem_id=row["problem_id"])
        rows.append(renamed)
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[:20])
    write_jsonl(folder / "rl.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: mine\n  data_files:\n"
        "  - split: rl\n    path: rl.jsonl\n"
        "  - split: train\n    path: train.jsonl\n---\n"
    )
    columns = [
        f"--data={folder}",
        "--data_config=mine",
        "--problem_column=text",
        "--answer_column=gold",
    ]

    call(prime, *arguments, *columns, "--split=rl", f"--out_dir={tmp_path}/a")
    # The same problems by another way.
    assert equal(weights(tmp_path / "a/policy"), result().policy)

    held_out = [f"--eval_data={folder}", "--eval_split=rl"]
    call(prime, *arguments, *columns, "--split=train", *held_out, f"--out_dir={tmp_path}/b")
    assert not equal(weights(tmp_path / "b/policy"), result().policy)
    accuracy = read_jsonl(tmp_path / "b/metrics.jsonl")[0]["eval_greedy"]
    assert (accuracy * 40) % 1 == pytest.approx(0)  # all 40 of the split rl


@pytest.mark.slow
def test_chat_template(result, tmp_path):
    own = AutoTokenizer.from_pretrained(result().out / "policy").chat_template
    template = tmp_path / "t.jinja"
    template.write_text("1" + own)
    assert not equal(result(f"--chat_template={template}").policy, result().policy)


# ----------------------------------------------------------------------------------------------
# the seams for forks


@pytest.mark.slow
def test_own_reward_and_own_data(arguments, tmp_path):
    """A .csv of columns that only the reward knows; it pays for an even digit."""
    lines = ["question,ability,wanted"]
    lines += [f"{k}?,parity,even" for k in range(10, 50)]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    (tmp_path / "my_reward.py").write_text(
        "def reward(response, problem):\n"
        "    assert problem['ability'] == 'parity'\n"
        "    even = '{2}' in response\n"
        "    return float(even == (problem['wanted'] == 'even'))\n"
    )
    out = tmp_path / "out"
    call(
        prime,
        *arguments,
        f"--data={tmp_path}/mine.csv",
        f"--reward={tmp_path}/my_reward.py",
        "--samples_logged=24",
        f"--out_dir={out}",
    )
    assert 0 < read_jsonl(out / "metrics.jsonl")[0]["outcome"] < 1
    for row in read_jsonl(out / "samples.jsonl"):
        assert row["outcome"] == float("{2}" in row["response"])


def test_a_reward_that_always_fails_is_blamed_for_it(arguments, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def reward(response, problem):\n    return missing\n")
    command = [*arguments, f"--reward={path}", "--max_draws=1", f"--out_dir={tmp_path}/out"]
    with pytest.raises(UserError, match=r"24 answers could not be graded"):
        call(prime, *command)


@pytest.mark.slow
def test_a_metric_is_added_at_one_place(arguments, tmp_path, monkeypatch, capsys):
    """A number that a loss function returns reaches metrics.jsonl and the status line."""
    plain = prime.ppo_loss

    def with_one_more(new_logprobs, old_logprobs, advantages, mask, clip):
        loss, stats = plain(new_logprobs, old_logprobs, advantages, mask, clip)
        return loss, dict(stats, rows_seen=torch.ones(()))

    monkeypatch.setattr(prime, "ppo_loss", with_one_more)
    call(prime, *arguments, "--max_steps=1", f"--out_dir={tmp_path}")
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["rows_seen"] == pytest.approx(1)
    assert "rows_seen 1 " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# what the algorithm does


@pytest.mark.slow
def test_what_the_prm_is_measured_on(result):
    """Its accuracy is that of weights which have not seen the outcomes, also where the rewards
    come from weights that have.
    """
    first = result("--prm_batch_rows=24").rows[0]
    before = result("--prm_batch_rows=24", "--prm_update=before").rows[0]
    # In one step of all rows every row is scored before the update: PRM = reference.
    assert first["prm_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert before["prm_pair_accuracy"] == first["prm_pair_accuracy"]
    assert before["process_return"] > 10 * first["process_return"]


@pytest.mark.slow
def test_the_policy_as_reference(result):
    """PRM and reference agree at the start, also where the policy samples at temperature 0.8."""
    changes = ["--prm_batch_rows=24", "--ref_type=policy", "--temperature=0.8", "--max_steps=1"]
    row = result(*changes).rows[0]
    assert row["prm_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert row["process_return"] < 1e-3


@pytest.mark.slow
def test_a_prompt_that_is_drawn_again_gets_new_answers(tmp_path, arguments):
    problem = write_jsonl(tmp_path / "one.jsonl", [dict(problem="10?", ground_truth="2")])
    call(
        prime,
        *arguments,
        f"--data={problem}",
        "--filter_low=0",
        "--filter_high=1",
        "--max_steps=1",
        "--samples_logged=24",
        f"--out_dir={tmp_path}/out",
    )
    said = [row["response"] for row in read_jsonl(tmp_path / "out/samples.jsonl")]
    groups = {tuple(said[i : i + 4]) for i in range(0, 24, 4)}
    assert len(groups) > 3


def test_one_prompt_that_fits(guess_data):
    """It is first in one epoch and last in the next: all the others lie between."""
    problems = load_problems(guess_data[1])
    for problem in problems[1:]:
        problem.messages[0]["content"] *= 50

    class Words:
        """A tokenizer whose tokens are characters."""

        bos_token_id = None

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, text, **_):
            return types.SimpleNamespace(input_ids=list(text))

    for seed in range(20):
        stream = prime.PromptStream(problems, Words(), 10, seed)
        drawn = []
        for _ in range(6):
            drawn += [index for index, _ in stream.draw(1)]
        assert drawn == [0] * 6


@pytest.mark.slow
def test_it_learns_what_only_outcomes_tell(tmp_path, arguments):
    """A model that guesses among three numbers; the outcome says that 2 is right."""
    rows = [dict(problem=f"{k}?", ground_truth="2") for k in range(10, 50)]
    problems = write_jsonl(tmp_path / "two.jsonl", rows)
    call(
        prime,
        *arguments,
        f"--data={problems}",
        "--prompts_per_step=8",
        "--batch_rows=16",
        "--prm_batch_rows=16",
        "--max_steps=3",
        "--learning_rate=1e-3",
        "--prm_learning_rate=1e-3",
        f"--eval_data={problems}",
        "--eval_interval=3",
        f"--out_dir={tmp_path}/out",
    )
    rows = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert rows[0]["eval_sampled"] < 0.5
    assert rows[-1]["eval_sampled"] > 0.75


@pytest.mark.slow
def test_it_ends_when_the_problems_are_solved(tmp_path, arguments, capsys):
    """Two problems, learned by heart: no group has contrast any more. Nothing is lost."""
    rows = [dict(problem=f"{k}?", ground_truth="2") for k in (10, 11)]
    problems = write_jsonl(tmp_path / "two.jsonl", rows)
    call(
        prime,
        *arguments,
        f"--data={problems}",
        "--prompts_per_step=2",
        "--samples_per_prompt=8",
        "--max_steps=300",
        "--max_draws=3",
        "--learning_rate=1e-3",
        "--prm_learning_rate=1e-3",
        "--save_interval=1000",
        f"--out_dir={tmp_path}/out",
    )
    rows = read_jsonl(tmp_path / "out/metrics.jsonl")
    checkpoints = [path.name for path in (tmp_path / "out/checkpoints").iterdir()]
    assert checkpoints == [f"step_{len(rows):06d}"]
    assert "these problems are solved" in capsys.readouterr().out
    assert len(rows) < 300
    assert rows[0]["outcome"] < 0.6
    assert weights(tmp_path / "out/policy")
    assert weights(tmp_path / "out/prm")


@pytest.mark.slow
def test_maths_and_code_in_one_run(tmp_path, arguments, guess_data):
    """A code row's outcome is that of its tests; each ability has its suffix and its metric."""
    tests = json.dumps(dict(fn_name="f", inputs=[[1]], outputs=[1]))
    rows = read_jsonl(guess_data[1])
    for k in range(10, 50):
        row = dict(problem=f"{k}?", ability="code", ground_truth=tests, problem_id=f"c{k}")
        rows.append(row)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    call(
        prime,
        *arguments,
        f"--data={mixed}",
        "--filter_low=0",
        "--filter_high=1",
        "--max_steps=1",
        "--prompts_per_step=20",
        "--code_suffix=+",
        f"--out_dir={tmp_path}/out",
    )
    (row,) = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert row["outcome_code"] == 0 < row["outcome_math"]  # this model writes no program

    found = load_problems(mixed, user_suffix="", code_suffix="+")
    assert found[0].messages[-1]["content"] == "10?"
    assert found[-1].messages[-1]["content"] == "49?+"


# ----------------------------------------------------------------------------------------------
# offload


@pytest.mark.slow
def test_what_is_offloaded_is_back_when_it_is_needed(arguments, tmp_path, monkeypatch):
    """On one device moving changes nothing. So: nothing runs or steps while it is away."""
    away = set()
    watched = set()
    ran_while_away = []
    move = prime.move
    step = prime.optimizer_step

    def watched_move(device, *parts):
        for part in parts:
            if isinstance(part, torch.nn.Module) and part not in watched:
                watched.add(part)
                part.register_forward_pre_hook(lambda net, _: ran_while_away.append(net in away))
            if device == "cpu":
                away.add(part)
            else:
                away.discard(part)
        move(device, *parts)

    def watched_step(net, optimizer, *more):
        ran_while_away.append(net in away or optimizer in away)
        return step(net, optimizer, *more)

    monkeypatch.setattr(prime, "move", watched_move)
    monkeypatch.setattr(model, "move", watched_move)
    monkeypatch.setattr(prime, "optimizer_step", watched_step)
    call(prime, *arguments, "--offload=True", "--max_steps=1", f"--out_dir={tmp_path}")
    assert watched
    assert ran_while_away
    assert not any(ran_while_away)


def test_moving_takes_weights_and_the_state_of_adam(guesser):
    """To "meta", for want of a second real device. The optimizer keeps the model's parameters."""
    device = torch.device("cpu")
    setup_distributed(device)
    try:
        net = model.load_model(str(guesser), device, torch.float32)
        optimizer = model.make_optimizer(net, 1e-3)
        batch = model.pack([([5, 6, 7], [1, 1, 1])], device)
        model.token_logprobs(net, batch).sum().backward()
        model.optimizer_step(net, optimizer, 1e-3, 0)
        model.move("meta", net, None, optimizer)

        parameters = list(net.parameters())
        averages = []
        for state in optimizer.state.values():
            averages += [state["exp_avg"], state["exp_avg_sq"]]
        assert len(averages) == 2 * len(parameters)
        assert all(tensor.device.type == "meta" for tensor in parameters + averages)

        own = {id(p) for p in parameters}
        in_groups = set()
        for group in optimizer.param_groups:
            in_groups |= {id(p) for p in group["params"]}
        assert in_groups == own
        assert {id(p) for p in optimizer.state} == own
    finally:
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------
# processes


@pytest.fixture(scope="module")
def few_prompts(arguments):
    """Five prompts of four samples, which four processes cannot share evenly."""
    changes = ["--prompts_per_step=5", "--learning_rate=2e-5", "--prm_learning_rate=2e-5"]
    return [*arguments, *changes], changes


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, batch_rows", [(2, 12), (2, 20), (4, 12), ("two nodes of 2", 12)]
)
def test_any_number_of_processes_gives_the_same_numbers(
    tmp_path, few_prompts, result, processes, batch_rows
):
    """The same prompts, samples and metrics; weights to 1e-5 after two steps of 2 + 2 updates, or
    of a single one of the policy's (20 rows).
    """
    command, changes = few_prompts
    command = [*command, f"--batch_rows={batch_rows}"]
    changes = [*changes, f"--batch_rows={batch_rows}"]
    out = tmp_path / "out"
    if processes == "two nodes of 2":
        # A copy of the weights on each node.
        two_nodes(2, "prime.py", *command, "--shard=2", f"--out_dir={out}")
    else:
        torchrun(processes, "prime.py", *command, f"--out_dir={out}")

    one = result(*changes)
    rows = read_jsonl(out / "metrics.jsonl")
    for name in NUMBERS:
        expected = pytest.approx([row[name] for row in one.rows], abs=2e-4, rel=1e-3)
        assert [row[name] for row in rows] == expected, name
    assert_close(one.policy, weights(out / "policy"))
    assert_close(one.prm, weights(out / "prm"))


def start_ranks(script, command, processes):
    """The script on so many processes, without torchrun, which would end them all."""
    environment = os.environ | dict(
        OMP_NUM_THREADS="1",
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    ranks = []
    for rank in range(processes):
        process = subprocess.Popen(
            [sys.executable, script, *command],
            cwd=ROOT,
            env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
    return ranks


def wait_for_a_row(process, path):
    """Until a process has written a line of metrics, or ended."""
    while process.poll() is None and not (path.exists() and path.stat().st_size > 10):
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("script, processes", [("prime.py", 2), ("sft.py", 4)])
def test_a_process_that_hangs_ends_the_run_and_the_phase_is_named(
    tmp_path, arguments, guesser, guess_data, script, processes
):
    """One of the processes is stopped (SIGSTOP): the others end, rank 0 says where in one line,
    with exit code 2; so it is with groups of two, which get the time-out of the settings, too.
    One that is aborted, as by NCCL's watchdog, says where it was.
    """
    command = list(arguments)
    if script == "sft.py":
        files = [f"--data={guess_data[0]}", f"--model={guesser}"]
        command = [*files, *SFT, "--epochs=1000", "--shard=2"]
    command += ["--max_steps=500", "--timeout_minutes=0.2", f"--out_dir={tmp_path}"]
    ranks = start_ranks(script, command, processes)
    wait_for_a_row(ranks[0], tmp_path / "metrics.jsonl")

    ranks[1].send_signal(signal.SIGSTOP)
    errors = ranks[0].communicate(timeout=120)[1]
    ranks[1].send_signal(signal.SIGABRT)
    ranks[1].send_signal(signal.SIGCONT)
    trace = ranks[1].communicate(timeout=60)[1]
    for rank in ranks[2:]:
        rank.communicate(timeout=60)

    assert ranks[0].returncode == 2, errors
    assert "Traceback" not in errors
    line = r"^error: step \d+, \w+: .*timeout_minutes=0.2$"
    assert re.search(line, errors, re.MULTILINE), errors
    assert re.search(rf'{script}", line \d+ in main', trace), trace


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_the_phase_is_named(tmp_path, arguments):
    ranks = start_ranks("prime.py", [*arguments, "--max_steps=500", f"--out_dir={tmp_path}"], 2)
    wait_for_a_row(ranks[0], tmp_path / "metrics.jsonl")
    ranks[1].kill()
    errors = ranks[0].communicate(timeout=60)[1]
    ranks[1].communicate(timeout=60)
    assert ranks[0].returncode == 2, errors
    assert "Traceback" not in errors
    line = r"^error: step \d+, \w+: rank 0 has lost another process, .*$"
    assert re.search(line, errors, re.MULTILINE), errors


# ----------------------------------------------------------------------------------------------
# killed, stopped, started again


@pytest.mark.slow
def test_started_again_before_the_first_checkpoint(tmp_path, arguments, capsys, monkeypatch):
    """No row appears twice, nor does the one before the first step; changed settings are told.
    The time that saving takes belongs to the next step.
    """
    held_out = [f"--eval_data={data_of(arguments)}", "--eval_problems=4"]
    command = [*arguments, *held_out, "--max_steps=2", f"--out_dir={tmp_path}"]
    call(prime, *command)
    assert "started with" not in capsys.readouterr().out

    save = prime.save_checkpoint

    def slow_save(*words):
        time.sleep(1)
        return save(*words)

    monkeypatch.setattr(prime, "save_checkpoint", slow_save)
    call(prime, *command, "--clip=0.3", "--save_interval=1")
    assert "started with clip=0.2, now it is 0.3" in capsys.readouterr().out

    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [-1, 0, 1]
    seconds = rows[2]["seconds"]
    assert seconds["save"] >= 1
    assert "save" not in rows[1]["seconds"]
    phases = [spent for phase, spent in seconds.items() if phase != "step"]
    assert sum(phases) == pytest.approx(seconds["step"], abs=0.5)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, arguments):
    """SIGKILL at any moment, then the same command: bit for bit the run without interruption."""
    held_out = [f"--eval_data={data_of(arguments)}", "--eval_problems=4", "--eval_interval=2"]
    command = [*arguments, *held_out, "--max_steps=6", "--save_interval=1"]
    call(prime, *command, f"--out_dir={tmp_path}/whole")
    child = subprocess.Popen(
        [sys.executable, "prime.py", *command, f"--out_dir={tmp_path}/killed"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not (tmp_path / "killed/checkpoints/step_000003").exists():
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed/policy").exists()

    call(prime, *command, f"--out_dir={tmp_path}/killed")
    for name in ("policy", "prm"):
        assert equal(weights(tmp_path / "killed" / name), weights(tmp_path / "whole" / name))
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "whole")
    killed = read_jsonl(tmp_path / "killed/samples.jsonl")
    assert killed == read_jsonl(tmp_path / "whole/samples.jsonl")


def without_clock(out):
    """A run's metrics but for times and memory."""
    rows = read_jsonl(out / "metrics.jsonl")
    for row in rows:
        row.pop("seconds", None)
        row.pop("peak_memory_gb", None)
    return rows


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_0(tmp_path, arguments):
    child = subprocess.Popen(
        [sys.executable, "prime.py", *arguments, "--max_steps=500", f"--out_dir={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_a_row(child, tmp_path / "metrics.jsonl")
    child.send_signal(signal.SIGTERM)
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 0, out
    assert "start again" in out
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_a_trained_prm_is_not_thrown_away(tmp_path, arguments):
    command = [*arguments, "--save_interval=1", "--max_steps=1", f"--out_dir={tmp_path}"]
    call(prime, *command)
    with pytest.raises(UserError, match="step_000001 has a trained prm, which would be lost"):
        call(prime, *command, "--prm_update=none")


@pytest.mark.slow
def test_outcomes_alone_need_no_prm(arguments, result, tmp_path):
    """The policy is that of a run whose PRM has no say."""
    call(prime, *arguments, "--process_coef=0", "--prm_update=none", f"--out_dir={tmp_path}")
    assert equal(weights(tmp_path / "policy"), result("--process_coef=0").policy)
    assert not (tmp_path / "prm").exists()

    for row in read_jsonl(tmp_path / "metrics.jsonl"):
        assert not {"prm_loss", "prm_pair_accuracy", "process_return"} & set(row)
        assert not {"ref", "prm"} & set(row["seconds"])
    for row in read_jsonl(tmp_path / "samples.jsonl"):
        assert not {"process_rewards", "prm_logprobs", "ref_logprobs"} & set(row)
        assert len(row["advantages"]) == len(row["returns"]) == len(row["tokens"])


@pytest.mark.slow
def test_prompts_put_back_may_be_none_of_other_data(tmp_path, arguments, guess_data):
    everything = ["--filter_low=0", "--filter_high=1"]
    command = [*arguments, *everything, "--save_interval=1", f"--out_dir={tmp_path}"]
    call(prime, *command, "--max_steps=1", "--oversample=3")
    few = write_jsonl(tmp_path / "few.jsonl", read_jsonl(guess_data[1])[:6])
    call(prime, *command, f"--data={few}")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


# ----------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    "change, words",
    [
        (["--data=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--answer_column=gold"], ["gold"]),
        (["--samples_per_prompt=1"], ["samples_per_prompt"]),
        (["--filter_low=0.9", "--filter_high=0.95", "--max_draws=2"], ["passed the filter"]),
        (["--prm_update=later"], ["prm_update"]),
        (["--estimator=gae"], ["estimator='gae'", "'rloo', 'grpo'"]),
        (["--temperature=0"], ["temperature"]),
        (["--outcome_coef=0", "--process_coef=0"], ["outcome_coef"]),
        (["--normalize_chunks=5"], ["24 rows"]),
        (["--max_prompt_tokens=1"], ["max_prompt_tokens"]),
        (["--eval_samples=0"], ["eval_samples=0", "at least 1"]),
        (["--batch_rows=0"], ["batch_rows"]),
        (["--wandb_project=x"], ["wandb"]),
        (["--model=out/nowhere"], ["out/nowhere"]),
        (["--device=tpu"], ["tpu"]),
        (["--collect=once", "--oversample=0.5"], ["oversample=0.5"]),
        (["--reward=nowhere.py"], ["nowhere.py"]),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, arguments, change, words):
    with pytest.raises(UserError) as error:
        call(prime, *arguments, *change, f"--out_dir={tmp_path}")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.slow
def test_malformed_rows(tmp_path, arguments, guess_data, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(guess_data[1].read_text() + '{"problem": "cut')
    command = [*arguments, f"--data={bad}", f"--out_dir={tmp_path}/out"]
    with pytest.raises(UserError, match="line 41"):
        call(prime, *command)
    call(prime, *command, "--max_bad_share=0.1", "--max_steps=1")
    assert "1 of 41 rows skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_ends_with_2_and_one_line(tmp_path, arguments):
    done = run("prime.py", *arguments, "--ref_type=old", f"--out_dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ref_type='old'")
    assert "Traceback" not in done.stderr


def test_a_token_that_the_prm_lacks():
    """Models of one family have the same tokenizer, and matrices of different sizes."""

    def net(size):
        return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=size))

    batch = types.SimpleNamespace(tokens=[[1, 2], [283]])
    models = types.SimpleNamespace(prm=net(284), ref=None)
    prime.check_tokens(batch, [models.prm, models.ref])
    for models.prm, models.ref in [(net(283), None), (net(284), net(283))]:
        with pytest.raises(UserError, match="wrote token 283, and its PRM or reference knows 283"):
            prime.check_tokens(batch, [models.prm, models.ref])
