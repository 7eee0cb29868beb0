"""The statistics of bench/claims_report.py, by hand and against tables."""

import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from claims_report import (  # noqa: E402
    Claim,
    Curve,
    TableClaim,
    claim_results,
    common_end,
    compare,
    read_curve,
    t_test,
    write_report,
)


def curve(samples, accuracy, goes_on=False):
    x = np.array(samples, float)
    return Curve(x, x / 10, np.array(accuracy), goes_on, [])


def test_mean_is_the_area_under_the_curve():
    # A triangle of 100 x 0.8 / 2, then 100 at 0.8: 120 of 200.
    run = curve([0, 100], [0.0, 0.8])
    assert run.mean("samples", 200) == pytest.approx(0.6)
    assert run.mean("samples", 50) == pytest.approx(0.2)
    assert run.mean("seconds", 20) == pytest.approx(0.6)


def test_where_a_curve_reaches_an_accuracy():
    run = curve([0, 100, 200], [0.2, 0.4, 0.8])
    assert run.reaches("samples", 0.1) == 0
    assert run.reaches("samples", 0.3) == pytest.approx(50)
    assert run.reaches("samples", 0.5) == pytest.approx(125)
    assert run.reaches("samples", 0.9) == math.inf


def test_curves_are_compared_up_to_where_all_say_something():
    short = curve([0, 100], [0, 1])
    long = curve([0, 300], [0, 1])
    solved = curve([0, 50], [0, 1], goes_on=True)
    assert common_end([short, long, solved], "samples") == 100
    assert common_end([long, solved], "samples") == 300
    assert common_end([solved], "samples") == 50


@pytest.mark.parametrize(
    "differences, t, p",
    [
        # t tables: 2.776 is the 5 % point of 4 degrees of freedom, 4.303 that of 2.
        ([-0.5, 0.5, 1.5, 0.5, 0.5], None, None),
        ([1.0, 2.0, 3.0], 3.4641, 0.0742),
    ],
)
def test_t_test_is_that_of_the_tables(differences, t, p):
    if p is not None:
        assert t_test(differences) == pytest.approx(p, abs=1e-4)
        return
    # mean 0.5, standard error sqrt(0.5 / 5) = 0.3162: t = 1.5811, p = 0.1890 with 4 degrees.
    assert t_test(differences) == pytest.approx(0.1890, abs=1e-4)


def test_five_percent_point_of_four_degrees_of_freedom():
    spread = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    error = math.sqrt(2.5 / 5)
    assert t_test(list(spread + 2.776 * error)) == pytest.approx(0.05, abs=2e-4)
    assert t_test([0.0, 0.0]) == 1.0


def test_comparison_of_two_arms_is_paired_by_seed():
    fast = {1: curve([0, 100, 200], [0, 0.5, 0.5]), 2: curve([0, 100, 200], [0.2, 0.7, 0.7])}
    slow = {1: curve([0, 100, 200], [0, 0.25, 0.5]), 2: curve([0, 100, 200], [0.2, 0.45, 0.7])}
    slow[3] = curve([0, 10], [0, 1])  # has no partner
    found = compare(dict(fast=fast, slow=slow), "fast", "slow", "samples")
    # Seed 1: (25 + 50) / 200 against (12.5 + 37.5) / 200; the same in seed 2.
    assert found.difference == pytest.approx(12.5)
    assert (found.seeds, found.ahead, found.end) == (2, 2, 200)
    assert found.share == pytest.approx(0.5)
    assert compare(dict(fast=fast, slow={1: slow[1]}), "fast", "slow", "samples") is None


def write_run(folder, accuracies, max_steps):
    folder.mkdir(parents=True)
    rows = [dict(step=-1, eval_sampled=accuracies[0])]
    for step, accuracy in enumerate(accuracies[1:]):
        seconds = dict(rollout=1.0, policy=2.0, eval=50.0, save=9.0, step=62.0)
        rows.append(
            dict(step=step, samples=100 * (step + 1), eval_sampled=accuracy, seconds=seconds)
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(settings=dict(max_steps=max_steps))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_text("")


def write_scores(folder, score):
    folder.mkdir()
    results = dict(models=dict(model=dict(test=dict(score=score))))
    (folder / "results.json").write_text(json.dumps(results))


def test_report_of_runs(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s{seed}" / "a", [0.1, 0.5 + seed / 100, 0.9], 2)
        write_run(tmp_path / f"s{seed}" / "b", [0.1, 0.2, 0.6], 2)
    run = read_curve(tmp_path / "s1" / "a")
    assert run.samples.tolist() == [0, 100, 200]
    assert run.seconds.tolist() == [0, 3, 6]
    assert not run.goes_on

    folders = {seed: tmp_path / f"s{seed}" for seed in (1, 2, 3)}
    claims = [
        Claim("one", "a paper", [("a", "b")]),
        Claim("not run", "a paper", [("a", "c")]),
    ]
    table = TableClaim("two", "a paper", dict(x=("s", "greedy"), y=("s", "maj@8")), ("x", "y"))
    for seed, folder in folders.items():
        write_scores(folder / "s", dict(greedy=[0.5 + seed / 100, 0.1], **{"maj@8": [0.3, 0.1]}))
    write_report(tmp_path, folders, ["a", "b", "c"], claims, [table], "# Head\n")
    text = (tmp_path / "claims.md").read_text()
    assert text.startswith("# Head")
    # Mean accuracies of a: 50.5, 51 and 51.5; of b 27.5.
    assert "`a` is better than `b` (+23.5 ± 0.3 points" in text
    assert "ahead in 3 of 3 seeds" in text
    assert "not run" not in text
    assert (tmp_path / "claims.png").stat().st_size > 10_000
    # Differences of 21, 22 and 23 points: 22, and 1 / sqrt(3).
    assert "| 52.0 ± 0.6 | 30.0 ± 0.0 |" in text
    assert "x against y: +22.0 ± 0.6 points, 3 seeds" in text
    _, stored = json.loads((tmp_path / "claims.json").read_text())
    assert stored["comparisons"][0]["difference"] == pytest.approx(23.5)


def test_claim_without_runs_is_left_out():
    assert claim_results(Claim("x", "p", [("a", "b")]), dict(a={}, b={})) is None
