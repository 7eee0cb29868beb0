"""README's section "Change it": what it says is done here, with the page's own text.

Code blocks are executed, the lines of its diffs are looked up in prime.py and changed there, and
its commands are run, on a small model.
"""

import csv
import importlib.util
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, call, message, read_jsonl
from transformers import AutoModelForCausalLM

import evaluate
import generate
import lib.report
import prime
from configurator import UserError
from engine import Engine
from lib.answers import Answer, Request
from lib.pretrained import load_tokenizer, render_prompt, stop_tokens
from lib.tools import sample

# A run of a few small steps, whatever the outcomes are.
STEPS = [
    "--engine=hf",
    "--device=cpu",
    "--prompts_per_step=4",
    "--samples_per_prompt=4",
    "--max_prompt_tokens=96",
    "--max_tokens=12",
    "--batch_rows=8",
    "--prm_batch_rows=8",
    "--max_steps=1",
    "--beta=1",
    "--save_interval=0",
    "--grade_workers=1",
    "--checkpointing=False",
    "--filter_low=0.0",
    "--filter_high=1.0",
]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(lib.report, "plot_curves", lambda *paths: None)


# ----------------------------------------------------------------------------------------------
# the page


def section(title):
    """The text of a part of "Change it"."""
    page = (ROOT / "README.md").read_text("utf-8")
    change_it = re.search(r"^## Change it\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)[1]
    return re.search(rf"^### {title}\n(.*?)(?=^### |\Z)", change_it, re.DOTALL | re.MULTILINE)[1]


def blocks(title, language):
    """The fenced blocks of one language in a part."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.DOTALL | re.MULTILINE)


def find_lines(lines, wanted):
    """Where these lines stand, one after the other; once."""
    count = len(wanted)
    found = [i for i in range(len(lines)) if lines[i : i + count] == wanted]
    assert len(found) == 1, f"{len(found)} times in prime.py: {wanted}"
    return found[0]


def patched(source, diff):
    """The source after a diff. Its hunks begin with @@; lines of the source must be there."""
    lines = source.splitlines()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        before = [line[1:] for line in hunk.splitlines() if line[0] in " -"]
        after = [line[1:] for line in hunk.splitlines() if line[0] in " +"]
        start = find_lines(lines, before)
        lines[start : start + len(before)] = after
    return "\n".join(lines) + "\n"


def test_patched():
    source = "a = 1\nb = 2\nc = 3\n"
    assert patched(source, "@@ here\n a = 1\n-b = 2\n+b = 20\n@@\n-c = 3\n") == "a = 1\nb = 20\n"


@pytest.fixture
def changed_prime(tmp_path):
    """changed_prime(diff): prime.py with a change, as a module."""

    def load(diff):
        path = tmp_path / "changed_prime.py"
        path.write_text(patched((ROOT / "prime.py").read_text("utf-8"), diff), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("changed_prime", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["changed_prime"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("changed_prime", None)


def steps(module, guesser, guess_data, out, *changes):
    """The metrics of a short run."""
    where = [f"--data={guess_data[1]}", f"--model={guesser}", f"--out_dir={out}"]
    call(module, *where, *STEPS, *changes)
    return read_jsonl(out / "metrics.jsonl")


# ----------------------------------------------------------------------------------------------
# your own data and reward


@pytest.fixture
def my_files(tmp_path, monkeypatch):
    """README's two files, in the working directory."""
    title = "Your own data and reward"
    (tmp_path / "my_problems.csv").write_text(blocks(title, "csv")[0], encoding="utf-8")
    (tmp_path / "my_reward.py").write_text(blocks(title, "python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reward(my_files):
    namespace = {}
    exec((my_files / "my_reward.py").read_text(), namespace)
    return namespace["reward"]


def test_the_reward(reward):
    assert reward("17 + 25 = 42", dict(target="42")) == 1.0
    assert reward("It is 21.", dict(target="42")) == 0.5
    assert reward("no idea", dict(target="42")) == 0.0


@pytest.mark.slow
def test_own_data_and_reward_in_prime(my_files, reward, guesser):
    """README's command, with a small model and small steps."""
    line = next(
        line for line in section("Your own data and reward").splitlines() if "torchrun" in line
    )
    words = shlex.split(line)
    arguments = words[words.index("prime.py") + 1 :]
    config = str(ROOT / arguments.pop(0))
    call(prime, config, *STEPS, *arguments, f"--model={guesser}")

    rows = read_jsonl(my_files / "out/mine/samples.jsonl")
    assert {row["problem"] for row in rows} <= {"17+25?", problems_of(my_files)[1]["problem"]}
    outcomes = set()
    for row in rows:
        problem = next(p for p in problems_of(my_files) if p["problem"] == row["problem"])
        if row["finish_reason"] == "stop":
            assert row["outcome"] == pytest.approx(reward(row["response"], problem))
        outcomes.add(row["outcome"])
    assert any(0 < outcome < 1 for outcome in outcomes)


def problems_of(folder):
    with open(folder / "my_problems.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_own_data_and_reward_in_generate_and_evaluate(my_files, guesser):
    small = ["--device=cpu", "--engine=hf", "--grade_workers=1", "--max_tokens=12"]
    mine = ["--data=my_problems.csv", "--reward=my_reward.py", "--out_dir=generate"]
    with pytest.raises(UserError, match="no answer is right"):
        call(generate, *mine, *small, f"--model={guesser}", "--system_prompt=")
    rows = read_jsonl(my_files / "generate/samples.jsonl")
    assert len(rows) == 4
    assert any(0 < row["score"] < 1 for row in rows)

    mine = ['--benchmarks=["my_problems.csv"]', "--reward=my_reward.py", "--out_dir=evaluate"]
    call(evaluate, *mine, *small, f'--models=["{guesser}"]', "--samples=2")
    text = (my_files / "evaluate/results.md").read_text()
    assert "my_problems" in text


# ----------------------------------------------------------------------------------------------
# another engine


@pytest.fixture
def generate_engine():
    """The page's class."""
    namespace = dict(
        Engine=Engine,
        Answer=Answer,
        AutoModelForCausalLM=AutoModelForCausalLM,
        stop_tokens=stop_tokens,
        torch=torch,
    )
    exec(blocks("Another engine", "python")[0], namespace)
    return namespace["GenerateEngine"]


def test_the_engine_has_all_methods(generate_engine):
    interface = [name for name in vars(Engine) if not name.startswith("_")]
    assert sorted(interface) == ["close", "sample", "sleep", "wake_up"]
    for name in interface:
        assert name in vars(generate_engine)


def test_the_engine_samples(generate_engine, guesser):
    tokenizer = load_tokenizer(str(guesser))
    prompt = render_prompt(tokenizer, [message("user", "12?")])
    requests = [Request(prompt, seed, temperature=0.7, max_tokens=12) for seed in (1, 2, 1)]
    requests.append(Request(prompt, 0, temperature=0.0, max_tokens=3))

    ours = dict(sample(generate_engine(str(guesser), tokenizer, 64), tokenizer, requests))
    assert len(ours) == 4
    assert ours[0].tokens == ours[2].tokens
    assert "boxed" in ours[0].text
    assert ours[3].finish_reason in ("stop", "length")

    # What it says the probabilities were is what the model says.
    model = AutoModelForCausalLM.from_pretrained(guesser)
    answer = ours[0]
    logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
    wanted = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(answer.tokens)[:, None])
    torch.testing.assert_close(torch.tensor(answer.logprobs), wanted.squeeze(-1), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_engine_trains(generate_engine, guesser, guess_data, tmp_path, monkeypatch):
    """prime.py with it: `mismatch` compares its log-probabilities with the trainer's."""

    def make_engine(kind, path, tokenizer, device, dtype, max_model_len, **_):
        return generate_engine(path, tokenizer, max_model_len)

    monkeypatch.setattr(prime, "make_engine", make_engine)
    rates = ["--learning_rate=1e-3", "--temperature=0.8"]
    rows = steps(prime, guesser, guess_data, tmp_path, "--max_steps=2", *rates)
    # In the second step, by new weights.
    assert max(row["mismatch"] for row in rows) < 1e-4


def test_the_diff_fits(changed_prime):
    """The lines to change are there, and what comes out is Python."""
    (diff,) = blocks("Another metric", "diff")
    assert changed_prime(diff).main


# ----------------------------------------------------------------------------------------------
# another advantage, another metric


@pytest.fixture
def textbook(changed_prime):
    """A copy of prime.py with the page's function."""
    module = changed_prime("")
    exec(blocks("Another advantage", "python")[0], vars(module))
    return module


def test_textbook_rloo(textbook):
    """The same as rloo() for outcomes; less the second term of rloo() for process rewards."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    end = textbook.last_token(mask)
    outcomes = torch.where(end, torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None], 0.0)
    torch.testing.assert_close(
        textbook.textbook_rloo(outcomes, end, 4), textbook.rloo(outcomes, end, 4)
    )

    rewards = torch.where(mask, torch.arange(12.0).view(4, 3), 0.0)
    means = [0.5, 4.0, 6.0, 10.0]
    returns = textbook.textbook_rloo(rewards, mask, 4)
    others = (sum(means) - means[0]) / 3
    assert returns[0].tolist() == pytest.approx([1 - 2 * others, 1 - others, 0])


@pytest.mark.slow
def test_textbook_rloo_in_a_run(textbook, guesser, guess_data, tmp_path):
    rows = steps(textbook, guesser, guess_data, tmp_path, "--estimator=textbook_rloo")
    assert rows[0]["process_return"] > 0


@pytest.mark.slow
def test_estimators_that_the_page_names(guesser, guess_data, tmp_path):
    command = re.search(r"`(--estimator=[^`]+)`", section("Another advantage"))[1]
    assert steps(prime, guesser, guess_data, tmp_path, *command.split())


@pytest.mark.slow
def test_metric(changed_prime, guesser, guess_data, tmp_path, capsys):
    """It reaches the file and the console; of the curves see test_report.py."""
    module = changed_prime(blocks("Another metric", "diff")[0])
    rows = steps(module, guesser, guess_data, tmp_path)
    assert rows[0]["ratio_mean"] == pytest.approx(1.0, abs=0.05)
    assert "ratio_mean" in capsys.readouterr().out
