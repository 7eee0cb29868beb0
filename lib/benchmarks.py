"""The benchmarks of INTELLECT-MATH, Eurus-2 and NuminaMath: their sources and how they are read."""

import collections
import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError
from lib.problems import Problem, check_truth, load_problems, read_truth
from lib.rows import check_text, is_missing, name_columns, read_rows, without_none
from lib.run import print0

# Columns whose values make groups of a benchmark's problems.
GROUP_COLUMNS = ("subject", "type", "subfield", "level", "difficulty")


@dataclass
class Benchmark:
    """Where a benchmark's problems are, and whose rules judge the answers.

    count: how many problems are published. source, config, split: of the hub data set.
    file: the name of its file in data_dir, without extension, if that is not the benchmark's name.
    rules: "prime" (PRIME's scripts) or "qwen" (those of Qwen2.5-Math): what --parity=True imitates;
    "code": the columns are those that code_row() makes; None: a file of the user's.
    """

    source: str
    count: int | None = None
    config: str | None = None
    split: str | None = "test"
    problem_column: str | None = None
    answer_column: str | None = None
    rules: str | None = None
    file: str | None = None


BENCHMARKS = {
    "gsm8k": Benchmark(
        source="openai/gsm8k",
        count=1319,
        config="main",
        problem_column="question",
        answer_column="answer",
        rules="qwen",
        file="gsm8k_test",
    ),
    "math": Benchmark(
        source="DigitalLearningGmbH/MATH-lighteval",
        count=5000,
        config="default",
        problem_column="problem",
        answer_column="solution",
        rules="qwen",
        file="math_test",
    ),
    "math500": Benchmark(
        source="HuggingFaceH4/MATH-500",
        count=500,
        problem_column="problem",
        answer_column="answer",
        rules="prime",
    ),
    "aime24": Benchmark(
        source="HuggingFaceH4/aime_2024",
        count=30,
        split="train",
        problem_column="problem",
        answer_column="answer",
        rules="prime",
    ),
    "amc": Benchmark(
        source="AI-MO/aimo-validation-amc",
        count=83,
        split="train",
        problem_column="problem",
        answer_column="answer",
        rules="prime",
        file="amc_2022_2023",
    ),
    "amc23": Benchmark(
        source="math-ai/amc23",
        count=40,
        problem_column="question",
        answer_column="answer",
        rules="prime",
    ),
    "minerva": Benchmark(
        source="math-ai/minervamath",
        count=272,
        problem_column="question",
        answer_column="answer",
        rules="qwen",
        file="minerva_math",
    ),
    # The hub has 674 of them. The column `error` is a tolerance.
    "olympiadbench": Benchmark(
        source="Hothan/OlympiadBench",
        count=675,
        config="OE_TO_maths_en_COMP",
        split="train",
        problem_column="question",
        answer_column="final_answer",
        rules="qwen",
    ),
    "humaneval": Benchmark(
        source="openai/openai_humaneval",
        count=164,
        problem_column="prompt",
        answer_column="ground_truth",
        rules="code",
    ),
    "mbpp": Benchmark(
        source="google-research-datasets/mbpp",
        count=399,
        config="sanitized",
        split="all",
        problem_column="prompt",
        answer_column="ground_truth",
        rules="code",
        file="mbpp_prime",
    ),
    # It is not on the hub: the error message for the missing file names the setting.
    "leetcode": Benchmark(
        source="data_dir/leetcode_sample.jsonl",
        count=180,
        split=None,
        problem_column="prompt",
        answer_column="ground_truth",
        rules="code",
        file="leetcode_sample",
    ),
}


def short_name(name: str) -> str:
    """What tables call a benchmark: its name in BENCHMARKS, or that of its file.

    >>> short_name("my/problems.jsonl.gz")
    'problems'
    """
    return Path(name).name.split(".")[0]


def check_dicts(
    benchmark_tokens: dict, benchmark_stop: dict, published: dict, parity_golds: dict
) -> None:
    """Raise UserError for values that no answer, or no report, can be made of.

    {benchmark: tokens}, {benchmark: text that ends an answer}, {column: {benchmark: percent}},
    {benchmark: file}.
    """
    for name, tokens in benchmark_tokens.items():
        if not isinstance(tokens, int) or tokens < 1:
            raise UserError(f"benchmark_tokens of {name} is {tokens!r}: at least 1")
    for name, stop in benchmark_stop.items():
        if stop is not None and not (isinstance(stop, str) and stop):
            raise UserError(f"benchmark_stop of {name} is {stop!r}: a text, or None")
    for name, path in parity_golds.items():
        if not isinstance(path, str):
            raise UserError(f"parity_golds of {name} is {path!r:.40}: a file")
    for column, numbers in published.items():
        if not isinstance(numbers, dict):
            raise UserError(f"published of {column!r} is {numbers!r:.40}: {{benchmark: percent}}")
        for name, number in numbers.items():
            if not isinstance(number, (int, float)) or not 0 <= number <= 100:
                raise UserError(f"published of {name} in {column!r} is {number!r}: a percentage")


def load_benchmark(
    name: str,
    *,
    data_dir: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    user_suffix: str = "",
    code_suffix: str = "",
    max_problems: int | None = None,
    golds_file: str | None = None,
    own_reward: bool = False,
) -> list[Problem]:
    """The problems of a benchmark by its name in BENCHMARKS, or of a file or folder.

    They have a group (["subject Algebra", "level 3"]), a tolerance where the benchmark grants
    one, and a published_gold where golds_file has another gold for them: rows of `unique_id` and
    `expected_answer`. problem_column and answer_column are of files that are not in BENCHMARKS.
    Raises UserError if there is no such benchmark, or its file cannot be used.
    """
    benchmark = find_benchmark(name, data_dir, problem_column, answer_column)
    rows = read_rows(benchmark.source, benchmark.split, benchmark.config, max_bad_share=0)
    suffix = user_suffix
    if benchmark.rules == "code":
        rows = [(where, code_row(where, row)) for where, row in rows]
        suffix = code_suffix

    problems = load_problems(
        benchmark.source,
        problem_column=benchmark.problem_column,
        answer_column=benchmark.answer_column,
        system_prompt=system_prompt,
        user_suffix=suffix,
        max_problems=max_problems,
        max_bad_share=0,
        rows=rows,
        own_reward=own_reward,
    )
    for problem in problems:
        problem.group = groups_of(problem.row)
        if name in BENCHMARKS:
            add_published_columns(problem, benchmark.source)
    if golds_file is not None:
        add_published_golds(problems, golds_file, name)

    check_ids(problems, benchmark.source)
    if benchmark.count is not None:
        compare_count(name, len(problems), benchmark.count, max_problems)
    return problems


def compare_count(name: str, found: int, published: int, max_problems: int | None) -> None:
    """Say if a benchmark has other problems than the published ones."""
    expected = min(published, max_problems or published)
    if found != expected:
        print0(f"note: {name} has {found} problems here, {published} are published")


def check_ids(problems: list[Problem], source: str) -> None:
    """Raise UserError if two problems have one id: answers are kept by it."""
    times = collections.Counter(str(problem.id) for problem in problems)
    for number, count in times.items():
        if count > 1:
            raise UserError(f"{source}: the id {number!r} is there twice")


def find_benchmark(
    name: str, data_dir: str | None, problem_column: str | None, answer_column: str | None
) -> Benchmark:
    """The entry of BENCHMARKS, with its source in data_dir if there is one, or one for a file."""
    if name not in BENCHMARKS:
        if not os.path.exists(name):
            guess = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0)[0]
            raise UserError(f"no such file {name!r}; did you mean {guess!r}?")
        return Benchmark(name, problem_column=problem_column, answer_column=answer_column)

    benchmark = BENCHMARKS[name]
    if not data_dir:
        return benchmark

    stem = benchmark.file or name
    found = sorted(Path(data_dir).glob(f"{stem}.*")) + sorted(Path(data_dir).glob(f"{name}.*"))
    source = str(found[0]) if found else f"{data_dir}/{stem}.jsonl"
    # A file may have other of the usual columns than the hub.
    return Benchmark(source, count=benchmark.count, rules=benchmark.rules)


def groups_of(row: dict) -> list[str]:
    """The groups that a row belongs to.

    >>> groups_of(dict(subject="Algebra", level="Level 3"))
    ['subject Algebra', 'level 3']
    """
    groups = []
    for column in GROUP_COLUMNS:
        if not is_missing(row.get(column)):
            value = str(row[column]).removeprefix("Level ")
            groups.append(f"{column} {value}")
    return groups


def add_published_columns(problem: Problem, source: str) -> None:
    """Take the id of an AMC or AIME problem and the tolerance of OlympiadBench from the row."""
    # AMC's own ids start again with each year, its links do not: ".../2022_AMC_12A/Problem_1".
    url = problem.row.get("url")
    if isinstance(url, str) and url:
        problem.id = "/".join(url.split("/")[-2:])

    # "0.1,0.1", one tolerance for each of several answers, is in no row that is used.
    error = problem.row.get("error")
    if is_missing(error) or "," in str(error):
        return
    try:
        tolerance = float(error)
    except (ValueError, TypeError, OverflowError):
        tolerance = -1.0
    if not 0 <= tolerance < math.inf:
        raise UserError(
            f"{source}, problem {problem.id}: its error, {error!r:.60}, is no number that a "
            "tolerance can be"
        )
    problem.tolerance = tolerance


def add_published_golds(problems: list[Problem], golds_file: str, name: str) -> None:
    """Give the problems the golds that a published script has edited.

    Raises UserError if the file has none for any of them, or one that is neither text nor number.
    """
    golds = {}
    for where, row in read_rows(golds_file):
        if not is_missing(row.get("expected_answer")):
            golds[str(row.get("unique_id"))] = published_gold(where, row["expected_answer"])
    for problem in problems:
        problem.published_gold = golds.get(str(problem.id))

    if not any(problem.published_gold for problem in problems):
        raise UserError(f"{golds_file}: no row has the unique_id of a problem of {name}")


def published_gold(where: str, gold) -> str:
    """A gold as a text. Raises UserError, which names its place, if it can be none."""
    try:
        text = read_truth(gold)
        check_truth("math", text)
        check_text(text)
    except ValueError as error:
        raise UserError(f"{where}: expected_answer: {error}") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected_answer is {gold!r:.60}, not one answer")
    return text


def code_row(where: str, row: dict) -> dict:
    """A row of HumanEval, MBPP or LeetCode with the columns that load_problems() takes.

    prompt: what is asked. ground_truth: a list of one program that checks the answer.
    Raises UserError for a row of something else; `where` is its place.
    """
    more = {}
    row = without_none(row)
    try:
        if "entry_point" in row:
            asked, test = humaneval_check(row)
        elif "prompt_sft" in row:
            asked = row["prompt_sft"]
            test = row["test"]
            more = dict(row.get("meta") or {})
        else:
            asked, test = mbpp_check(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where} is no row of HumanEval, MBPP or LeetCode ({error!r}); "
            f"it has {name_columns([(where, row)])}"
        ) from None
    tests = [test] if test else []
    return row | more | dict(prompt=asked, ability="code", ground_truth=tests)


def humaneval_check(row: dict) -> tuple[str, str]:
    """(what is asked, the program that checks an answer) of a row of HumanEval."""
    asked = f"```python\n{row['prompt']}```"
    if not row["test"]:
        return asked, ""
    # The check may use what comes before the function.
    before, _, _ = row["prompt"].rpartition(f"def {row['entry_point']}")
    return asked, f"{before}\n{row['test']}\ncheck({row['entry_point']})"


def mbpp_check(row: dict) -> tuple[str, str]:
    """(what is asked, the program that checks an answer) of a row of MBPP."""
    # The first assertion is shown, as PRIME does.
    asked = f"{row.get('prompt') or row['text']}\n{row['test_list'][0]}"
    lines = [*row.get("test_imports", []), row.get("test_setup_code", ""), *row["test_list"]]
    return asked, "\n".join(lines)
