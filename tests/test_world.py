"""The built-in world: data/arithmetic/prepare.py. python -m pytest tests/test_world.py"""
import importlib.util
import json
import os
import random
from functools import partial

import pytest

import configurator
from configurator import UserError

PREPARE = os.path.join(os.path.dirname(os.path.abspath(configurator.__file__)), "data", "arithmetic", "prepare.py")
SMALL = ["--train_problems=300", "--rl_problems=400", "--test_problems=150", "--web_solutions=600", "--web_val_solutions=60",
         "--tool_solutions=200", "--large_problems=50", "--code_solutions=400", "--code_rl_problems=100", "--code_test_problems=50"]
FILES = ["web", "web_val", "train", "rl", "test"]


def make_world(out_dir, *argv):
    """A small world in out_dir; returns the script as a module, with its settings."""
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    configurator.configure(vars(prepare), [f"--out_dir={out_dir}", *SMALL, *argv])
    prepare.main()
    return prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("world")
    return make_world(out_dir), out_dir


def read(out_dir, name):
    with open(out_dir / f"{name}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def pairs(out_dir, name):
    """The unordered pairs of numbers of a file, with repetitions."""
    texts = [row["problem"] if "problem" in row else row["messages"][0]["content"] for row in read(out_dir, name)]
    return [tuple(sorted(map(int, text.rstrip("?").split("+")))) for text in texts]


# --- files

def test_same_seed_same_bytes(world, tmp_path):
    _, first = world
    make_world(tmp_path / "again")
    make_world(tmp_path / "other", "--seed=7")
    for folder, _, names in os.walk(first):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), first)
            again, other = (tmp_path / "again" / path).read_bytes(), (tmp_path / "other" / path).read_bytes()
            assert again == (first / path).read_bytes(), path
            if name.endswith((".jsonl", ".safetensors")):
                assert other != again, path


def test_no_pair_is_in_two_files_whatever_the_seed(world, tmp_path):
    _, first = world
    make_world(tmp_path, "--seed=7")
    sets = {name: set(pairs(first, name)) | set(pairs(tmp_path, name)) for name in FILES}
    for name in FILES:
        for other in FILES:
            assert name == other or not sets[name] & sets[other], (name, other)
    for name in ("train", "rl", "test"):                        # nor twice in one file
        assert len(set(pairs(first, name))) == len(pairs(first, name))


def test_a_pair_and_its_commutation_share_a_split(world):
    prepare, _ = world
    assert sum(prepare.SHARES.values()) == 100
    counts = dict.fromkeys(FILES, 0)
    for a in range(100, 300):
        for b in range(100, 300):
            assert prepare.split_of(a, b) == prepare.split_of(b, a)
            counts[prepare.split_of(a, b)] += 1
    for name in FILES:
        assert abs(counts[name] / 400 - prepare.SHARES[name]) < 1.5


def test_columns_and_sizes(world):
    _, out_dir = world
    assert [len(read(out_dir, name)) for name in FILES] == [600, 60, 300, 400, 150]
    for name in ("train", "rl", "test"):
        rows = read(out_dir, name)
        for row in rows:
            a, b = map(int, row["problem"].rstrip("?").split("+"))
            assert row["ground_truth"] == str(a + b) and len(str(a)) == len(str(b)) == row["digits"]
        assert len({row["problem_id"] for row in rows}) == len(rows)
        assert {row["digits"] for row in rows} == {3}
    assert [m["role"] for m in read(out_dir, "web")[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("argv, word", [
    (["--rl_problems=5000", "--min_digits=2"], "rl_problems=5000"), (["--min_digits=5"], "min_digits"), (["--fact_errors=[0.5, 2]"], "fact_errors"),
    (["--fact_errors=[]"], "fact_errors"), (["--habits=bad"], "habits"), (["--n_head=3"], "n_head"),
])
def test_mistake(tmp_path, argv, word):
    with pytest.raises(UserError, match=word):
        make_world(tmp_path, *argv)


# --- solutions

def test_solution_by_hand(world):
    prepare, _ = world
    assert prepare.solution(47, 86) == "7+6+0=13\n4+8+1=13\n\\boxed{133}"
    assert prepare.solution(5, 95) == "5+5+0=10\n0+9+1=10\n\\boxed{100}"
    assert prepare.solution(47, 86, lambda x, y, c: (c, x + y + c - 1)) == "7+6+0=12\n4+8+1=12\n\\boxed{122}"
    assert prepare.solution(47, 86, lambda x, y, c: (0, x + y)) == "7+6+0=13\n4+8+0=12\n\\boxed{123}"


def test_solutions_without_habits_are_right_in_every_line(world):
    prepare, _ = world
    rng = random.Random(0)
    for _ in range(2000):
        a, b = rng.randrange(10 ** rng.randint(1, 6)), rng.randrange(10 ** rng.randint(1, 6))
        *lines, box = prepare.solution(a, b).split("\n")
        assert box == f"\\boxed{{{a + b}}}"
        carry, written = 0, ""
        for i, line in enumerate(lines):
            terms, total = line.split("=")
            x, y, c = map(int, terms.split("+"))
            assert (x, y, c) == (a // 10**i % 10, b // 10**i % 10, carry) and int(total) == x + y + c and len(total) == 2
            carry, written = int(total[0]), total[1] + written
        assert int(str(carry) + written) == a + b


def test_no_habits_in_a_world_without(tmp_path):
    prepare = make_world(tmp_path, "--habits=none", "--web_solutions=100")
    for row in read(tmp_path, "web"):
        problem, answer = (m["content"] for m in row["messages"])
        assert prepare.first_error(problem, answer) is None


def test_wrong_facts_come_as_often_as_stated(world):
    prepare, _ = world
    errors, rng, n = [0.0, 0.1, 0.3, 0.5, 1.0], random.Random(0), 400
    seen = set()
    for x in range(10):
        for y in range(x, 10):
            p = errors[prepare.pair_hash(x, y) % 5]
            assert prepare.pair_hash(x, y) == prepare.pair_hash(y, x)
            for carry in (0, 1):
                written = [prepare.wrong_facts(x, y, carry, rng, errors) for _ in range(n)]
                assert all(c == carry and 0 <= total <= 19 and abs(total - x - y - carry) <= 1 for c, total in written)
                assert len({total for _, total in written} - {x + y + carry}) <= 1     # wrong the same way every time
                share = sum(total != x + y + carry for _, total in written) / n
                assert abs(share - p) <= 5 * (p * (1 - p) / n) ** 0.5
            seen.add(p)
    assert seen == set(errors)


def test_carries_are_forgotten_as_often_as_stated(world):
    prepare, _ = world
    errors, rng, n = [0.3, 0.45, 0.6, 0.75, 0.85], random.Random(0), 400
    for x in range(10):
        for y in range(10):
            assert prepare.forgotten_carries(x, y, 0, rng, errors) == (0, x + y)
            p = errors[(7 * x + 3 * y) % 5]
            written = [prepare.forgotten_carries(x, y, 1, rng, errors) for _ in range(n)]
            assert set(written) <= {(0, x + y), (1, x + y + 1)}
            assert abs(written.count((0, x + y)) / n - p) <= 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("habits", ["facts", "carries"])
def test_first_error_agrees_with_the_answer(tmp_path, habits):
    prepare = make_world(tmp_path, f"--habits={habits}", "--web_solutions=1500")
    right = 0
    for row in read(tmp_path, "web"):
        problem, answer = (m["content"] for m in row["messages"])
        a, b = map(int, problem.rstrip("?").split("+"))
        good = answer.endswith(f"\\boxed{{{a + b}}}")
        assert good == (prepare.first_error(problem, answer) is None)
        right += good
    assert 0.1 < right / 1500 < 0.6


def test_first_error_by_hand(world):
    first_error = world[0].first_error
    good = "7+6+0=13\n4+8+1=13\n\\boxed{133}"
    assert first_error("47+86?", good) is None and first_error("47+86?", good + "\n") is None
    assert first_error("47+86?", "7+6+0=14\n4+8+1=13\n\\boxed{134}") == 0
    assert first_error("47+86?", "7+6+0=13\n4+8+0=12\n\\boxed{123}") == 1
    assert first_error("47+86?", "7+6+0=13\n4+8+1=13\n\\boxed{143}") == 2
    assert first_error("47+86?", "7+6+0=13\n4+8+1=13") == 2
    assert first_error("47+86?", good + "\n1") == 3
    assert first_error("47+86?", "") == 0


# --- tokenizer and model

@pytest.fixture(scope="module")
def tokenizer(world):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(world[1] / "init")


def test_tokenizer_round_trip(world, tokenizer):
    texts = ["".join(map(chr, range(32, 127))) + "\n", "users of assistants \\boxed{\\boxed{1}}  two  spaces ,.", "939+945?", ""]
    texts += ["Grüße, 你好 🙂\t\r\n"] + [m["content"] for row in read(world[1], "web")[:50] for m in row["messages"]]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    ids = tokenizer("14\n\\boxed{14}<|im_end|>")["input_ids"]
    assert [tokenizer.decode(i) for i in ids] == ["1", "4", "\n", "\\boxed", "{", "1", "4", "}", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == max(tokenizer.get_vocab().values()) + 1


def test_tokenizer_on_disk_is_the_one_made(world, tokenizer):
    """transformers must not rebuild it into something else, which it does for classes it thinks wrong for the model."""
    made = world[0].make_tokenizer()
    for row in read(world[1], "web")[:50]:
        text = made.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
    assert [tokenizer.decode(i) for i in tokenizer("<|im_start|>user\n1")["input_ids"]] == ["<|im_start|>", "user", "\n", "1"]


@pytest.mark.parametrize("system", [None, "Be kind: use \\boxed{}."])
def test_chat_template(tokenizer, system):
    prompt = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "47+86?"}]
    answer = "7+6+0=13\n\\boxed{133}"
    ids = partial(tokenizer.apply_chat_template, return_dict=False)
    plain, asked = ids(prompt), ids(prompt, add_generation_prompt=True)
    full = ids(prompt + [{"role": "assistant", "content": answer}])
    assert asked[:len(plain)] == plain and full[:len(asked)] == asked
    assert full[len(asked):] == tokenizer(answer + "<|im_end|>\n")["input_ids"] and tokenizer.eos_token_id in full[len(asked):]
    text = ("<|im_start|>system\n" + system + "<|im_end|>\n" if system else "") + "<|im_start|>user\n47+86?<|im_end|>\n"
    assert tokenizer.decode(asked) == text + "<|im_start|>assistant\n"
    assert tokenizer(tokenizer.decode(asked), add_special_tokens=False)["input_ids"] == asked


def test_model_folder_opens(world, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(world[1] / "init")
    config = model.config
    assert config.model_type == "qwen2" and config.vocab_size == len(tokenizer) and config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads == 32
    assert model.generation_config.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert abs(p.std().item() - 0.06) < 0.006, name
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("939+945?")["input_ids"]])).logits
    assert logits.shape == (1, 8, len(tokenizer)) and torch.isfinite(logits).all()


# --- tools and code

def test_large_sums_by_a_program(world):
    prepare, folder = world
    assert prepare.tool_solution(47, 86) == "```python\nprint(47+86)\n```\n```output\n133\n```\n\\boxed{133}"
    for row in read(folder, "tools"):
        question, answer = (m["content"] for m in row["messages"])
        assert answer == prepare.tool_solution(*map(int, question.rstrip("?").split("+")))
    assert all(len(str(n)) == 5 for name in ("tools", "large") for pair in pairs(folder, name) for n in pair)
    assert not set(pairs(folder, "tools")) & set(pairs(folder, "large"))


def test_programs_and_their_tests(world):
    """The right program passes its tests, the one with the author's bad habit none; held-out functions are in no other file."""
    import grader
    prepare, folder = world
    problem, right, tests = prepare.code_problem(321, -1, 207)
    assert (problem, right) == ("f(x)=321x-207?", "```python\ndef f(x):\n    return 321*x-207\n```")
    assert tests == dict(fn_name="f", inputs=[[2], [10]], outputs=[435, 3003])
    assert grader.grade_code(right, tests) == 1.0 and grader.grade_code(right.replace("-", "+"), tests) == 0.0
    asked = {name: [row for row in read(folder, name)] for name in ("code_rl", "code_test")}
    rl = {row["problem"] for row in asked["code_rl"] if row["ability"] == "code"}
    assert len(rl) == 50 and sum(row["ability"] == "math" for row in asked["code_rl"]) == 50
    test = {row["problem"] for row in asked["code_test"]}
    web = {row["messages"][0]["content"] for row in read(folder, "code_web")}
    assert len(test) == 50 and not test & rl and not test & web and not rl & web


def test_signs_are_wrong_as_often_as_stated(tmp_path):
    make_world(tmp_path, "--sign_errors=[0.7]", "--code_solutions=4000")
    wrong = [row["messages"][1]["content"].count("+") for row in read(tmp_path, "code_web") if "-" in row["messages"][0]["content"]]
    assert sum(wrong) / len(wrong) == pytest.approx(0.7, abs=4 * (0.21 / len(wrong)) ** 0.5)
