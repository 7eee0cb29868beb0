r"""
Speed of sft.py and prime.py at a given shape, on random weights.

    python bench/train.py                         # some minutes on two cores: 20 M parameters
    python bench/train.py --trl=/venv/bin/python  # beside TRL's SFTTrainer in that environment
    python bench/train.py --trl-grpo=/venv/bin/python --rows=64 --tokens=240 --answer=128
                                                  # prime.py beside TRL's GRPOTrainer, prompts of 80
    python bench/train.py --each                  # each optimisation beside the same without it
    python bench/train.py --against=../other      # this checkout beside another one, and the ratio
    python bench/train.py --scaling --hidden=128 --layers=4 --vocab=2048 --tokens=96 --answer=32
                                                  # 64 to 4,096 rows on 1 and 2 processes

    python bench/train.py --device=cuda --dtype=bfloat16 --tokens=1024 --vocab=151936 --layers=28 \
        --hidden=1536 --intermediate=8960 --heads=12 --groups=2         # the shape of Qwen2.5-1.5B

What is compared runs in turns, `--rounds` times, on the same rows, batches and model. All numbers
are medians of the steps after the second. Tokens are those of the rows, padding not counted. MFU is
a share of the rate of a matrix product that is measured in the same process. "other" is what is
left of a step of prime.py without its phases.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from random_model import make_model
from transformers import AutoTokenizer, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent

# Runs in an environment with TRL, which may be another one than ours.
TRL = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

folder, rows, steps, packing, dtype = sys.argv[1:]
ids = json.load(open(folder + "/ids.json"))
tokens = []
ends = []


class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        ends.append(time.time())


class CountingTrainer(SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        tokens.append(int(mask.sum()))
        return super().training_step(model, inputs, *args, **kwargs)


config = SFTConfig(
    output_dir=folder + "/trl",
    per_device_train_batch_size=int(rows),
    max_steps=int(steps),
    packing=packing == "packing",
    max_length=max(len(row) for row in ids),
    gradient_checkpointing=False,
    bf16=dtype == "bfloat16",
    use_cpu=not torch.cuda.is_available(),
    report_to=[],
    logging_steps=1,
    save_strategy="no",
    learning_rate=1e-5,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = CountingTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32),
    args=config,
    train_dataset=Dataset.from_dict(dict(input_ids=ids)),
    callbacks=[Clock()],
    processing_class=AutoTokenizer.from_pretrained(folder + "/model"),
)
trainer.train()
rates = []
for i in range(2, len(ends)):
    rates.append(tokens[i] / (ends[i] - ends[i - 1]))
print("RATES", json.dumps(rates))
"""

# The same for GRPO. beta > 0: with a reference model.
TRL_GRPO = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, prompts, samples, tokens, steps, beta, dtype = sys.argv[1:]
rows = int(prompts) * int(samples)
questions = [json.loads(line)["problem"] for line in open(folder + "/problems.jsonl")]
ends = []


class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        ends.append(time.time())


def reward(completions, **kwargs):
    # Half of the answers are right, whatever they say.
    return [float(number % 2) for number in range(len(completions))]


config = GRPOConfig(
    output_dir=folder + "/trl_grpo",
    per_device_train_batch_size=rows,
    num_generations=int(samples),
    max_completion_length=int(tokens),
    max_steps=int(steps),
    beta=float(beta),
    temperature=1.0,
    gradient_checkpointing=False,
    bf16=dtype == "bfloat16",
    use_cpu=not torch.cuda.is_available(),
    report_to=[],
    logging_steps=1,
    save_strategy="no",
    learning_rate=1e-6,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
messages = [[dict(role="user", content=question)] for question in questions]
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32),
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_dict(dict(prompt=messages)),
    callbacks=[Clock()],
    processing_class=AutoTokenizer.from_pretrained(folder + "/model"),
)
trainer.train()
print("SECONDS", json.dumps([b - a for a, b in zip(ends, ends[1:])]))
"""


# --------------------------------------------------------------------------------------------------
# what is trained


def write_model(folder, shape):
    """folder/model: of random weights, or a link to another model. Returns its tokenizer."""
    if shape.model:
        Path(folder, "model").symlink_to(Path(shape.model).resolve())
        print(f"{shape.model}, {shape.dtype}, {shape.device}, {os.cpu_count()} cores")
        return AutoTokenizer.from_pretrained(shape.model)

    # What is not given is in the usual proportion to the hidden size.
    heads = shape.heads or max(1, shape.hidden // 64)
    tokenizer = make_model(
        folder,
        Qwen2Config,
        vocab=shape.vocab,
        hidden=shape.hidden,
        intermediate=shape.intermediate or shape.hidden * 11 // 4 // 64 * 64,
        layers=shape.layers,
        heads=heads,
        groups=shape.groups or max(1, heads // 4),
    )
    print(f"{shape.dtype}, {shape.device}, {os.cpu_count()} cores")
    return tokenizer


def make_rows(folder, shape, tokenizer):
    """Rows and problems of random digits: rows.jsonl, problems.jsonl, and ids.json for TRL."""
    draw = random.Random(0)
    rows = []
    problems = []
    ids = []
    for number in range(8 * shape.rows):
        length = int(shape.tokens * draw.lognormvariate(-0.1, 0.45))
        length = min(4 * shape.tokens, max(8, length))
        digits = "".join(draw.choice("0123456789") for _ in range(length))
        question = digits[: length // 3]
        messages = [
            dict(role="user", content=question),
            dict(role="assistant", content=digits[length // 3 :]),
        ]
        rows.append(dict(messages=messages))
        problems.append(dict(problem=question, ground_truth="7", problem_id=number))
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids.append(tokenizer(text, add_special_tokens=False).input_ids)

    for name, table in (("rows.jsonl", rows), ("problems.jsonl", problems)):
        lines = [json.dumps(row) + "\n" for row in table]
        Path(folder, name).write_text("".join(lines))
    Path(folder, "ids.json").write_text(json.dumps(ids))

    lengths = [len(row) for row in ids]
    print(
        f"rows of {statistics.mean(lengths):.0f} tokens on average, {max(lengths)} at most; "
        f"batches of {shape.rows} rows"
    )


# --------------------------------------------------------------------------------------------------
# measurements


def run_script(script, folder, shape, settings, checkout=ROOT, processes=1):
    """The metrics of a run of sft.py or prime.py, without its first step."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = tempfile.mkdtemp(dir=folder)
    common = [
        f"--model={folder}/model",
        f"--out_dir={out}",
        f"--device={shape.device}",
        f"--dtype={shape.dtype}",
        "--save_interval=0",
        "--checkpointing=False",
    ]
    subprocess.run(
        [*start, script, *common, *settings],
        cwd=checkout,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def finetune(folder, shape, *more, checkout=ROOT):
    """A row of metrics per step of sft.py, without the first two."""
    settings = [
        f"--data={folder}/rows.jsonl",
        "--tokenizer=None",
        "--val_rows=0",
        f"--batch_size={shape.rows}",
        f"--max_steps={shape.steps}",
        "--mask_prompt=False",
    ]
    return run_script("sft.py", folder, shape, [*settings, *more], checkout)[1:]


def reinforce(folder, shape, *more, checkout=ROOT, processes=1):
    """Seconds by phase of prime.py, a dictionary per step, without the first one."""
    settings = [
        f"--data={folder}/problems.jsonl",
        f"--max_tokens={shape.tokens}",
        f"--max_steps={shape.steps // 2}",
        "--filter_low=0",
        "--filter_high=1",
        f"--prompts_per_step={shape.rows}",
        "--samples_per_prompt=4",
        f"--batch_rows={2 * shape.rows}",
        f"--prm_batch_rows={2 * shape.rows}",
    ]
    rows = run_script("prime.py", folder, shape, [*settings, *more], checkout, processes)
    return [row["seconds"] for row in rows]


def sft_rates(folder, shape, *more, checkout=ROOT):
    """Tokens per second of the steps of sft.py."""
    rows = finetune(folder, shape, *more, checkout=checkout)
    return [row["tokens_per_s"] for row in rows]


def prm_seconds(folder, shape, *more):
    """Seconds of prime.py's PRM phase."""
    return [seconds["prm"] for seconds in reinforce(folder, shape, *more)]


def trl_rates(folder, shape, packing):
    """Tokens per second of the steps of TRL's SFTTrainer."""
    arguments = [folder, str(shape.rows), str(shape.steps), packing, shape.dtype]
    done = subprocess.run(
        [shape.trl, "-c", TRL, *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RATES")[2])


def grpo_seconds(folder, shape, beta):
    """Seconds of the steps of TRL's GRPOTrainer, without the first one."""
    tokens = shape.answer or shape.tokens
    arguments = [shape.rows // 8, 8, tokens, shape.steps, beta, shape.dtype]
    done = subprocess.run(
        [shape.trl_grpo, "-c", TRL_GRPO, folder, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("SECONDS")[2])


def prime_steps(folder, shape, *more, processes=1):
    """Seconds by phase of prime.py on as many rows, without the first step."""
    settings = [
        f"--max_steps={shape.steps}",
        f"--max_tokens={shape.answer or shape.tokens}",
        f"--prompts_per_step={shape.rows // 8}",
        "--samples_per_prompt=8",
        f"--batch_rows={shape.rows}",
        f"--prm_batch_rows={shape.rows}",
        "--learning_rate=1e-6",
    ]
    return reinforce(folder, shape, *settings, *more, processes=processes)


# --------------------------------------------------------------------------------------------------
# reports


def report_speed(folder, shape):
    """Tokens per second and MFU of sft.py, beside others; the phases of prime.py."""
    metrics = {"sft.py": []}
    rates = {}
    for _ in range(shape.rounds):
        metrics["sft.py"] += finetune(folder, shape)
        if shape.compile:
            rows = metrics.setdefault("sft.py, compiled layers", [])
            rows += finetune(folder, shape, "--compile=True")
        if shape.trl:
            for packing in ("no packing", "packing"):
                others = rates.setdefault(f"TRL, {packing}", [])
                others += trl_rates(folder, shape, packing)

    base = statistics.median(row["tokens_per_s"] for row in metrics["sft.py"])
    for name, rows in metrics.items():
        rate = statistics.median(row["tokens_per_s"] for row in rows)
        mfu = statistics.median(row["mfu"] for row in rows)
        print(f"{name:<24} {rate:8.0f} tokens/s  MFU {mfu:.1%}  {rate / base:.2f} times sft.py")
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:<24} {rate:8.0f} tokens/s  sft.py is {base / rate:.2f} times as fast")

    steps = reinforce(folder, shape)
    whole = sum(seconds["step"] for seconds in steps)
    shares = {}
    for name in steps[0]:
        if name != "step":
            shares[name] = sum(seconds[name] for seconds in steps) / whole
    shares["other"] = 1 - sum(shares.values())
    phases = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"prime.py, {4 * shape.rows} rows per step of {whole / len(steps):.1f} s: {phases}")


def report_each(folder, shape):
    """Each optimisation beside the same without it."""
    # Name, unit, measurement, settings without and with it.
    cases = [
        ("packed rows, not one per pass", "tokens/s", sft_rates, ["--micro_batch_tokens=1"], []),
        ("compiled layers and head", "tokens/s", sft_rates, [], ["--compile=True"]),
        (
            "activations kept, not recomputed",
            "tokens/s",
            sft_rates,
            ["--checkpointing=True"],
            [],
        ),
        (
            "PRM scored by the pass that trains it",
            "seconds",
            prm_seconds,
            ["--prm_update=before"],
            [],
        ),
    ]
    print(f"{'':<44}{'without':>16}{'with':>10}  times as fast")
    for name, unit, measure, off, on in cases:
        without = []
        with_it = []
        for _ in range(shape.rounds):
            without += measure(folder, shape, *off)
            with_it += measure(folder, shape, *on)
        old = statistics.median(without)
        new = statistics.median(with_it)
        ratio = old / new if unit == "seconds" else new / old
        print(f"{name:<44}{old:10.2f} {unit:<9}{new:6.2f}  {ratio:5.2f}", flush=True)


def report_grpo(folder, shape):
    """Seconds per step of prime.py and TRL's GRPOTrainer: 8 answers per prompt, one update."""
    outcomes_alone = ["--process_coef=0", "--prm_update=none"]
    steps = {"prime.py, outcomes alone": [], "prime.py": []}
    seconds = {"TRL, no reference": [], "TRL, with a reference": []}
    for _ in range(shape.rounds):
        steps["prime.py, outcomes alone"] += prime_steps(folder, shape, *outcomes_alone)
        seconds["TRL, no reference"] += grpo_seconds(folder, shape, beta=0.0)
        steps["prime.py"] += prime_steps(folder, shape)
        seconds["TRL, with a reference"] += grpo_seconds(folder, shape, beta=0.04)

    for name, values in seconds.items():
        print(f"{name:<28} {statistics.median(values):6.1f} s")
    for name, rows in steps.items():
        phases = []
        for phase in rows[0]:
            middle = statistics.median(row[phase] for row in rows)
            phases.append(f"{phase} {middle:.1f}")
        whole = statistics.median(row["step"] for row in rows)
        print(f"{name:<28} {whole:6.1f} s  ({', '.join(phases)})")
        for other, values in seconds.items():
            print(f"    {statistics.median(values) / whole:.2f} times as fast as {other}")


def report_scaling(folder, shape):
    """Milliseconds per row of prime.py's phases, for more and more rows, in updates of 64 rows."""
    print(f"{'processes':>9}{'rows':>7}{'rollout':>10}{'updates':>10}{'step':>10}  ms per row")
    for processes in (1, 2):
        for rows in (64, 256, 1024, 4096):
            case = argparse.Namespace(**vars(shape) | dict(rows=rows))
            updates = ["--batch_rows=64", "--prm_batch_rows=64"]
            steps = prime_steps(folder, case, *updates, processes=processes)
            rollout = statistics.median(step["rollout"] for step in steps)
            updating = statistics.median(step["prm"] + step["policy"] for step in steps)
            whole = statistics.median(step["step"] for step in steps)
            print(f"{processes:>9}{rows:>7}", end="")
            for seconds in (rollout, updating, whole):
                print(f"{1000 * seconds / rows:>10.2f}", end="")
            print(flush=True)


def report_against(folder, shape):
    """This checkout beside another one."""
    rates = {"this": [], "other": []}
    seconds = {"this": [], "other": []}
    checkouts = dict(this=ROOT, other=Path(shape.against).resolve())
    for _ in range(shape.rounds):
        for name, checkout in checkouts.items():
            rates[name] += sft_rates(folder, shape, checkout=checkout)
            seconds[name] += reinforce(folder, shape, checkout=checkout)

    print(f"{'':<28}{'this':>10}{'other':>10}  this is so many times as fast")
    this = statistics.median(rates["this"])
    other = statistics.median(rates["other"])
    print(f"{'sft.py, tokens/s':<28}{this:10.0f}{other:10.0f}  {this / other:5.2f}")
    for phase in seconds["this"][0]:
        if not all(phase in step for step in seconds["other"]):
            continue
        this = statistics.median(step[phase] for step in seconds["this"])
        other = statistics.median(step[phase] for step in seconds["other"])
        ratio = f"{other / this:5.2f}" if this else ""
        print(f"{f'prime.py, {phase}, s':<28}{this:10.3f}{other:10.3f}  {ratio}")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # 0: in the usual proportion to hidden; answer: tokens of an answer in --trl-grpo, 0: --tokens.
    shape = dict(hidden=384, layers=9, vocab=16384, intermediate=0, heads=0, groups=0)
    for name, value in dict(shape, tokens=162, answer=0, rows=16, steps=6, rounds=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", help="a model's folder, in place of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of both; float32 or bfloat16")
    parser.add_argument("--trl", help="the interpreter of an environment with trl")
    parser.add_argument("--trl-grpo", help="the same, to compare prime.py with, and nothing else")
    parser.add_argument("--compile", action="store_true", help="sft.py --compile=True as well")
    parser.add_argument("--each", action="store_true", help="each optimisation, and nothing else")
    parser.add_argument("--scaling", action="store_true", help="64 to 4,096 rows, nothing else")
    parser.add_argument("--against", help="the folder of another checkout, and nothing else")
    return parser.parse_args()


def main():
    shape = arguments()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_model(folder, shape)
        make_rows(folder, shape, tokenizer)
        if shape.each:
            report_each(folder, shape)
        elif shape.trl_grpo:
            report_grpo(folder, shape)
        elif shape.scaling:
            report_scaling(folder, shape)
        elif shape.against:
            report_against(folder, shape)
        else:
            report_speed(folder, shape)


if __name__ == "__main__":
    main()
