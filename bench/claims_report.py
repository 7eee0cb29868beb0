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
    settings = json.loads(Path(folder, "config.json").read_text())["settings"]
    goes_on = metrics[-1]["step"] + 1 < settings["max_steps"]
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


# --------------------------------------------------------------------------------------------------
# claims


@dataclass
class Claim:
    """A sentence of a paper, and the runs that try it.

    paper  what the paper reports, and where
    pairs  (arm, the arm that it is compared with)
    axis   "samples", or "seconds" of training on one core
    """

    title: str
    paper: str
    pairs: list[tuple[str, str]]
    axis: str = "samples"

    @property
    def arms(self) -> list[str]:
        """All arms, those that others are compared with first."""
        found = [other for _, other in self.pairs] + [arm for arm, _ in self.pairs]
        return list(dict.fromkeys(found))


@dataclass
class Comparison:
    """Two arms over the seeds that have both.

    difference, error  in mean accuracy up to `end`, points, and its standard error over seeds
    ahead              the number of seeds in which the arm is ahead
    p                  two-sided, of Student's paired test
    share              of `end`, where the arm has reached what the other ends with: the median
    """

    arm: str
    other: str
    end: float
    seeds: int
    difference: float
    error: float
    ahead: int
    p: float
    share: float

    def sentence(self, axis: str) -> str:
        """What the numbers say, and no more."""
        end = f"up to {self.end:,.0f} {axis}"
        numbers = (
            f"{self.difference:+.1f} ± {self.error:.1f} points on average {end}, "
            f"ahead in {self.ahead} of {self.seeds} seeds, p = {self.p:.2g}"
        )
        if self.p >= 0.05:
            return (
                f"`{self.arm}` and `{self.other}` do not differ by what these seeds can show"
                f" ({numbers})."
            )
        word = "better" if self.difference > 0 else "worse"
        return f"`{self.arm}` is {word} than `{self.other}` ({numbers})."


def compare(
    runs: dict[str, dict[int, Curve]], arm: str, other: str, axis: str
) -> Comparison | None:
    """runs: {arm: {seed: curve}}. None where fewer than two seeds have both arms."""
    seeds = sorted(runs[arm].keys() & runs[other].keys())
    if len(seeds) < 2:
        return None
    pairs = [(runs[arm][seed], runs[other][seed]) for seed in seeds]
    end = common_end([curve for pair in pairs for curve in pair], axis)
    differences = []
    shares = []
    for curve, base in pairs:
        differences.append(100 * (curve.mean(axis, end) - base.mean(axis, end)))
        shares.append(curve.reaches(axis, base.at(axis, end)) / end)
    difference, error = mean_and_error(differences)
    return Comparison(
        arm=arm,
        other=other,
        end=end,
        seeds=len(seeds),
        difference=difference,
        error=error,
        ahead=sum(d > 0 for d in differences),
        p=t_test(differences),
        share=float(np.median(shares)),
    )


def describe_arm(curves: list[Curve], axis: str, end: float) -> dict:
    """What a table says of an arm: percent, and standard errors over seeds."""
    row = {}
    row["before"] = mean_and_error([100 * curve.accuracy[0] for curve in curves])
    row["on the way"] = mean_and_error([100 * curve.mean(axis, end) for curve in curves])
    row["at the end"] = mean_and_error([100 * curve.at(axis, end) for curve in curves])
    for name in ("prm_pair_accuracy", "wrong_step_found", "wrong_step_chance", "step_auc"):
        means = []
        for curve in curves:
            values = [metrics[name] for metrics in curve.metrics if name in metrics]
            if values:
                means.append(float(np.mean(values)))
        if len(means) > 1:
            row[name] = mean_and_error(means)
    return row


# --------------------------------------------------------------------------------------------------
# what is written


def read_runs(folders: dict[int, Path], names: list[str]) -> dict[str, dict[int, Curve]]:
    """{arm: {seed: curve}} of the runs that are finished."""
    runs = {name: {} for name in names}
    for name in names:
        for seed, folder in folders.items():
            if (folder / name / "policy" / "model.safetensors").exists():
                runs[name][seed] = read_curve(folder / name)
    return runs


def claim_results(claim: Claim, runs: dict) -> dict | None:
    """{comparisons, arms, end} of a claim; None where its runs are missing."""
    comparisons = []
    for arm, other in claim.pairs:
        if arm in runs and other in runs:
            found = compare(runs, arm, other, claim.axis)
            if found:
                comparisons.append(found)
    if not comparisons:
        return None
    end = min(comparison.end for comparison in comparisons)
    arms = {}
    for name in claim.arms:
        if name in runs and len(runs[name]) > 1:
            arms[name] = describe_arm(list(runs[name].values()), claim.axis, end)
    return dict(comparisons=comparisons, arms=arms, end=end)


def claim_text(claim: Claim, found: dict) -> str:
    """A claim as Markdown: the paper, a table of its arms, a sentence per comparison."""
    lines = [f"## {claim.title}", "", f"*Published:* {claim.paper}", ""]
    columns = list(dict.fromkeys(name for row in found["arms"].values() for name in row))
    lines.append(f"| {found['end']:,.0f} {claim.axis} | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in found["arms"].items():
        cells = []
        for column in columns:
            if column not in row:
                cells.append("")
                continue
            mean, error = row[column]
            digits = 1 if column in ("before", "on the way", "at the end") else 2
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines.append("")
    for comparison in found["comparisons"]:
        line = comparison.sentence(claim.axis)
        if comparison.share <= 1:
            line += (
                f" It reaches what `{comparison.other}` ends with after "
                f"{comparison.share:.0%} of the {claim.axis} (median)."
            )
        lines.append(f"- {line}")
    return "\n".join(lines) + "\n"


@dataclass
class TableClaim:
    """A claim about scores of evaluate.py, not about curves.

    columns  {column: (folder of a seed's results, metric)}
    pair     two columns that are compared
    """

    title: str
    paper: str
    columns: dict[str, tuple[str, str]]
    pair: tuple[str, str]


def read_score(folder: Path, metric: str) -> float | None:
    """Percent of a metric in the results.json of one model on one benchmark; None without file."""
    path = folder / "results.json"
    if not path.exists():
        return None
    (model,) = json.loads(path.read_text())["models"].values()
    (benchmark,) = model.values()
    mean, _ = benchmark["score"][metric]
    return 100 * mean


def table_results(claim: TableClaim, folders: dict[int, Path]) -> dict | None:
    """{scores: {column: mean and error}, difference, p, seeds}; None for less than two seeds."""
    scores = {column: [] for column in claim.columns}
    for folder in folders.values():
        row = {}
        for column, (name, metric) in claim.columns.items():
            row[column] = read_score(folder / name, metric)
        if None in row.values():
            continue
        for column, value in row.items():
            scores[column].append(value)

    ours, others = (scores[column] for column in claim.pair)
    if len(ours) < 2:
        return None
    differences = [a - b for a, b in zip(ours, others)]
    return dict(
        scores={column: mean_and_error(values) for column, values in scores.items()},
        difference=mean_and_error(differences),
        p=t_test(differences),
        seeds=len(differences),
    )


def table_text(claim: TableClaim, found: dict) -> str:
    """The claim as Markdown."""
    cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in found["scores"].values()]
    mean, error = found["difference"]
    ours, others = claim.pair
    lines = [
        f"## {claim.title}",
        "",
        f"*Published:* {claim.paper}",
        "",
        "| " + " | ".join(found["scores"]) + " |",
        "|---" * len(cells) + "|",
        "| " + " | ".join(cells) + " |",
        "",
        f"- {ours} against {others}: {mean:+.1f} ± {error:.1f} points, {found['seeds']} seeds, "
        f"p = {found['p']:.2g}.",
        "",
    ]
    return "\n".join(lines)


def draw(claims: list[tuple[Claim, dict]], runs: dict, path: Path) -> None:
    """A panel per claim: mean accuracy over seeds, and a band of its standard error."""
    import matplotlib.figure

    across = 3
    down = -(-len(claims) // across)
    figure = matplotlib.figure.Figure((5 * across, 3.8 * down), layout="tight")
    panels = figure.subplots(down, across, squeeze=False).flat
    for panel in panels:
        panel.set_visible(False)
    for panel, (claim, found) in zip(figure.axes, claims):
        panel.set_visible(True)
        for number, name in enumerate(found["arms"]):
            grid = np.linspace(0, found["end"], 60)
            heights = []
            for curve in runs[name].values():
                heights.append(100 * np.interp(grid, curve.axis(claim.axis), curve.accuracy))
            mean = np.mean(heights, 0)
            error = np.std(heights, 0, ddof=1) / math.sqrt(len(heights))
            look = number % len(STYLES)
            colour = COLOURS[look]
            panel.plot(grid, mean, STYLES[look], color=colour, label=name, linewidth=1.6)
            panel.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.15)
        panel.set_title(claim.title, fontsize=9)
        panel.set_xlabel(f"{claim.axis}" + (" of one core" if claim.axis == "seconds" else ""))
        panel.set_ylabel("% right at T = 1")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=72)


def write_report(
    out: Path,
    folders: dict[int, Path],
    names: list[str],
    claims: list[Claim],
    table_claims: list[TableClaim],
    head: str,
) -> None:
    """claims.md, claims.json and claims.png in `out`, of the runs that there are.

    folders: {seed: its folder}. names: of the arms. head: the first lines of claims.md.
    """
    runs = read_runs(folders, names)
    shown = []
    for claim in claims:
        found = claim_results(claim, runs)
        if found:
            shown.append((claim, found))

    text = head + "\n![curves](claims.png)\n\n"
    text += "\n".join(claim_text(claim, found) for claim, found in shown)
    everything = []
    for claim in table_claims:
        found = table_results(claim, folders)
        if found:
            text += "\n" + table_text(claim, found)
            everything.append(vars(claim) | found)
    (out / "claims.md").write_text(text)

    for claim, found in shown:
        comparisons = [vars(comparison) for comparison in found["comparisons"]]
        everything.append(vars(claim) | dict(found, comparisons=comparisons))
    (out / "claims.json").write_text(json.dumps(everything, indent=1))
    if shown:
        draw(shown, runs, out / "claims.png")
    print(f"wrote {out}/claims.md, claims.json and claims.png: {len(shown)} claims")
