"""The built-in world: data/arithmetic/prepare.py. python -m pytest tests/test_world.py"""

import importlib.util
import random

import pytest
from conftest import ROOT, call, read_jsonl, run

from configurator import UserError

SIZES = [
    "--train_problems=300",
    "--rl_problems=400",
    "--test_problems=150",
    "--web_solutions=600",
    "--web_val_solutions=60",
    "--tool_solutions=200",
    "--large_problems=50",
    "--code_solutions=400",
    "--code_rl_problems=100",
    "--code_test_problems=50",
]
FILES = ["web", "web_val", "train", "rl", "test"]


@pytest.fixture(scope="module")
def prepare():
    """The script as a module."""
    path = ROOT / "data" / "arithmetic" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_world(prepare):
    """make_world(folder, "--setting=value", ...) runs the script for a small world."""

    def make(folder, *changes):
        call(prepare, f"--out_dir={folder}", *SIZES, *changes)

    return make


@pytest.fixture(scope="module")
def folder(make_world, tmp_path_factory):
    """The folder of a small world that most tests look at."""
    path = tmp_path_factory.mktemp("world")
    make_world(path)
    return path


def read(folder, name):
    return read_jsonl(folder / f"{name}.jsonl")


def dialogues(folder, name):
    """(question, answer) of each row of messages."""
    found = []
    for row in read(folder, name):
        question, answer = row["messages"]
        found.append((question["content"], answer["content"]))
    return found


def addends(problem):
    """The two numbers of a problem such as `47+86?`."""
    a, b = problem.rstrip("?").split("+")
    return int(a), int(b)


def pairs(folder, name):
    """The unordered pairs of numbers in a file, with repetitions."""
    found = []
    for row in read(folder, name):
        text = row["problem"] if "problem" in row else row["messages"][0]["content"]
        found.append(tuple(sorted(addends(text))))
    return found


# --- files


def test_same_seed_same_bytes(folder, make_world, tmp_path):
    again = tmp_path / "again"
    other = tmp_path / "other"
    make_world(again)
    make_world(other, "--seed=7")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        name = path.relative_to(folder)
        assert (again / name).read_bytes() == path.read_bytes(), name
        if path.suffix in (".jsonl", ".safetensors"):
            assert (other / name).read_bytes() != path.read_bytes(), name


@pytest.mark.slow
def test_a_process_of_its_own_writes_the_same(folder, tmp_path):
    run("data/arithmetic/prepare.py", f"--out_dir={tmp_path}", *SIZES)
    for name in FILES:
        assert read(tmp_path, name) == read(folder, name)


def test_no_pair_is_in_two_files_whatever_the_seed(folder, make_world, tmp_path):
    make_world(tmp_path, "--seed=7")
    sets = {name: set(pairs(folder, name)) | set(pairs(tmp_path, name)) for name in FILES}
    for name in FILES:
        for other in FILES:
            if name != other:
                assert not sets[name] & sets[other], (name, other)


@pytest.mark.parametrize("name", ["train", "rl", "test"])
def test_no_problem_is_twice_in_a_file(folder, name):
    found = pairs(folder, name)
    assert len(set(found)) == len(found)


def test_a_pair_and_its_commutation_share_a_split(prepare):
    assert sum(prepare.SHARES.values()) == 100
    counts = dict.fromkeys(FILES, 0)
    for a in range(100, 300):
        for b in range(100, 300):
            split = prepare.split_of(a, b)
            assert split == prepare.split_of(b, a)
            counts[split] += 1

    # Of 40,000 pairs.
    for name in FILES:
        percent = counts[name] / 400
        assert abs(percent - prepare.SHARES[name]) < 1.5


def test_columns_and_sizes(folder):
    assert [len(read(folder, name)) for name in FILES] == [600, 60, 300, 400, 150]
    for name in ("train", "rl", "test"):
        rows = read(folder, name)
        for row in rows:
            a, b = addends(row["problem"])
            assert row["ground_truth"] == str(a + b)
            assert len(str(a)) == 3
            assert len(str(b)) == 3
            assert row["digits"] == 3
        assert len({row["problem_id"] for row in rows}) == len(rows)

    messages = read(folder, "web")[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_lengths_are_equally_frequent(make_world, tmp_path):
    make_world(tmp_path, "--min_digits=2", "--max_digits=4", "--train_problems=90")
    lengths = []
    for a, b in pairs(tmp_path, "train"):
        assert len(str(a)) == len(str(b))
        lengths.append(len(str(a)))
    assert [lengths.count(length) for length in (2, 3, 4)] == [30, 30, 30]


@pytest.mark.parametrize(
    "changes, word",
    [
        (["--rl_problems=5000", "--min_digits=2"], "rl_problems=5000"),
        (["--min_digits=5"], "min_digits"),
        (["--fact_errors=[0.5, 2]"], "fact_errors"),
        (["--fact_errors=[]"], "fact_errors"),
        (["--habits=bad"], "habits"),
        (["--n_head=3"], "n_head"),
        (["--n_kv_head=3"], "n_kv_head"),
    ],
)
def test_mistake(make_world, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        make_world(tmp_path, *changes)


# --- solutions


def test_solution_by_hand(prepare):
    assert prepare.solution(47, 86) == "7+6+0=13\n4+8+1=13\n\\boxed{133}"
    assert prepare.solution(5, 95) == "5+5+0=10\n0+9+1=10\n\\boxed{100}"


def test_solution_by_hand_with_a_habit(prepare):
    def one_too_few(x, y, carry):
        return carry, x + y + carry - 1

    def without_carry(x, y, carry):
        return 0, x + y

    assert prepare.solution(47, 86, one_too_few) == "7+6+0=12\n4+8+1=12\n\\boxed{122}"
    assert prepare.solution(47, 86, without_carry) == "7+6+0=13\n4+8+0=12\n\\boxed{123}"


def test_solutions_without_habits_are_right_in_every_line(prepare):
    rng = random.Random(0)
    for _ in range(2000):
        a = rng.randrange(10 ** rng.randint(1, 6))
        b = rng.randrange(10 ** rng.randint(1, 6))
        *lines, box = prepare.solution(a, b).split("\n")
        assert box == f"\\boxed{{{a + b}}}"

        carry = 0
        digits = ""
        for place, line in enumerate(lines):
            terms, total = line.split("=")
            x, y, written_carry = map(int, terms.split("+"))
            assert x == a // 10**place % 10
            assert y == b // 10**place % 10
            assert written_carry == carry
            assert len(total) == 2
            assert int(total) == x + y + carry
            carry = int(total[0])
            digits = total[1] + digits
        assert int(str(carry) + digits) == a + b


def test_no_habits_in_a_world_without(prepare, make_world, tmp_path):
    make_world(tmp_path, "--habits=none", "--web_solutions=100")
    for problem, answer in dialogues(tmp_path, "web"):
        assert prepare.first_error(problem, answer) is None


def assert_frequency(count, n, probability):
    """count of n is within five standard deviations of what the probability says."""
    deviation = (probability * (1 - probability) / n) ** 0.5
    assert abs(count / n - probability) <= 5 * deviation


def test_wrong_facts_come_as_often_as_stated(prepare):
    errors = [0.0, 0.1, 0.3, 0.5, 1.0]
    rng = random.Random(0)
    seen = set()
    for x in range(10):
        for y in range(x, 10):
            assert prepare.pair_hash(x, y) == prepare.pair_hash(y, x)
            probability = errors[prepare.pair_hash(x, y) % 5]
            seen.add(probability)
            for carry in (0, 1):
                right = x + y + carry
                wrong = []
                for _ in range(400):
                    written_carry, total = prepare.wrong_facts(x, y, carry, rng, errors)
                    assert written_carry == carry
                    assert 0 <= total <= 19
                    assert abs(total - right) <= 1
                    if total != right:
                        wrong.append(total)
                # Wrong in the same way every time.
                assert len(set(wrong)) <= 1
                assert_frequency(len(wrong), 400, probability)
    assert seen == set(errors)


def test_carries_are_forgotten_as_often_as_stated(prepare):
    errors = [0.3, 0.45, 0.6, 0.75, 0.85]
    rng = random.Random(0)
    for x in range(10):
        for y in range(10):
            assert prepare.forgotten_carries(x, y, 0, rng, errors) == (0, x + y)
            written = [prepare.forgotten_carries(x, y, 1, rng, errors) for _ in range(400)]
            assert set(written) <= {(0, x + y), (1, x + y + 1)}
            probability = errors[(7 * x + 3 * y) % 5]
            assert_frequency(written.count((0, x + y)), 400, probability)


@pytest.mark.parametrize("habits", ["facts", "carries"])
def test_first_error_agrees_with_the_answer(prepare, make_world, tmp_path, habits):
    make_world(tmp_path, f"--habits={habits}", "--web_solutions=1500")
    n_right = 0
    for problem, answer in dialogues(tmp_path, "web"):
        a, b = addends(problem)
        is_right = answer.endswith(f"\\boxed{{{a + b}}}")
        assert is_right == (prepare.first_error(problem, answer) is None)
        n_right += is_right
    assert 0.1 < n_right / 1500 < 0.6


@pytest.mark.parametrize(
    "response, index",
    [
        ("7+6+0=13\n4+8+1=13\n\\boxed{133}", None),
        ("7+6+0=13\n4+8+1=13\n\\boxed{133}\n", None),
        ("7+6+0=14\n4+8+1=13\n\\boxed{134}", 0),
        ("7+6+0=13\n4+8+0=12\n\\boxed{123}", 1),
        ("7+6+0=13\n4+8+1=13\n\\boxed{143}", 2),
        ("7+6+0=13\n4+8+1=13", 2),
        ("7+6+0=13\n4+8+1=13\n\\boxed{133}\n1", 3),
        ("", 0),
    ],
)
def test_first_error_by_hand(prepare, response, index):
    assert prepare.first_error("47+86?", response) == index


# --- tokenizer and model


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "init")


def test_tokenizer_round_trip(folder, tokenizer):
    texts = [
        "".join(map(chr, range(32, 127))) + "\n",
        "users of assistants \\boxed{\\boxed{1}}  two  spaces ,.",
        "939+945?",
        "",
        "Grüße, 你好 🙂\t\r\n",
    ]
    for question, answer in dialogues(folder, "web")[:50]:
        texts.append(question)
        texts.append(answer)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens_are_single_bytes_and_a_few_words(tokenizer):
    ids = tokenizer("14\n\\boxed{14}<|im_end|>")["input_ids"]
    words = [tokenizer.decode(i) for i in ids]
    assert words == ["1", "4", "\n", "\\boxed", "{", "1", "4", "}", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"

    # The ids are 0, 1, 2, ... without gaps.
    ids = tokenizer.get_vocab().values()
    assert sorted(ids) == list(range(len(tokenizer)))


def test_tokenizer_on_disk_is_the_one_made(prepare, folder, tokenizer):
    """transformers must not rebuild it as something else.

    It does so for classes that it thinks are wrong for the model.
    """
    made = prepare.make_tokenizer()
    for row in read(folder, "web")[:50]:
        text = made.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
    ids = tokenizer("<|im_start|>user\n1")["input_ids"]
    assert [tokenizer.decode(i) for i in ids] == ["<|im_start|>", "user", "\n", "1"]


@pytest.mark.parametrize("system", [None, "Be kind: use \\boxed{}."])
def test_chat_template(tokenizer, system):
    prompt = [{"role": "user", "content": "47+86?"}]
    text = "<|im_start|>user\n47+86?<|im_end|>\n"
    if system is not None:
        prompt.insert(0, {"role": "system", "content": system})
        text = f"<|im_start|>system\n{system}<|im_end|>\n{text}"
    answer = "7+6+0=13\n\\boxed{133}"

    def ids(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)

    plain = ids(prompt)
    asked = ids(prompt, add_generation_prompt=True)
    full = ids([*prompt, {"role": "assistant", "content": answer}])

    # Each is the beginning of the next.
    assert asked[: len(plain)] == plain
    assert full[: len(asked)] == asked
    answered = full[len(asked) :]
    assert answered == tokenizer(answer + "<|im_end|>\n")["input_ids"]
    assert tokenizer.eos_token_id in answered

    assert tokenizer.decode(asked) == text + "<|im_start|>assistant\n"
    assert tokenizer(tokenizer.decode(asked), add_special_tokens=False)["input_ids"] == asked


def test_model_folder_opens(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "init")
    config = model.config
    assert config.model_type == "qwen2"
    assert config.vocab_size == len(tokenizer)
    assert config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads == 32
    assert config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.06) < 0.006, name

    ids = torch.tensor([tokenizer("939+945?")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, 8, len(tokenizer))
    assert torch.isfinite(logits).all()


# --- tools and code


def test_large_sums_by_a_program(prepare, folder):
    expected = "```python\nprint(47+86)\n```\n```output\n133\n```\n\\boxed{133}"
    assert prepare.tool_solution(47, 86) == expected
    for question, answer in dialogues(folder, "tools"):
        assert answer == prepare.tool_solution(*addends(question))

    for name in ("tools", "large"):
        for a, b in pairs(folder, name):
            assert len(str(a)) == 5
            assert len(str(b)) == 5
    assert not set(pairs(folder, "tools")) & set(pairs(folder, "large"))


def test_programs_and_their_tests(prepare):
    """The right program passes its tests; the one with the author's bad habit passes none."""
    import grader

    function = (321, -1, 207)
    assert prepare.code_problem(*function) == "f(x)=321x-207?"
    program = prepare.code_program(*function)
    assert program == "```python\ndef f(x):\n    return 321*x-207\n```"
    tests = prepare.code_tests(*function)
    assert tests == {"fn_name": "f", "inputs": [[2], [10]], "outputs": [435, 3003]}

    wrong = prepare.code_program(321, 1, 207)
    assert grader.grade_code(program, tests) == 1.0
    assert grader.grade_code(wrong, tests) == 0.0


def test_held_out_functions_are_in_no_other_file(folder):
    abilities = [row["ability"] for row in read(folder, "code_rl")]
    assert abilities == ["code"] * 50 + ["math"] * 50

    rl = {row["problem"] for row in read(folder, "code_rl") if row["ability"] == "code"}
    test = {row["problem"] for row in read(folder, "code_test")}
    web = {question for question, _ in dialogues(folder, "code_web")}
    assert len(rl) == 50
    assert len(test) == 50
    assert not test & rl
    assert not test & web
    assert not rl & web


def test_signs_are_wrong_as_often_as_stated(make_world, tmp_path):
    make_world(tmp_path, "--sign_errors=[0.7]", "--code_solutions=4000")
    programs = [answer for question, answer in dialogues(tmp_path, "code_web") if "-" in question]
    n_wrong = sum("+" in program for program in programs)
    deviation = (0.7 * 0.3 / len(programs)) ** 0.5
    assert n_wrong / len(programs) == pytest.approx(0.7, abs=4 * deviation)
