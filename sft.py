"""
Supervised fine-tuning with FSDP2 on packed sequences.

    torchrun --nproc_per_node 8 sft.py                          # INTELLECT-MATH-SFT: 7B on 8 GPUs
    torchrun --nproc_per_node 2 sft.py config/toy_sft.py        # a laptop: the built-in world

The loss is the mean over the assistant's tokens of the whole global batch: neither the number of
processes nor the packing changes it. The result is a Hugging Face folder. Left out on purpose:
padding, LoRA, tensor and sequence parallelism.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import configurator
from configurator import UserError
from lib import memory
from lib.finite import NotFinite, row_list, rows_not_finite, stops_if_not_finite
from lib.pretrained import check_tokenizer_can_be_saved, load_tokenizer
from lib.problems import load_sft_rows
from lib.report import Stopwatch
from lib.run import (
    all_sum,
    catch_signals,
    check_limits,
    is_due,
    keep_lines,
    leave_distributed,
    machine_words,
    make_run_folder,
    pick_device,
    print0,
    setup_distributed,
    to_disk,
    waiting_for,
    write_run_config,
)
from model import (
    flops,
    idle_passes,
    load_checkpoint,
    load_model,
    longest_batch,
    make_optimizer,
    matmul_rate,
    my_micro_batches,
    optimizer_step,
    pack,
    save_checkpoint,
    save_model,
    token_logprobs,
)

# --- data
# rows with `messages` (docs/data.md): hub id or file
data = "PrimeIntellect/INTELLECT-MATH-SFT-Data"
split = "train"  # the hub data set's split
val_data: str = None  # the same for validation; None: the last val_rows of the shuffled data
val_split = "validation"  # the split of val_data, if that is a hub data set
val_rows = 128  # rows held out for validation, at most a tenth of all; 0: none
max_length = 5000  # tokens per row (published)
overlong = "truncate"  # longer rows: 'truncate' (published: they lose their end token) or 'drop'
mask_prompt = True  # no loss on what is not the assistant's
mask_output = True  # no loss on what a tool said (```output ... ```): the model never writes it
max_bad_share = 0.01  # malformed rows are counted and reported; more than this share is an error
# --- model
model = "Qwen/Qwen2.5-Math-7B"  # hub id or folder
# None: the model's own. Published: the Instruct model's, for its chat template
tokenizer = "Qwen/Qwen2.5-Math-7B-Instruct"
# .jinja file; None: the tokenizer's own. The published run may have used config/tulu.jinja
chat_template: str = None
attention = "auto"  # 'flash_attn', 'varlen' (torch's own kernel), 'padded'; 'auto': the first found
# --- optimisation: the published run's, github.com/PrimeIntellect-ai/INTELLECT-MATH, sft/
epochs = 5
max_steps: int = None  # stop earlier than the epochs do
# rows per optimizer step, over all processes. Published: 1 x 16 accumulation x 8 GPUs
batch_size = 128
learning_rate = 5e-6
schedule = "linear"  # down to 0: 'linear' or 'cosine'; or 'constant'
warmup = 0.03  # share of the steps
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0  # on matrices only
grad_clip = 1.0  # norm; 0: no clipping. Published: DeepSpeed's 'auto', which is the Trainer's 1.0
seed = 42
# --- system
device = "auto"  # 'cuda', 'cpu', 'auto': cuda where there is one
# of passes: 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu. Weights are fp32
dtype = "auto"
micro_batch_tokens = 16384  # tokens per forward pass and process; a longer row goes alone
# recompute activations in the backward pass: a third more time, far less memory
checkpointing = True
compile = False  # torch.compile layers and head: meant for GPUs; the first step takes a minute
# processes that share a copy of a model's state (HSDP; with --nnodes: a node's); None: all
shard: int = None
timeout_minutes = 60.0  # a collective that waits longer ends the run
# print what a step and a GPU hold; where there is a GPU run the longest batch; and end
dry_run = False
# --- output
out_dir = "out/intellect_math_sft"  # model/ at the end; metrics.jsonl, config.json, checkpoints/
log_interval = 1  # steps
val_interval = 300  # steps
save_interval = 300  # steps between checkpoints to resume from (published: 300); 0: none
keep_checkpoints = 2  # the newest ones that are kept


def learning_rate_at(step: int, steps: int, peak: float, schedule: str, warmup_steps: int) -> float:
    """The learning rate of step 0 .. steps-1: linear warm-up, then `schedule`.

    As get_scheduler() of transformers has it.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * progress)))
    return peak


def count_scored(rows: list) -> int:
    """How many tokens of these rows have a loss; at least 1, because the loss is divided by it.

    There may be none: rows that are cut before their answers.
    """
    return max(1, sum(int(scored[1:].sum()) for _, scored in rows))


def loss_part(net, rows: list, torch_device):
    """This process's part of the mean loss per scored token; with gradients on, also its backward.

    rows: those of all processes. The parts of all processes add up to the loss. Collective.
    """
    scored_tokens = count_scored(rows)
    lengths = [len(tokens) for tokens, _ in rows]
    mine, idle = my_micro_batches(lengths, micro_batch_tokens)

    part = 0.0
    for members in mine:
        batch = pack([rows[i] for i in members], torch_device)
        loss = -token_logprobs(net, batch).sum() / scored_tokens
        if torch.is_grad_enabled():
            # FSDP divides gradients by the number of processes: undo that.
            (loss * dist.get_world_size()).backward()
        part = part + loss.detach().double()
    idle_passes(net, idle, torch_device)
    return part


def update(net, optimizer, rows: list, lr: float, torch_device) -> tuple[float, float]:
    """(loss, norm of its gradient) of a step on these rows. Collective.

    Raises NotFinite, and takes no step, if one of the two is not finite.
    """
    part = loss_part(net, rows, torch_device)
    try:
        norm = optimizer_step(net, optimizer, lr, grad_clip, part)
    except NotFinite as error:
        bad = bad_rows(net, rows, torch_device)
        where = f", because of {row_list(bad)} of {len(rows)}" if bad else ""
        raise NotFinite(f"{error}{where}", bad) from None
    return all_sum(part, torch_device), norm


def bad_rows(net, rows: list, torch_device) -> list[int]:
    """The numbers of the rows whose own loss, or its gradient, is not finite. Collective.

    Every process runs every row: this takes its time, once.
    """
    print0(f"a number is not finite: running each of {len(rows)} rows by itself")
    numbers = []
    for row in rows:
        loss = -token_logprobs(net, pack([row], torch_device)).sum() / count_scored(rows)
        loss.backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        norm = torch.nn.utils.get_total_norm(gradients).full_tensor()
        numbers.append(norm + loss.detach())
        net.zero_grad(set_to_none=True)
    return rows_not_finite(torch.stack(numbers))


@torch.no_grad()
def validate(net, rows: list, torch_device) -> float:
    """The mean loss per scored token of validation rows. Collective.

    Raises NotFinite if it is not finite: a model with such a loss is not worth a checkpoint.
    """
    loss = all_sum(loss_part(net, rows, torch_device), torch_device)
    if not math.isfinite(loss):
        losses = [-token_logprobs(net, pack([row], torch_device)).sum() for row in rows]
        bad = rows_not_finite(torch.stack(losses))
        where = f", because of {row_list(bad)} of {len(rows)}" if bad else ""
        raise NotFinite(f"the loss on the validation rows is {loss}{where}")
    net.reshard()  # FSDP frees embeddings and head only in a backward pass: free them here
    return loss


# --------------------------------------------------------------------------------------------------
# the steps of main()


def check_settings() -> None:
    """Raise UserError for values that cannot work, before anything is loaded."""
    at_least_one = (
        "epochs max_steps batch_size micro_batch_tokens log_interval val_interval keep_checkpoints"
    )
    least = dict.fromkeys(at_least_one.split(), 1)
    # The first token of a row is never predicted.
    least["max_length"] = 2
    # Rates, shares and counts that may be 0.
    not_negative = "val_rows save_interval max_bad_share learning_rate weight_decay grad_clip"
    least |= dict.fromkeys(not_negative.split(), 0)
    check_limits(
        globals(),
        least,
        schedule=("linear", "cosine", "constant"),
        overlong=("truncate", "drop"),
    )
    for name in ("warmup", "beta1", "beta2"):
        value = globals()[name]
        if not 0 <= value <= 1 or (value == 1 and name != "warmup"):
            raise UserError(f"{name}={value}: a share, from 0 to 1")
    if not math.isfinite(learning_rate):
        raise UserError(f"learning_rate={learning_rate}: a finite number")


def print_memory() -> None:
    """What a step and a GPU hold, by arithmetic."""
    memory.print_sft(
        model,
        memory.gpus_of_this_run(),
        batch_size=batch_size,
        max_length=max_length,
        micro_batch_tokens=micro_batch_tokens,
        checkpointing=checkpointing,
        shard=shard,
        dtype=dtype,
        keep_checkpoints=keep_checkpoints,
    )


def run_longest_batch(torch_device, torch_dtype) -> None:
    """Run the largest update that there can be, and print what a GPU then holds."""
    setup_distributed(torch_device, timeout_minutes)
    net, optimizer = load_net(torch_device, torch_dtype)
    longest_batch([(net, optimizer)], max(micro_batch_tokens, max_length), torch_device)
    leave_distributed()


def load_net(torch_device, torch_dtype):
    """(the model, its optimizer). Collective."""
    net = load_model(
        model,
        torch_device,
        torch_dtype,
        checkpointing=checkpointing,
        attention=attention,
        shard=shard,
        compile=compile,
    )
    return net, make_optimizer(net, learning_rate, beta1, beta2, weight_decay)


def load_data(text_tokenizer) -> tuple[list, list]:
    """(rows to train on, rows to validate on), each row (tokens [t], scored [t]). Collective."""
    how = dict(
        max_length=max_length,
        overlong=overlong,
        mask_prompt=mask_prompt,
        mask_output=mask_output,
        max_bad_share=max_bad_share,
    )
    rows = shuffled(load_sft_rows(data, split, text_tokenizer, **how), seed)
    if val_data:
        return rows, load_sft_rows(val_data, val_split, text_tokenizer, **how)
    kept = len(rows) - min(val_rows, len(rows) // 10)
    return rows[:kept], rows[kept:]


def shuffled(rows: list, seed: int) -> list:
    """The rows in an order that the seed alone decides."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]


def check_vocabulary(rows: list, vocabulary: int) -> None:
    """Raise UserError if a row has a token that the model does not know."""
    last = max(np.max(tokens) for tokens, _ in rows)
    if last >= vocabulary:
        name = tokenizer or model
        raise UserError(f"the tokenizer of {name} has a token {last}, {model} {vocabulary} in all")


def print_start(net, text_tokenizer, rows: list, steps: int, start: int, torch_dtype) -> None:
    """The sizes that follow from the settings, and the first row."""
    size = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    machine = machine_words(next(net.parameters()).device)
    world_size = dist.get_world_size()
    print0(
        f"{size:.1f} M parameters on {machine}, {torch_dtype}; "
        f"{steps} steps of {batch_size} rows, {math.ceil(len(rows) / batch_size)} per epoch; "
        f"{batch_size / world_size:g} rows per process and step"
    )
    first_row = text_tokenizer.decode(rows[0][0].tolist())
    print0(f"first row: {first_row[:500]!r}")
    if start:
        print0(f"resumed after step {start}")


def describe(text_tokenizer, rows: list) -> Iterator[dict]:
    """What is written of the rows of a step that went wrong."""
    for tokens, scored in rows:
        text = text_tokenizer.decode(tokens.tolist())
        yield dict(text=text, tokens=tokens.tolist(), scored=scored.tolist())


def append_row(path: str, row: dict) -> None:
    """Add a row to a .jsonl file, on rank 0. JSON has no nan and no inf: null."""
    if dist.get_rank() != 0:
        return
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
        to_disk(file)


def print_status(row: dict, steps: int, seconds_left: float) -> None:
    """One line about a step."""
    validation = f" val {row['val_loss']:.4f}" if "val_loss" in row else ""
    print0(
        f"step {row['step'] + 1}/{steps} loss {row['loss']:.4f}{validation} "
        f"lr {row['lr']:.2e} norm {row['grad_norm']:.2f} | "
        f"{row['tokens_per_s']:.0f} tok/s mfu {row['mfu']:.1%} "
        f"eta {timedelta(seconds=round(seconds_left))}"
    )


def main():
    check_settings()
    torch_device, torch_dtype = pick_device(device, dtype, dry_run)
    if dry_run:
        print_memory()
        if memory.runs_longest_batch(torch_device):
            run_longest_batch(torch_device, torch_dtype)
        return

    # Processes, data, model.
    text_tokenizer = load_tokenizer(tokenizer or model, chat_template)
    check_tokenizer_can_be_saved(text_tokenizer, model)
    rank, world_size = setup_distributed(torch_device, timeout_minutes)
    make_run_folder(out_dir, "checkpoints", "model")
    memory.check_disk(out_dir, torch_dtype, [model], [model], keep_checkpoints, save_interval)
    stop_signals = catch_signals()
    with waiting_for("loading", timeout_minutes):
        rows, held_out = load_data(text_tokenizer)
        net, optimizer = load_net(torch_device, torch_dtype)
    check_vocabulary(rows + held_out, net.config.vocab_size)

    steps_per_epoch = math.ceil(len(rows) / batch_size)
    steps = math.ceil(epochs * steps_per_epoch)
    if max_steps is not None:
        steps = min(steps, max_steps)
    # The rate of the first step of a warm-up is 0. A run of one step has none: it would train
    # nothing.
    warmup_steps = min(math.ceil(warmup * steps), steps - 1)

    # Go on after the newest checkpoint, if there is one.
    trained = dict(model=(net, optimizer))
    checkpoints = os.path.join(out_dir, "checkpoints")
    metrics = os.path.join(out_dir, "metrics.jsonl")
    with waiting_for("loading the checkpoint", timeout_minutes):
        start, _ = load_checkpoint(checkpoints, trained) or (0, None)
    if rank == 0:
        write_run_config(out_dir, configurator.values(globals()))
        keep_lines(metrics, start)
    print_start(net, text_tokenizer, rows, steps, start, torch_dtype)
    peak = world_size * matmul_rate(torch_device, torch_dtype)
    clock = Stopwatch()
    stopped = False

    # What a step that goes wrong leaves behind: see lib/finite.py.
    def rows_of_this_step():
        return describe(text_tokenizer, batch)

    with (
        waiting_for(clock, timeout_minutes),
        stops_if_not_finite(out_dir, clock, rows_of_this_step),
    ):
        for step in range(start, steps):
            # The rows of this step: each epoch has an order of its own.
            epoch, position = divmod(step, steps_per_epoch)
            first = position * batch_size
            batch = shuffled(rows, seed + 1 + epoch)[first : first + batch_size]

            # Update.
            clock.start("update", step)
            began = time.monotonic()
            lr = learning_rate_at(step, steps, learning_rate, schedule, warmup_steps)
            loss, norm = update(net, optimizer, batch, lr, torch_device)
            seconds = time.monotonic() - began

            # Report.
            tokens = sum(len(tokens) for tokens, _ in batch)
            pairs = sum(len(tokens) ** 2 for tokens, _ in batch)
            row = dict(step=step, epoch=step / steps_per_epoch, loss=loss, lr=lr, grad_norm=norm)
            row["tokens_per_s"] = tokens / seconds
            row["mfu"] = flops(net, tokens, pairs) / seconds / peak
            if held_out and is_due(val_interval, step + 1, steps):
                clock.start("validation")
                row["val_loss"] = validate(net, held_out, torch_device)
            clock.end_step()
            append_row(metrics, row)
            if (step + 1) % log_interval == 0 or step == start or "val_loss" in row:
                print_status(row, steps, clock.seconds_left(steps - step - 1))

            # Save. If one rank was asked to stop, all stop.
            clock.start("checkpoint")
            stopped = all_sum(len(stop_signals), torch_device) > 0
            if stopped or is_due(save_interval, step + 1, steps):
                save_checkpoint(checkpoints, step + 1, trained, {}, keep_checkpoints)
            if stopped:
                break

    # The model's folder, unless the run is to go on later.
    if stopped:
        print0(f"stopped after step {step + 1}: start again with the same command to resume")
    else:
        path = os.path.join(out_dir, "model")
        with waiting_for("the model's files", timeout_minutes):
            save_model(net, text_tokenizer, path, torch_dtype, model)
        print0(f"wrote {path} after {clock.elapsed()}")
    leave_distributed()


if __name__ == "__main__":
    configurator.run(main, globals())
