r"""
Speed of sft.py and prime.py at a given shape, on random weights; beside TRL's SFTTrainer where its interpreter is given:

    python tests/bench_train.py                                    # some minutes on two cores: 20 M parameters, rows of 162 tokens
    python tests/bench_train.py --trl /path/to/venv/bin/python     # the same rows, batches and model by TRL, turn about
    python tests/bench_train.py --each                             # each optimisation beside the same without it, turn about
    python tests/bench_train.py --hidden 1536 --layers 28 --vocab 151936 --intermediate 8960 --heads 12 --groups 2 --tokens 1024 \
        --device cuda --dtype bfloat16                             # the shape of Qwen2.5-1.5B

Tokens are those of the rows, padding not counted; MFU is a share of the rate of a matrix product measured in the same process;
"other" is what is left of a step without its phases. The median of the steps after the second.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runs import plan
SHAPE = dict(hidden=384, layers=9, vocab=16384, intermediate=0, heads=0, groups=0)  # 0: in the usual proportion to hidden
TRL = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
folder, rows, steps, packing, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "packing", sys.argv[5]
ids = json.load(open(folder + "/ids.json"))
clock = []
class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs): clock.append(time.time())
longest = max(map(len, ids))
config = SFTConfig(output_dir=folder + "/trl", per_device_train_batch_size=rows, max_steps=steps, packing=packing, max_length=longest,
                   gradient_checkpointing=False, bf16=dtype == "bfloat16", use_cpu=not torch.cuda.is_available(), report_to=[], logging_steps=1,
                   save_strategy="no", learning_rate=1e-5, disable_tqdm=True, dataloader_pin_memory=False)
count = []
class Count(SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        count.append(int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()))
        return super().training_step(model, inputs, *args, **kwargs)
model = AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32)
trainer = Count(model=model, args=config, train_dataset=Dataset.from_dict(dict(input_ids=ids)), callbacks=[Clock()],
                processing_class=AutoTokenizer.from_pretrained(folder + "/model"))
trainer.train()
rates = [tokens / (after - before) for tokens, before, after in zip(count[1:], clock, clock[1:])]
print("RATES", json.dumps(rates[1:]))
"""


def make(folder, a):
    "a model of random weights, its tokenizer, rows and problems of random digits"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
    subprocess.run([sys.executable, "data/arithmetic/prepare.py", f"--out_dir={folder}/world", "--web_solutions=50", "--web_val_solutions=10",
                    "--train_problems=50", "--rl_problems=50", "--test_problems=50"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/world/init")
    heads, inner = a.heads or max(1, a.hidden // 64), a.intermediate or a.hidden * 11 // 4 // 64 * 64
    config = Qwen2Config(vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=inner, num_hidden_layers=a.layers,
                         num_attention_heads=heads, num_key_value_heads=a.groups or max(1, heads // 4), max_position_embeddings=8192,
                         eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    draw, ids = random.Random(0), []
    with open(f"{folder}/rows.jsonl", "w") as rows, open(f"{folder}/problems.jsonl", "w") as problems:
        for number in range(a.rows * 8):
            length = min(4 * a.tokens, max(8, int(a.tokens * draw.lognormvariate(-0.1, 0.45))))
            digits = "".join(draw.choice("0123456789") for _ in range(length))
            talk = [dict(role="user", content=digits[:length // 3]), dict(role="assistant", content=digits[length // 3:])]
            rows.write(json.dumps(dict(messages=talk)) + "\n")
            problems.write(json.dumps(dict(problem=digits[:length // 3], ground_truth="7", problem_id=number)) + "\n")
            ids.append(tokenizer(tokenizer.apply_chat_template(talk, tokenize=False).rstrip("\n"), add_special_tokens=False).input_ids)
    pathlib.Path(folder, "ids.json").write_text(json.dumps(ids))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; rows of {statistics.mean(map(len, ids)):.0f} tokens on "
          f"average, {max(map(len, ids))} at most; batches of {a.rows} rows; {a.dtype}, {a.device}, {os.cpu_count()} cores")


def start(script, folder, a, *settings):
    "metrics of a run of sft.py or prime.py, the steps after the first"
    out = tempfile.mkdtemp(dir=folder)
    subprocess.run([sys.executable, f"{script}.py", f"--model={folder}/model", f"--out_dir={out}", f"--device={a.device}", f"--dtype={a.dtype}",
                    "--save_interval=0", "--checkpointing=False", *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in open(f"{out}/metrics.jsonl")][1:]


def finetune(folder, a, *more):
    "tokens/s and MFU of sft.py"
    rows = start("sft", folder, a, f"--data={folder}/rows.jsonl", "--tokenizer=None", "--val_rows=0", f"--batch_size={a.rows}",
                 f"--max_steps={a.steps}", "--mask_prompt=False", *more)[1:]
    return [row["tokens_per_s"] for row in rows], [row["mfu"] for row in rows]


def reinforce(folder, a, *more):
    "seconds by phase of prime.py, a dictionary a step"
    rows = start("prime", folder, a, f"--data={folder}/problems.jsonl", f"--max_tokens={a.tokens}", f"--max_steps={a.steps // 2}", "--filter_low=0",
                 "--filter_high=1", f"--prompts_per_step={a.rows}", "--samples_per_prompt=4", f"--batch_rows={2 * a.rows}",
                 f"--prm_batch_rows={2 * a.rows}", *more)
    return [row["seconds"] for row in rows]


def each(folder, a):
    "each optimisation beside the same without it: medians of one run, turn about"
    import torch
    import sft
    tokens, seconds = ("tokens/s", lambda old, new: new / old), ("seconds", lambda old, new: old / new)

    def rate(*more):
        return finetune(folder, a, *more)[0]

    def prm(*more):
        return [step["prm"] for step in reinforce(folder, a, *more)]

    def save(*how):
        started = time.perf_counter()
        writing = sft.save_checkpoint(f"{folder}/checkpoints", len(os.listdir(f"{folder}/checkpoints")), trained, {}, 9, *how)
        held = time.perf_counter() - started
        writing and writing.result()
        return [held]

    os.mkdir(f"{folder}/checkpoints")
    device = torch.device(a.device)
    sft.setup_distributed(device)
    net = sft.load_model(f"{folder}/model", device, getattr(torch, a.dtype))
    trained = dict(model=(net, sft.make_optimizer(net, 1e-6)))
    group = torch.distributed.new_group(backend="gloo")
    print(f"{'':<44}{'without':>16}{'with':>10}  times")
    with ThreadPoolExecutor(1, "writer", plan.pick_device, (a.device, a.dtype)) as writer:
        for name, (unit, times), measure, without, with_ in (
                ("packed rows, not one a pass", tokens, rate, ["--micro_batch_tokens=1"], []),
                ("compiled layers and head", tokens, rate, [], ["--compile=True"]),
                ("activations kept, not recomputed", tokens, rate, ["--checkpointing=True"], []),
                ("PRM scored by the pass that trains it", seconds, prm, ["--prm_update=before"], []),
                ("checkpoint written beside the loop", seconds, save, [], [writer.submit, group])):
            old, new = [], []
            for _ in range(a.rounds):
                old += measure(*without)
                new += measure(*with_)
            old, new = statistics.median(old), statistics.median(new)
            print(f"{name:<44}{old:10.2f} {unit:<9}{new:6.2f}  {times(old, new):5.2f}", flush=True)
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(SHAPE, tokens=162, rows=16, steps=6, rounds=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of both; float32 or bfloat16")
    parser.add_argument("--trl", help="the interpreter of an environment with trl")
    parser.add_argument("--compile", action="store_true", help="sft.py --compile=True as well")
    parser.add_argument("--each", action="store_true", help="each optimisation by itself, and nothing else")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(folder, a)
        if a.each:
            return each(folder, a)
        rates, mfu = {}, {}
        for _ in range(a.rounds):                           # turn about: a machine's mood is shared
            for name, more in [("sft.py", [])] + [("sft.py, compiled layers", ["--compile=True"])] * a.compile:
                for found, values in zip((rates, mfu), finetune(folder, a, *more)):
                    found.setdefault(name, []).extend(values)
            for packing in ("no packing", "packing") if a.trl else ():
                done = subprocess.run([a.trl, "-c", TRL, folder, str(a.rows), str(a.steps), packing, a.dtype], capture_output=True, text=True,
                                      cwd=folder)
                assert done.returncode == 0, done.stderr[-3000:]
                rates.setdefault(f"TRL, {packing}", []).extend(json.loads(done.stdout.rpartition("RATES")[2]))
        base = statistics.median(rates["sft.py"])
        for name, values in rates.items():
            print(f"{name:<24} {statistics.median(values):8.0f} tokens/s" + (f"  MFU {statistics.median(mfu[name]):.1%}" if name in mfu else "") +
                  f"  sft.py is {base / statistics.median(values):.2f} times as fast" * (name != "sft.py"))
        steps = reinforce(folder, a)
        whole = sum(step.pop("step") for step in steps)
        shares = {name: sum(step[name] for step in steps) / whole for name in steps[0]}
        print(f"prime.py, {4 * a.rows} rows a step of {whole / len(steps):.1f} s: " + ", ".join(
            f"{name} {share:.1%}" for name, share in (shares | dict(other=1 - sum(shares.values()))).items()))


if __name__ == "__main__":
    main()
