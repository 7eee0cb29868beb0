"""lib/report.py: means over ranks, the stopwatch, the status line, curves."""

import json

import pytest
import torch

from lib import report
from lib.run import setup_distributed

STEP = dict(
    step=0,
    outcome=0.5,
    prompts_kept=2,
    prompts_drawn=4,
    response_tokens=30,
    truncated=0.1,
    prm_loss=0.69,
    prm_pair_accuracy=0.5,
    clipfrac=0.0,
    approx_kl=1e-3,
    entropy=1.0,
    mismatch=1e-6,
    seconds=dict(rollout=1.0, step=2.0),
)


@pytest.fixture
def process_group():
    setup_distributed(torch.device("cpu"))
    yield
    torch.distributed.destroy_process_group()


def test_means_over_rows_and_a_maximum(process_group):
    """Three rows with the mean 2 and one with 6: 3 over all four; the larger maximum."""
    means = report.RowMeans(total_rows=4)
    means.add(dict(loss=torch.tensor(2.0), ratio_max=torch.tensor(1.5)), 3)
    means.add(dict(loss=torch.tensor(6.0), ratio_max=torch.tensor(1.25)), 1)
    assert means.over_ranks() == dict(loss=3.0, ratio_max=1.5)


def test_a_stopwatch_says_where_the_run_is():
    clock = report.Stopwatch()
    clock.start("rollout", step=2)
    assert str(clock) == "step 3, rollout"
    clock.start("policy")
    seconds = clock.end_step()
    assert set(seconds) == {"rollout", "policy", "step"}
    assert seconds["step"] >= 0
    assert set(clock.end_step()) == {"step"}


def test_an_added_metric_is_in_the_status_line(capsys):
    report.print_status(dict(STEP, my_metric=0.25), max_steps=2, seconds_left=60)
    line = capsys.readouterr().out
    assert line.startswith("step 1/2 outcome 0.500 kept 2/4 len 30 cut 10.0% | prm 0.690")
    assert "my_metric 0.25" in line
    assert "eta 0:01:00" in line


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]


def log_steps(folder, start, steps, steps_kept):
    """A run that writes a row of samples.jsonl in each of these steps. Returns all steps there."""
    log = report.RunLog(str(folder), start, 0, None, {})
    for step in steps:
        log.write_samples(step, [dict(step=step, response="\ud83d é")], steps_kept)
    log.samples.close()
    log.metrics.close()
    return steps_of(folder / "samples.jsonl")


def test_samples_of_the_last_steps_stay(tmp_path):
    """Seven steps of which the last two stay are cut at steps 2, 4 and 6; so they are resumed."""
    assert log_steps(tmp_path, 0, range(7), steps_kept=2) == [4, 5, 6]
    assert log_steps(tmp_path, 5, [5, 6], steps_kept=2) == [4, 5, 6]
    assert log_steps(tmp_path, 0, range(7), steps_kept=None) == list(range(7))


@pytest.mark.slow
def test_curves_with_an_added_metric(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [dict(step=-1, eval_greedy=0.2, eval_sampled=0.3)]
    for step in range(3):
        rows.append(dict(STEP, step=step, my_metric=step))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.plot_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10000
    assert report.added_metrics(rows[-1]) == ["my_metric"]
