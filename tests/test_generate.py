"""generate.py: reading problems, the sampling engine of transformers, resume after a kill, the SFT set."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import generate
from conftest import ROOT, call, read_jsonl, run, write_jsonl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok(guesser):
    return generate.load_tokenizer(str(guesser))


@pytest.fixture(scope="module")
def engine(guesser, tok):
    return generate.make_engine("hf", str(guesser), tok, CPU, torch.float32, 128)


def prompts(tok, *texts):
    return [generate.render_prompt(tok, [dict(role="user", content=t)]) for t in texts]


def answers(engine, requests, **sampling):
    found = dict(engine.sample([(ids, seed, sampling) for ids, seed in requests]))
    return [found[i] for i in range(len(requests))]


def test_greedy_equals_transformers_generate(engine, guesser, tok):
    model = AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32)
    ids = prompts(tok, "10?", "12345?", "7?", "44?")
    for got, prompt in zip(answers(engine, [(p, 0) for p in ids], temperature=0.0, max_tokens=24), ids):
        want = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=tok.pad_token_id)[0][len(prompt):]
        assert got.tokens == want.tolist()
        assert got.finish_reason == ("stop" if got.tokens[-1] == tok.eos_token_id else "length")


def test_logprobs_are_those_of_the_model(engine, guesser, tok):
    model = AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32)
    ids = prompts(tok, "10?", "12345?", "33?")
    for got, prompt in zip(answers(engine, [(p, i) for i, p in enumerate(ids)], temperature=0.7, max_tokens=24), ids):
        logits = model(torch.tensor([prompt + got.tokens])).logits[0, len(prompt) - 1:-1] / 0.7
        want = logits.log_softmax(-1).gather(-1, torch.tensor(got.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(got.logprobs), want, atol=1e-4, rtol=0)


def test_samples_follow_the_model_and_top_p(engine, guesser, tok):
    """First tokens of 4,000 samples against the model's probabilities (chi-square), and inside the nucleus with top_p."""
    prompt = prompts(tok, "10?")[0]
    model = AutoModelForCausalLM.from_pretrained(guesser, dtype=torch.float32)
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).double()
    n = 4000
    first = torch.tensor([a.tokens[0] for a in answers(engine, [(prompt, s) for s in range(n)], temperature=2.0, max_tokens=1)])
    count = torch.bincount(first, minlength=len(p)).double()
    common = p * n >= 5
    observed = torch.cat([count[common], count[~common].sum()[None]])
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    chi2, freedom = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum(), int(common.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5                                    # five standard deviations
    sorted_p, order = p.sort(descending=True)
    nucleus = set(order[:int((sorted_p.cumsum(0) < 0.8).sum()) + 1].tolist())
    first = {a.tokens[0] for a in answers(engine, [(prompt, s) for s in range(500)], temperature=2.0, top_p=0.8, max_tokens=1)}
    assert first <= nucleus and len(first) > 1


def test_a_sample_depends_on_its_seed_alone(engine, tok):
    ids = prompts(tok, *(f"{k}?" for k in range(10, 26)))
    together = answers(engine, [(p, 100 + i) for i, p in enumerate(ids)], max_tokens=16)
    alone = [answers(engine, [(p, 100 + i)], max_tokens=16)[0] for i, p in enumerate(ids)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({tuple(a.tokens) for a in answers(engine, [(ids[0], s) for s in range(30)], max_tokens=16)}) > 2


def test_limits(engine, tok):
    prompt = prompts(tok, "10?")[0]
    cut = answers(engine, [(prompt, 3)], max_tokens=2)[0]
    assert len(cut.tokens) == 2 and cut.finish_reason == "length"
    engine.max_model_len, before = len(prompt) + 3, engine.max_model_len
    try:
        assert len(answers(engine, [(prompt, 3)], temperature=2.0, max_tokens=50)[0].tokens) <= 3
    finally:
        engine.max_model_len = before


def test_problem_formats(tmp_path):
    rows = [dict(problem="a", solution="so \\boxed{1}", id="x"), dict(problem="b", solution="\\boxed{2}", id="y")]
    got = generate.load_problems(write_jsonl(tmp_path / "a.jsonl", rows), system_prompt="S", user_suffix="!")
    assert got[0] == dict(id="x", problem="a", ability="math", ground_truth="so \\boxed{1}",
                          messages=[dict(role="system", content="S"), dict(role="user", content="a!")])
    tests = dict(inputs=["1"], outputs=["2"])
    odd = [dict(prompt=p, ground_truth=g, ability=a) for p, g, a in (
        ("a", "1", None), ("b", tests, "code"), ("c", json.dumps(tests), "code"), ("d", dict(inputs=["1"], outputs=[]), "code"),
        ("e", "no JSON", "code"), ([dict(role="user", content=[dict(type="text", text="f")])], "1", "math"), (5, "1", "math"), ("g", "1", "algebra"))]
    with pytest.raises(generate.UserError, match=r"5 of 8 rows .*line 4, .*line 5, .*line 6, .*line 7; more"):
        generate.load_problems(write_jsonl(tmp_path / "o.jsonl", odd))
    assert [p["problem"] for p in generate.load_problems(tmp_path / "o.jsonl", max_bad_share=0.9)] == ["a", "b", "c"]
    gsm = [dict(question="q", answer="1+1=<<1+1=2>>2\n#### 1,234")]
    assert generate.load_problems(write_jsonl(tmp_path / "b.jsonl", gsm))[0]["ground_truth"] == "1234"
    for headed in ("#### Step 1\nadd\n\n#### Conclusion\nThe answer is $\\boxed{(1, 2)}$.", "so \\boxed{7}\n\n#### Check\nIt works."):
        assert generate.load_problems(write_jsonl(tmp_path / "b.jsonl", [dict(problem="q", solution=headed)]))[0]["ground_truth"] == headed
    tests = json.dumps(dict(inputs=["1\n"], outputs=["1\n"]))
    eurus = [dict(prompt=[dict(role="system", content="act"), dict(role="user", content="code it")], ability="code",
                  reward_model=dict(style="rule", ground_truth=tests))]
    got = generate.load_problems(write_jsonl(tmp_path / "c.jsonl", eurus))[0]
    assert got["ability"] == "code" and got["ground_truth"] == tests and [m["role"] for m in got["messages"]] == ["system", "user"]
    assert generate.load_problems(tmp_path / "c.jsonl", system_prompt="")[0]["messages"] == [dict(role="user", content="code it")]
    amc = [dict(problem="p", answer=36.0)]
    assert generate.load_problems(write_jsonl(tmp_path / "d.jsonl", amc))[0]["ground_truth"] == "36"
    import pandas
    pandas.DataFrame(amc).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(amc))
    for name in ("d.parquet", "d.json"):
        assert generate.load_problems(tmp_path / name)[0]["ground_truth"] == "36"


def test_bad_problems(tmp_path):
    good = dict(problem="a", answer="1")
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([json.dumps(good)] * 5 + ["{", json.dumps(dict(problem="", answer="1")), json.dumps(dict(problem="a"))]))
    assert len(generate.load_problems(path, max_bad_share=0.5)) == 5
    for kwargs, words in ((dict(), "line 6"), (dict(problem_column="text", max_bad_share=0.5), "text.*answer, problem"),
                          (dict(answer_column="gold", max_bad_share=0.5), "gold")):
        with pytest.raises(generate.UserError, match=words):
            generate.load_problems(path, **kwargs)
    lone = write_jsonl(tmp_path / "s.jsonl", [dict(prompt=[dict(role=role, content="a")], answer="1") for role in ("user", "system")])
    assert len(generate.load_problems(lone, system_prompt="", max_bad_share=0.5)) == 1
    with pytest.raises(generate.UserError, match="nowhere"):
        generate.load_problems("nowhere.jsonl")


def test_real_files_load(shared):
    counts = dict(gsm8k_test=1319, math500=500, aime24=30, amc_2022_2023=83, amc23=40, minerva_math=272, olympiadbench=675)
    for name, count in counts.items():
        assert len(generate.load_problems(shared / "data" / f"{name}.jsonl")) == count
    assert len(generate.load_problems(shared / "data" / "math_test.jsonl.gz")) == 5000


def arguments(guesser, guess_data, out):
    return [f"--model={guesser}", f"--data={guess_data[1]}", f"--out_dir={out}", "--system_prompt=", "--sft_system_prompt=", "--engine=hf",
            "--samples_per_problem=12", "--temperature=1.0", "--max_tokens=24", "--max_prompt_tokens=40", "--grade_workers=1"]


def test_killed_and_started_again(tmp_path, guesser, guess_data, capsys):
    """SIGKILL while it writes, again and again: at the end every sample is there once and equals the uninterrupted run's."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call(generate, *arguments(guesser, guess_data, whole))
    assert "kept" in capsys.readouterr().out
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "generate.py", *arguments(guesser, guess_data, killed)], cwd=ROOT,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
        path, before = killed / "samples.jsonl", (killed / "samples.jsonl").stat().st_size if (killed / "samples.jsonl").exists() else 0
        while child.poll() is None and not (path.exists() and path.stat().st_size > before):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    with open(killed / "samples.jsonl", "ab") as f:
        f.write(b'{"problem_id": 10, "sam')                 # what a kill in the middle of a write leaves
    run("generate.py", *arguments(guesser, guess_data, killed))
    rows = {(r["problem_id"], r["sample"]): r for r in read_jsonl(killed / "samples.jsonl")}
    assert len(rows) == len(read_jsonl(killed / "samples.jsonl")) == 40 * 12
    assert all(rows[r["problem_id"], r["sample"]] == r for r in read_jsonl(whole / "samples.jsonl"))
    for row in rows.values():                               # the verdicts, by another way of reading the box
        assert row["correct"] == (re.findall(r"\\boxed\{([^{}]*)\}", row["response"])[-1:] == [row["ground_truth"]])
    sft = read_jsonl(killed / "sft.jsonl")
    assert 0 < len(sft) == sum(r["correct"] and r["finish_reason"] == "stop" for r in rows.values()) < len(rows)
    assert all(f"\\boxed{{{m['ground_truth']}}}" in m["messages"][-1]["content"] and len(m["messages"]) == 2 for m in sft)
    for change in ("--temperature=0.5", "--seed=1", "--system_prompt=brief"):
        with pytest.raises(generate.UserError, match="out_dir"):
            call(generate, *arguments(guesser, guess_data, killed), change)
    assert json.loads((killed / "config.json").read_text())["settings"]["max_tokens"] == 24


def test_several_processes_would_do_the_same(tmp_path, guesser, guess_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(generate.UserError, match="torchrun"):
        call(generate, *arguments(guesser, guess_data, tmp_path))


def test_no_vllm_is_said(guesser, tok):
    if generate.importlib.util.find_spec("vllm"):
        assert generate.make_engine("auto", str(guesser), tok, CPU, torch.float32, 64).name == "vllm"
        return
    with pytest.raises(generate.UserError, match="requirements-gpu.txt"):
        generate.make_engine("vllm", str(guesser), tok, CPU, torch.float32, 64)
    assert generate.make_engine("auto", str(guesser), tok, CPU, torch.float32, 64).name == "hf"
