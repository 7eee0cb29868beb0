"""sft.py: packing, log-probabilities, sharded loading and saving, the loss, resume, bad input."""
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig, MistralConfig, OlmoConfig, Qwen2Config,
                          Qwen3Config)

import prime
import sft
from conftest import ROOT, SFT, call, children, read_jsonl, run, torchrun, two_nodes, write_jsonl

CPU = torch.device("cpu")


@pytest.fixture
def group():
    sft.setup_distributed(CPU)
    yield
    torch.distributed.destroy_process_group()


def small_model(folder, tied, kind=Qwen2Config, vocab=97):
    torch.manual_seed(0)
    config = kind(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


ROWS = [([5, 6, 7, 8, 9, 10, 3], [0, 0, 1, 1, 1, 1, 1]), ([11, 12], [0, 1]), (list(range(20, 50)), [0] * 10 + [1] * 20),
        ([4, 4, 4], [1, 0, 1])]


def by_hand(model, rows, temperature=1.0):
    """Log-probabilities and entropies of the scored tokens, row by row, by transformers' own forward pass."""
    logprobs, entropies = [], []
    for tokens, scored in rows:
        logp = (model(torch.tensor([tokens])).logits[0].double() / temperature).log_softmax(-1)
        for t in range(1, len(tokens)):
            if scored[t]:
                logprobs.append(logp[t - 1, tokens[t]])
                entropies.append(-(logp[t - 1].exp() * logp[t - 1]).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def test_pack_example():
    batch = sft.pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["predict"].tolist() == [0, 1, 3] and batch["targets"].tolist() == [6, 7, 9]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] and batch["max_length_q"] == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 80), st.sampled_from([1, 2, 4]))
def test_micro_batches(lengths, budget, world):
    ranks = sft.micro_batches(lengths, budget, world)
    assert len(ranks) == world and len({len(batches) for batches in ranks}) == 1                    # the same number each
    assert sorted(i for batches in ranks for rows in batches for i in rows) == list(range(len(lengths)))
    assert all(len(rows) <= 1 or sum(lengths[i] for i in rows) <= budget for batches in ranks for rows in batches)
    assert len(ranks[0]) <= len(lengths)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_packed_logprobs_equal_transformers(tmp_path, group, tied, kind):
    """Packed = row by row = plain transformers, values and gradients, chunked or not, checkpointed or not, at any temperature."""
    plain = small_model(tmp_path / "m", tied, kind)
    for temperature in (1.0, 0.7):
        want, want_entropy = by_hand(plain, ROWS, temperature)
        net = sft.load_model(str(tmp_path / "m"), CPU, torch.float32)
        for chunk in (2048, 3):
            got, entropy = net(**sft.pack(ROWS, CPU), temperature=temperature, entropy=True, chunk=chunk)
            torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=0)
            torch.testing.assert_close(entropy, want_entropy.float(), atol=1e-5, rtol=0)
        alone = torch.cat([net(**sft.pack([row], CPU), temperature=temperature)[0] for row in ROWS])
        torch.testing.assert_close(alone, got, atol=1e-5, rtol=0)
    plain.zero_grad(), want.exp().sum().backward()
    for checkpointing in (False, True):
        net = sft.load_model(str(tmp_path / "m"), CPU, torch.float32, checkpointing=checkpointing)
        net(**sft.pack(ROWS, CPU), temperature=0.7, chunk=3)[0].exp().sum().backward()
        for (name, p), (other, q) in zip(net.named_parameters(), plain.named_parameters()):
            assert name == other
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, more, same", [(MistralConfig, dict(sliding_window=None), True), (Qwen3Config, dict(head_dim=16), True),
                                              (MistralConfig, dict(sliding_window=8), False), (GemmaConfig, dict(head_dim=16), False)])
def test_models_that_are_not_known_are_refused(tmp_path, group, kind, more, same):
    """Gemma scales its embeddings and more, Mistral may look back a few tokens only: not what is computed here. Others agree."""
    plain = small_model(tmp_path / "m", False, functools.partial(kind, **more))
    if same:
        got = sft.load_model(str(tmp_path / "m"), CPU, torch.float32)(**sft.pack(ROWS, CPU))[0]
        torch.testing.assert_close(got, by_hand(plain, ROWS)[0].float(), atol=1e-5, rtol=0)
    else:
        with pytest.raises(sft.UserError, match=kind.model_type):
            sft.load_model(str(tmp_path / "m"), CPU, torch.float32)


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_never_exist_at_once(tmp_path, group, entropy):
    """Forward and backward have logits of a chunk of tokens at a time, those of earlier ones are gone: five tensors of a chunk live at most."""
    small_model(tmp_path / "m", True, vocab=5000)
    net = sft.load_model(str(tmp_path / "m"), CPU, torch.float32)
    rows, widths, living, seen = [(torch.randint(0, 97, (200,)), torch.ones(200))], set(), [0], weakref.WeakSet()
    most = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == 5000:
                    widths.add(t.shape[0])
                    if t.shape[0] < 64 and t.untyped_storage() not in seen:
                        seen.add(t.untyped_storage())
                        living[0] += 1
                        weakref.finalize(t.untyped_storage(), lambda: living.__setitem__(0, living[0] - 1))
                        most = max(most, living[0])
            return out

    with Watch():
        values = net(**sft.pack(rows, CPU), entropy=entropy, chunk=16)
        assert len(values) == 1 + entropy
        sum(value.sum() for value in values).backward()     # `values` lives on, as in a training step
    assert widths == {16, 199 % 16, 64}                     # 64: the head itself, transposed
    assert 2 <= most <= 5, most


@pytest.mark.parametrize("kind", [LlamaConfig, functools.partial(MistralConfig, sliding_window=None), OlmoConfig, Qwen2Config, Qwen3Config])
def test_nothing_in_a_pass_waits_for_the_card(tmp_path, group, kind):
    """No number is asked for and no mask made, between the attention kernels, which are left out here, in forward and backward passes."""
    small_model(tmp_path / "m", True, kind=kind)
    net, seen = sft.load_model(str(tmp_path / "m"), CPU, torch.float32, checkpointing=True), set()
    AttentionInterface.register("packed", lambda module, query, key, value, mask, **_: (seen.add(mask), (query.transpose(1, 2), None))[1])
    batch = sft.pack(ROWS, CPU)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        sum(value.sum() for value in net(**batch, entropy=True)).backward()
    assert "mm" in seen and not seen & {"_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select"}
    assert None in seen and not any(isinstance(x, torch.Tensor) for x in seen)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler here")
def test_compiled_layers_change_nothing(tmp_path, group):
    small_model(tmp_path / "m", True)
    got = []
    for compile, checkpointing in ((False, False), (True, False), (True, True)):
        net = sft.load_model(str(tmp_path / "m"), CPU, torch.float32, checkpointing=checkpointing, compile=compile)
        assert all((layer._compiled_call_impl is not None) == compile for layer in net.model.layers)
        logprobs = [net(**sft.pack(rows, CPU), temperature=0.7)[0] for rows in (ROWS, ROWS[:2])]            # two lengths
        torch.cat(logprobs).exp().sum().backward()
        got.append([*logprobs, *(p.grad.full_tensor() for p in net.parameters())])
    for compiled in got[1:]:
        for a, b in zip(got[0], compiled):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells a process's peak memory")
def test_no_process_holds_a_whole_model(tmp_path):
    """Four processes load 276 M parameters: the peak of none grows by more than a third of the fp32 size and 256 MB."""
    config = Qwen2Config(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
                         num_key_value_heads=4, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path / "m")
    size = 4 * sum(p.numel() for p in model.parameters())
    script = tmp_path / "load.py"
    script.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, transformers, sft
from transformers import Qwen2ForCausalLM
def peak():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
rank, world = sft.setup_distributed(torch.device("cpu"))
before = peak()
sft.load_model({str(tmp_path / "m")!r}, torch.device("cpu"), torch.float32)
pathlib.Path({str(tmp_path)!r}, f"{{rank}}.peak").write_text(str(peak() - before))
torch.distributed.destroy_process_group()
""")
    torchrun(4, script)
    peaks = [int((tmp_path / f"{rank}.peak").read_text()) for rank in range(4)]
    assert min(peaks) > size / 4 and max(peaks) < size / 3 + 2 ** 28, (peaks, size)


@pytest.mark.parametrize("tied", [True, False])
def test_load_and_save_round_trip(tmp_path, group, tied, world):
    """Sharded loading is from_pretrained bit for bit; what is saved opens in transformers with the same weights."""
    plain = small_model(tmp_path / "m", tied)
    net = sft.load_model(str(tmp_path / "m"), CPU, torch.float32)
    loaded = dict(prime.full_tensors(net))
    assert set(loaded) == {k for k in plain.state_dict() if not (tied and k == "lm_head.weight")}
    assert all(torch.equal(loaded[k], plain.state_dict()[k]) for k in loaded)
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    for _ in range(2):                                      # the second time over the first
        sft.save_model(net, tokenizer, str(tmp_path / "out"), torch.bfloat16, str(tmp_path / "m"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and again.generation_config.eos_token_id is not None
    assert all(torch.equal(v, plain.state_dict()[k].bfloat16()) for k, v in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_frozen_and_trained_bf16_agree_exactly(tmp_path, group):
    """A PRM with fp32 masters that computes in bf16 and its frozen bf16 reference give equal log-probabilities: the
    log-ratio of a PRM that has learned nothing is 0, not noise."""
    small_model(tmp_path / "m", True)
    trained = sft.load_model(str(tmp_path / "m"), CPU, torch.bfloat16)
    frozen = sft.load_model(str(tmp_path / "m"), CPU, torch.bfloat16, trained=False)
    a, b = (net(**sft.pack(ROWS, CPU))[0] for net in (trained, frozen))
    assert a.dtype == torch.float32 and torch.equal(a, b)


def test_what_is_scored(world):
    """Assistant's words and end token only, several turns, the same prompt ids as at inference."""
    from generate import render_prompt
    tok = AutoTokenizer.from_pretrained(world / "init")
    talk = [dict(role="system", content="s"), dict(role="user", content="1+1?"), dict(role="assistant", content="2"),
            dict(role="user", content="2+2?"), dict(role="assistant", content="4")]
    tokens, scored = sft.tokenize_messages(tok, talk)
    assert tok.decode([t for t, s in zip(tokens, scored) if s]) == "2<|im_end|>4<|im_end|>"
    assert tok.decode(tokens) == tok.apply_chat_template(talk, tokenize=False).rstrip("\n")
    prompt = render_prompt(tok, talk[:-1])
    assert tokens[:len(prompt)] == prompt and tokens[len(prompt):] == tok("4<|im_end|>", add_special_tokens=False).input_ids
    with pytest.raises(ValueError):
        sft.tokenize_messages(tok, talk[:2])
    for shown in ("", "\n", "7\n"):                         # a tool's words are its own, if there are none, too
        text = f"```python\nf()\n```\n```output\n{shown}```\nSo 1.\n```python\ng()\n```"
        tokens, scored = sft.tokenize_messages(tok, [dict(role="user", content="1?"), dict(role="assistant", content=text)])
        assert tok.decode([t for t, s in zip(tokens, scored) if s]) == text.replace(f"{shown}```\nSo", "\nSo") + "<|im_end|>"


def test_end_token_where_the_template_has_none_and_one_bos(world):
    """A NuminaMath-like template writes no end token and the tokenizer puts a begin token in front."""
    from tokenizers.processors import TemplateProcessing
    tok = AutoTokenizer.from_pretrained(world / "init")
    tok.add_special_tokens(dict(bos_token="<|im_start|>"))
    tok._tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tok.bos_token_id)])
    tok.chat_template = ("{% for m in messages %}{{ ('P: ' if m['role'] == 'user' else 'S: ') + m['content'] + '\n' }}{% endfor %}"
                         "{% if add_generation_prompt %}{{ 'S: ' }}{% endif %}")
    tokens, scored = sft.tokenize_messages(tok, [dict(role="user", content="1"), dict(role="assistant", content="2")])
    assert tok.decode(tokens) == "<|im_start|>P: 1\nS: 2\n<|im_end|>"
    assert tok.decode([t for t, s in zip(tokens, scored) if s]) == "2\n<|im_end|>"


def test_schedules():
    assert [sft.learning_rate_at(s, 10, 1.0, "linear", 2) for s in (0, 1, 2, 6)] == [0, 0.5, 1.0, 0.5]
    assert sft.learning_rate_at(6, 10, 1.0, "cosine", 2) == pytest.approx(0.5)
    assert sft.learning_rate_at(9, 10, 3.0, "constant", 0) == 3.0


def test_loss_is_the_token_mean_whatever_the_number_of_processes(tmp_path, guesser, guess_data):
    """1, 2 and 4 processes, two nodes with a copy of the weights each, and any packing: the same losses (1e-5), gradient norms
    and weights (1e-5) after 5 steps."""
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=6", "--max_steps=5", "--learning_rate=1e-3"]
    runs = {}
    for name, start, extra in (("1", functools.partial(call, sft), []), ("2", functools.partial(torchrun, 2, "sft.py"), []),
                               ("4", functools.partial(torchrun, 4, "sft.py"), []),
                               ("nodes", functools.partial(two_nodes, 2, "sft.py"), ["--shard=2"]),
                               ("tight", functools.partial(call, sft), ["--micro_batch_tokens=20"])):
        out = tmp_path / name
        start(*args, *extra, f"--out_dir={out}")
        runs[name] = read_jsonl(out / "metrics.jsonl"), AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    for metrics, weights in runs.values():
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in metrics] == pytest.approx([r[key] for r in runs["1"][0]], abs=1e-5, rel=1e-5)
        for k, v in weights.items():
            torch.testing.assert_close(v, runs["1"][1][k], atol=1e-5, rtol=0)

    # the first step's loss by transformers: mean over the tokens of the 6 rows
    tok, plain = AutoTokenizer.from_pretrained(guesser), AutoModelForCausalLM.from_pretrained(guesser)
    rows = [sft.tokenize_messages(tok, row["messages"]) for row in read_jsonl(guess_data[0])]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()]     # the hold-out shuffle
    batch = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(43)).tolist()[:6]]
    assert runs["1"][0][0]["loss"] == pytest.approx(-by_hand(plain, batch)[0].mean().item(), abs=1e-5)


def test_resume_equals_the_uninterrupted_run(tmp_path, guesser, guess_data):
    """Stopped after 4 steps and started again, on one process or two: bit-equal weights, no metrics row twice."""
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=30", "--epochs=2", "--save_interval=2"]
    call(sft, *args, f"--out_dir={tmp_path}/whole")
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model").state_dict()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/model")
    newest = sorted((tmp_path / "again/checkpoints").iterdir())[-1]
    assert newest.name == "step_000008" and len(list((tmp_path / "again/checkpoints").iterdir())) == 2
    (newest / ".metadata").unlink()                         # damaged: the one before is taken
    (tmp_path / "again/checkpoints/step_000009.tmp").mkdir()
    call(sft, *args, f"--out_dir={tmp_path}/again")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "again/model").state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)
    rows, other = read_jsonl(tmp_path / "again/metrics.jsonl"), read_jsonl(tmp_path / "whole/metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in other] and len(rows) == 8


def test_settings_of_now_hold_after_a_resume(tmp_path, guesser, guess_data, monkeypatch):
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=30", "--save_interval=1", f"--out_dir={tmp_path}"]
    call(sft, *args, "--max_steps=1")
    seen, step = [], sft.optimizer_step

    def watched(net, optimizer, *rest):
        seen.append([(group["weight_decay"], group["betas"]) for group in optimizer.param_groups])
        return step(net, optimizer, *rest)
    monkeypatch.setattr(sft, "optimizer_step", watched)
    call(sft, *args, "--max_steps=2", "--weight_decay=0.5", "--beta2=0.9")
    assert seen == [[(0.5, (0.9, 0.9)), (0.0, (0.9, 0.9))]]


def test_checkpoints_that_cannot_be_read(tmp_path, guesser, guess_data, monkeypatch):
    """A damaged newest one takes no place of those written after it. If none can be read, the run does not begin anew over what is there;
    nor does a broken connection count as damage. A line that a full disk cut inside a character is made again."""
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=30", "--epochs=2", "--save_interval=2", f"--out_dir={tmp_path}"]
    folder, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    call(sft, *args)
    (folder / "step_000008/.metadata").unlink()
    call(sft, *args, "--max_steps=7", "--keep_checkpoints=1")
    assert sorted(path.name for path in folder.iterdir()) == ["step_000007", "step_000008"]
    rows = metrics.read_text()
    monkeypatch.setattr(sft.dcp, "load", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(sft, *args)
    monkeypatch.undo()
    os.truncate(next((folder / "step_000007").glob("*.distcp")), 1000)
    with pytest.raises(sft.UserError, match="no checkpoint"):
        call(sft, *args)
    assert metrics.read_text() == rows and rows.count("\n") == 7
    shutil.rmtree(folder)
    metrics.write_bytes(rows.encode() + '{"step": 7, "text": "\u00e9'.encode()[:-1])
    sft.plan.keep_lines(str(metrics), 7)
    assert metrics.read_text() == rows


def test_signals_twice(monkeypatch):
    """torchrun passes a SIGTERM on to processes that may have had it: no reason to leave at once, as a Ctrl-C then is."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        received = sft.plan.catch_signals()
        signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert received == [signal.SIGTERM] * 2


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0(tmp_path, guesser, guess_data, end):
    """Two processes are told to stop: both save and end well. The next start goes on there, as if nothing had been."""
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=30", "--epochs=10", "--save_interval=0"]
    child = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "sft.py", *args,
                              f"--out_dir={tmp_path}/stopped"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=os.environ | dict(OMP_NUM_THREADS="1"))
    log = tmp_path / "stopped/metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    for pid in children(child.pid):
        os.kill(pid, end)
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0 and "start again" in output, output[-2000:]
    step = len(read_jsonl(log))
    assert 3 < step < 40 and [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == [f"step_{step:06d}"]
    if end == signal.SIGINT:
        return
    torchrun(2, "sft.py", *args, f"--out_dir={tmp_path}/stopped")
    torchrun(2, "sft.py", *args, f"--out_dir={tmp_path}/whole")
    got, want = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("stopped", "whole"))
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.skipif(shutil.which("unshare") is None or subprocess.run(
    "unshare -rm mount -t tmpfs none /mnt", shell=True, capture_output=True).returncode, reason="no small file system can be made here")
def test_full_disk_leaves_the_checkpoint_before(tmp_path, guesser, guess_data):
    """A file system with room for one checkpoint and not for two: one line, code 2, and the old checkpoint is whole."""
    args = [f"--data={guess_data[0]}", f"--model={guesser}", *SFT, "--batch_size=30", "--epochs=2", "--save_interval=2", "--keep_checkpoints=1"]
    call(sft, *args, "--max_steps=2", f"--out_dir={tmp_path}/big")
    size = sum(f.stat().st_size for f in (tmp_path / "big/checkpoints").rglob("*"))
    command = [sys.executable, "sft.py", *args, f"--out_dir={tmp_path}/small"]
    (tmp_path / "small").mkdir()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size={int(1.5 * size)} none {tmp_path}/small && "
                           f"{shlex.join(command)}; code=$?; cp -r {tmp_path}/small {tmp_path}/seen; exit $code"], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: disk full or read-only: free some space and run the same command again"]
    shutil.rmtree(tmp_path / "seen/checkpoints/step_000004.tmp", ignore_errors=True)
    assert [p.name for p in (tmp_path / "seen/checkpoints").iterdir()] == ["step_000002"]
    call(sft, *args, f"--out_dir={tmp_path}/seen")          # there is room now: it goes on from there
    assert len(read_jsonl(tmp_path / "seen/metrics.jsonl")) == 8


@pytest.mark.parametrize("change, words", [
    (["--data=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--model=out/nowhere"], ["out/nowhere"]),
    (["--device=cuda"], ["cuda"]),
    (["--learning_rat=1"], ["learning_rat", "learning_rate"]),
    (["--schedule=square"], ["schedule", "square"]),
    (["--chat_template=nowhere.jinja"], ["nowhere.jinja"]),
    (["--attention=varlen"], ["attention", "padded"]),
    (["--shard=2"], ["shard=2", "1 processes"]),
    (["--val_interval=0"], ["val_interval=0", "at least 1"]),
    (["--max_steps=few"], ["max_steps", "int", "few"]),
    (["--tokenizer=TOKENIZER"], ["has a token 300", "280 in all"]),
])
def test_mistakes(tmp_path, guesser, guess_data, change, words):
    if change == ["--device=cuda"] and torch.cuda.is_available():
        change, words = ["--device=tpu"], ["tpu"]
    if change == ["--tokenizer=TOKENIZER"]:                 # a folder with nothing but a tokenizer, of more words than the model's
        tok = AutoTokenizer.from_pretrained(guesser)
        tok.add_tokens([f"<{i}>" for i in range(len(tok), 300)] + ["boxed"])
        tok.save_pretrained(tmp_path / "tok")
        change = [f"--tokenizer={tmp_path}/tok"]
    with pytest.raises(sft.UserError) as e:
        call(sft, f"--data={guess_data[0]}", f"--model={guesser}", *SFT, f"--out_dir={tmp_path}", *change)
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_a_mistake_ends_with_2_and_one_line(tmp_path, guesser, guess_data):
    done = run("sft.py", f"--data={guess_data[0]}", f"--model={guesser}", *SFT, f"--out_dir={tmp_path}", "--shard=2", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "shard=2" in errors[0]


def test_bad_rows_are_counted_named_and_limited(tmp_path, guesser, guess_data, capsys):
    rows = read_jsonl(guess_data[0])
    lines = [json.dumps(r) for r in rows[:60]]
    lines[7] = '{"messages": [{"role": "user"'              # cut
    lines[9] = json.dumps(dict(messages=[dict(role="user", content="no answer")]))
    lines[11] = json.dumps(dict(messages=[dict(role="user", content="1?"), dict(role="assistant", content=None)]))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    args = [f"--data={bad}", f"--model={guesser}", *SFT, "--batch_size=29", "--max_steps=1", f"--out_dir={tmp_path}/out"]
    call(sft, *args, "--max_bad_share=0.1")
    out = capsys.readouterr().out
    assert "bad.jsonl line 8" in out and "bad.jsonl line 10:" in out and "bad.jsonl line 12" in out and "57 rows" in out
    with pytest.raises(sft.UserError, match="line 8"):
        call(sft, *args)
    with pytest.raises(sft.UserError, match="messages"):
        call(sft, *args, f"--data={write_jsonl(tmp_path / 'x.jsonl', [dict(text='a')])}")


def test_model_without_chat_template(tmp_path, guesser, guess_data):
    shutil.copytree(guesser, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").unlink()
    with pytest.raises(sft.UserError, match="chat template"):
        call(sft, f"--data={guess_data[0]}", f"--model={tmp_path}/m", *SFT, f"--out_dir={tmp_path}/out")
