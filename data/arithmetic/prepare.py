"""
The built-in world: column addition, small enough that every stage of the recipe runs on a laptop.

    python data/arithmetic/prepare.py                              # seconds; the files below, in out_dir

A problem is `47+86?`. Its worked solution adds column by column, ones first, each line
digit + digit + carry = two-digit sum, then puts the result in a box:

    7+6+0=13
    4+8+1=13
    \\boxed{133}

The base model learns from text whose author has bad habits: wrong digit sums or forgotten carries, each with a
probability of its own. So it knows the method and often fails, some problems nearly always, some never; and because every
line has a known truth, one can check what a process reward says about it (first_error).

    web.jsonl, web_val.jsonl    solutions with the habits, as `messages` rows: what the base model is pretrained on (sft.py)
    train.jsonl                 problems to sample SFT data from (generate.py)
    rl.jsonl                    problems for RL (prime.py)
    test.jsonl                  problems held out
    tools.jsonl                 solutions of large sums by a one-line program, with its output, as `messages` rows (runs/toy_tir.sh)
    large.jsonl                 problems held out whose numbers are too large to be added in the head
    code_web.jsonl              half sums, half programs (`f(x)=3x-8?`), with the habits (runs/toy_code.sh)
    code_rl.jsonl               the same halves: problems, with tests for the programs
    code_test.jsonl             programs held out
    init/                       an untrained Qwen2 model and its tokenizer, a Hugging Face folder

What a model learns from (web, tools, code_web), is sampled on (train), reinforced on (rl, code_rl) and tested on (test, large,
code_test) are disjoint: no pair of numbers is in two of these, in either order. The same settings give the same bytes.
"""
import hashlib
import json
import os
import random
import sys
from functools import partial

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))    # the root, for configurator
import configurator
from configurator import UserError

# --- output
out_dir = 'data/arithmetic/world'   # everything is written here
seed = 1337                         # of the problems, the habits and the model's weights
# --- problems
min_digits = 3                      # both numbers of a problem have the same number of digits,
max_digits = 3                      # any from min to max alike
train_problems = 300                # rows of train.jsonl; few on purpose: one epoch on the correct answers to thousands of
                                    # problems unlearns the habits by itself and leaves nothing to RL
rl_problems = 3000                  # rows of rl.jsonl
test_problems = 500                 # rows of test.jsonl
web_solutions = 40000               # rows of web.jsonl; problems may come again here, with other mistakes
web_val_solutions = 500             # rows of web_val.jsonl
large_digits = 5                    # of both numbers, in tools.jsonl and large.jsonl
tool_solutions = 16000              # rows of tools.jsonl
large_problems = 200                # rows of large.jsonl
code_solutions = 16000              # rows of code_web.jsonl
code_rl_problems = 2000             # rows of code_rl.jsonl
code_test_problems = 200            # rows of code_test.jsonl
# --- habits of the author of web.jsonl
habits = 'carries'                  # 'carries': some carries are forgotten; 'facts': some digit sums are off by one; 'none'
fact_errors = [0.0, 0.0, 0.2, 0.4, 0.6, 0.7]     # how often a sum is off; which entry holds depends on the two digits.
                                    # Some 35 habits that must be unlearned one by one: accuracy climbs gradually
carry_errors = [0.6, 0.7, 0.8, 0.85, 0.9]        # how often a carry of 1 is forgotten; one habit: all falls at once
sign_errors = [0.5, 0.6, 0.7, 0.8]  # how often a program adds where it should subtract
# --- model
n_layer = 2
hidden_size = 128
n_head = 4                          # heads of 32: vLLM on CPU needs at least that
n_kv_head = 2
ffn_size = 256
init_std = 0.06                     # of the matrices; at this width the usual 0.02 learns far slower
max_positions = 512                 # context length

# Share of all pairs of numbers that a file draws from, in percent.
SHARES = {'web': 30, 'web_val': 5, 'train': 25, 'rl': 30, 'test': 10}
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ---------------------------------------------------------------------------------------------------------------------
# problems and solutions

def split_of(a, b):
    """The one split a pair of numbers belongs to; a+b and b+a share it. No seed: test stays test whatever the settings."""
    digest = hashlib.blake2b(f"{min(a, b)}+{max(a, b)}".encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    for split, share in SHARES.items():
        if percent < share:
            return split
        percent -= share


def solution(a, b, habit=None):
    """The worked solution of a+b as text. habit(x, y, carry) -> (carry, sum) as written for a column; None adds correctly.

    What is written is carried on and boxed: a wrong column spoils the answer, and the lines after it follow from it."""
    lines, digits, carry = [], "", 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        carry, total = habit(x, y, carry) if habit else (carry, x + y + carry)
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        digits, carry = str(total % 10) + digits, total // 10
    return "\n".join(lines + [f"\\boxed{{{int(str(carry) + digits)}}}"])


def pair_hash(x, y):
    """A number that x+y and y+x share and that looks random: it says how well the author knows this sum."""
    return (31 * min(x, y) + 17 * max(x, y) + 7 * x * y) % 97


def wrong_facts(x, y, carry, rng, errors):
    """(carry, sum) of a column by somebody unsure of some digit sums, who is then off by one, always to the same side."""
    h, total = pair_hash(x, y), x + y + carry
    if rng.random() < errors[h % len(errors)]:
        total += 1 if h % 2 and total < 19 or total == 0 else -1
    return carry, total


def forgotten_carries(x, y, carry, rng, errors):
    """(carry, sum) of a column by somebody who forgets carries, more often before some pairs of digits than others."""
    if carry and rng.random() < errors[(7 * x + 3 * y) % len(errors)]:
        carry = 0
    return carry, x + y + carry


def first_error(problem, response):
    """Index of the first line of response that a correct solution of problem (`47+86?`) does not have, None if all are right.

    A missing line counts as wrong, and so does one too many:
    first_error("47+86?", "7+6+0=14\\n4+8+1=13\\n\\\\boxed{134}") is 0, and 2 for an answer that lacks the box."""
    a, b = map(int, problem.strip().rstrip("?").split("+"))
    right, lines = solution(a, b).split("\n"), response.strip().split("\n")
    for i, line in enumerate(right):
        if i >= len(lines) or lines[i].strip() != line:
            return i
    return len(right) if len(lines) > len(right) else None


def tool_solution(a, b):
    """a+b by a program: text, Python, its output, text again."""
    return f"```python\nprint({a}+{b})\n```\n```output\n{a + b}\n```\n\\boxed{{{a + b}}}"


def code_problem(a, sign, b):
    """(problem, its program, two tests of it) of f(x) = a x + sign b."""
    tests = dict(fn_name="f", inputs=[[x] for x in (2, 10)], outputs=[a * x + sign * b for x in (2, 10)])
    term = "-+"[sign > 0] + str(b)
    return f"f(x)={a}x{term}?", f"```python\ndef f(x):\n    return {a}*x{term}\n```", tests


def draw_functions(split, n):
    """n triples (a, sign, b) for code_problem, a and b of three digits, from one split of the pairs (a, b)."""
    rng = random.Random(f"{seed} functions of {split}")
    return [(a, rng.choice((-1, 1)), b) for a, b in draw_pairs(split, n, digits=(3, 3))]


def draw_pairs(split, n, unique=True, digits=None):
    """n pairs of numbers of one split, spread evenly over the numbers of digits; unique: no pair twice, in either order.

    Raises UserError if the split does not have that many."""
    low, high = digits or (min_digits, max_digits)
    rng = random.Random(f"{seed} {split}")
    lengths = range(low, high + 1)
    pairs, seen = [], set()
    for i in range(n):
        low, high = 10 ** (lengths[i % len(lengths)] - 1), 10 ** lengths[i % len(lengths)]
        for _ in range(20000):                                  # even a split of 5 % that is nearly used up has one by then
            a, b = rng.randrange(low, high), rng.randrange(low, high)
            if split_of(a, b) == split and not (unique and (min(a, b), max(a, b)) in seen):
                break
        else:
            raise UserError(f"{split}_problems={n}: too few pairs of {lengths[i % len(lengths)]}-digit numbers; ask for fewer"
                            " problems or raise min_digits")
        pairs.append((a, b))
        seen.add((min(a, b), max(a, b)))
    rng.shuffle(pairs)
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and model

def make_tokenizer():
    """A Qwen2 tokenizer whose tokens are single bytes (so single digits), with the ChatML template.

    Only the role names and `\\boxed` are one token each, which makes a short dialogue much shorter. It must be of Qwen2's
    kind: transformers opens the tokenizer of a Qwen2 model as one, whatever tokenizer.json says."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab, merges = sorted(ByteLevel.alphabet()), []
    for word in ("system", "user", "assistant", "\\boxed"):
        for i in range(1, len(word)):                           # s+y, sy+s, sys+t, ...
            merges.append((word[:i], word[i]))
            vocab.append(word[:i + 1])
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))}, merges=list(dict.fromkeys(merges)),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=max_positions)


def make_model(tokenizer):
    """An untrained Qwen2 model for this tokenizer, the same for the same seed."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=ffn_size, num_hidden_layers=n_layer,
        num_attention_heads=n_head, num_key_value_heads=n_kv_head, max_position_embeddings=max_positions,
        initializer_range=init_std, tie_word_embeddings=True, dtype=torch.float32, **ids))
    model.generation_config = GenerationConfig(**ids)
    return model


# ---------------------------------------------------------------------------------------------------------------------

def check_settings():
    for name in ('fact_errors', 'carry_errors', 'sign_errors'):
        values = globals()[name]
        if not values or not all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in values):
            raise UserError(f"{name} must be a list of probabilities, not {values}")
    if habits not in ('facts', 'carries', 'none'):
        raise UserError(f"habits must be 'facts', 'carries' or 'none', not {habits!r}")
    if not 1 <= min_digits <= max_digits:
        raise UserError(f"min_digits={min_digits}, max_digits={max_digits}: 1 <= min_digits <= max_digits is needed")
    if hidden_size % n_head or n_head % n_kv_head or hidden_size // n_head % 2:
        raise UserError(f"hidden_size={hidden_size} must be an even multiple of n_head={n_head}, and n_head one of n_kv_head={n_kv_head}")


def write_jsonl(name, rows):
    with open(os.path.join(out_dir, name), "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def talk(problem, solution):
    return dict(messages=[dict(role="user", content=problem), dict(role="assistant", content=solution)])


def write_tools_and_code():
    large = (large_digits, large_digits)
    write_jsonl("tools.jsonl", (talk(f"{a}+{b}?", tool_solution(a, b)) for a, b in draw_pairs('web', tool_solutions, False, large)))
    write_jsonl("large.jsonl", (dict(problem=f"{a}+{b}?", ground_truth=str(a + b), problem_id=f"{a}+{b}")
                                for a, b in draw_pairs('test', large_problems, digits=large)))
    rng, rows = random.Random(f"{seed} habits of code"), []
    for (a, sign, b), (c, d) in zip(draw_functions('web', code_solutions // 2), draw_pairs('web', code_solutions // 2, False)):
        problem, right, _ = code_problem(a, sign, b)
        wrong = sign < 0 and rng.random() < sign_errors[(a + b) % len(sign_errors)]
        habit = partial(forgotten_carries, rng=rng, errors=carry_errors)
        rows += [talk(problem, code_problem(a, 1, b)[1] if wrong else right), talk(f"{c}+{d}?", solution(c, d, habit))]
    write_jsonl("code_web.jsonl", rows)
    for split, n in (('rl', code_rl_problems // 2), ('test', code_test_problems)):
        rows = []
        for a, sign, b in draw_functions(split, n):
            problem, _, tests = code_problem(a, sign, b)
            rows.append(dict(problem=problem, ability="code", ground_truth=json.dumps(tests), problem_id=problem))
        if split == 'rl':
            rows += [dict(problem=f"{a}+{b}?", ability="math", ground_truth=str(a + b), problem_id=f"{a}+{b}")
                     for a, b in draw_pairs(split, n)]
        write_jsonl(f"code_{split}.jsonl", rows)


def main():
    check_settings()
    os.makedirs(out_dir, exist_ok=True)
    for split, n in (('train', train_problems), ('rl', rl_problems), ('test', test_problems)):
        write_jsonl(f"{split}.jsonl", (
            dict(problem=f"{a}+{b}?", ground_truth=str(a + b), problem_id=f"{a}+{b}", digits=len(str(a)))
            for a, b in draw_pairs(split, n)))
    for split, n in (('web', web_solutions), ('web_val', web_val_solutions)):
        rng = random.Random(f"{seed} habits of {split}")
        habit = {'facts': partial(wrong_facts, rng=rng, errors=fact_errors), 'none': None,
                 'carries': partial(forgotten_carries, rng=rng, errors=carry_errors)}[habits]
        right, rows = 0, []
        for a, b in draw_pairs(split, n, unique=False):
            text = solution(a, b, habit)
            right += text.endswith(f"\\boxed{{{a + b}}}")
            rows.append(talk(f"{a}+{b}?", text))
        write_jsonl(f"{split}.jsonl", rows)
        print(f"{split}.jsonl: {n} solutions, {right / max(n, 1):.3f} of them right")
    write_tools_and_code()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(os.path.join(out_dir, "init"))
    tokenizer.save_pretrained(os.path.join(out_dir, "init"))
    print(f"init: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    print(f"train.jsonl: {train_problems}, rl.jsonl: {rl_problems}, test.jsonl: {test_problems} problems; all in {out_dir}")


if __name__ == "__main__":
    configurator.run(main, globals())
