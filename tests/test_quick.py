"""Every script, for two steps, one after the other: what breaks a script breaks here first.

Part of `pytest -m "not slow"`. All in this process, on a CPU, with the plain engine.
"""

import importlib
import json
import re

import pytest
from conftest import call, message, read_jsonl, write_jsonl

import configurator
import evaluate
import generate
import lib.report
import prime
import sft
from configurator import UserError

SMALL = ["--device=cpu", "--engine=hf", "--grade_workers=1", "--max_prompt_tokens=40"]
SFT = [
    "--device=cpu",
    "--tokenizer=None",
    "--max_length=64",
    "--max_steps=2",
    "--batch_size=8",
    "--val_rows=8",
    "--val_interval=1",
    "--checkpointing=False",
]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes longer than a run this small; tests/test_report.py draws."""
    monkeypatch.setattr(lib.report, "plot_curves", lambda *paths: None)


def test_prepare_and_sft(tmp_path):
    """The built-in world, and two steps of pretraining on it."""
    prepare = importlib.import_module("data.arithmetic.prepare")
    names = [
        n for n in configurator.values(vars(prepare)) if re.search("_(problems|solutions)$", n)
    ]
    call(prepare, f"--out_dir={tmp_path}", *(f"--{name}=20" for name in names))
    assert len(read_jsonl(tmp_path / "web.jsonl")) == 20
    assert len(read_jsonl(tmp_path / "rl.jsonl")) == 20

    out = tmp_path / "base"
    files = [f"--data={tmp_path}/web.jsonl", f"--model={tmp_path}/init", f"--out_dir={out}"]
    call(sft, *files, *SFT)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows][-1] == 1
    assert (out / "model/model.safetensors").exists()


def test_from_a_teacher_to_a_table(guesser, guess_data, tmp_path):
    """generate.py, sft.py, prime.py, evaluate.py: each starts from what the one before wrote."""
    problems = guess_data[1]

    # The teacher's right answers.
    teacher = tmp_path / "generate"
    sampling = ["--system_prompt=", "--sft_system_prompt=", "--max_tokens=12", "--max_problems=8"]
    where = [f"--data={problems}", f"--model={guesser}", f"--out_dir={teacher}"]
    call(generate, *where, *SMALL, *sampling)
    samples = read_jsonl(teacher / "samples.jsonl")
    assert len(samples) == 16
    assert len(read_jsonl(teacher / "sft.jsonl")) == sum(row["correct"] for row in samples)

    # Fine-tuning on them.
    student = tmp_path / "sft"
    where = [f"--data={teacher}/sft.jsonl", f"--model={guesser}", f"--out_dir={student}"]
    call(sft, *where, *SFT, "--batch_size=2", "--val_rows=0", "--learning_rate=1e-4")

    # Two steps of PRIME.
    out = tmp_path / "prime"
    where = [f"--data={problems}", f"--model={student}/model", f"--out_dir={out}"]
    step = ["--prompts_per_step=4", "--samples_per_prompt=4", "--batch_rows=8"]
    rates = ["--beta=1", "--learning_rate=1e-4", "--prm_learning_rate=1e-4"]
    run = ["--max_steps=2", "--save_interval=0", "--checkpointing=False", "--max_tokens=12"]
    call(prime, *where, *SMALL, *step, *rates, *run)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["prm_loss"] == pytest.approx(0.693, abs=0.02)
    assert max(row["mismatch"] for row in rows) < 1e-4
    assert read_jsonl(out / "samples.jsonl")

    # The table.
    table = tmp_path / "evaluate"
    models = json.dumps([f"{student}/model", f"{out}/policy"])
    where = [f"--models={models}", f"--benchmarks={json.dumps([str(problems)])}"]
    sampling = ["--samples=2", "--max_tokens=12", "--max_problems=8"]
    call(evaluate, *where, *SMALL, *sampling, f"--out_dir={table}")
    results = json.loads((table / "results.json").read_text())
    assert len(results["models"]) == 2
    assert "avg@2" in (table / "results.md").read_text()


def test_dry_run_needs_no_data(guesser, capsys):
    for script in (generate, sft, prime):
        call(script, f"--model={guesser}", "--device=cpu", "--dry_run=True")
    call(evaluate, f"--models={json.dumps([str(guesser)])}", "--device=cpu", "--dry_run=True")
    assert capsys.readouterr().out.count("GB") >= 4


def test_a_mistake_is_one_line(guesser, tmp_path):
    """Of the user's: a message, not a stack trace."""
    data = write_jsonl(tmp_path / "rows.jsonl", [dict(messages=[message("user", "no answer")])])
    with pytest.raises(UserError, match="rows.jsonl"):
        call(prime, f"--data={data}", f"--model={guesser}", *SMALL)
    with pytest.raises(UserError, match="learning_rate"):
        call(prime, "--learning_rat=1")
