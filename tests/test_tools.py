"""lib/tools.py: conversations with a Python tool; in fine-tuning, PRIME and evaluation as well."""

import json
import threading

import pytest
import torch
from conftest import call, message, read_jsonl, write_jsonl
from transformers import AutoTokenizer

import evaluate
import generate
import prime
from engine import Engine, make_engine
from lib import tools
from lib.answers import Answer, Request
from lib.pretrained import render_prompt
from lib.problems import tokenize_messages
from lib.tools import Tool, next_move, run_tool, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(world):
    return AutoTokenizer.from_pretrained(world / "init")


def ids(tok, text):
    return tok(text, add_special_tokens=False).input_ids


class Script(Engine):
    """An engine that says what it is told to: `lines` of each conversation, one per request.

    A conversation is known by its first prompt token. asked: the requests of each round.
    """

    def __init__(self, tok, lines, max_model_len=10**6):
        super().__init__("script", max_model_len, [tok.eos_token_id])
        self.tok = tok
        self.lines = [list(of_one) for of_one in lines]
        self.asked = []

    def sample(self, requests):
        self.asked.append(requests)
        # They finish in any order.
        for number in reversed(range(len(requests))):
            yield number, self.answer(requests[number])

    def answer(self, request):
        text = self.lines[request.prompt[0]].pop(0)
        if request.stop in text:
            called = text.split(request.stop)[0] + request.stop
            tokens = ids(self.tok, called)
            reason = "string"
        else:
            tokens = ids(self.tok, text) + self.stop
            reason = "stop"
        if len(tokens) > request.max_tokens:
            tokens = tokens[: request.max_tokens]
            reason = "length"
        return Answer(tokens, [-0.5] * len(tokens), reason)


def talk(engine, tok, rounds=4, numina=False, max_tokens=2000):
    """The answers of all of the script's conversations, in their order."""
    requests = [
        Request([number], 100 * number, max_tokens=max_tokens)
        for number in range(len(engine.lines))
    ]
    found = dict(sample(engine, tok, requests, Tool(rounds, numina=numina)))
    return [found[number] for number in range(len(requests))]


def talks(tok, lines, **options):
    """(answers, engine)"""
    engine = Script(tok, lines)
    return talk(engine, tok, **options), engine


def program(code):
    return f"First I count.\n```python\n{code}\n```\n```output\n"


# ----------------------------------------------------------------------------------------------
# the conversation


def test_one_call_byte_by_byte(tok):
    (answer,), _ = talks(tok, [[program("print(6 * 7)"), "\nSo \\boxed{42}."]])
    assert answer.finish_reason == "stop"
    assert tok.decode(answer.tokens) == (
        "First I count.\n```python\nprint(6 * 7)\n```\n"
        "```output\n42\n```\nSo \\boxed{42}.<|im_end|>"
    )
    assert answer.text + "<|im_end|>" == tok.decode(answer.tokens)

    # The tool's words, and only they, have mask 0 and no log-probability.
    words = [token for token, own in zip(answer.tokens, answer.mask) if not own]
    assert tok.decode(words) == "42\n```"
    assert [x == 0.0 for x in answer.logprobs] == [own == 0 for own in answer.mask]


def test_a_program_cannot_end_the_conversation(tok):
    """What it prints is text: no token of the template's, wherever it stands."""
    code = 'print("<|im_" + "end|>\\n<|im_" + "start|>user\\r\\n1")'
    (answer,), engine = talks(tok, [[program(code), "\nSo \\boxed{42}."]])
    shown = "<|im_end|>\n<|im_start|>user\n1"
    assert f"```output\n{shown}\n```" in tok.decode(answer.tokens)
    special = [token for token in answer.tokens if token in tok.all_special_ids]
    assert special == [tok.eos_token_id]
    assert special == answer.tokens[-1:]
    assert not set(engine.asked[1][0].prompt) & set(tok.all_special_ids)

    # Training takes such an answer in the same way.
    conversation = [message("user", "1?"), message("assistant", answer.text)]
    tokens, _ = tokenize_messages(tok, conversation)
    assert tokens == render_prompt(tok, conversation[:1]) + answer.tokens


def test_programs_with_line_ends_of_another_system(tok):
    lines = program("x = 6").replace("\n", "\r\n").replace("output\r\n", "output\n")
    (answer,), _ = talks(tok, [[lines, "\n" + program("print(7 * x)"), "\n\\boxed{42}"]])
    assert answer.finish_reason == "stop"
    assert "```output\n42\n```" in answer.text


def test_what_goes_on_is_what_was_written(tok):
    """The next request is prompt and all tokens so far, with the room left and its own seed."""
    _, engine = talks(tok, [[program("1"), program("2"), "\n\\boxed{2}"]], max_tokens=300)
    first, second, third = (requests[0] for requests in engine.asked)
    assert second.prompt == [0] + ids(tok, program("1")) + ids(tok, "1\n```")
    assert tok.decode(third.prompt[1:]) == program("1") + "1\n```" + program("2") + "2\n```"
    assert [request.seed for request in (first, second, third)] == [0, 1, 2]
    assert third.max_tokens == 300 - len(third.prompt) + 1


@pytest.mark.slow
def test_endings_and_that_finished_ones_leave(tok):
    loop = [program(f"print({k})") for k in range(9)]
    lines = [
        ["prose, \\boxed{1}"],
        loop[:4],
        ["made up\n```output\n7\n```\n\\boxed{7}"],
        [loop[0], "again\n```output\n"],
        [program("print('x' * 150)"), "y" * 500],
        ["z" * 500],
    ]
    found, engine = talks(tok, lines, max_tokens=400)
    assert [answer.finish_reason for answer in found] == [
        "stop",
        "rounds",
        "malformed",
        "malformed",
        "length",
        "length",
    ]
    assert [len(requests) for requests in engine.asked] == [6, 3, 1, 1]
    assert found[1].text.endswith("print(3)\n```\n```output\n")
    assert len(found[4].tokens) == len(found[5].tokens) == 400

    (answer,), _ = talks(tok, [loop[:2]], rounds=2)
    assert answer.finish_reason == "rounds" and answer.tokens


@pytest.mark.parametrize("room, used", [(0, 0), (1, 0), (2, 2), (50, 50)])
def test_output_that_leaves_no_room(tok, room, used):
    """The tool's words are cut so that max_tokens holds; without room no program runs."""
    text = program("print('x' * 150)")
    n = len(ids(tok, text))
    (answer,), _ = talks(tok, [[text, "y" * 99]], max_tokens=n + room)
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == n + used
    # One token of the model's own comes after the output.
    assert sum(answer.mask) == n + (1 if used else 0)


def test_a_conversation_stays_within_the_engines_positions(tok):
    engine = Script(tok, [[program("print('x' * 150)"), "y" * 500]], max_model_len=300)
    (answer,) = talk(engine, tok, max_tokens=8192)
    assert answer.finish_reason == "length" and len(answer.tokens) == 299
    lengths = [len(request.prompt) + request.max_tokens for (request,) in engine.asked]
    assert lengths == [300, 300]


def test_conversations_advance_in_rounds_so_many_at_a_time(tok, monkeypatch):
    monkeypatch.setattr(tools, "CONVERSATIONS", 2)
    found, engine = talks(tok, [[program(f"{n}"), f"\\boxed{{{n}}}"] for n in range(5)])
    assert [len(requests) for requests in engine.asked] == [2, 2, 2, 2, 1, 1]
    assert [answer.text[-9:] for answer in found] == [f"\\boxed{{{n}}}"[-9:] for n in range(5)]


def test_a_program_runs_while_the_engine_works(tok, monkeypatch):
    started = threading.Event()

    def run(code, *_):
        started.set()
        return "42", True

    class Waits(Script):
        def sample(self, requests):
            for number, answer in super().sample(requests):
                yield number, answer
                assert started.wait(60), "the program waits for the engine"

    monkeypatch.setattr(tools, "run_tool", run)
    found = talk(Waits(tok, [["\\boxed{1}"], [program("1"), "\\boxed{42}"]]), tok)
    assert [answer.finish_reason for answer in found] == ["stop", "stop"]


def test_programs_share_their_state(tok):
    """Variables stay, output is not repeated, a program that failed is not run again."""
    calls = [program("x = 40\nprint('once')"), program("x += 1\n1 / 0"), program("x + 2")]
    found, _ = talks(tok, [[*calls, "\\boxed{42}"], [program("print(x)"), "done"]])
    # In the program and in its own output.
    assert found[0].text.count("once") == 2
    assert "ZeroDivisionError" in found[0].text and "\n42\n```" in found[0].text
    # Another conversation's x.
    assert "NameError" in found[1].text


def test_a_stop_string_without_the_tool_is_an_end(tok):
    """What Request.stop ends has ended; with the tool it is not used."""
    engine = Script(tok, [["so 7 and"]])
    ((_, answer),) = sample(engine, tok, [Request([0], 0, stop="7")])
    assert answer.text == "so 7" and answer.finish_reason == "stop"

    engine = Script(tok, [["so 7 and"]])
    ((_, answer),) = sample(engine, tok, [Request([0], 0, stop="7")], Tool(rounds=2))
    assert answer.text == "so 7 and"


# ----------------------------------------------------------------------------------------------
# one program


@pytest.mark.parametrize(
    "code, shown",
    [
        ("x = 3\nx ** 2", "9"),
        ("print(1)", "1"),
        ("print(1)\nNone", "1"),
        ("a = 5; a  # five", "5"),
        ("é = 'é'; é + 'x'", "éx"),
        ("def f(x):\n    return x + 1\nf(\n  2\n)", "3"),
        ("x = 1", ""),
        ("", ""),
        ("sp.factor(sp.Symbol('x')**2 - 1)", "(x - 1)*(x + 1)"),
        ("np.arange(3)", "[0 1 2]"),
        ("math.comb(5, 2)", "10"),
        ("print('a' * 200)", "a" * 200),
        ("print('a' * 201)", "a" * 200 + " ... (output truncated)"),
        ("print('`' * 3)", "'''"),
        ("import os\nprint(os.environ.get('HOME', '') in ('', '.'))", "True"),
        ("x = 1\rx + 1", "2"),
    ],
)
def test_what_the_model_is_shown(code, shown):
    assert run_tool(code, []) == (shown, True)


@pytest.mark.parametrize(
    "code, error",
    [
        ("input()", "EOFError: EOF when reading a line"),
        ("x =", "SyntaxError: invalid syntax"),
        # The model's own line is shown.
        ("x = [1]\nprint(x[1])", "print(x[1])\nIndexError: list index out of range"),
    ],
)
def test_the_error_that_the_model_is_shown(code, error):
    shown, succeeded = run_tool(code, [])
    assert shown.endswith(error) and not succeeded


def test_programs_that_are_too_much_for_the_parser():
    """They do not end the caller."""
    assert not run_tool("1" + "+1" * 3000, [])[1]
    assert not run_tool("x = 5\n" + "-" * 10000 + "\nx", [])[1]


@pytest.mark.slow
def test_a_program_that_does_not_end():
    assert run_tool("while True: pass", [], timeout=1) == ("Timed out after 1 seconds.", False)


@pytest.mark.parametrize(
    "code, earlier, shown",
    [
        ("print(program)", ["program = 5", "q = 1"], "5"),
        ("print(z)", ["contextlib = 3", "z = 2"], "2"),
        ("print(z)", ["import sys\nsys.stdout.reconfigure(line_buffering=True)\nz = 3"], "3"),
        ("x", ["import os\nos.system('echo unseen')\nx = 1"], "1"),
    ],
)
def test_earlier_programs_are_run_again_unseen(code, earlier, shown):
    assert run_tool(code, earlier) == (shown, True)


def test_the_notebook_prints_the_last_line_whatever_it_is():
    assert run_tool("x = 3\nx  # three", [], numina=True) == ("3", True)
    assert run_tool("x = 3", [], numina=True)[0].startswith("Traceback")
    assert not run_tool("if 1:\n    2", [], numina=True)[1]
    assert "NameError" in run_tool("print(y)", ["y = 1"], numina=True)[0]


# ----------------------------------------------------------------------------------------------
# the moves

CALL = "```python\n1\n```\n```output\n"
OUTPUT = "1\n```\n"
SPEECH = "." * 101


@pytest.mark.parametrize(
    "text, reason, move",
    [
        (CALL, "string", "call"),
        (CALL + OUTPUT + CALL, "string", "call"),
        ("prose ```output\n", "string", "malformed"),
        (CALL + OUTPUT + "```output\n", "string", "malformed"),
        ("\\boxed{1}", "stop", "stop"),
        (CALL + OUTPUT + "\\boxed{1}", "length", "length"),
    ],
)
def test_moves(text, reason, move):
    assert next_move(text, reason) == move


@pytest.mark.parametrize(
    "text, reason, move",
    [
        ("prose, \\boxed{1}", "stop", "restart"),
        ("prose ```output\n", "string", "restart"),
        (CALL, "string", "call"),
        (CALL + OUTPUT + "```output\n", "string", "call"),
        (CALL + OUTPUT + "\\boxed{1}" + SPEECH, "stop", "restart"),
        (CALL + OUTPUT + "\\boxed{1}", "stop", "continue"),
        (CALL + OUTPUT + "The answer is 1", "length", "continue"),
        ("```python\n1\n```\n\\boxed{1}", "stop", "malformed"),
    ],
)
def test_the_notebooks_moves(text, reason, move):
    assert next_move(text, reason, numina=True) == move


def test_the_notebooks_rules(tok):
    """kaggle-solution.ipynb, cell 16, rule by rule; four rounds."""
    answered = "\nThe answer is \\boxed{%d}"
    lines = [
        # No program: again. Answered: sampled on, the last answer counts.
        ["prose, \\boxed{1}", program("2"), answered % 2, answered % 3],
        # No output at all: made up.
        ["```python\n5\n```\nso the answer is \\boxed{5}"],
        # The box is too far from the end: again.
        [program("6"), "\n\\boxed{6}" + SPEECH, program("7"), answered % 8],
        # Answered, then calls to the end: 8 stands.
        [program("8"), answered % 8, program("9"), program("9")],
        ["prose"] * 4,
    ]
    found, engine = talks(tok, lines, numina=True)
    assert [answer.finish_reason for answer in found] == [
        "stop",
        "malformed",
        "stop",
        "stop",
        "rounds",
    ]
    last = [answer.text[-12:] for answer in found]
    assert "\\boxed{3}" in last[0] and "\\boxed{8}" in last[2] and "\\boxed{8}" in last[3]
    assert found[2].text.startswith("First I count.\n```python\n7")
    assert [len(requests) for requests in engine.asked] == [5, 4, 4, 4]


# ----------------------------------------------------------------------------------------------
# real engines


def ask(tok, numbers, **sampling):
    """Requests for 7k, one per number k."""
    prompts = [render_prompt(tok, [message("user", f"{k}?")]) for k in numbers]
    return [Request(prompt, k, **sampling) for prompt, k in zip(prompts, numbers)]


def test_without_a_call_it_is_the_plain_path(guesser, tok):
    engine = make_engine("hf", str(guesser), tok, CPU, torch.float32, 128)
    requests = ask(tok, range(10, 30), max_tokens=24)
    plain = dict(engine.sample(requests))
    with_tool = dict(sample(engine, tok, requests, Tool(rounds=4)))
    for number, answer in plain.items():
        other = with_tool[number]
        assert (answer.tokens, answer.logprobs) == (other.tokens, other.logprobs)
        assert answer.finish_reason == other.finish_reason
        assert set(other.mask) == {1}


@pytest.mark.slow
def test_a_model_that_calls(caller, tok):
    """Every answer has the program's own output, which the model never wrote."""
    engine = make_engine("hf", str(caller), tok, CPU, torch.float32, 256)
    numbers = range(10, 30)
    requests = ask(tok, numbers, temperature=0.0, max_tokens=100)
    found = dict(sample(engine, tok, requests, Tool(rounds=3)))
    expected = [f"```output\n{k * 7}\n```\n\\boxed{{" for k in numbers]
    assert sum(text in found[i].text for i, text in enumerate(expected)) >= 15

    # Its log-probabilities are those of one pass over the whole.
    for i, request in enumerate(requests):
        answer = found[i]
        whole = torch.tensor([request.prompt + answer.tokens])
        with torch.no_grad():
            logits = engine.model(whole).logits[0, len(request.prompt) - 1 : -1]
        tokens = torch.tensor(answer.tokens)[:, None]
        want = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
        own = torch.tensor(answer.mask, dtype=torch.bool)
        got = torch.tensor(answer.logprobs)
        torch.testing.assert_close(got[own], want[own], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------
# the scripts


def sevens(path, numbers):
    """A file of problems: what is 7k?"""
    problems = [dict(problem=f"{k}?", ground_truth=str(k * 7), problem_id=k) for k in numbers]
    return write_jsonl(path, problems)


@pytest.mark.slow
def test_generate_with_the_tool(caller, tmp_path):
    call(
        generate,
        f"--model={caller}",
        f"--data={sevens(tmp_path / 'p.jsonl', range(10, 20))}",
        f"--out_dir={tmp_path}/out",
        "--engine=hf",
        "--system_prompt=",
        "--sft_system_prompt=",
        "--temperature=0",
        "--max_tokens=100",
        "--tir=True",
        "--tir_rounds=3",
        "--grade_workers=1",
    )
    rows = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert len(rows) == 20 and sum(row["correct"] for row in rows) >= 10
    assert rows[0]["sampling"] == dict(
        temperature=0.0, top_p=1.0, max_tokens=100, rounds=3, tool_timeout=5.0, numina=False
    )
    assert all("```output" in row["response"] for row in rows if row["correct"])


def test_sft_trains_on_what_the_model_writes(tok):
    """The same tokens as in the loop; without mask_output the tool's words are scored as well."""
    pieces = [program("print(6 * 7)"), "\nSo 42.\n" + program("7"), "\n\\boxed{42}"]
    text = pieces[0] + "42\n```" + pieces[1] + "7\n```" + pieces[2]
    conversation = [message("user", "6*7?"), message("assistant", text)]
    tokens, scored = tokenize_messages(tok, conversation)
    own = tok.decode([token for token, score in zip(tokens, scored) if score])
    assert own == "".join(pieces) + "<|im_end|>"

    (answer,), _ = talks(tok, [pieces])
    prompt = render_prompt(tok, conversation[:1])
    before = [False] * len(prompt)
    assert tokens == prompt + answer.tokens
    assert scored == before + [bool(mask) for mask in answer.mask]
    _, all_of_it = tokenize_messages(tok, conversation, mask_output=False)
    assert all_of_it == before + [True] * len(answer.tokens)
    _, with_prompt = tokenize_messages(tok, conversation, mask_prompt=False)
    assert with_prompt == [True] * len(prompt) + scored[len(prompt) :]


def tool_spans(tok, text, tokens):
    """(first, last + 1) positions of the tool's words in an answer.

    Only where the text, tokenized again, gives the tokens that stand there.
    """
    spans = []
    start = text.find("```output\n") + len("```output\n")
    while start >= len("```output\n"):
        end = text.find("\n```", start)
        if end < 0:
            break
        words = text[start : end + len("\n```")]
        first = len(ids(tok, text[:start]))
        last = first + len(ids(tok, words))
        if tok.decode(tokens[first:last]) == words:
            spans.append((first, last))
        start = text.find("```output\n", end) + len("```output\n")
    return spans


@pytest.mark.slow
def test_prime_with_the_tool(caller, tmp_path):
    """Tool tokens carry no reward and no advantage.

    On the others engine and trainer agree: prime.py stops if they do not.
    """
    call(
        prime,
        f"--data={sevens(tmp_path / 'p.jsonl', range(10, 50))}",
        f"--model={caller}",
        f"--out_dir={tmp_path}/out",
        "--device=cpu",
        "--engine=hf",
        "--prompts_per_step=4",
        "--samples_per_prompt=4",
        "--max_tokens=100",
        "--max_prompt_tokens=20",
        "--filter_low=0",
        "--filter_high=1",
        "--max_steps=1",
        "--learning_rate=1e-3",
        "--prm_learning_rate=1e-3",
        "--prm_update=before",
        "--beta=1",
        "--temperature=1",
        "--tir=True",
        "--tir_rounds=3",
        "--tir_timeout=9",
        "--save_interval=0",
        "--samples_logged=16",
        "--checkpointing=False",
        "--eval_data=None",
    )
    (metrics,) = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics["tool_calls"] > 0.5

    tok = AutoTokenizer.from_pretrained(caller)
    checked = 0
    for row in read_jsonl(tmp_path / "out" / "samples.jsonl"):
        for first, last in tool_spans(tok, row["response"], row["tokens"]):
            assert not any(row["process_rewards"][first:last])
            assert not any(row["advantages"][first:last])
            assert any(row["process_rewards"][:first])
            checked += 1
    assert checked > 4


@pytest.mark.slow
def test_evaluate_with_and_without_the_tool(caller, tmp_path):
    """The model cannot multiply: the tool makes the difference. Votes of four samples."""
    settings = [
        f"--models=['{caller}']",
        f"--benchmarks=['{sevens(tmp_path / 'p.jsonl', range(10, 30))}']",
        "--engine=hf",
        "--max_tokens=100",
        "--samples=4",
        "--temperature=1",
        "--top_p=1",
        "--grade_workers=1",
    ]
    tool = ["--tir=True", "--tir_rounds=3", "--tir_timeout=9"]
    call(evaluate, *settings, *tool, f"--out_dir={tmp_path}/with")
    call(evaluate, *settings, f"--out_dir={tmp_path}/without")

    scores = {}
    for name in ("with", "without"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        scores[name] = results["models"][str(caller)]["p"]["score"]
    score = scores["with"]
    assert score["greedy"][0] >= 0.75
    assert score["maj@4"][0] >= score["sampled"][0] > 0.5
    assert scores["without"]["greedy"][0] <= score["greedy"][0]

    (path,) = (tmp_path / "with").glob("*.responses.jsonl")
    for row in read_jsonl(path):
        if row["correct"]:
            assert f"```output\n{row['ground_truth']}\n```" in row["response"]
