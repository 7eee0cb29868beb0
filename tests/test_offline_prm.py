"""prime.py --rollouts: a PRM trained on stored answers; prm.json; what is refused."""

import shutil

import pytest
import torch
from conftest import call, read_jsonl, run, torchrun, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import lib.report
import prime
from configurator import UserError
from lib.prm_folder import read_prm_file, write_prm_file
from lib.stored_answers import read_groups, tokenize_stored


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(lib.report, "plot_curves", lambda *paths: None)


@pytest.fixture(scope="module")
def answers(guesser, guess_data, tmp_path_factory):
    """samples.jsonl of generate.py: four answers of a small model to each of 40 problems."""
    out = tmp_path_factory.mktemp("answers")
    call(
        generate,
        f"--data={guess_data[1]}",
        f"--model={guesser}",
        "--samples_per_problem=4",
        "--max_problems=40",
        "--temperature=1.0",
        "--max_tokens=12",
        "--engine=hf",
        "--device=cpu",
        "--grade_workers=1",
        "--system_prompt=",
        f"--out_dir={out}",
    )
    return out / "samples.jsonl"


@pytest.fixture(scope="module")
def arguments(guesser, answers):
    return [
        f"--rollouts={answers}",
        f"--model={guesser}",
        "--device=cpu",
        "--prompts_per_step=6",
        "--samples_per_prompt=4",
        "--max_prompt_tokens=40",
        "--max_tokens=13",
        "--prm_batch_rows=12",
        "--filter_low=0",
        "--filter_high=1",
        "--beta=1",
        "--prm_learning_rate=1e-3",
        "--save_interval=0",
        "--checkpointing=False",
        "--max_steps=3",
        "--seed=3",
    ]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


# ----------------------------------------------------------------------------------------------
# answers of a file


def test_stored_answers_are_the_tokens_that_the_model_wrote(guesser, answers):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    for row in read_jsonl(answers)[:20]:
        prompt, answer = tokenize_stored(tokenizer, row)
        assert prompt == tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=False
        )
        ended = row["finish_reason"] == "stop"
        assert len(answer.tokens) == row["n_tokens"]
        assert (answer.tokens[-1] == tokenizer.eos_token_id) == ended
        assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == row["response"]
        assert answer.outcome == row["correct"]


def test_groups_have_as_many_answers_as_asked_for(guesser, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    rows = []
    for problem, count in (("1", 3), ("2", 1), ("3", 2)):
        for k in range(count):
            messages = [dict(role="user", content=problem)]
            rows.append(
                dict(messages=messages, response=str(k), finish_reason="stop", correct=k == 0)
            )
    path = write_jsonl(tmp_path / "answers.jsonl", rows)
    groups = read_groups(path, tokenizer, 2, 100, 100)
    assert [group.outcomes for group in groups] == [[1, 0], [1, 0]]
    assert [tokenizer.decode(group.answers[1].tokens[:1]) for group in groups] == ["1", "1"]
    assert "6 answers to 3 prompts" in capsys.readouterr().out
    with pytest.raises(UserError, match="no prompt has samples_per_prompt=4"):
        read_groups(path, tokenizer, 4, 100, 100)


@pytest.mark.parametrize(
    "row, trouble",
    [
        (dict(response="1", correct=True), "neither messages nor prompt"),
        (dict(prompt="1?", correct=True), "no response"),
        (dict(prompt="1?", response="1"), "no outcome"),
        (dict(prompt="1?", response="1", score=2), "no outcome"),
        (dict(prompt="1?", response="", finish_reason="length", correct=True), "empty"),
    ],
)
def test_rows_that_are_no_graded_answers(guesser, row, trouble):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    with pytest.raises(ValueError, match=trouble):
        tokenize_stored(tokenizer, row)


# ----------------------------------------------------------------------------------------------
# training


def test_loss_of_the_first_step_and_what_is_written(arguments, guesser, tmp_path):
    call(prime, *arguments, "--prm_batch_rows=24", f"--out_dir={tmp_path}")
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    # PRM and reference begin equal: ln 2.
    assert rows[0]["prm_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[2]["prm_loss"] != pytest.approx(0.693147, abs=1e-3)
    assert read_prm_file(tmp_path / "prm") == dict(reference=str(guesser), beta=1)
    assert not (tmp_path / "policy").exists()


def test_it_makes_the_updates_of_prime(arguments, guesser, answers, tmp_path, monkeypatch):
    """prime.py on the same answers, outcomes and order gives the same PRM, bit for bit."""
    call(prime, *arguments, f"--out_dir={tmp_path / 'offline'}")
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    monkeypatch.setattr(prime, "seed", 3)
    monkeypatch.setattr(prime, "rollouts", str(answers))
    for name, value in (
        ("samples_per_prompt", 4),
        ("prompts_per_step", 6),
        ("max_prompt_tokens", 40),
        ("max_tokens", 13),
        ("filter_low", 0),
        ("filter_high", 1),
        ("max_steps", 3),
    ):
        monkeypatch.setattr(prime, name, value)
    batches = prime.stored_batches(tokenizer)
    assert [len(batch) for batch in batches] == [6, 6, 6]

    # The policy's rate is 0, and it samples what the file has.
    monkeypatch.undo()
    monkeypatch.setattr(lib.report, "plot_curves", lambda *paths: None)
    given = iter(batches)
    monkeypatch.setattr(prime, "collect_groups", lambda *args: (next(given),) * 2)
    monkeypatch.setattr(prime, "check_mismatch", lambda *args: None)
    data = tmp_path / "data.jsonl"
    problems = [dict(problem="1", ground_truth="1", problem_id=i) for i in range(40)]
    call(
        prime,
        *arguments[1:],
        f"--data={write_jsonl(data, problems)}",
        "--learning_rate=0",
        "--weight_decay=0",
        "--grade_workers=1",
        "--engine=hf",
        "--batch_rows=12",
        "--samples_logged=0",
        f"--out_dir={tmp_path / 'online'}",
    )
    offline = weights(tmp_path / "offline" / "prm")
    online = weights(tmp_path / "online" / "prm")
    assert all(torch.equal(offline[name], online[name]) for name in offline)


@pytest.mark.slow
def test_resumed_and_on_two_processes_it_is_the_same(arguments, tmp_path):
    whole = [*arguments, "--save_interval=1"]
    run("prime.py", *whole, f"--out_dir={tmp_path / 'whole'}")
    run("prime.py", *whole, "--max_steps=1", f"--out_dir={tmp_path / 'half'}")
    run("prime.py", *whole, f"--out_dir={tmp_path / 'half'}")
    torchrun(2, "prime.py", *whole, f"--out_dir={tmp_path / 'two'}")
    one = weights(tmp_path / "whole" / "prm")
    half = weights(tmp_path / "half" / "prm")
    two = weights(tmp_path / "two" / "prm")
    for name in one:
        assert torch.equal(one[name], half[name])
        # Adam follows the rounding of gradients that are nearly 0.
        assert (one[name] - two[name]).abs().mean() < 1e-6
    steps = [row["step"] for row in read_jsonl(tmp_path / "half" / "metrics.jsonl")]
    assert steps == [0, 1, 2]


def test_a_prm_brings_its_reference_along(arguments, guesser, tmp_path):
    first = tmp_path / "first"
    arguments = [*arguments, "--prm_batch_rows=24"]  # a single update per step
    call(prime, *arguments, f"--out_dir={first}")
    # Its start would be its reference without prm.json.
    call(prime, *arguments, f"--prm_model={first / 'prm'}", f"--out_dir={tmp_path / 'second'}")
    again = read_jsonl(tmp_path / "second" / "metrics.jsonl")[0]
    assert again["prm_loss"] != pytest.approx(0.693147, abs=1e-3)
    assert read_prm_file(tmp_path / "second" / "prm")["reference"] == str(guesser)

    plain = tmp_path / "plain"
    shutil.copytree(first / "prm", plain)
    (plain / "prm.json").unlink()
    call(prime, *arguments, f"--prm_model={plain}", f"--out_dir={tmp_path / 'third'}")
    third = read_jsonl(tmp_path / "third" / "metrics.jsonl")[0]
    assert third["prm_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert read_prm_file(tmp_path / "third" / "prm")["reference"] == str(plain)


# ----------------------------------------------------------------------------------------------
# what is refused


def test_prm_file(tmp_path):
    assert read_prm_file(tmp_path) is None
    assert read_prm_file("PRIME-RL/EurusPRM-Stage2") is None
    write_prm_file(tmp_path, "some/model", 0.05)
    assert read_prm_file(tmp_path) == dict(reference="some/model", beta=0.05)
    for text in ("", "[]", '{"reference": 1, "beta": 1}', '{"reference": "a", "beta": true}'):
        (tmp_path / "prm.json").write_text(text)
        with pytest.raises(UserError, match=r"prm\.json: \{"):
            read_prm_file(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ("--prm_update=none", "trains a PRM on stored answers"),
        ("--ref_type=policy", "trains a PRM on stored answers"),
        ("--samples_per_prompt=5", "no prompt has samples_per_prompt=5"),
        ("--filter_low=0.99", "no prompt has a mean outcome"),
        ("--rollouts=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_it_ends_in_one_line(arguments, tmp_path, change, words):
    changes = [change]
    if "samples" in change:
        changes.append("--prompts_per_step=4")
    with pytest.raises(UserError, match=words):
        call(prime, *arguments, *changes, "--filter_high=1", f"--out_dir={tmp_path}")


def test_a_file_without_answers_is_named(arguments, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [dict(problem="1", response="1")])
    with pytest.raises(UserError, match="no graded answer"):
        call(prime, *arguments, f"--rollouts={path}", f"--out_dir={tmp_path}")
