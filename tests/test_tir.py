"""Tool-integrated reasoning: the conversation with a Python tool, in sampling, fine-tuning, PRIME and evaluation."""
import itertools
import json
import time

import pytest
import torch
from transformers import AutoTokenizer

import evaluate
import generate
import prime
import sft
from conftest import call, read_jsonl, write_jsonl
from generate import Sample, run_tool, sample
from runs import plan, sandbox

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(world):
    return AutoTokenizer.from_pretrained(world / "init")


class Script:
    """An engine that says what it is told to: `lines` of each conversation, known by its first prompt token, one a request.
    It answers all that it can get, as transformers' engine does, then asks again."""
    max_model_len = 10 ** 6

    def __init__(self, tok, lines):
        self.tok, self.lines, self.asked = tok, [list(x) for x in lines], []

    def sample(self, requests):
        first = 0
        while batch := list(itertools.takewhile(bool, requests)):
            self.asked.append(batch)
            for i, request in reversed(list(enumerate(batch, first))):          # they finish in any order
                yield i, self.answer(*request)
            first += len(batch)

    def answer(self, prompt, seed, own):
        limit, stop = own["max_tokens"], own["stop"]
        text = self.lines[prompt[0]].pop(0)
        called = stop in text
        tokens = self.tok(text.split(stop)[0] + stop if called else text, add_special_tokens=False).input_ids
        tokens += [] if called else [self.tok.eos_token_id]
        reason = "length" if len(tokens) > limit else "string" if called else "stop"
        return Sample(tokens[:limit], [-0.5] * len(tokens[:limit]), reason)


def talks(tok, lines, live=4096, **own):
    """(text, finish_reason, Sample) of each conversation, and the engine."""
    engine = Script(tok, lines)
    own = dict(max_tokens=2000, rounds=4) | own
    found = dict(sample(engine, tok, [([n], 100 * n, own) for n in range(len(lines))], live))
    return [(tok.decode(found[n].tokens), found[n].finish_reason, found[n]) for n in range(len(lines))], engine


class Places(Script):
    """An engine with so many places, which ends its oldest request when all are taken or no request is left to come."""
    def __init__(self, tok, lines, places):
        super().__init__(tok, lines)
        self.places, self.deadline = places, time.monotonic() + 60

    def sample(self, requests):
        running, left, numbers = {}, sum(map(len, self.lines)), itertools.count()
        while left or running:
            while left and len(running) < self.places:
                assert time.monotonic() < self.deadline, "it waits for a request that does not come"
                if request := next(requests):
                    running[next(numbers)] = request
                    self.asked.append([seed for _, seed, _ in running.values()])
                    left -= 1
            oldest = min(running)
            yield oldest, self.answer(*running.pop(oldest))


def program(code):
    return f"First I count.\n```python\n{code}\n```\n```output\n"


def test_one_call_byte_by_byte(tok):
    text, reason, answer = talks(tok, [[program("print(6 * 7)"), "\nSo \\boxed{42}."]])[0][0]
    assert text == "First I count.\n```python\nprint(6 * 7)\n```\n```output\n42\n```\nSo \\boxed{42}.<|im_end|>" and reason == "stop"
    assert tok.decode([t for t, own in zip(answer.tokens, answer.mask) if not own]) == "42\n```"
    assert [x == 0.0 for x in answer.logprobs] == [own == 0 for own in answer.mask]


def test_what_goes_on_is_what_was_written(tok):
    """The next request is prompt + all tokens so far, with what room is left and a seed of its own."""
    _, engine = talks(tok, [[program("1"), program("2"), "\n\\boxed{2}"]], max_tokens=300)
    first, second, third = (requests[0] for requests in engine.asked)
    text = program("1") + "1\n```"
    assert second[0] == [0] + tok(program("1"), add_special_tokens=False).input_ids + tok("1\n```", add_special_tokens=False).input_ids
    assert tok.decode(third[0][1:]) == text + program("2") + "2\n```"
    assert [first[1], second[1], third[1]] == [0, 1, 2] and third[2]["max_tokens"] == 300 - len(third[0]) + 1


def test_endings_and_that_finished_ones_leave(tok):
    loop = [program(f"print({k})") for k in range(9)]
    found, engine = talks(tok, [
        ["prose, \\boxed{1}"], loop[:4], ["made up\n```output\n7\n```\n\\boxed{7}"], [loop[0], "again\n```output\n"],
        [program("print('x' * 150)") + "", "y" * 500], ["z" * 500]], max_tokens=400)
    assert [reason for _, reason, _ in found] == ["stop", "rounds", "malformed", "malformed", "length", "length"]
    assert [len(requests) for requests in engine.asked] == [6, 3, 1, 1]
    assert found[1][0].endswith("print(3)\n```\n```output\n") and len(found[4][2].tokens) == len(found[5][2].tokens) == 400
    assert len(talks(tok, [loop[:2]], rounds=2)[0][0][2].tokens) and talks(tok, [loop[:2]], rounds=2)[0][0][1] == "rounds"


def test_output_that_leaves_no_room(tok):
    """The tool's words are cut so that max_tokens holds, and a program for whose output there is no room is not run."""
    text = program("print('x' * 150)")
    n = len(tok(text, add_special_tokens=False).input_ids)
    for extra in (0, 1, 2, 50):
        (_, reason, answer), = talks(tok, [[text, "y" * 99]], max_tokens=n + extra)[0]
        assert reason == "length" and len(answer.tokens) == n + (extra if extra >= 2 else 0) and sum(answer.mask) == n + (extra >= 2)


def test_conversations_advance_on_their_own(tok):
    """A second round is sampled beside a first; continuations go before new conversations, which are begun up to a limit."""
    engine = Places(tok, [[program("1"), "\\boxed{0}"], ["\\boxed{1}"]], places=2)
    own = dict(max_tokens=500, rounds=4)
    found = dict(sample(engine, tok, [([0], 0, own), ([1], 100, own)]))
    assert engine.asked == [[0], [0, 100], [100, 1]]         # 100 n + round; conversation 1 was in the engine all the time
    assert [found[n].finish_reason for n in (0, 1)] == ["stop", "stop"]
    calls = [[program(f"{n}"), f"\\boxed{{{n}}}"] for n in range(5)]
    engine = Places(tok, calls[:3], places=1)
    assert len(list(sample(engine, tok, [([n], 100 * n, own) for n in range(3)]))) == 3
    assert engine.asked == [[0], [1], [100], [101], [200], [201]]
    found, engine = talks(tok, calls, live=2)
    assert [len(requests) for requests in engine.asked] == [2, 2, 2, 2, 1, 1]
    assert [text[-9:] for text, _, _ in found] == [f"{n}}}<|im_end|>"[-9:] for n in range(5)]


def test_a_conversation_stays_within_the_engines_positions(tok):
    engine = Script(tok, [[program("print('x' * 150)"), "y" * 500]])
    engine.max_model_len = 300
    (_, answer), = sample(engine, tok, [([0], 0, dict(max_tokens=8192, rounds=4))])
    assert answer.finish_reason == "length" and len(answer.tokens) == 299
    assert [len(prompt) + own["max_tokens"] for ((prompt, _, own),) in engine.asked] == [300, 300]


def test_programs_share_their_state(tok):
    """Variables stay, output is not repeated, a program that failed is not run again."""
    found, _ = talks(tok, [[program("x = 40\nprint('once')"), program("x += 1\n1 / 0"), program("x + 2"), "\\boxed{42}"],
                           [program("print(x)"), "done"]])
    assert found[0][0].count("once") == 2                  # in the program and in its own output
    assert "ZeroDivisionError" in found[0][0] and "\n42\n```" in found[0][0]
    assert "NameError" in found[1][0]                      # another conversation's x


@pytest.mark.parametrize("code, shown", [
    ("x = 3\nx ** 2", "9"), ("print(1)", "1"), ("print(1)\nNone", "1"), ("a = 5; a  # five", "5"), ("é = 'é'; é + 'x'", "éx"),
    ("def f(x):\n    return x + 1\nf(\n  2\n)", "3"), ("x = 1", ""), ("sp.factor(sp.Symbol('x')**2 - 1)", "(x - 1)*(x + 1)"),
    ("np.arange(3)", "[0 1 2]"), ("math.comb(5, 2)", "10"), ("print('a' * 200)", "a" * 200),
    ("print('a' * 201)", "a" * 200 + " ... (output truncated)"), ("print('`' * 3)", "'''"), ("input()", "EOFError: EOF when reading a line"),
    ("import os\nprint(os.environ.get('HOME', '') in ('', '.'))", "True"), ("x =", "SyntaxError: invalid syntax")])
def test_what_the_model_is_shown(code, shown):
    got, ok = run_tool(code, [])
    assert got == shown or not ok and got.endswith(shown)
    assert ok == ("Error" not in shown)


def test_a_program_that_does_not_end():
    assert run_tool("x = 1\rx + 1", []) == ("2", True) and not run_tool("1" + "+1" * 3000, [])[1]       # neither ends the caller
    assert not run_tool("x = 5\n" + "-" * 10000 + "\nx", [])[1]
    assert run_tool("x = [1]\nprint(x[1])", [])[0].endswith("print(x[1])\nIndexError: list index out of range")      # its own line
    for code, earlier, shown in (("print(program)", ["program = 5", "q = 1"], "5"), ("print(z)", ["contextlib = 3", "z = 2"], "2"),
                                 ("print(z)", ["import sys\nsys.stdout.reconfigure(line_buffering=True)\nz = 3"], "3"),
                                 ("x", ["import os\nos.system('echo unseen')\nx = 1"], "1")):    # earlier programs are run again, unseen
        assert run_tool(code, earlier) == (shown, True)
    assert run_tool("while True: pass", [], timeout=1) == ("Timed out after 1 seconds.", False)


def test_the_notebook_prints_the_last_line_whatever_it_is():
    assert run_tool("x = 3\nx  # three", [], numina=True) == ("3", True)
    assert run_tool("x = 3", [], numina=True)[0].startswith("Traceback") and not run_tool("if 1:\n    2", [], numina=True)[1]
    assert "NameError" in run_tool("print(y)", ["y = 1"], numina=True)[0]


def test_the_notebooks_rules(tok):
    """kaggle-solution.ipynb, cell 16, rule by rule; four rounds."""
    answered = "\nThe answer is \\boxed{%d}"
    found, engine = talks(tok, [
        ["prose, \\boxed{1}", program("2"), answered % 2, answered % 3],        # no program: again; answered: sampled on, 3 wins
        ["```python\n5\n```\nso the answer is \\boxed{5}"],                     # no output at all: made up
        [program("6"), "\n\\boxed{6}" + "." * 101, program("7"), answered % 8],  # the box is too far from the end: again
        [program("8"), answered % 8, program("9"), program("9")],               # answered, then calls to the end: 8 stands
        ["prose"] * 4], numina=True)
    last = [tok.decode(answer.tokens)[-20:] for _, _, answer in found]
    assert [reason for _, reason, _ in found] == ["stop", "malformed", "stop", "stop", "rounds"]
    assert "\\boxed{3}" in last[0] and "\\boxed{8}" in last[2] and "\\boxed{8}" in last[3]
    assert found[2][0].startswith("First I count.\n```python\n7") and [len(requests) for requests in engine.asked] == [5, 4, 4, 4]


def test_without_a_call_it_is_the_plain_path(guesser, tok):
    engine = generate.make_engine("hf", str(guesser), tok, CPU, torch.float32, 128)
    asked = [(generate.render_prompt(tok, [dict(role="user", content=f"{k}?")]), k, dict(max_tokens=24)) for k in range(10, 30)]
    plain = dict(engine.sample(asked))
    tool = dict(sample(engine, tok, [(ids, k, own | dict(rounds=4)) for ids, k, own in asked]))
    assert all(plain[i][:3] == tool[i][:3] and set(tool[i].mask) == {1} for i in range(20))


def test_a_stop_string_that_begins_in_the_prompt_is_none(caller, tok):
    """A prompt that ends in the first half of the string: what the model goes on to write is no call, and nothing is cut."""
    engine = generate.make_engine("hf", str(caller), tok, CPU, torch.float32, 256)
    prompt = generate.render_prompt(tok, [dict(role="user", content="12?")])
    (_, whole), = engine.sample([(prompt, 0, dict(temperature=0.0, max_tokens=60))])
    stop = tok.decode(whole.tokens[3:7])
    asked = [(prompt + whole.tokens[:n], 0, dict(temperature=0.0, max_tokens=60 - n, stop=stop)) for n in (0, 5)]
    found = dict(engine.sample(asked))
    assert found[0].tokens == whole.tokens[:7] and found[0].finish_reason == "string"
    assert stop in tok.decode(whole.tokens[:7]) and stop not in tok.decode(whole.tokens[5:])
    assert found[1].tokens == whole.tokens[5:] and found[1].finish_reason == whole.finish_reason


def test_a_model_that_calls(caller, tok):
    """The real engine and the real tool: every answer has the program's own output, which the model never wrote."""
    engine = generate.make_engine("hf", str(caller), tok, CPU, torch.float32, 256)
    asked = [(generate.render_prompt(tok, [dict(role="user", content=f"{k}?")]), k, dict(temperature=0.0, max_tokens=100, rounds=3))
             for k in range(10, 30)]
    found = dict(sample(engine, tok, asked))
    texts = [tok.decode(found[i].tokens) for i in range(20)]
    assert sum(f"```output\n{k * 7}\n```\n\\boxed{{" in text for k, text in zip(range(10, 30), texts)) >= 15
    for i, (prompt, *_) in enumerate(asked):                 # and its log-probabilities are those of one pass over the whole
        logits = engine.model(torch.tensor([prompt + found[i].tokens])).logits[0, len(prompt) - 1:-1]
        want = logits.log_softmax(-1).gather(-1, torch.tensor(found[i].tokens)[:, None]).squeeze(-1)
        own = torch.tensor(found[i].mask, dtype=torch.bool)
        torch.testing.assert_close(torch.tensor(found[i].logprobs)[own], want[own], atol=1e-4, rtol=0)


def test_generate_with_the_tool(caller, tmp_path):
    problems = [dict(problem=f"{k}?", ground_truth=str(k * 7), problem_id=k) for k in range(10, 20)]
    call(generate, f"--model={caller}", f"--data={write_jsonl(tmp_path / 'p.jsonl', problems)}", f"--out_dir={tmp_path}/out", "--engine=hf",
         "--system_prompt=", "--sft_system_prompt=", "--temperature=0", "--max_tokens=100", "--tir=True", "--tir_rounds=3", "--grade_workers=1")
    rows = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert len(rows) == 20 and sum(row["correct"] for row in rows) >= 10
    assert rows[0]["sampling"]["rounds"] == 3 and all("```output" in row["response"] for row in rows if row["correct"])


def test_sft_trains_on_what_the_model_writes(tok):
    """The same tokens as in the loop; the tool's words are context unless mask_output is off, the prompt unless mask_prompt is."""
    answer = program("print(6 * 7)") + "42\n```\nSo 42.\n" + program("7") + "7\n```\n\\boxed{42}"
    talk = [dict(role="user", content="6*7?"), dict(role="assistant", content=answer)]
    tokens, scored = sft.tokenize_messages(tok, talk)
    own = tok.decode([t for t, s in zip(tokens, scored) if s])
    assert own == program("print(6 * 7)") + "\nSo 42.\n" + program("7") + "\n\\boxed{42}<|im_end|>"
    (_, _, looped), = talks(tok, [[program("print(6 * 7)"), "\nSo 42.\n" + program("7"), "\n\\boxed{42}"]])[0]
    prompt = generate.render_prompt(tok, talk[:1])
    assert tokens == prompt + looped.tokens and scored == [False] * len(prompt) + [bool(m) for m in looped.mask]
    assert sft.tokenize_messages(tok, talk, mask_output=False)[1] == [False] * len(prompt) + [True] * len(looped.tokens)
    assert sft.tokenize_messages(tok, talk, mask_prompt=False)[1] == [True] * len(prompt) + scored[len(prompt):]


def test_prime_with_the_tool(caller, tmp_path):
    """Tool tokens carry no reward and no advantage; engine and trainer agree on the others (prime.py stops if not)."""
    problems = [dict(problem=f"{k}?", ground_truth=str(k * 7), problem_id=k) for k in range(10, 50)]
    call(prime, f"--data={write_jsonl(tmp_path / 'p.jsonl', problems)}", f"--model={caller}", f"--out_dir={tmp_path}/out", "--device=cpu",
         "--prompts_per_step=4", "--samples_per_prompt=4", "--max_tokens=100", "--max_prompt_tokens=20", "--filter_low=0",
         "--filter_high=1", "--max_steps=1", "--learning_rate=1e-3", "--prm_learning_rate=1e-3", "--beta=1", "--save_interval=0", "--tir=True",
         "--temperature=1", "--tir_rounds=3", "--tir_timeout=9", "--engine=hf", "--samples_logged=16", "--prm_update=before",
         "--checkpointing=False", "--eval_data=None")
    row, = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert row["tool_calls"] > 0.5
    tok, checked = AutoTokenizer.from_pretrained(caller), 0
    for row in read_jsonl(tmp_path / "out" / "samples.jsonl"):
        parts = row["response"].split("```output\n")
        for before, after in zip(["```output\n".join(parts[:i + 1]) for i in range(len(parts) - 1)], parts[1:]):
            start = len(tok(before + "```output\n", add_special_tokens=False).input_ids)
            words = after.split("\n```")[0] + "\n```"
            span = slice(start, start + len(tok(words, add_special_tokens=False).input_ids))
            if "\n```" in after and tok.decode(row["tokens"][span]) == words:
                assert not any(row["process_rewards"][span]) and not any(row["advantages"][span])
                assert any(row["process_rewards"][:start])
                checked += 1
    assert checked > 4


def test_evaluate_with_and_without_the_tool(caller, tmp_path):
    """The model cannot multiply: the tool makes the difference. Votes of four samples; malformed conversations have none."""
    problems = [dict(problem=f"{k}?", ground_truth=str(k * 7), problem_id=k) for k in range(10, 30)]
    run = [evaluate, f"--models=['{caller}']", f"--benchmarks=['{write_jsonl(tmp_path / 'p.jsonl', problems)}']", "--engine=hf",
           "--max_tokens=100", "--samples=4", "--temperature=1", "--top_p=1", "--grade_workers=1"]
    call(*run, "--tir=True", "--tir_rounds=3", "--tir_timeout=9", f"--out_dir={tmp_path}/with")
    call(*run, f"--out_dir={tmp_path}/without")
    score, plain = (json.loads((tmp_path / name / "results.json").read_text())["models"][str(caller)]["p"]["score"]
                    for name in ("with", "without"))
    rows = read_jsonl(next((tmp_path / "with").glob("*.responses.jsonl")))
    assert score["greedy"][0] >= 0.75 and score["maj@4"][0] >= score["sampled"][0] > 0.5
    assert all(f"```output\n{row['ground_truth']}\n```" in row["response"] for row in rows if row["correct"])
    assert plain["greedy"][0] <= score["greedy"][0]


def test_votes():
    """The notebook's (its cell 18): half to even, negatives dropped, modulo 1000, ties to the first seen, 0 without a vote."""
    vote = evaluate.notebook_vote
    assert vote(["3.4", "5", "3"]) == 3 and vote(["2.5", "3"]) == 2 and vote(["1e3", "7"]) == 0 and vote(["1003"]) == 3
    assert vote(["9", "4", "4", "9"]) == 9 and vote(["-1", "-1", "6"]) == 6 and vote(["x", None, "inf", "nan"]) == vote([]) == 0
    problems = [dict(id=n, ground_truth=gold, ability="math", group=[]) for n, gold in enumerate(["1003", "1/2", "7"])]
    said = [["3", "3", "1003"], ["0.5", "\\frac12", "3"], ["7", "8", "8"]]
    rows = [dict(problem_id=n, mode="sampled", sample=k, answer=a, correct=a == p["ground_truth"] or n == 1 and k < 2, n_tokens=1,
                 finish_reason="malformed" if n == 2 and k else "stop") for n, p in enumerate(problems) for k, a in enumerate(said[n])]
    assert evaluate.summarize(rows, problems)["score"]["maj@3"][0] == pytest.approx(2 / 3)           # not the first: 3 is not 1003
    assert evaluate.summarize(rows, problems, numina=True)["score"]["maj@3"][0] == pytest.approx(2 / 3)     # not the second


def test_the_sandbox_is_said_or_required(capsys, monkeypatch):
    import grader
    plan.announce_sandbox("auto", True)
    assert capsys.readouterr().out.split()[-1] == grader.isolation()
    plan.announce_sandbox("required", False)                # no program, no word
    assert not capsys.readouterr().out
    with pytest.raises(generate.UserError, match="sandbox='off'"):
        plan.announce_sandbox("off", False)
    grader.isolation.cache_clear()
    monkeypatch.setattr(sandbox, "box", lambda kind: ["/nowhere/bwrap"])
    monkeypatch.setattr(sandbox, "IDLE", {})
    try:
        with pytest.raises(generate.UserError, match="apt install bubblewrap"):
            plan.announce_sandbox("required", True)
    finally:
        grader.isolation.cache_clear()
