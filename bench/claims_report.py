"""What bench/claims.py has run -> claims.md, claims.json and claims.png."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import mpmath
import numpy as np

# Phases of a step that are no training.
NOT_COUNTED = ("eval", "save", "step")
# Lines differ in grey and in style: a print in black and white tells them apart.
STYLES = ["-", "--", ":", "-."]
COLOURS = ["#111111", "#c2410c", "#2563eb", "#7c9a2c"]


@dataclass
class Curve:
    """A run: accuracy on held-out problems at temperature 1 over samples drawn, or over seconds.

    samples, seconds, accuracy  [evaluations]; the first one is before training
    goes_on  has the run ended because it had nothing more to learn from? Then its last accuracy
             counts for later samples, too
    """

    samples: np.ndarray
    seconds: np.ndarray
    accuracy: np.ndarray
    goes_on: bool
    metrics: list[dict] = field(repr=False)

    def axis(self, name: str) -> np.ndarray:
        return getattr(self, name)

    def mean(self, axis: str, end: float) -> float:
        """Mean accuracy from 0 to `end` samples or seconds, the area under the curve over `end`.

        The last accuracy goes on to the right.

        >>> Curve(np.array([0, 10]), None, np.array([0.0, 1.0]), True, []).mean("samples", 20)
        0.75
        """
        x = self.axis(axis)
        inside = x < end
        corners = np.append(x[inside], end)
        heights = np.interp(corners, x, self.accuracy)
        return float(np.trapezoid(heights, corners) / end)

    def at(self, axis: str, x: float) -> float:
        return float(np.interp(x, self.axis(axis), self.accuracy))

    def reaches(self, axis: str, accuracy: float) -> float:
        """Where the curve first reaches an accuracy, interpolated; inf if it never does."""
        x = self.axis(axis)
        above = np.flatnonzero(self.accuracy >= accuracy)
        if len(above) == 0:
            return math.inf
        i = above[0]
        if i == 0:
            return float(x[0])
        share = (accuracy - self.accuracy[i - 1]) / (self.accuracy[i] - self.accuracy[i - 1])
        return float(x[i - 1] + share * (x[i] - x[i - 1]))


def read_curve(folder: Path) -> Curve:
    """The curve of a run of prime.py."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    samples = []
    seconds = []
    accuracy = []
    spent = 0.0
    for row in metrics:
        for phase, value in row.get("seconds", {}).items():
            if phase not in NOT_COUNTED:
                spent += value
        if "eval_sampled" in row:
            samples.append(row.get("samples", 0))
            seconds.append(spent)
            accuracy.append(row["eval_sampled"])
    max_steps = json.loads(Path(folder, "config.json").read_text())["max_steps"]
    goes_on = metrics[-1]["step"] + 1 < max_steps
    return Curve(np.array(samples), np.array(seconds), np.array(accuracy), goes_on, metrics)


def common_end(curves: list[Curve], axis: str) -> float:
    """Up to where all curves say something."""
    ends = [curve.axis(axis)[-1] for curve in curves if not curve.goes_on]
    if not ends:
        ends = [max(curve.axis(axis)[-1] for curve in curves)]
    return float(min(ends))


def t_test(differences: list[float]) -> float:
    """Two-sided p of Student's paired test: are the differences 0 on average?

    >>> round(t_test([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    n = len(differences)
    error = np.std(differences, ddof=1) / math.sqrt(n)
    if error == 0:
        return 1.0 if np.mean(differences) == 0 else 0.0
    t = np.mean(differences) / error
    x = (n - 1) / (n - 1 + t * t)
    return float(mpmath.betainc((n - 1) / 2, 0.5, 0, x, regularized=True))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def write_report(out: Path, folders: dict[int, Path], names: list[str]) -> None:
    """claims.md, claims.json and claims.png in `out`, of the runs that there are."""
