"""
What a training run shows: config, metrics, samples, a status line per step, curves, a page.

    python -m lib.report out/toy_prime/samples.jsonl     # writes tokens.html beside it
"""

import json
import os
import sys
import time
from datetime import timedelta
from importlib.util import find_spec

import torch.distributed as dist

from configurator import UserError
from lib.run import keep_lines, print0, to_disk, write_run_config
from lib.token_page import is_number, write_token_page

# Metrics with a place of their own in the status line: (name, how it is shown). All others that
# a step reports and HIDDEN does not name are appended as "name value".
STATUS = [
    ("outcome", "outcome {:.3f}"),
    ("response_tokens", "len {:.0f}"),
    ("truncated", "cut {:.1%} |"),
    ("prm_loss", "prm {:.3f}"),
    ("prm_pair_accuracy", "pairs {:.2f} |"),
    ("clipfrac", "clip {:.3f}"),
    ("approx_kl", "kl {:.1e}"),
    ("entropy", "ent {:.2f}"),
    ("mismatch", "mis {:.0e}"),
]

# Metrics that metrics.jsonl has and the status line does not repeat.
HIDDEN = {
    "advantage_std",
    "eval_greedy",
    "eval_sampled",
    "given_up",
    "grad_norm",
    "kept_share",
    "lr",
    "mismatch_kl",
    "no_box",
    "outcome_kept",
    "outcome_return",
    "peak_memory_gb",
    "policy_loss",
    "prm_grad_norm",
    "process_return",
    "prompts_drawn",
    "prompts_kept",
    "ratio_max",
    "samples",
    "seconds",
    "step",
    "step_auc",
    "too_long",
    "tool_calls",
    "wrong_step_chance",
    "wrong_step_found",
}

# The panels of curves.png. Metrics that the status line appends get a panel of their own.
PANELS = {
    "accuracy": ["outcome", "outcome_kept", "eval_greedy", "eval_sampled"],
    "implicit PRM": [
        "prm_loss",
        "prm_pair_accuracy",
        "wrong_step_found",
        "wrong_step_chance",
        "step_auc",
    ],
    "mean |return|": ["process_return", "outcome_return"],
    "policy": ["entropy", "clipfrac", "grad_norm"],
    "tokens per response": ["response_tokens"],
    "share": ["kept_share", "truncated", "no_box"],
}


def added_metrics(names) -> list[str]:
    """The names that STATUS and HIDDEN do not know: metrics that somebody has added."""
    known = HIDDEN | {name for name, _ in STATUS}
    return [name for name in names if name not in known]


class RowMeans:
    """Means over rows of named numbers, summed over micro-batches and ranks.

    A name that ends in "_max" is a maximum instead. total_rows: rows of all ranks together.
    """

    def __init__(self, total_rows: int):
        self.total_rows = total_rows
        self.sums = {}

    def add(self, stats: dict, rows: int) -> None:
        """stats: {name: mean over these rows}, tensors; nothing here waits for the GPU."""
        for name, value in stats.items():
            if name.endswith("_max"):
                value = value.double()
                earlier = self.sums.get(name)
                self.sums[name] = value if earlier is None else value.maximum(earlier)
            else:
                share = (value * rows / self.total_rows).double()
                self.sums[name] = self.sums.get(name, 0.0) + share

    def over_ranks(self) -> dict[str, float]:
        """{name: value} of all ranks together. Collective."""
        mine = {name: value.item() for name, value in self.sums.items()}
        by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)

        total = {}
        for numbers in by_rank:
            for name, value in numbers.items():
                if name.endswith("_max"):
                    total[name] = max(value, total.get(name, value))
                else:
                    total[name] = total.get(name, 0.0) + value
        return total


class Stopwatch:
    """Seconds per phase and step. waiting_for() takes it for the name of the phase."""

    def __init__(self):
        self.step = 0
        self.reset()

    def reset(self) -> None:
        """The run's time begins now."""
        self.phase = None
        self.seconds = {}
        self.steps_done = 0
        now = time.monotonic()
        self.run_began = now
        self.step_began = now
        self.phase_began = now

    def __str__(self):
        """Where the run is: "step 3, policy"."""
        return f"step {self.step + 1}, {self.phase}"

    def start(self, phase: str, step: int | None = None) -> None:
        """The phase before ends, this one begins."""
        self.stop()
        self.phase = phase
        self.phase_began = time.monotonic()
        if step is not None:
            self.step = step

    def stop(self) -> None:
        """The phase ends; what follows belongs to none."""
        if self.phase is not None:
            earlier = self.seconds.get(self.phase, 0.0)
            self.seconds[self.phase] = earlier + time.monotonic() - self.phase_began
        self.phase = None

    def end_step(self) -> dict[str, float]:
        """Seconds per phase and of the whole step; what follows belongs to the next step."""
        self.stop()
        now = time.monotonic()
        seconds = {phase: round(spent, 3) for phase, spent in self.seconds.items()}
        seconds["step"] = round(now - self.step_began, 3)
        self.seconds = {}
        self.steps_done += 1
        self.step_began = now
        return seconds

    def seconds_left(self, steps: int) -> float:
        """An estimate for `steps` more steps."""
        return (time.monotonic() - self.run_began) / self.steps_done * steps

    def elapsed(self) -> timedelta:
        """Since the run's time began."""
        return timedelta(seconds=round(time.monotonic() - self.run_began))


class RunLog:
    """The files of a run, and Weights & Biases; on ranks other than 0, nothing.

    start: the step that the run goes on with; rows of later steps are dropped, since they are
    made again. Row -1 is the evaluation before the first step.
    """

    def __init__(self, out_dir: str, start: int, rank: int, wandb_project: str | None, settings):
        self.metrics_path = os.path.join(out_dir, "metrics.jsonl")
        self.curves_path = os.path.join(out_dir, "curves.png")
        self.samples_path = os.path.join(out_dir, "samples.jsonl")
        self.page_path = os.path.join(out_dir, "tokens.html")
        self.wandb_run = None
        self.is_first = rank == 0
        if not self.is_first:
            return

        write_run_config(out_dir, settings)
        # A new run (start 0) drops row -1 as well, the evaluation before the first step.
        keep_lines(self.metrics_path, start or -1)
        keep_lines(self.samples_path, start)
        self.metrics = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115
        self.open_samples()
        if wandb_project:
            import wandb

            self.wandb_run = wandb.init(
                project=wandb_project, dir=out_dir, resume="auto", config=settings
            )

    def write(self, metrics: dict, max_steps: int, seconds_left: float) -> None:
        """A step's metrics: a row of metrics.jsonl, of Weights & Biases, and the status line."""
        if not self.is_first:
            return
        print(json.dumps(metrics), file=self.metrics)
        to_disk(self.metrics)
        print_status(metrics, max_steps, seconds_left)
        if self.wandb_run:
            self.wandb_run.log(metrics, step=metrics["step"])

    def write_first(self, metrics: dict) -> None:
        """The evaluation before the first step."""
        print0(
            "before step 1: held-out accuracy "
            f"greedy {metrics['eval_greedy']:.3f}, sampled {metrics['eval_sampled']:.3f}"
        )
        if self.is_first:
            print(json.dumps(dict(metrics, step=-1)), file=self.metrics)
            to_disk(self.metrics)

    def open_samples(self) -> None:
        """samples.jsonl, to write on at its end."""
        # Half a surrogate pair, which UTF-8 cannot write, becomes JSON's escape for it.
        self.samples = open(  # noqa: SIM115
            self.samples_path, "a", encoding="utf-8", errors="backslashreplace"
        )

    def write_samples(self, step: int, rows: list[dict], steps_kept: int | None) -> None:
        """A step's rows of samples.jsonl.

        steps_kept: after so many steps, and again after as many, all but the last so many are
        dropped; None: none is. Which are there depends on the step alone, as after a resume.
        """
        if not self.is_first:
            return
        if steps_kept and step % steps_kept == 0:
            self.samples.close()
            keep_lines(self.samples_path, step, since=step - steps_kept)
            self.open_samples()
        for row in rows:
            self.samples.write(json.dumps(row, ensure_ascii=False) + "\n")
        to_disk(self.samples)

    def close(self, finished: bool) -> None:
        """Close the files, draw the curves, write the page of tokens.

        An unfinished wandb run goes on after a restart.
        """
        if not self.is_first:
            return
        self.metrics.close()
        self.samples.close()
        plot_curves(self.metrics_path, self.curves_path)
        if os.path.getsize(self.samples_path):
            write_token_page(self.samples_path, self.page_path)
        if self.wandb_run:
            self.wandb_run.finish(exit_code=0 if finished else 1)


def check_wandb(wandb_project: str | None) -> None:
    """Raise UserError if a run is to be logged to Weights & Biases, which is not installed."""
    if wandb_project and find_spec("wandb") is None:
        raise UserError(
            "wandb_project is set, but wandb is not installed: "
            "pip install wandb, or --wandb_project=None"
        )


def print_status(metrics: dict, max_steps: int, seconds_left: float) -> None:
    """One line: the step's metrics, added ones included, its seconds per phase, and the ETA."""
    words = [f"step {metrics['step'] + 1}/{max_steps}"]
    for name, shown in STATUS:
        # Outcomes alone have no PRM.
        if name not in metrics:
            continue
        words.append(shown.format(metrics[name]))
        if name == "outcome":
            words.append(f"kept {metrics['prompts_kept']}/{metrics['prompts_drawn']}")
    for name in added_metrics(metrics):
        words.append(f"{name} {metrics[name]:.3g}")

    words.append("|")
    for phase, seconds in metrics["seconds"].items():
        words.append(f"{phase} {seconds:.1f}")
    words.append(f"s eta {timedelta(seconds=round(seconds_left))}")
    if "eval_greedy" in metrics:
        words.append(f"| held out: greedy {metrics['eval_greedy']:.3f}")
        words.append(f"sampled {metrics['eval_sampled']:.3f}")
    print0(" ".join(words))


def read_metrics(path: str):
    """A pandas table of metrics.jsonl: a row per step, a column per metric.

    What is no finite number, in a line that somebody has edited say, has no place on a curve.
    """
    import pandas

    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            metrics = json.loads(line).items()
            rows.append({name: float(value) for name, value in metrics if is_number(value)})
    return pandas.DataFrame(rows)


def plot_curves(metrics_path: str, path: str) -> None:
    """metrics.jsonl -> a figure of accuracy, PRM, policy and whatever else the run measured."""
    import matplotlib.figure

    rows = read_metrics(metrics_path)
    rows.index = rows.get("step", rows.index) + 1

    # Names per panel; an added metric has a panel to itself.
    panels = {}
    for title, names in PANELS.items():
        if set(names) & set(rows.columns):
            panels[title] = names
    for name in added_metrics(rows.columns):
        panels[name] = [name]

    grid_rows = -(-len(panels) // 3)
    figure = matplotlib.figure.Figure((13, 3.5 * grid_rows), layout="tight")
    axes = figure.subplots(grid_rows, 3).flat
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            if name not in rows:
                continue
            style = "o-" if name.startswith("eval") else "-"
            rows[name].dropna().plot(ax=axis, title=title, style=style, markersize=3, grid=True)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    """The page of tokens of a run's samples.jsonl, which lies beside it.

    Raises UserError if it is no such file.
    """
    if len(arguments) != 1:
        raise UserError("python -m lib.report takes one argument, the samples.jsonl of a run")
    (samples_path,) = arguments
    page_path = os.path.join(os.path.dirname(samples_path), "tokens.html")
    write_token_page(samples_path, page_path)
    print(f"wrote {page_path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
