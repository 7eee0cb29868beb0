r"""
The one judge of answers: generate.py, prime.py and evaluate.py use it unchanged.

    >>> grade_math(r"... so its area is \boxed{\tfrac12\text{ cm}^2}.", "0.5")
    True

A mathematical answer is taken from its box (lib/extraction.py) and compared by value
(lib/mathexpr.py). A program is run against tests (lib/code_tests.py), in a sandbox
(lib/sandbox.py). Anything else is up to a reward of the user's own, a file with a function
`reward(response, problem) -> float` (lib/own_reward.py). Grader does all of this for many responses
at once, in child processes with deadlines.
"""

import collections
import concurrent.futures
import json
import math
import os
import sys
import textwrap
import threading
import time

from configurator import UserError
from lib import own_reward
from lib.code_tests import find_program, outputs_agree, read_tests, words
from lib.extraction import extract_answer, golds, last_boxes
from lib.mathexpr import judge
from lib.sandbox import (
    PRELUDE,
    ChildDied,
    ChildTimeout,
    GraderError,
    RunResult,
    ask,
    isolation,
    kill,
    run_python,
)
from lib.sandbox_child import end_with_parent, serve

__all__ = ["extract_answer", "golds", "verdict", "is_equiv", "grade_math", "grade_code"]
__all__ += ["Grader", "Score", "GraderError", "RunResult", "isolation", "run_python"]

# What a child process runs.
CHILD_FILE = os.path.abspath(__file__)
# Seconds that a child has to import the file of an own reward: it may load a model.
LOAD_SECONDS = 300
# Different complaints, of an own reward say, that are printed.
MAX_COMPLAINTS = 20
# After so many items in a row without a child that works, the run ends.
MAX_BROKEN = 20
# A program that fails this many tests from the first on is not run against the rest.
FIRST_TESTS = 5
# Characters of output, or of a value's JSON, beyond the expected ones that are looked at.
MAX_EXTRA_OUTPUT = 10_000


# --- mathematics ---


def verdict(
    answer: str, gold, parity: bool = False, tolerance: float | None = None
) -> tuple[bool, bool]:
    """(right, unparsed): does the answer equal a gold? If not, was there a text nobody could read?

    parity, tolerance: see is_equiv.
    """
    unparsed = False
    answer = extract_answer(answer) or answer
    for text in golds(gold):
        try:
            if judge(answer, text, parity, tolerance):
                return True, False
        except Exception:
            # Unparsed, as a rule. A bug of ours, or one of sympy's, costs this answer alone.
            unparsed = True
    return False, unparsed


def is_equiv(answer: str, gold, *, parity: bool = False, tolerance: float | None = None) -> bool:
    """Mathematical equality of an answer and a gold (see golds).

    tolerance: an absolute error of numbers. parity: the lenient rules that published tables rest
    on, for comparison with them, never for rewards. Never raises, and evaluates nothing as Python;
    a time limit is up to Grader.
    """
    if not isinstance(answer, str):
        return False
    right, _ = verdict(answer, gold, parity, tolerance)
    return right


def grade_math(
    response: str,
    gold,
    fallback: bool = False,
    *,
    parity: bool = False,
    tolerance: float | None = None,
) -> bool:
    """Does the answer of a response equal the gold? False if it has none.

    fallback: see extract_answer; the others: see is_equiv.
    """
    right, _ = response_verdict(response, gold, fallback, parity, tolerance)
    return right


def response_verdict(
    response: str, gold, fallback: bool, parity: bool, tolerance: float | None
) -> tuple[bool, bool]:
    """verdict() on the answer of a response; (False, False) if it has none."""
    answer = extract_answer(response, fallback)
    if answer is None:
        return False, False
    right, unparsed = verdict(answer, gold, parity, tolerance)
    boxes = last_boxes(response)
    if right or len(boxes) < 2:
        return right, unparsed

    # Several boxes are a list, or one answer in several spellings: red and \text{red}.
    for text in golds(gold):
        if all(is_equiv(box, text, parity=parity, tolerance=tolerance) for box in boxes):
            return True, False
    return False, unparsed


# --- grading at scale ---


class Score(float):
    """A grade in [0, 1]. failure: None, or why it is 0.0.

    "timeouts": the deadline has passed. "crashes": the child process died, or did not start.
    "unparsed": the text of an answer could not be read. "reward": an own reward raised, or returned
    no number in [0, 1].
    """

    def __new__(cls, value: float, failure: str | None = None):
        score = super().__new__(cls, value)
        score.failure = failure
        return score


class ThreadsChild(threading.local):
    """The child process of each thread: a list of one, or of none before the first item.

    all_lists: gets the lists of all threads.
    """

    def __init__(self, all_lists: list[list]):
        self.idle = []
        all_lists.append(self.idle)


class Grader:
    """Grades responses in child processes: one that hangs, crashes or eats memory scores 0.0.

        with Grader() as grader:
            scores = grader.grade(["... \\boxed{4}"], [{"ability": "math", "ground_truth": "4"}])

    A reference is {"ability": "math" or "code", "ground_truth": ...}, for mathematics with
    "tolerance" if it has one. With an own reward it is anything that JSON can hold.

    workers: children, by default one per core. timeout: seconds per item, from when a child starts
    on it; for programs, per test. code_timeout: seconds for a program and all of its tests.
    memory_mb: memory of a child, for an own reward beyond what its imports take. fallback, parity:
    see grade_math. reward: a file with `reward(response: str, problem: dict) -> float` in [0, 1],
    which then grades everything; `problem` is the reference.

    failures counts items by Score.failure. The children are new interpreters, which is safe after
    CUDA has started, and end with the `with` block, or with their parent. One that breaks or does
    not start costs its item; GraderError is raised only after MAX_BROKEN such items in a row, or
    four per worker if that is more. Raises UserError if there is no such reward.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        code_timeout: float = 60.0,
        fallback: bool = False,
        parity: bool = False,
        reward: str | None = None,
    ):
        self.timeout = timeout
        self.code_timeout = code_timeout
        self.memory_mb = memory_mb
        self.fallback = fallback
        self.parity = parity
        self.failures = collections.Counter()
        self.lock = threading.Lock()

        # Each thread waits for one child.
        workers = workers or os.cpu_count()
        self.threads = concurrent.futures.ThreadPoolExecutor(workers)
        self.children = []
        self.child = ThreadsChild(self.children)
        # Items in a row that had no child, and how many may be.
        self.broken = 0
        self.max_broken = max(MAX_BROKEN, 4 * workers)

        self.reward = None
        self.folder = os.getcwd()
        self.complaints = set()
        if reward is not None:
            self.reward = os.path.abspath(reward)
            self.check_reward()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Waits for the items that are being graded, then ends all children."""
        self.threads.shutdown(cancel_futures=True)
        for idle in self.children:
            end_children(idle)

    @property
    def timeouts(self) -> int:
        return self.failures["timeouts"]

    @property
    def crashes(self) -> int:
        return self.failures["crashes"]

    @property
    def unparsed(self) -> int:
        return self.failures["unparsed"]

    def grade(self, responses: list[str], references: list[dict]) -> list[Score]:
        """The scores of all responses, in their order."""
        futures = []
        for response, reference in zip(responses, references, strict=True):
            futures.append(self.submit(response, reference))
        return [future.result() for future in futures]

    def submit(self, response: str, reference: dict) -> concurrent.futures.Future:
        """A Future of the score of one response. Raises ValueError if nothing can grade it."""
        ability = reference.get("ability")
        if self.reward is None and ability not in ("math", "code"):
            raise ValueError(f"a reference needs the ability 'math' or 'code', not {ability!r}")
        return self.threads.submit(self.work, response, reference)

    def compare(self, answer: str, gold, parity: bool = False) -> concurrent.futures.Future:
        """A Future of is_equiv(answer, gold, parity=parity); it is False at the deadline."""
        return self.threads.submit(self.ask_equal, answer, gold, parity)

    def is_equiv(self, answer: str, gold, parity: bool = False) -> bool:
        """compare(), and waits for it."""
        return self.compare(answer, gold, parity).result()

    def work(self, response: str, reference: dict) -> Score:
        """One item, in a thread of the pool."""
        try:
            score = self.score(response, reference)
            self.broken = 0
        except GraderError as error:
            self.count_broken(error)
            score = Score(0.0, "crashes")
        if score.failure is not None:
            with self.lock:
                self.failures[score.failure] += 1
        return score

    def score(self, response: str, reference: dict) -> Score:
        """One item. Raises GraderError if a child reports a bug, or does not start."""
        if self.reward is not None:
            score = self.ask_reward(response, reference)
            if score.failure == "crashes":
                # As in ask_twice().
                score = self.ask_reward(response, reference)
            return score
        if reference["ability"] == "code":
            tests = reference["ground_truth"]
            return grade_code(response, tests, self.timeout, self.code_timeout)
        return self.ask_judge(response, reference)

    def count_broken(self, error: GraderError):
        """Prints a bug of ours, once, or a child that does not start. Raises it if it goes on."""
        self.complain(str(error).strip(), "grader")
        with self.lock:
            self.broken += 1
            if self.broken >= self.max_broken:
                raise error

    def ask_child(self, seconds: float, task: str, *arguments):
        """The reply of this thread's child (see answer_task)."""
        return ask(self.child.idle, CHILD_FILE, None, seconds, [task, *arguments])

    def ask_twice(self, seconds: float, task: str, *arguments):
        """ask_child(), and again if the child dies: a text that ends its judge does so twice.

        What else ends a process, such as a machine that is short of memory, seldom does.
        """
        try:
            return self.ask_child(seconds, task, *arguments)
        except ChildDied:
            return self.ask_child(seconds, task, *arguments)

    def ask_judge(self, response: str, reference: dict) -> Score:
        gold = own_reward.as_plain_json(reference["ground_truth"])
        tolerance = reference.get("tolerance")
        options = [self.fallback, self.parity, self.memory_mb]
        try:
            reply = self.ask_twice(self.timeout, "math", response, gold, tolerance, *options)
        except ChildTimeout:
            return Score(0.0, "timeouts")
        except ChildDied:
            return Score(0.0, "crashes")
        return Score(*reply)

    def ask_equal(self, answer: str, gold, parity: bool) -> bool:
        # A child with an own reward may have imported gigabytes: this limit would be below that.
        memory_mb = self.memory_mb if self.reward is None else None
        try:
            same = self.ask_twice(self.timeout, "equal", answer, gold, parity, memory_mb)
            self.broken = 0
            return same
        except (ChildTimeout, ChildDied):
            return False
        except GraderError as error:
            self.count_broken(error)
            return False

    def ask_reward(self, response: str, reference: dict) -> Score:
        # Loading has a time limit of its own; a child that has loaded the file replies at once.
        message = self.load_reward()
        if message is not None:
            self.complain(message)
            return Score(0.0, "reward")

        problem = own_reward.as_plain_json(reference)
        try:
            arguments = [self.reward, response, problem, self.memory_mb]
            reply = self.ask_child(self.timeout, "reward", *arguments)
        except ChildTimeout:
            self.complain(f"{self.reward}: reward did not return within {self.timeout} seconds")
            return Score(0.0, "timeouts")
        except ChildDied:
            self.complain(f"{self.reward}: reward ended its process")
            return Score(0.0, "crashes")

        value, message, is_out_of_memory = reply
        if is_out_of_memory:
            end_children(self.child.idle)
        if message is not None:
            self.complain(message)
            return Score(0.0, "reward")
        return Score(value)

    def load_reward(self) -> str | None:
        """Has this thread's child import the own reward. Returns None, or what is wrong."""
        try:
            return self.ask_child(LOAD_SECONDS, "load", self.reward, self.folder)
        except ChildTimeout:
            return f"{self.reward}: importing it took more than {LOAD_SECONDS} seconds"
        except ChildDied:
            return f"{self.reward}: importing it ended the process"

    def check_reward(self):
        """Imports the own reward in a child, so that a mistake ends the run before it begins."""
        message = f"no such file {self.reward}"
        if os.path.isfile(self.reward):
            message = self.threads.submit(self.load_reward).result()
        if message is not None:
            self.close()
            raise UserError(f"reward: {message}")

    def complain(self, message: str, source: str = "reward"):
        """Prints a message, once, however many responses it concerns."""
        with self.lock:
            if message in self.complaints or len(self.complaints) > MAX_COMPLAINTS:
                return
            self.complaints.add(message)
            if len(self.complaints) > MAX_COMPLAINTS:
                message = "other messages like these are not shown"
            print(f"{source}: {message}", file=sys.stderr, flush=True)


def end_children(idle: list):
    """Ends the children of a list; whoever wants one of it gets a new one."""
    while idle:
        kill(idle.pop())


# --- in a child ---


def answer_task(task: str, *arguments):
    """The reply to a request of Grader.ask_child."""
    if task == "math":
        return judge_response(*arguments)
    if task == "equal":
        return judge_equal(*arguments)
    if task == "load":
        return own_reward.load(*arguments)
    return own_reward.call(*arguments)


def judge_response(
    response: str, gold, tolerance: float | None, fallback: bool, parity: bool, memory_mb: int
) -> tuple[float, str | None]:
    """(score, failure) of a mathematical answer."""
    own_reward.limit_memory(memory_mb << 20)
    right, unparsed = response_verdict(response, gold, fallback, parity, tolerance)
    return float(right), "unparsed" if unparsed else None


def judge_equal(answer: str, gold, parity: bool, memory_mb: int | None) -> bool:
    if memory_mb is not None:
        own_reward.limit_memory(memory_mb << 20)
    return is_equiv(answer, gold, parity=parity)


# --- code rewards ---


def grade_code(response: str, tests, timeout: float = 10.0, total: float = math.inf) -> Score:
    r"""The share of `tests` that the last ```python block of a response passes.

    tests: see read_tests, which raises ValueError if they have no known form. timeout: seconds per
    test. total: seconds for all; beyond them the score is 0.0. All tests count, unlike in PRIME's
    own scorer; but if the first five fail, the rest is not run. Output is compared line by line
    and word by word, see outputs_agree().

    >>> grade_code("```python\nprint(int(input()) + 1)\n```", {"inputs": ["1"], "outputs": ["2"]})
    1.0
    """
    tests = read_tests(tests)
    program = find_program(response)
    if program is None:
        return Score(0.0)
    code = textwrap.dedent(program)

    deadline = time.monotonic() + total
    passed = 0
    for number, test in enumerate(tests, 1):
        remaining = deadline - time.monotonic()
        if passes(code, test, min(timeout, remaining)):
            passed += 1
        if time.monotonic() > deadline:
            return Score(0.0, "timeouts")
        if number == FIRST_TESTS and passed == 0:
            break
    return Score(passed / len(tests))


def passes(code: str, test, timeout: float) -> bool:
    """Does a program pass a test: a text with assertions, or (input, output, function or None)?"""
    if isinstance(test, str):
        result = run_python(code, timeout=timeout, prelude=PRELUDE, test=test)
        return result.returncode == 0
    given, wanted, function = test
    if function:
        try:
            return returns(code, function, given, wanted, timeout)
        except (ValueError, RecursionError):
            # A test that is not JSON; a program that returned no value, or a deeply nested one.
            return False
    return prints(code, given, wanted, timeout)


def prints(code: str, given, wanted, timeout: float) -> bool:
    """Does a program turn this standard input into this output? Lists are lines."""
    if isinstance(given, list):
        given = "\n".join(map(str, given))
    if isinstance(wanted, list):
        wanted = "\n".join(map(str, wanted))
    wanted = str(wanted)
    result = run_python(code, str(given), timeout, prelude=PRELUDE)
    # Megabytes of output are wrong without a look at them.
    if len(result.stdout) > 4 * len(wanted) + MAX_EXTRA_OUTPUT:
        return False
    return result.returncode == 0 and outputs_agree(words(result.stdout), words(wanted))


CALL = """import json
from math import inf, nan

def find(name):
    if 'Solution' in defined:
        try:
            return getattr(Solution(), name)
        except Exception:
            # A class of this name may want arguments, and be there for something else.
            if name not in defined:
                raise
    return defined[name]

print(json.dumps(find({name!r})(*{arguments!r})))"""


def returns(code: str, function: str, given, wanted, timeout: float) -> bool:
    """Does a method of class Solution, or a function, return `wanted`?

    given: its arguments, or a text with the JSON of one argument per line; wanted can then be JSON
    as well. Raises ValueError if there is no JSON where it should be.
    """
    arguments = given
    if isinstance(given, str):
        arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
    test = CALL.format(name=function, arguments=arguments)
    result = run_python(code, timeout=timeout, prelude=PRELUDE, test=test)
    longest = 4 * len(json.dumps(wanted, default=str)) + MAX_EXTRA_OUTPUT
    if result.returncode != 0 or len(result.stdout) > longest:
        return False
    value = json.loads(result.stdout)

    # Some data sets put the value into a list.
    if outputs_agree(value, wanted) or outputs_agree([value], wanted):
        return True
    is_text = isinstance(given, str) and isinstance(wanted, str)
    return is_text and outputs_agree(value, json.loads(wanted))


if __name__ == "__main__":
    end_with_parent()
    serve(answer_task)
