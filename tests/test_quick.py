"""Every script, for two steps, one after the other: what breaks a script breaks here first.

Part of `pytest -m "not slow"`. All in this process, on a CPU, with the plain engine.
"""

import json

import pytest
from conftest import call, message, read_jsonl, write_jsonl

import evaluate
import generate
import lib.report
import lib.tables
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


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Drawing, and measuring how fast the machine is, take longer than runs this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.report, "plot_curves", lambda *paths: None)
        patch.setattr(lib.tables, "chart", lambda *results: None)
        patch.setattr(sft, "matmul_rate", lambda *where: 1e9)
        yield


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """Two steps of pretraining on the built-in world."""
    out = tmp_path_factory.mktemp("base")
    call(sft, f"--data={world}/web.jsonl", f"--model={world}/init", f"--out_dir={out}", *SFT)
    return out


def test_sft(base):
    assert [row["step"] for row in read_jsonl(base / "metrics.jsonl")][-1] == 1
    assert (base / "model/model.safetensors").exists()


# A model that has learned next to nothing ends one answer in two, and is right by chance.
OWN_REWARD = """
def reward(response, problem):
    return (sum(response.encode()) + int(problem["weight"])) % 2
"""


def test_from_a_teacher_to_a_table(base, tmp_path):
    """generate.py, sft.py, prime.py, evaluate.py: each starts from what the one before wrote.

    Problems and reward are one's own.
    """
    problems = tmp_path / "mine.csv"
    problems.write_text("question,weight\n" + "".join(f"{k}+5?,{k}\n" for k in range(10, 30)))
    reward = tmp_path / "my_reward.py"
    reward.write_text(OWN_REWARD)
    mine = [*SMALL, f"--reward={reward}", "--max_tokens=60"]

    # The teacher's right answers.
    teacher = tmp_path / "generate"
    sampling = ["--system_prompt=", "--sft_system_prompt=", "--max_problems=8"]
    where = [f"--data={problems}", f"--model={base}/model", f"--out_dir={teacher}"]
    call(generate, *where, *mine, *sampling)
    samples = read_jsonl(teacher / "samples.jsonl")
    assert len(samples) == 16
    good = [row for row in samples if row["correct"] and row["finish_reason"] == "stop"]
    assert 0 < len(good) < 16
    assert len(read_jsonl(teacher / "sft.jsonl")) == len(good)

    # Fine-tuning on them.
    student = tmp_path / "sft"
    where = [f"--data={teacher}/sft.jsonl", f"--model={base}/model", f"--out_dir={student}"]
    call(sft, *where, *SFT, "--batch_size=2", "--val_rows=0", "--learning_rate=1e-4")

    # Two steps of PRIME.
    out = tmp_path / "prime"
    where = [f"--data={problems}", f"--model={student}/model", f"--out_dir={out}"]
    step = ["--prompts_per_step=4", "--samples_per_prompt=4", "--batch_rows=8"]
    rates = ["--beta=1", "--learning_rate=1e-4", "--prm_learning_rate=1e-4"]
    run = ["--max_steps=2", "--save_interval=0", "--checkpointing=False"]
    call(prime, *where, *mine, *step, *rates, *run)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["prm_loss"] == pytest.approx(0.693, abs=0.02)
    assert max(row["mismatch"] for row in rows) < 1e-4
    assert read_jsonl(out / "samples.jsonl")

    # The table.
    table = tmp_path / "evaluate"
    models = json.dumps([f"{student}/model", f"{out}/policy"])
    where = [f"--models={models}", f"--benchmarks={json.dumps([str(problems)])}"]
    call(evaluate, *where, *mine, "--samples=2", "--max_problems=8", f"--out_dir={table}")
    results = json.loads((table / "results.json").read_text())
    assert len(results["models"]) == 2
    assert "avg@2" in (table / "results.md").read_text()


def test_dry_run_needs_no_data(base, capsys):
    for script in (generate, sft, prime):
        call(script, f"--model={base}/model", "--device=cpu", "--dry_run=True")
    models = json.dumps([f"{base}/model"])
    call(evaluate, f"--models={models}", "--device=cpu", "--dry_run=True")
    assert capsys.readouterr().out.count("GB") >= 4


def test_a_mistake_is_one_line(base, tmp_path):
    """Of the user's: a message, not a stack trace."""
    data = write_jsonl(tmp_path / "rows.jsonl", [dict(messages=[message("user", "no answer")])])
    with pytest.raises(UserError, match="rows.jsonl"):
        call(prime, f"--data={data}", f"--model={base}/model", *SMALL)
    with pytest.raises(UserError, match="learning_rate"):
        call(prime, "--learning_rat=1")
