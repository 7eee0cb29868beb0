"""
The built-in world: column addition, small enough that every stage of the recipe runs on a laptop.

    python data/arithmetic/prepare.py       # takes seconds; writes the files below to out_dir

A problem is `47+86?`. Its worked solution adds column by column, ones first. Each line is
digit + digit + carry = two-digit sum, and the last line is the result in a box:

    7+6+0=13
    4+8+1=13
    \\boxed{133}

The base model learns from text by an author with bad habits: wrong digit sums or forgotten carries,
each with its own probability. So the model knows the method and often fails, on some problems
nearly always and on others never. And because every line is known to be right or wrong, one can
check what a process reward says about it (see first_error).

    web.jsonl, web_val.jsonl    solutions with the bad habits, as `messages` rows: what the base
                                model is pretrained on (sft.py)
    train.jsonl                 problems for which SFT data is sampled (generate.py)
    rl.jsonl                    problems for RL (prime.py)
    test.jsonl                  held-out problems
    tools.jsonl                 large sums solved by a one-line program, together with its output,
                                as `messages` rows (runs/toy_tir.sh)
    large.jsonl                 held-out problems with numbers too large to add in the head
    code_web.jsonl              half sums, half programs (`f(x)=3x-8?`), both with the bad habits
                                (runs/toy_code.sh)
    code_rl.jsonl               problems, half sums, half programs; the programs come with tests
    code_test.jsonl             held-out programs
    init/                       an untrained Qwen2 model and its tokenizer, a Hugging Face folder

No pair of numbers, in either order, is in more than one of these four groups: what a model learns
from (web, tools, code_web), is sampled on (train), is reinforced on (rl, code_rl), and is tested on
(test, large, code_test). The same settings give the same bytes.
"""

import hashlib
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules in the script's own folder; configurator.py is in the root folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import UserError

# --- output
out_dir = "data/arithmetic/world"  # everything is written here
seed = 1337  # of the problems, the habits and the model's weights

# --- problems
# Both numbers of a problem have the same number of digits; all lengths are equally frequent.
min_digits = 3
max_digits = 3
# Rows of train.jsonl. Few on purpose: one epoch on the right answers to thousands of problems
# unlearns the bad habits by itself and leaves nothing for RL to do.
train_problems = 300
rl_problems = 3000  # rows of rl.jsonl
test_problems = 500  # rows of test.jsonl
web_solutions = 40000  # rows of web.jsonl; a problem may occur again, with other mistakes
web_val_solutions = 500  # rows of web_val.jsonl
large_digits = 5  # of both numbers, in tools.jsonl and large.jsonl
tool_solutions = 16000  # rows of tools.jsonl
large_problems = 200  # rows of large.jsonl
code_solutions = 16000  # rows of code_web.jsonl
code_rl_problems = 2000  # rows of code_rl.jsonl
code_test_problems = 200  # rows of code_test.jsonl

# --- bad habits of the author of web.jsonl
# "carries": some carries are forgotten; "facts": some digit sums are off by one; "none".
habits = "carries"
# How often a digit sum is off; the two digits decide which entry applies. These are some 35 habits
# that have to be unlearned one by one, so accuracy climbs gradually.
fact_errors = [0.0, 0.0, 0.2, 0.4, 0.6, 0.7]
# How often a carry of 1 is forgotten. This is one habit: it is unlearned all at once.
carry_errors = [0.6, 0.7, 0.8, 0.85, 0.9]
sign_errors = [0.5, 0.6, 0.7, 0.8]  # how often a program adds where it should subtract

# --- model
n_layer = 2
hidden_size = 128
n_head = 4  # heads of 32 dimensions, the fewest that vLLM supports on CPU
n_kv_head = 2
ffn_size = 256
init_std = 0.06  # of the matrices; at this width the usual 0.02 learns far more slowly
max_positions = 512  # context length

# Percentage of all pairs of numbers that belong to each split.
SHARES = {"web": 30, "web_val": 5, "train": 25, "rl": 30, "test": 10}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------------------------------
# Pairs of numbers


def split_of(a, b):
    """The one split that a pair of numbers belongs to, in either order.

    The seed has no influence: a test problem is a test problem whatever the settings.
    """
    pair = f"{min(a, b)}+{max(a, b)}"
    digest = hashlib.blake2b(pair.encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    for split, share in SHARES.items():
        if percent < share:
            return split
        percent -= share


def draw_pairs(split, n, unique=True, digits=None):
    """n pairs of numbers from one split, in equal parts for each number of digits.

    digits is (fewest, most), by default the settings min_digits and max_digits. With `unique` no
    pair is drawn twice, in either order. Raises UserError if the split does not have n pairs.
    """
    if digits is None:
        digits = (min_digits, max_digits)
    fewest, most = digits
    lengths = range(fewest, most + 1)

    rng = random.Random(f"{seed} {split}")
    pairs = []
    seen = set()
    for i in range(n):
        length = lengths[i % len(lengths)]
        pair = _draw_pair(rng, split, length, seen)
        if pair is None:
            raise UserError(
                f"{split}_problems={n}: too few pairs of {length}-digit numbers; ask for fewer"
                " problems or raise min_digits"
            )
        pairs.append(pair)
        if unique:
            seen.add(tuple(sorted(pair)))
    rng.shuffle(pairs)
    return pairs


def _draw_pair(rng, split, length, seen):
    """A pair of numbers of this length and split that is not in seen, or None if none was found."""
    low = 10 ** (length - 1)
    high = 10**length
    # So many attempts find one even in a split of 5 % that is nearly used up.
    for _ in range(20000):
        a = rng.randrange(low, high)
        b = rng.randrange(low, high)
        if split_of(a, b) == split and (min(a, b), max(a, b)) not in seen:
            return a, b
    return None


def draw_functions(split, n):
    """n triples (a, sign, b) for code_problem; (a, b) is a pair of three-digit numbers."""
    rng = random.Random(f"{seed} functions of {split}")
    functions = []
    for a, b in draw_pairs(split, n, digits=(3, 3)):
        sign = rng.choice((-1, 1))
        functions.append((a, sign, b))
    return functions


# --------------------------------------------------------------------------------------------------
# Sums


def solution(a, b, habit=None):
    """The worked solution of a+b as text.

    habit(x, y, carry) returns (carry, sum) as the author writes them for one column; without it
    every column is right. The next columns and the box follow from what is written, so one wrong
    column spoils the answer.
    """
    lines = []
    digits = ""
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        x = a // 10**place % 10
        y = b // 10**place % 10
        total = x + y + carry
        if habit is not None:
            carry, total = habit(x, y, carry)
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        digits = str(total % 10) + digits
        carry = total // 10
    result = int(str(carry) + digits)
    lines.append(f"\\boxed{{{result}}}")
    return "\n".join(lines)


def first_error(problem, response):
    """Index of the first wrong line of a response to a problem (`47+86?`), None if all are right.

    A line is right if it is the same as in the correct solution. A missing line counts as wrong,
    and so does an extra one: first_error("47+86?", "7+6+0=14\\n4+8+1=13\\n\\\\boxed{134}") is 0,
    and for a response without the box it is 2.
    """
    a, b = map(int, problem.strip().rstrip("?").split("+"))
    right = solution(a, b).split("\n")
    lines = response.strip().split("\n")
    for i, line in enumerate(right):
        if i >= len(lines) or lines[i].strip() != line:
            return i
    if len(lines) > len(right):
        return len(right)
    return None


def pair_hash(x, y):
    """A random-looking number, the same for x+y and y+x: how well the author knows this sum."""
    return (31 * min(x, y) + 17 * max(x, y) + 7 * x * y) % 97


def wrong_facts(x, y, carry, rng, errors):
    """(carry, sum) of a column by an author who is unsure of some digit sums.

    A wrong sum is off by one, for the same two digits always in the same direction.
    """
    number = pair_hash(x, y)
    total = x + y + carry
    if rng.random() < errors[number % len(errors)]:
        is_upward = number % 2 == 1 and total < 19
        if is_upward or total == 0:
            total += 1
        else:
            total -= 1
    return carry, total


def forgotten_carries(x, y, carry, rng, errors):
    """(carry, sum) of a column by an author who forgets carries.

    How often depends on the two digits.
    """
    if carry == 1 and rng.random() < errors[(7 * x + 3 * y) % len(errors)]:
        carry = 0
    return carry, x + y + carry


def make_habit(rng):
    """The habit for solution() that the settings ask for."""
    if habits == "facts":
        return partial(wrong_facts, rng=rng, errors=fact_errors)
    if habits == "carries":
        return partial(forgotten_carries, rng=rng, errors=carry_errors)
    return None


# --------------------------------------------------------------------------------------------------
# Sums by a program, and functions to program


def tool_solution(a, b):
    """a+b by a program: text, Python, its output, text again."""
    return f"```python\nprint({a}+{b})\n```\n```output\n{a + b}\n```\n\\boxed{{{a + b}}}"


def code_term(sign, b):
    """`-8` or `+8`, as in f(x)=3x-8."""
    if sign > 0:
        return f"+{b}"
    return f"-{b}"


def code_problem(a, sign, b):
    """The text of a problem that asks for a function: f(x)=3x-8?"""
    return f"f(x)={a}x{code_term(sign, b)}?"


def code_program(a, sign, b):
    """The program for a code_problem."""
    return f"```python\ndef f(x):\n    return {a}*x{code_term(sign, b)}\n```"


def code_tests(a, sign, b):
    """Two tests of the program for a code_problem."""
    arguments = (2, 10)
    return {
        "fn_name": "f",
        "inputs": [[x] for x in arguments],
        "outputs": [a * x + sign * b for x in arguments],
    }


# --------------------------------------------------------------------------------------------------
# Files


def write_jsonl(name, rows):
    with open(os.path.join(out_dir, name), "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def dialogue(problem, solution):
    """A problem and its solution as a row of messages."""
    question = {"role": "user", "content": problem}
    answer = {"role": "assistant", "content": solution}
    return {"messages": [question, answer]}


def sum_row(a, b):
    """The problem a+b as a row."""
    return {"problem": f"{a}+{b}?", "ground_truth": str(a + b), "problem_id": f"{a}+{b}"}


def mixed_row(problem, ability, ground_truth, problem_id):
    """A row of a file whose problems may ask for a sum ("math") or a program ("code")."""
    return {
        "problem": problem,
        "ability": ability,
        "ground_truth": ground_truth,
        "problem_id": problem_id,
    }


def write_problems(split, n):
    """Problems for sampling: train.jsonl, rl.jsonl and test.jsonl.

    `steps`, the right lines, are for reports; the model sees the problem alone.
    """
    rows = []
    for a, b in draw_pairs(split, n):
        *steps, _ = solution(a, b).split("\n")
        rows.append(sum_row(a, b) | {"digits": len(str(a)), "steps": steps})
    write_jsonl(f"{split}.jsonl", rows)


def write_solutions(split, n):
    """Solutions with the bad habits: web.jsonl and web_val.jsonl."""
    habit = make_habit(random.Random(f"{seed} habits of {split}"))
    n_right = 0
    rows = []
    for a, b in draw_pairs(split, n, unique=False):
        text = solution(a, b, habit)
        if text.endswith(f"\\boxed{{{a + b}}}"):
            n_right += 1
        rows.append(dialogue(f"{a}+{b}?", text))
    write_jsonl(f"{split}.jsonl", rows)
    print(f"{split}.jsonl: {n} solutions, {n_right / max(n, 1):.3f} of them right")


def write_tools():
    """Large sums, with a program that solves them and without: tools.jsonl and large.jsonl."""
    digits = (large_digits, large_digits)
    rows = []
    for a, b in draw_pairs("web", tool_solutions, unique=False, digits=digits):
        rows.append(dialogue(f"{a}+{b}?", tool_solution(a, b)))
    write_jsonl("tools.jsonl", rows)

    rows = []
    for a, b in draw_pairs("test", large_problems, digits=digits):
        rows.append(sum_row(a, b))
    write_jsonl("large.jsonl", rows)


def write_code_solutions():
    """Programs and sums in turn, both with the bad habits: code_web.jsonl."""
    rng = random.Random(f"{seed} habits of code")
    habit = partial(forgotten_carries, rng=rng, errors=carry_errors)
    functions = draw_functions("web", code_solutions // 2)
    sums = draw_pairs("web", code_solutions // 2, unique=False)
    rows = []
    for (a, sign, b), (c, d) in zip(functions, sums):
        # The author sometimes writes a plus where the problem has a minus.
        written_sign = sign
        if sign < 0 and rng.random() < sign_errors[(a + b) % len(sign_errors)]:
            written_sign = 1
        rows.append(dialogue(code_problem(a, sign, b), code_program(a, written_sign, b)))
        rows.append(dialogue(f"{c}+{d}?", solution(c, d, habit)))
    write_jsonl("code_web.jsonl", rows)


def write_code_problems():
    """Functions with their tests: code_rl.jsonl, which has as many sums, and code_test.jsonl."""
    rows = code_rows("rl", code_rl_problems // 2)
    for a, b in draw_pairs("rl", code_rl_problems // 2):
        rows.append(mixed_row(f"{a}+{b}?", "math", str(a + b), f"{a}+{b}"))
    write_jsonl("code_rl.jsonl", rows)
    write_jsonl("code_test.jsonl", code_rows("test", code_test_problems))


def code_rows(split, n):
    """Rows for n functions of a split."""
    rows = []
    for a, sign, b in draw_functions(split, n):
        problem = code_problem(a, sign, b)
        tests = json.dumps(code_tests(a, sign, b))
        rows.append(mixed_row(problem, "code", tests, problem))
    return rows


# --------------------------------------------------------------------------------------------------
# Tokenizer and model


def make_tokenizer():
    """A Qwen2 tokenizer whose tokens are single bytes (so single digits), with the ChatML template.

    Only the role names and `\\boxed` are one token each, which makes a short dialogue much shorter.
    The class has to be Qwen2's: transformers opens the tokenizer of a Qwen2 model with that class,
    whatever tokenizer.json says.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    # A word of several bytes needs a merge for each of its beginnings: s+y, sy+s, sys+t, ...
    vocab = sorted(ByteLevel.alphabet())
    merges = []
    for word in ("system", "user", "assistant", "\\boxed"):
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            vocab.append(word[: i + 1])

    # Words that begin alike share tokens and merges, which must be listed only once.
    vocab = dict.fromkeys(vocab)
    merges = dict.fromkeys(merges)
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )


def make_model(tokenizer):
    """An untrained Qwen2 model for this tokenizer, the same for the same seed."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    special_ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=ffn_size,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head,
        max_position_embeddings=max_positions,
        initializer_range=init_std,
        tie_word_embeddings=True,
        dtype=torch.float32,
        **special_ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**special_ids)
    return model


# --------------------------------------------------------------------------------------------------


def check_settings():
    """Raises UserError if a setting is out of range."""
    lists = {"fact_errors": fact_errors, "carry_errors": carry_errors, "sign_errors": sign_errors}
    for name, probabilities in lists.items():
        if not probabilities or not all(is_probability(p) for p in probabilities):
            raise UserError(f"{name} must be a list of probabilities, not {probabilities}")

    if habits not in ("facts", "carries", "none"):
        raise UserError(f"habits must be 'facts', 'carries' or 'none', not {habits!r}")

    if not 1 <= min_digits <= max_digits:
        raise UserError(
            f"min_digits={min_digits}, max_digits={max_digits}:"
            " 1 <= min_digits <= max_digits is needed"
        )

    # Heads must have an even size, for the rotary embedding.
    if min(n_head, n_kv_head) < 1 or hidden_size % (2 * n_head) or n_head % n_kv_head:
        raise UserError(
            f"hidden_size={hidden_size} must be an even multiple of n_head={n_head},"
            f" and n_head a multiple of n_kv_head={n_kv_head}"
        )


def is_probability(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def main():
    check_settings()
    os.makedirs(out_dir, exist_ok=True)
    write_problems("train", train_problems)
    write_problems("rl", rl_problems)
    write_problems("test", test_problems)
    write_solutions("web", web_solutions)
    write_solutions("web_val", web_val_solutions)
    write_tools()
    write_code_solutions()
    write_code_problems()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(os.path.join(out_dir, "init"))
    tokenizer.save_pretrained(os.path.join(out_dir, "init"))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"init: {n_parameters:,} parameters, {len(tokenizer)} tokens")
    print(
        f"train.jsonl: {train_problems}, rl.jsonl: {rl_problems}, test.jsonl: {test_problems}"
        f" problems; all in {out_dir}"
    )


if __name__ == "__main__":
    configurator.run(main, globals())
