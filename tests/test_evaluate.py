"""evaluate.py: numbers by hand, tables, resume, mistakes."""
import json
import statistics

import pytest

import evaluate
from conftest import call, read_jsonl, write_jsonl


def test_accuracy_by_hand():
    assert evaluate.accuracy([1, 0]) == (0.5, 0.5)
    shares = [1.0, 0.5, 0.25, 0.0, 1.0]
    mean, se = evaluate.accuracy(shares)
    assert mean == pytest.approx(statistics.mean(shares)) and se == pytest.approx(statistics.stdev(shares) / 5 ** 0.5)
    n = 30
    mean, se = evaluate.accuracy([1] * 8 + [0] * 22)        # AIME: one greedy answer a problem is a Bernoulli trial
    assert se == pytest.approx((mean * (1 - mean) / (n - 1)) ** 0.5) and se == pytest.approx(0.082, abs=1e-3)


def test_table_of_two_checkpoints_and_resume(tmp_path, guesser, guess_data, world, capsys):
    args = [f'--models=["{guesser}", "{world}/init"]', f'--benchmarks=["{guess_data[1]}"]', "--samples=3", "--temperature=1.0", "--top_p=1.0",
            "--max_tokens=12", "--max_prompt_tokens=40", "--engine=hf", "--device=cpu", "--grade_workers=1", f"--out_dir={tmp_path}"]
    call(evaluate, *args)
    out = capsys.readouterr().out
    assert "<|im_start|>user\n10?<|im_end|>" in out         # the rendered prompt of the first problem
    results = json.loads((tmp_path / "results.json").read_text())
    files = sorted(tmp_path.glob("*.responses.jsonl"))
    assert len(results) == 2 and len(files) == 2
    for model, scores in results.items():
        file = next(f for f in files if f.name.startswith(model.strip("./").replace("/", "--")))
        rows, s = read_jsonl(file), scores["problems"]
        assert len(rows) == 40 * 4 and s["problems"] == 40
        greedy = [r["correct"] for r in rows if r["mode"] == "greedy"]
        sampled = [r["correct"] for r in rows if r["mode"] == "sampled"]
        assert s["greedy"] == pytest.approx(sum(greedy) / 40) and s["sampled"] == pytest.approx(sum(sampled) / 120)
        assert f"{100 * s['sampled']:.1f}" in out
    assert results[str(guesser)]["problems"]["no_box"] < 0.2 < 0.9 < results[f"{world}/init"]["problems"]["no_box"]

    whole = files[0].read_text()
    lines = whole.splitlines(keepends=True)
    files[0].write_text("".join(lines[:50]) + lines[50][:20])       # as a kill leaves it
    call(evaluate, *args)
    assert sorted(read_jsonl(files[0]), key=str) == sorted(map(json.loads, lines), key=str)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    call(evaluate, *args, "--samples=1")                            # fewer samples: those that are there, cut to k = 1
    again = json.loads((tmp_path / "results.json").read_text())
    assert all(s["problems"]["sampled_k"] == 1 for s in again.values()) and len(read_jsonl(files[0])) == 160


def test_real_benchmark_files(shared):
    names = dict(math500=500, aime24=30, amc23=40, olympiadbench=675)
    before = evaluate.data_dir
    evaluate.data_dir = str(shared / "data")
    try:
        for name, count in names.items():
            assert len(evaluate.load_benchmark(name)[1]) == count
    finally:
        evaluate.data_dir = before


@pytest.mark.parametrize("change, words", [
    (['--benchmarks=["mat500"]'], ["mat500", "math500"]), (['--models=[]'], ["models"]), (["--greedy=False"], ["greedy"]),
    (['--models=["out/nowhere"]'], ["out/nowhere"]),
])
def test_mistakes(tmp_path, guesser, guess_data, change, words):
    with pytest.raises(evaluate.UserError) as e:
        call(evaluate, f'--models=["{guesser}"]', f'--benchmarks=["{guess_data[1]}"]', f"--out_dir={tmp_path}/out", *change)
    assert all(word in str(e.value) for word in words)
    assert not (tmp_path / "out/results.json").exists()


def test_the_same_id_twice(tmp_path, guesser):
    rows = [dict(problem="a", answer="1", id=1), dict(problem="b", answer="2", id=1)]
    with pytest.raises(evaluate.UserError, match="twice"):
        call(evaluate, f'--models=["{guesser}"]', f'--benchmarks=["{write_jsonl(tmp_path / "p.jsonl", rows)}"]', f"--out_dir={tmp_path}/out")
