r"""
Tool-integrated reasoning: an answer that calls Python on its way, as NuminaMath-7B-TIR's do.

    The sum is easy for a computer.
    ```python
    print(47 * 86)
    ```
    ```output                       <- here the model stops; the program runs; the next two lines are the tool's
    4042
    ```
    So the answer is \boxed{4042}.

generate.py, prime.py and evaluate.py sample through sample(); sft.py keeps the tool's words out of the loss. Source: the
notebook, the model card and the training set of NuminaMath-7B-TIR, github.com/project-numina/aimo-progress-prize.
"""
import ast
import contextlib
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from configurator import UserError

TOOL_STOP, TOOL_END = "```output\n", "\n```"    # how the model calls its tool; what comes after the tool's words
TOOL_IMPORTS = dict(math="import math", np="import numpy as np", sp="import sympy as sp")       # as in Numina's notebook
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def announce_sandbox(sandbox, needed):
    """Say once what separates the programs of a model from this machine (grader.isolation), if there will be any.
    UserError: sandbox='required', and bubblewrap is not there or does not work; an unknown sandbox."""
    from grader import isolation
    if sandbox not in ("auto", "required"):
        raise UserError(f"sandbox={sandbox!r}: 'auto' or 'required'")
    if needed:
        try:
            print(f"programs run apart from this machine by: {isolation(sandbox)}", flush=True)
        except RuntimeError as e:
            raise UserError(f"{e}: install bubblewrap (Debian: apt install bubblewrap), or --sandbox=auto") from None


def run_tool(code, earlier, timeout=5.0, numina=False):
    """(what the model is shown of its program's run, did it succeed): what it printed and the value of its last line, or
    the error; 200 characters. earlier: programs of the same answer; what they defined is there, what they printed is not.
    numina: the last line becomes print(line) unless it prints (a syntax error if it is no expression); nothing is left."""
    from grader import run_python
    if numina:
        *before, last = code.rstrip().split("\n")
        code, earlier = code if "print(" in last else "\n".join([*before, f"print({last.split('#')[0]})"]), []
    else:
        with contextlib.suppress(SyntaxError, ValueError):          # the model shall see it from the run
            *_, last = ast.parse(code).body
            if isinstance(last, ast.Expr):                          # its column counts bytes; the newline ends a comment
                *before, line = code.split("\n")[:last.lineno]
                line = line.encode()[:last.col_offset].decode() + f"_ = ({ast.get_source_segment(code, last)}\n)"
                code = "\n".join([*before, line, "if _ is not None: print(_)"])
    if earlier:
        silent = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): "
        code = f"{silent}exec({chr(10).join(earlier)!r})\n{code}"
    for name, line in TOOL_IMPORTS.items():                         # sympy alone takes half a second
        code = f"{line}\n" * bool(re.search(rf"\b{name}\b", code)) + code
    result = run_python(code, timeout=timeout)
    ok = result.returncode == 0 and not result.timed_out
    shown = f"Timed out after {timeout:g} seconds." if result.timed_out else (result.stdout if ok else result.stderr).strip()
    shown = shown if len(shown) <= 200 else shown[:200] + " ... (output truncated)"
    return shown.replace("```", "'''"), ok                          # a fence of its own would end the block


def next_move(text, reason, numina=False):
    """What a conversation does after the engine stopped for `reason`: "call" its tool, go "on", start "again", or end as
    "stop" (answered), "length" or "malformed" (a call without a new program). See sample() for numina."""
    fences, called = FENCE.findall(text), reason == "tool"
    if not numina:
        return reason if not called else "call" if fences and fences[-1][0] == "python" else "malformed"
    languages, ended = [language for language, _ in fences], re.search(r"answer is|\\boxed", text[-100:])
    if "python" not in languages:
        return "again"
    return "call" if called else "again" if not ended else "on" if "output" in languages else "malformed"


def sample(engine, tokenizer, requests, max_tokens=1024, rounds=0, tool_timeout=5.0, numina=False, batch=4096, **sampling):
    """engine.sample() with a Python interpreter in the loop, as NuminaMath-7B-TIR has it: an answer stops at ```output, its
    last program runs, the result goes on the answer, and so on for `rounds` rounds (0: no tool). A batch of conversations
    advances together, programs run while others are sampled. Yields (number of the request, Sample) as they end.

    max_tokens: of an answer, the tool's words included. finish_reason: "stop" (ended by itself), "length", "rounds" (still
    calling in the last round, where no program runs), "malformed" (a call without a new program). numina=True: the rules of
    its notebook (aimo-progress-prize, kaggle-solution.ipynb). An answer without a program, or that ends without a box in its
    last 100 characters, is begun again, at the cost of a round; one that made up its output is malformed; one that is
    answered is sampled on, and may change its answer: the text is then that of its last answer."""
    if not rounds:
        yield from engine.sample(requests, max_tokens=max_tokens, **sampling)
        return
    requests = enumerate(requests)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while talks := [SimpleNamespace(n=n, prompt=prompt, seed=seed, tape=[], earlier=[], answered=[], program=None)
                        for n, (prompt, seed) in itertools.islice(requests, batch)]:
            for turn in range(rounds):
                going, asked = [], [(t.prompt + [token for token, *_ in t.tape], t.seed + turn, max_tokens - len(t.tape))
                                    for t in talks]
                for i, answer in engine.sample(asked, max_tokens=max_tokens, stop=TOOL_STOP, **sampling):
                    talk = talks[i]
                    talk.tape += [(*pair, 1) for pair in zip(answer.tokens, answer.logprobs)]       # (token, logprob, mask)
                    text = tokenizer.decode([token for token, *_ in talk.tape], skip_special_tokens=True)
                    move = next_move(text, answer.finish_reason, numina)
                    if move == "on":
                        talk.answered, talk.tape = talk.tape, talk.tape[:-1]                        # without its end token
                    if move in ("call", "on", "again") and turn + 1 == rounds:
                        move = "rounds"
                    elif move in ("call", "on") and len(talk.tape) + 2 > max_tokens:
                        move = "length"
                    elif move == "again":
                        talk.tape = []
                    elif move == "call":
                        talk.code = [code for language, code in FENCE.findall(text) if language == "python"][-1]
                        talk.program = pool.submit(run_tool, talk.code, talk.earlier, tool_timeout, numina)
                    if move in ("call", "on", "again"):
                        going.append(talk)
                    else:
                        tokens, logprobs, mask = map(list, zip(*(talk.answered or talk.tape)))
                        move = "stop" if talk.answered else move
                        yield talk.n, answer._replace(tokens=tokens, logprobs=logprobs, finish_reason=move, mask=mask)
                for talk in (talk for talk in going if talk.program):
                    (shown, ok), talk.program = talk.program.result(), None
                    words = tokenizer(shown + TOOL_END, add_special_tokens=False).input_ids
                    talk.tape += [(token, 0.0, 0) for token in words[:max_tokens - len(talk.tape) - 1]]
                    talk.earlier += [talk.code] * ok
                if not (talks := going):
                    break
