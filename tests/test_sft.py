"""sft.py: the schedule, the loss on any number of processes, resume, signals, mistakes."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    SFT,
    call,
    children,
    message,
    read_jsonl,
    run,
    torchrun,
    two_nodes,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from configurator import UserError
from lib.problems import tokenize_messages


@pytest.fixture
def files(guesser, guess_data):
    """Settings: data and model."""
    return [f"--data={guess_data[0]}", f"--model={guesser}", *SFT]


def weights_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal_weights(folder, other):
    got = weights_in(folder)
    for name, tensor in weights_in(other).items():
        assert torch.equal(got[name], tensor), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------
# the algorithm


def test_schedules():
    rates = [sft.learning_rate_at(step, 10, 1.0, "linear", 2) for step in (0, 1, 2, 6)]
    assert rates == [0, 0.5, 1.0, 0.5]
    assert sft.learning_rate_at(6, 10, 1.0, "cosine", 2) == pytest.approx(0.5)
    assert sft.learning_rate_at(9, 10, 3.0, "constant", 0) == 3.0


def seeded_order(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def loss_by_transformers(folder, rows):
    """The mean loss per scored token, row by row, from all logits."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for tokens, scored in rows:
        logp = plain(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        for t in range(1, len(tokens)):
            if scored[t]:
                losses.append(-logp[t - 1, tokens[t]].item())
    return sum(losses) / len(losses)


def test_loss_is_the_token_mean(tmp_path, files, guesser, guess_data):
    """The first step's loss and the validation loss, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    rows = [tokenize_messages(tokenizer, row["messages"]) for row in read_jsonl(guess_data[0])]
    shuffled = [rows[i] for i in seeded_order(len(rows), seed=42)]
    training = shuffled[:-5]
    first_batch = [training[i] for i in seeded_order(len(training), seed=43)[:6]]

    # A learning rate of 0: validation after the step is that of the model as it was.
    settings = ["--val_rows=5", "--batch_size=6", "--max_steps=1", "--learning_rate=0"]
    call(sft, *files, *settings, f"--out_dir={tmp_path}")
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(loss_by_transformers(guesser, first_batch), abs=1e-5)
    assert row["val_loss"] == pytest.approx(loss_by_transformers(guesser, shuffled[-5:]), abs=1e-5)
    assert_equal_weights(tmp_path / "model", guesser)


def assert_same_run(folder, other):
    """Losses, gradient norms and weights of two runs are those of each other up to 1e-5."""
    rows = read_jsonl(folder / "metrics.jsonl")
    others = read_jsonl(other / "metrics.jsonl")
    assert len(rows) == len(others)
    for row, expected in zip(rows, others):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in expected:
                assert row[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5)
    got = weights_in(folder / "model")
    for name, tensor in weights_in(other / "model").items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=0)


FIVE_STEPS = ["--batch_size=6", "--max_steps=5", "--learning_rate=1e-3", "--val_rows=3"]


@pytest.fixture(scope="module")
def five_steps(guesser, guess_data, tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("five_steps")
    files = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT]
    call(sft, *files, *FIVE_STEPS, f"--out_dir={out}")
    return out


def test_loss_is_the_same_in_any_packing(tmp_path, files, five_steps):
    call(sft, *files, *FIVE_STEPS, "--micro_batch_tokens=20", f"--out_dir={tmp_path}")
    assert_same_run(tmp_path, five_steps)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_loss_is_the_same_on_any_number_of_processes(tmp_path, files, five_steps, processes):
    """With four, three validation rows leave one without a row."""
    torchrun(processes, "sft.py", *files, *FIVE_STEPS, f"--out_dir={tmp_path}")
    assert_same_run(tmp_path, five_steps)


@pytest.mark.slow
def test_loss_is_the_same_on_two_nodes(tmp_path, files, five_steps):
    """Each node has a copy of the weights."""
    two_nodes(2, "sft.py", *files, *FIVE_STEPS, "--shard=2", f"--out_dir={tmp_path}")
    assert_same_run(tmp_path, five_steps)


# --------------------------------------------------------------------------------------------------
# resume

EIGHT_STEPS = ["--batch_size=30", "--epochs=2", "--save_interval=2"]


@pytest.fixture(scope="module")
def eight_steps(guesser, guess_data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("eight_steps")
    files = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT]
    call(sft, *files, *EIGHT_STEPS, f"--out_dir={out}")
    return out


def test_resume_equals_the_uninterrupted_run(tmp_path, files, eight_steps):
    """Started again after 6 steps: equal weights bit for bit, no metrics row twice."""
    out = tmp_path / "again"
    shutil.copytree(eight_steps, out)
    shutil.rmtree(out / "model")
    assert names_in(out / "checkpoints") == ["step_000006", "step_000008"]

    # The newest one is damaged: the one before it is taken.
    (out / "checkpoints/step_000008/.metadata").unlink()
    (out / "checkpoints/step_000009.tmp").mkdir()
    call(sft, *files, *EIGHT_STEPS, f"--out_dir={out}")
    assert_equal_weights(out / "model", eight_steps / "model")

    rows = read_jsonl(out / "metrics.jsonl")
    others = read_jsonl(eight_steps / "metrics.jsonl")
    assert len(rows) == 8
    for row, other in zip(rows, others):
        assert (row["step"], row["loss"]) == (other["step"], other["loss"])


def test_a_finished_run_writes_its_model_again(tmp_path, files, eight_steps):
    out = tmp_path / "again"
    shutil.copytree(eight_steps, out)
    shutil.rmtree(out / "model")
    call(sft, *files, *EIGHT_STEPS, f"--out_dir={out}")
    assert_equal_weights(out / "model", eight_steps / "model")
    assert len(read_jsonl(out / "metrics.jsonl")) == 8


def test_checkpoints_that_cannot_be_read(tmp_path, files, eight_steps, capfd):
    """A damaged one takes no place of those that are written after it.

    If none can be read, the run does not start from nothing over what is there.
    """
    shutil.copytree(eight_steps / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(eight_steps / "metrics.jsonl", tmp_path)
    (tmp_path / "checkpoints/step_000008/.metadata").unlink()
    again = [*files, *EIGHT_STEPS, f"--out_dir={tmp_path}"]
    call(sft, *again, "--max_steps=7", "--keep_checkpoints=1")
    assert names_in(tmp_path / "checkpoints") == ["step_000007", "step_000008"]

    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert metrics.count("\n") == 7
    os.truncate(next((tmp_path / "checkpoints/step_000007").glob("*.distcp")), 1000)
    with pytest.raises(UserError, match="no checkpoint"):
        call(sft, *again)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    # torch would print one for each file that is not there.
    assert "Traceback" not in capfd.readouterr().err


def start_training(processes, *settings):
    """sft.py under torchrun, in the background."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*start, f"--nproc_per_node={processes}", "sft.py", *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )


def stop_after_some_steps(process, folder, number):
    """Send a signal to all processes of a run. Returns its output and the steps that it made."""
    log = folder / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    for pid in children(process.pid):
        os.kill(pid, number)
    output = process.communicate(timeout=120)[0]
    return output, len(read_jsonl(log))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0(tmp_path, files, number):
    """Two processes are told to stop: both save, and end without an error."""
    settings = [*files, "--batch_size=30", "--epochs=10", "--save_interval=0"]
    process = start_training(2, *settings, f"--out_dir={tmp_path}")
    output, steps = stop_after_some_steps(process, tmp_path, number)
    assert process.returncode == 0, output[-2000:]
    assert "start again" in output
    assert 3 < steps < 40
    assert names_in(tmp_path / "checkpoints") == [f"step_{steps:06d}"]
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path, files):
    """The next start ends with the weights of a run that was never stopped."""
    settings = [*files, "--batch_size=30", "--epochs=10", "--save_interval=0"]
    stopped = tmp_path / "stopped"
    process = start_training(2, *settings, f"--out_dir={stopped}")
    stop_after_some_steps(process, stopped, signal.SIGTERM)
    torchrun(2, "sft.py", *settings, f"--out_dir={stopped}")
    torchrun(2, "sft.py", *settings, f"--out_dir={tmp_path}/whole")
    assert_equal_weights(stopped / "model", tmp_path / "whole/model")


def can_mount():
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no small file system can be made here")
def test_full_disk_leaves_the_checkpoint_before(tmp_path, files, eight_steps):
    """A file system with room for one checkpoint and not for two.

    One line, code 2, and the first checkpoint is whole.
    """
    checkpoint = eight_steps / "checkpoints/step_000008"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*"))
    small = tmp_path / "small"
    small.mkdir()
    settings = [*files, *EIGHT_STEPS, "--keep_checkpoints=1"]
    command = [sys.executable, "sft.py", *settings, f"--out_dir={small}"]

    # The small file system is gone with the command: what is on it is copied before.
    script = (
        f"mount -t tmpfs -o size={int(1.5 * size)} none {small} && {shlex.join(command)}; "
        f"code=$?; cp -r {small} {tmp_path}/seen; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "disk full or read-only" in errors[0]

    # There is room now: it goes on from there.
    seen = tmp_path / "seen"
    shutil.rmtree(seen / "checkpoints/step_000004.tmp", ignore_errors=True)
    assert names_in(seen / "checkpoints") == ["step_000002"]
    call(sft, *settings, f"--out_dir={seen}")
    assert len(read_jsonl(seen / "metrics.jsonl")) == 8


# --------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    "setting, words",
    [
        ("--data=nowhere.jsonl", ["nowhere.jsonl"]),
        ("--model=out/nowhere", ["out/nowhere"]),
        ("--learning_rat=1", ["learning_rat", "learning_rate"]),
        ("--schedule=square", ["schedule", "square"]),
        ("--chat_template=nowhere.jinja", ["nowhere.jinja"]),
        ("--attention=varlen", ["attention", "padded"]),
        ("--shard=2", ["shard=2", "1 processes"]),
        ("--val_interval=0", ["val_interval=0", "at least 1"]),
        ("--max_steps=few", ["max_steps", "int", "few"]),
        ("--max_steps=-3", ["max_steps=-3", "at least 1"]),
        ("--max_steps=0", ["max_steps=0", "at least 1"]),
        ("--epochs=-1", ["epochs=-1", "at least 1"]),
        ("--max_length=1", ["max_length=1", "at least 2"]),
        ("--save_interval=-1", ["save_interval=-1", "at least 0"]),
        ("--grad_clip=-1.0", ["grad_clip=-1.0", "at least 0"]),
        ("--learning_rate=-1e-5", ["learning_rate=-1e-05", "at least 0"]),
        ("--learning_rate=1e999", ["learning_rate=inf", "finite"]),
        ("--warmup=3", ["warmup=3", "from 0 to 1"]),
        ("--beta2=1.0", ["beta2=1.0", "from 0 to 1"]),
    ],
)
def test_mistakes(tmp_path, files, setting, words):
    with pytest.raises(UserError) as error:
        call(sft, *files, f"--out_dir={tmp_path}", setting)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there(tmp_path, files):
    device = "tpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UserError, match=device):
        call(sft, *files, f"--out_dir={tmp_path}", f"--device={device}")


def test_a_tokenizer_of_more_words_than_the_models(tmp_path, files, guesser):
    """Its folder has no model."""
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    words = [f"<{i}>" for i in range(len(tokenizer), 300)]
    tokenizer.add_tokens([*words, "boxed"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has a token 300, .* 280 in all"):
        call(sft, *files, f"--out_dir={tmp_path}", f"--tokenizer={tmp_path}/tokenizer")


def test_model_without_chat_template(tmp_path, files, guesser):
    shutil.copytree(guesser, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        call(sft, *files, f"--model={tmp_path}/m", f"--out_dir={tmp_path}/out")


@pytest.mark.slow
def test_a_mistake_ends_with_2_and_one_line(tmp_path, files):
    done = run("sft.py", *files, f"--out_dir={tmp_path}", "--shard=2", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "shard=2" in errors[0]


@pytest.fixture
def explosive(tmp_path, guesser):
    """The folder of a model that computes the same as `guesser`, with a gradient that is inf."""
    folder = tmp_path / "explosive"
    plain = AutoModelForCausalLM.from_pretrained(guesser)
    with torch.no_grad():
        for layer in plain.model.layers:
            attention = layer.self_attn
            attention.o_proj.weight *= 1e20
            attention.v_proj.weight *= 1e-20
            attention.v_proj.bias *= 1e-20
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight * 1e21)
        plain.config.tie_word_embeddings = False
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(guesser).save_pretrained(folder)
    return folder


def assert_left_behind(out, error):
    """No checkpoint and no model; the rows in a file."""
    for words in ("step 1, update", "the norm of the gradient is ", "Its 20 rows are in"):
        assert words in error
    assert names_in(out) == ["config.json", "not_finite.jsonl"]
    rows = read_jsonl(out / "not_finite.jsonl")
    assert len(rows) == 20
    for row in rows:
        assert row["text"].startswith("<|im_start|>user")
        assert len(row["scored"]) == len(row["tokens"])


EXPLODE = ["--batch_size=20", "--max_steps=1", "--warmup=0", "--save_interval=1"]


def test_a_gradient_that_is_not_finite(tmp_path, files, explosive):
    """Finite losses, an infinite gradient."""
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        call(sft, *files, f"--model={explosive}", *EXPLODE, f"--out_dir={out}")
    assert_left_behind(out, str(error.value))


def test_a_gradient_that_is_not_finite_on_two_processes(tmp_path, files, explosive):
    """Both end, each with code 2, and one of them says why."""
    out = tmp_path / "out"
    settings = [*files, f"--model={explosive}", *EXPLODE, f"--out_dir={out}"]
    done = torchrun(2, "sft.py", *settings, check=False, timeout=100)
    assert done.returncode != 0
    assert done.stderr.count("exitcode  : 2") == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert_left_behind(out, line)


def test_the_rows_that_are_to_blame(tmp_path, files, guesser, monkeypatch):
    """A pass over rows with a certain token has a finite loss, and a gradient that is nan."""
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    four = tokenizer("4", add_special_tokens=False).input_ids[0]
    logprobs_of = sft.token_logprobs

    def with_nan(net, batch):
        logprobs = logprobs_of(net, batch)
        if (batch["input_ids"] == four).any():
            logprobs.register_hook(lambda gradient: gradient * math.nan)
        return logprobs

    monkeypatch.setattr(sft, "token_logprobs", with_nan)
    with pytest.raises(UserError, match="the norm of the gradient is nan, because of rows"):
        call(sft, *files, *EXPLODE, f"--out_dir={tmp_path}")
    rows = read_jsonl(tmp_path / "not_finite.jsonl")
    for row in rows:
        assert row["not_finite"] == (four in row["tokens"]), row["text"]
    assert {row["not_finite"] for row in rows} == {True, False}


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before(tmp_path, files, capsys):
    """A rate that is much too high: the first step is saved, the second has no loss.

    Lowered, the same command goes on.
    """
    settings = [*files, "--batch_size=20", "--warmup=0", "--save_interval=1", "--max_steps=3"]
    settings.append(f"--out_dir={tmp_path}")
    words = (
        r"step 2, update: the loss is nan, because of rows 0, .* of 20\. .* lower the learning rate"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            call(sft, *settings, "--learning_rate=1e30")
        assert names_in(tmp_path / "checkpoints") == ["step_000001"]
        assert not (tmp_path / "model").exists()
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert "resumed after step 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_validation_loss_that_is_not_finite(tmp_path, files, guess_data):
    """After the last update nothing else would show it: neither checkpoint nor model is kept."""
    settings = [*files, "--batch_size=20", "--warmup=0", "--save_interval=1", "--max_steps=1"]
    settings += [f"--val_data={guess_data[0]}", "--val_interval=1", f"--out_dir={tmp_path}"]
    words = (
        "step 1, validation: the loss on the validation rows is nan, because of rows 0, .* of 12"
    )
    with pytest.raises(UserError, match=words):
        call(sft, *settings, "--learning_rate=1e18")
    assert not list(tmp_path.glob("model*"))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_weights_that_are_not_finite(tmp_path, files, guesser):
    """They are refused, and a rate that makes them leaves no model."""
    plain = AutoModelForCausalLM.from_pretrained(guesser)
    with torch.no_grad():
        plain.model.norm.weight[0] = math.inf
    plain.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(guesser).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="weights that are not finite .model.norm.weight"):
        call(sft, *files, f"--model={tmp_path}/m", f"--out_dir={tmp_path}/out")

    settings = ["--batch_size=20", "--max_steps=1", "--learning_rate=1e38", "--weight_decay=10"]
    with pytest.raises(UserError, match="not finite"):
        call(sft, *files, *settings, f"--out_dir={tmp_path}/out")
    assert not (tmp_path / "out/model").exists()


# --------------------------------------------------------------------------------------------------
# folders


def test_any_name_of_a_folder(tmp_path, files, guesser, capsys):
    """Signs of patterns, blanks: the run goes on where it was, from the same model."""
    model = tmp_path / "model [1]*"
    shutil.copytree(guesser, model)
    out = tmp_path / "run[lr=1e-3] ?"
    again = [*files, f"--model={model}", "--batch_size=20", "--save_interval=1", "--epochs=2"]
    again.append(f"--out_dir={out}")
    call(sft, *again, "--max_steps=4")
    call(sft, *again, "--max_steps=8")
    assert "resumed after step 4" in capsys.readouterr().out
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == list(range(8))
    assert names_in(out / "checkpoints") == ["step_000007", "step_000008"]


def test_a_run_of_one_step_trains(tmp_path, files, guesser):
    """The first step of a warm-up has the rate 0. Here it would be the only one."""
    settings = ["--batch_size=20", "--max_steps=1", "--learning_rate=1e-3"]
    call(sft, *files, *settings, f"--out_dir={tmp_path}")
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["lr"] == 1e-3
    before = weights_in(guesser)
    after = weights_in(tmp_path / "model")
    assert any(not torch.equal(after[name], before[name]) for name in before)


# --------------------------------------------------------------------------------------------------
# rows


def test_bad_rows_are_counted_named_and_limited(tmp_path, files, guess_data, capsys):
    lines = [json.dumps(row) for row in read_jsonl(guess_data[0])[:60]]
    lines[7] = '{"messages": [{"role": "user"'
    lines[9] = json.dumps(dict(messages=[message("user", "no answer")]))
    no_text = [message("user", "1?"), message("assistant", None)]
    lines[11] = json.dumps(dict(messages=no_text))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")

    settings = [*files, f"--data={bad}", "--batch_size=29", "--max_steps=1"]
    settings.append(f"--out_dir={tmp_path}/out")
    call(sft, *settings, "--max_bad_share=0.1")
    out = capsys.readouterr().out
    for words in ("bad.jsonl line 8", "bad.jsonl line 10:", "bad.jsonl line 12", "57 rows"):
        assert words in out

    with pytest.raises(UserError, match="line 8"):
        call(sft, *settings)
    other = write_jsonl(tmp_path / "other.jsonl", [dict(text="a")])
    with pytest.raises(UserError, match="messages"):
        call(sft, *settings, f"--data={other}")
