"""
Answers that call Python: the conversation of a model with an interpreter.

An answer stops where it has written ```output, its last program runs in the sandbox, what the
program printed is appended to the answer, and the model goes on. This is how NuminaMath-7B-TIR
works (kaggle-solution.ipynb of github.com/project-numina/aimo-progress-prize). Where we differ from
it: docs/tools.md.

sample() samples answers, with a tool or without; stream_answers() also grades them and writes them
to a file. The engine and the grader come in as arguments.
"""

import ast
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from lib.answers import TOOL_END, TOOL_STOP, Answer, Request
from lib.pretrained import encode_words
from lib.problems import Problem
from lib.sandbox import REPLAY, run_python

# Conversations that advance together.
CONVERSATIONS = 4096
# What programs need not import, as in Numina's notebook.
IMPORTS = "import math\nimport numpy as np\nimport sympy as sp\n"
# Characters that a model is shown of its program's output.
SHOWN_CHARACTERS = 200

FENCED_BLOCK = re.compile(r"```(\w*)\r?\n(.*?)```", re.DOTALL)


@dataclass
class Tool:
    """A Python interpreter, and how answers may use it.

    rounds: how often the model writes; one more than programs run. timeout: seconds per program.
    numina: the rules of Numina's notebook to the letter, see next_move() and print_last_line().
    """

    rounds: int
    timeout: float = 5.0
    numina: bool = False


# ----------------------------------------------------------------------------------------------
# one program


def run_tool(
    code: str, earlier: list[str], timeout: float = 5.0, numina: bool = False
) -> tuple[str, bool]:
    """Run a model's program -> (what the model is shown, whether the program succeeded).

    Shown is what it printed and the value of its last line, as in a notebook, or its error; at most
    200 characters. earlier: programs of the same answer that succeeded. What they defined is
    there, what they printed is not shown again. With numina nothing of them is left.

        code         x = 3          print(1)      1 / 0
                     x ** 2
        shown        9              1             Traceback (most recent call last): ...
                                                  ZeroDivisionError: division by zero
        succeeded    True           True          False
    """
    code = re.sub("\r\n?", "\n", code)
    if numina:
        prelude = IMPORTS
        program = print_last_line(code)
    else:
        prelude = f"{IMPORTS}{REPLAY}replay({earlier!r})\ndel replay"
        program = print_last_value(code)

    result = run_python(program, timeout=timeout, prelude=prelude)
    succeeded = result.returncode == 0 and not result.timed_out
    if result.timed_out:
        shown = f"Timed out after {timeout:g} seconds."
    elif succeeded:
        shown = result.stdout.strip()
    else:
        shown = result.stderr.strip()
    shown = re.sub("\r\n?", "\n", shown)

    if len(shown) > SHOWN_CHARACTERS:
        shown = shown[:SHOWN_CHARACTERS] + " ... (output truncated)"
    # Three backticks of its own would end the block that it is put into.
    return shown.replace("```", "'''"), succeeded


def print_last_value(code: str) -> str:
    r"""The program, changed so that it prints the value of its last line, as a notebook does.

    A last line that is no expression, or prints by itself, is left as it is.

    >>> print(print_last_value("x = 3\nx ** 2  # nine"))
    x = 3
    _ = (x ** 2
    )
    if _ is not None: print(_)
    >>> print(print_last_value("a = 5; f(\n  a\n)"))
    a = 5; _ = (f(
      a
    )
    )
    if _ is not None: print(_)
    >>> print(print_last_value("x = 3\nprint(x)"))
    x = 3
    print(x)
    """
    lines = code.rstrip().split("\n")
    last = last_statement(code)
    if isinstance(last, ast.Expr) and not is_print(last.value):
        # The columns of ast count bytes.
        first_line = lines[last.lineno - 1]
        before = first_line.encode()[: last.col_offset].decode()
        expression = ast.get_source_segment(code, last)
        lines[last.lineno - 1 :] = [
            f"{before}_ = ({expression}\n)",
            "if _ is not None: print(_)",
        ]
    return "\n".join(lines)


def last_statement(code: str) -> ast.stmt | None:
    """The syntax tree of a program's last statement; None if there is none, or no valid program."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The run will tell the model.
        return None
    return statements[-1] if statements else None


def is_print(node: ast.expr) -> bool:
    """Is this expression a call of print?"""
    if not isinstance(node, ast.Call):
        return False
    return isinstance(node.func, ast.Name) and node.func.id == "print"


def print_last_line(code: str) -> str:
    r"""The program as Numina's notebook runs it: its last line is put into print(), whatever it is.

    >>> print_last_line("x = 3\nx  # three")
    'x = 3\nprint(x  )'
    >>> print_last_line("x = 3")
    'print(x = 3)'
    >>> print_last_line("print(3)")
    'print(3)'
    """
    lines = code.rstrip().split("\n")
    if "print(" not in lines[-1]:
        expression = lines[-1].split("#")[0]
        lines[-1] = f"print({expression})"
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# one conversation


def next_move(text: str, reason: str, numina: bool = False) -> str:
    """What a conversation does after the engine stopped: one of three moves, or an ending.

    text: the answer so far. reason: the engine's finish_reason; "string" means that the model has
    written ```output. The moves are
        "call"          run the last program and append its output
        "continue"      let the model write on after the end of its answer (numina only)
        "restart"       throw the text away and sample it again (numina only)
    and the endings
        "stop"          the model has ended its answer
        "length"        there is no room left
        "malformed"     it asks for output but has written no program since the last one

    Ours: a call needs a program right before it, and the model's own end is the end.

        ...```python print(1)``` ```output      call
        ...prose            ```output           malformed
        ...the answer is 1. <end>               stop

    Numina's notebook wants a program in every answer and the result in its last 100 characters. It
    then lets the model write on, and the last result counts.

        prose, \\boxed{1} <end>                                    restart
        ```python ...``` ```output                                call
        ```python ...``` ```output 1``` ... a long speech <end>   restart
        ```python ...``` ```output 1``` \\boxed{1} <end>           continue
        ```python ...``` \\boxed{1} <end>                          malformed
    """
    blocks = [language for language, _ in FENCED_BLOCK.findall(text)]
    called = reason == "string"

    if not numina:
        if not called:
            return reason
        # The tool's own ```output block is the last one if there is no new program.
        return "call" if blocks[-1:] == ["python"] else "malformed"

    if "python" not in blocks:
        return "restart"
    if called:
        return "call"
    answered = re.search(r"answer is|\\boxed", text[-100:])
    if not answered:
        return "restart"
    return "continue" if "output" in blocks else "malformed"


def last_program(text: str) -> str:
    """The code of the last python block."""
    programs = [code for language, code in FENCED_BLOCK.findall(text) if language == "python"]
    return programs[-1]


@dataclass
class Conversation:
    """An answer in the making.

    number, request: as the caller gave them. max_tokens: of the whole answer, the tool's words
    included. answer: what is written so far. turn: how often the model has written. code, running:
    the program that it waits for. earlier: programs that succeeded. answered: with numina's rules
    the last complete answer, which counts if no other follows.
    """

    number: int
    request: Request
    max_tokens: int
    answer: Answer = field(default_factory=lambda: Answer([], [], ""))
    turn: int = 0
    code: str = ""
    running: Future | None = None
    earlier: list[str] = field(default_factory=list)
    answered: Answer | None = None

    def next_request(self) -> Request:
        """What the engine is asked next: to go on after the prompt and all that is written."""
        return Request(
            prompt=self.request.prompt + self.answer.tokens,
            # Each turn has its own: with the same random numbers a model may repeat itself.
            seed=self.request.seed + self.turn,
            temperature=self.request.temperature,
            top_p=self.request.top_p,
            max_tokens=self.max_tokens - len(self.answer.tokens),
            stop=TOOL_STOP,
        )

    def write(self, more: Answer) -> None:
        """Append what the model has written in this turn."""
        self.turn += 1
        self.answer.tokens += more.tokens
        self.answer.logprobs += more.logprobs
        self.answer.mask += more.mask

    def start(self, pool: ThreadPoolExecutor, code: str, tool: Tool) -> None:
        """Start a program of the model's."""
        self.code = code
        self.running = pool.submit(run_tool, code, self.earlier, tool.timeout, tool.numina)

    def output(self) -> str:
        """What the model is shown of its program; waits for its end."""
        shown, succeeded = self.running.result()
        if succeeded:
            self.earlier.append(self.code)
        return shown

    def write_output(self, tokens: list[int]) -> None:
        """Append the tool's words, as far as they fit and leave the model a token."""
        room = self.max_tokens - len(self.answer.tokens) - 1
        tokens = tokens[:room]
        self.answer.tokens += tokens
        self.answer.logprobs += [0.0] * len(tokens)
        self.answer.mask += [0] * len(tokens)

    def decide(self, text: str, reason: str, tool: Tool) -> str:
        """The next move (see next_move), or how the conversation ends.

        One more ending is "rounds": it would go on, but the model has written tool.rounds times.
        """
        move = next_move(text, reason, tool.numina)
        if move == "continue":
            # It goes on without its end token, which would tell the model that it has finished.
            self.answered = self.answer
            whole = self.answer
            self.answer = Answer(whole.tokens[:-1], whole.logprobs[:-1], "", whole.mask[:-1])

        if move in ("call", "continue", "restart") and self.turn == tool.rounds:
            return "rounds"
        # There must be room for a token of the output and one of the model's.
        if move in ("call", "continue") and len(self.answer.tokens) + 2 > self.max_tokens:
            return "length"

        if move == "restart":
            self.answer = Answer([], [], "")
        return move

    def finish(self, ending: str) -> Answer:
        """The answer that counts, with its finish_reason."""
        if self.answered is not None:
            self.answered.finish_reason = "stop"
            return self.answered
        self.answer.finish_reason = ending
        return self.answer


# ----------------------------------------------------------------------------------------------
# many conversations


def sample(
    engine, tokenizer, requests: list[Request], tool: Tool | None = None
) -> Iterator[tuple[int, Answer]]:
    """Yield (number of the request, its answer with its text) as they finish.

    Without a tool it is engine.sample(). With one an answer may call Python: Request.stop is not
    used, max_tokens counts the tool's words, Answer.mask is 0 on them, and finish_reason is
        "stop"          the model has ended it; also: at Request.stop
        "length"        max_tokens
        "rounds"        the model has written tool.rounds times and not ended
        "malformed"     it asks for output without a new program
    """
    if tool is None:
        answers = engine.sample(requests)
    else:
        answers = sample_with_tool(engine, tokenizer, requests, tool)

    for number, answer in answers:
        if answer.finish_reason == "string":
            answer.finish_reason = "stop"
        answer.text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        yield number, answer


def sample_with_tool(
    engine, tokenizer, requests: list[Request], tool: Tool
) -> Iterator[tuple[int, Answer]]:
    """sample() with a tool. The texts of the answers are left to the caller."""
    conversations = []
    for number, request in enumerate(requests):
        max_tokens = min(request.max_tokens, engine.max_model_len - len(request.prompt))
        conversations.append(Conversation(number, request, max_tokens))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(conversations), CONVERSATIONS):
            active = conversations[first : first + CONVERSATIONS]
            yield from converse(engine, tokenizer, active, tool, pool)


def converse(
    engine, tokenizer, active: list[Conversation], tool: Tool, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Answer]]:
    """Continue conversations to their ends, in rounds: in each the model writes once in each.

    Rounds are simple; the price is an engine that has little to do at the end of each. Programs run
    while it still works on other conversations.
    """
    while active:
        calls = []
        others = []
        requests = [conversation.next_request() for conversation in active]
        for number, more in engine.sample(requests):
            conversation = active[number]
            conversation.write(more)
            text = tokenizer.decode(conversation.answer.tokens, skip_special_tokens=True)
            move = conversation.decide(text, more.finish_reason, tool)

            if move == "call":
                conversation.start(pool, last_program(text), tool)
                calls.append(conversation)
            elif move in ("continue", "restart"):
                others.append(conversation)
            else:
                yield conversation.number, conversation.finish(move)

        for conversation in calls:
            shown = conversation.output()
            words = encode_words(tokenizer, TOOL_STOP, shown + TOOL_END)
            conversation.write_output(words)

        # The order decides who shares a batch, and so the last digits: the latest first.
        active = calls[::-1] + others[::-1]


# ----------------------------------------------------------------------------------------------
# answers, graded and written to a file


@dataclass
class Job:
    """An answer to sample, grade and write: `row` is what its line in the file begins with."""

    request: Request
    problem: Problem
    row: dict


def stream_answers(
    engine, grader, tokenizer, jobs: list[Job], path: str, tool: Tool | None = None
) -> None:
    """Sample the jobs' answers, grade them meanwhile, append each to a .jsonl file when it is done.

    A row is the job's, and: problem_id, ground_truth, response, finish_reason, n_tokens, correct
    (the score is 1), failure (why the grader gave up, or None), with an own reward also score.
    """
    right = 0
    tokens = 0
    rows = graded_rows(engine, grader, tokenizer, jobs, tool)
    bar = tqdm(rows, total=len(jobs), unit="answer", smoothing=0.05)
    # What has no UTF-8, half a surrogate pair, becomes an escape that JSON knows.
    with open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for count, row in enumerate(bar, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

            right += row["correct"]
            tokens += row["n_tokens"]
            rate = tokens / (bar.format_dict["elapsed"] or 1)
            bar.set_postfix_str(f"{rate:.0f} tok/s, {right / count:.1%} right", refresh=False)


def graded_rows(
    engine, grader, tokenizer, jobs: list[Job], tool: Tool | None = None
) -> Iterator[dict]:
    """The rows of stream_answers(), in the order in which they were sampled.

    Other processes grade while the engine goes on; a row comes when its verdict is there.
    """
    pending = deque()
    requests = [job.request for job in jobs]
    for number, answer in sample(engine, tokenizer, requests, tool):
        job = jobs[number]
        score = grader.submit(answer.text, job.problem.reference)
        pending.append((job, answer, score))
        while pending and pending[0][2].done():
            yield graded_row(*pending.popleft())

    while pending:
        yield graded_row(*pending.popleft())


def graded_row(job: Job, answer: Answer, score: Future) -> dict:
    """One row of stream_answers(); waits for the verdict."""
    verdict = score.result()
    row = dict(
        job.row,
        problem_id=job.problem.id,
        ground_truth=job.problem.ground_truth,
        response=answer.text,
        finish_reason=answer.finish_reason,
        n_tokens=len(answer.tokens),
        correct=verdict == 1.0,
        failure=verdict.failure,
    )
    if job.problem.own_reward:
        row["score"] = float(verdict)
    return row
