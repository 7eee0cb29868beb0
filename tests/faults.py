r"""
What a small pipeline survives: each stage is killed, stopped and damaged, and started again.

    python tests/faults.py                         # every fault three times: some ten minutes
    python tests/faults.py --times=100             # SIGKILL at a hundred moments of each stage
    python tests/faults.py --only sft prime --fault SIGKILL SIGTERM --times=1

The stages are sft.py, generate.py, prime.py and evaluate.py on forty guessing problems. A run under
faults is started with the same command until it ends, and must then have what a run without faults
has: the same weights, rows and metrics, bit for bit, none missing and none twice. Prints a line per
fault: how often it was tried, how many rows were lost or doubled, and the seconds from the last
start to the end, beside those of a whole run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 300  # seconds of one start
STARTS = 20  # of one run, at most

# Columns that are another one in every run.
CLOCKS = {"seconds", "peak_memory_gb", "tokens_per_s", "mfu", "date", "elapsed"}


# ----------------------------------------------------------------------------------------------
# the pipeline


def write_jsonl(path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(path).write_text("".join(lines))


def make_data(folder):
    """Problems "k?" whose answer from 1 to 3 nobody can know, rows to learn guessing from."""
    rows = []
    problems = []
    for k in range(10, 50):
        problems.append(dict(problem=f"{k}?", ground_truth=str(1 + k % 3), problem_id=k))
        for digit in (1, 2, 3):
            answer = "7" * (k % 4) + f"\\boxed{{{digit}}}"
            question = dict(role="user", content=f"{k}?")
            rows.append(dict(messages=[question, dict(role="assistant", content=answer)]))
    write_jsonl(folder / "sft.jsonl", rows)
    write_jsonl(folder / "problems.jsonl", problems)

    sizes = ["web_solutions", "train_problems", "rl_problems", "test_problems"]
    settings = [f"--{name}=50" for name in sizes]
    prepare = ["data/arithmetic/prepare.py", "--web_val_solutions=10", f"--out_dir={folder}/world"]
    started = start([*prepare, *settings])
    assert started.wait() == 0


def stages(folder) -> dict:
    """{stage: its command without out_dir}; the model of all but the first is that of `sft`."""
    guesser = folder / "guesser/model"
    data = f"--data={folder}/problems.jsonl"
    sampling = ["--device=cpu", "--max_prompt_tokens=32", "--temperature=1.0", "--engine=hf"]
    return {
        "sft": [
            "sft.py",
            f"--data={folder}/sft.jsonl",
            f"--model={folder}/world/init",
            "--tokenizer=None",
            "--device=cpu",
            "--max_length=64",
            "--val_rows=0",
            "--checkpointing=False",
            "--batch_size=120",
            "--epochs=40",
            "--learning_rate=5e-3",
            "--log_interval=1",
            "--save_interval=8",
        ],
        "generate": [
            "generate.py",
            data,
            f"--model={guesser}",
            "--system_prompt=''",
            "--samples_per_problem=12",
            "--max_tokens=24",
            "--grade_workers=1",
            *sampling,
        ],
        "prime": [
            "prime.py",
            data,
            f"--model={guesser}",
            "--system_prompt=None",
            "--user_suffix=",
            "--max_steps=6",
            "--prompts_per_step=8",
            "--samples_per_prompt=4",
            "--batch_rows=16",
            "--prm_batch_rows=16",
            "--filter_low=0",
            "--filter_high=1",
            "--max_tokens=24",
            "--learning_rate=1e-4",
            "--prm_learning_rate=1e-3",
            "--save_interval=1",
            "--grade_workers=1",
            *sampling,
        ],
        "evaluate": [
            "evaluate.py",
            f"--models=['{guesser}']",
            f"--benchmarks=['{folder}/problems.jsonl']",
            "--samples=8",
            "--max_tokens=24",
            "--grade_workers=1",
            *sampling,
        ],
    }


def start(command, out_dir=None, log=None):
    """A script in a process group of its own."""
    arguments = [*command]
    if out_dir is not None:
        arguments.append(f"--out_dir={out_dir}")
    environment = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with open(log or os.devnull, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_to_its_end(command, out_dir) -> float:
    """Start a command until it ends by itself. Returns the seconds of the last start."""
    log = f"{out_dir}.log"
    for _ in range(STARTS):
        began = time.monotonic()
        code = start(command, out_dir, log).wait(LONGEST)
        if code == 0:
            return time.monotonic() - began
        # A stage that stopped as it was asked to goes on with the next start.
        assert code in (-signal.SIGKILL, -signal.SIGTERM), Path(log).read_text()[-3000:]
    raise AssertionError(f"{command[0]} did not end in {STARTS} starts")


# ----------------------------------------------------------------------------------------------
# what a run has made


def rows_of(path) -> list[str]:
    """The rows of a .jsonl file without the clock, each as one text."""
    rows = []
    for line in Path(path).read_text("utf-8").splitlines():
        row = {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
        rows.append(json.dumps(row, sort_keys=True))
    return rows


def results(out_dir) -> dict:
    """{file: digest, or the rows of a .jsonl file} of everything that a run leaves."""
    found = {}
    for path in sorted(Path(out_dir).rglob("*")):
        name = str(path.relative_to(out_dir))
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = rows_of(path)
    return found


def compare(got: dict, want: dict) -> tuple[int, int]:
    """(rows lost, rows doubled or changed) against a run without faults; files count as rows."""
    lost = 0
    others = len(got.keys() - want.keys())
    for name, expected in want.items():
        found = got.get(name)
        if found is None:
            lost += 1
        elif isinstance(expected, str):
            others += found != expected
        else:
            lost += (Counter(expected) - Counter(found)).total()
            others += (Counter(found) - Counter(expected)).total()
            # Metrics are a sequence; answers come in the order in which they were finished.
            if Path(name).name == "metrics.jsonl":
                others += found != expected
    return lost, others


# ----------------------------------------------------------------------------------------------
# faults: each does its harm to an unfinished run


def interrupt(command, out_dir, seconds, number, draw):
    """Start a run, and send it a signal at a random moment of its first `seconds`."""
    process = start(command, out_dir, f"{out_dir}.log")
    try:
        process.wait(draw.uniform(1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
        process.wait(LONGEST)


def killed(command, out_dir, seconds, draw):
    interrupt(command, out_dir, seconds, signal.SIGKILL, draw)


def asked_to_stop(command, out_dir, seconds, draw):
    interrupt(command, out_dir, seconds, signal.SIGTERM, draw)


def torn_line(command, out_dir, seconds, draw):
    """Killed in the middle of a write: the last line of each .jsonl file is half there."""
    killed(command, out_dir, seconds, draw)
    for path in Path(out_dir).rglob("*.jsonl*"):
        size = path.stat().st_size
        if size:
            os.truncate(path, size - min(size, draw.randint(1, 40)))


def newest_shard(command, out_dir) -> Path:
    """Of a run that is killed when it has two checkpoints."""
    process = start(command, out_dir, f"{out_dir}.log")
    while process.poll() is None and len(checkpoints(out_dir)) < 2:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(LONGEST)
    return next(checkpoints(out_dir)[-1].glob("*.distcp"))


def checkpoints(out_dir) -> list[Path]:
    return sorted(Path(out_dir, "checkpoints").glob("step_??????"))


def truncated_checkpoint(command, out_dir, seconds, draw):
    shard = newest_shard(command, out_dir)
    os.truncate(shard, draw.randrange(shard.stat().st_size))


def flipped_bit(command, out_dir, seconds, draw):
    shard = newest_shard(command, out_dir)
    content = bytearray(shard.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    shard.write_bytes(content)


def odd_name(command, out_dir, seconds, draw):
    """Killed; the folder's name has what shells and patterns take for their own."""
    killed(command, out_dir, seconds, draw)


FAULTS = {
    "SIGKILL": killed,
    "SIGTERM": asked_to_stop,
    "SIGKILL and a torn last line": torn_line,
    "a truncated checkpoint": truncated_checkpoint,
    "a bit of a checkpoint flipped": flipped_bit,
    "SIGKILL, a folder 'a [b] *ü?'": odd_name,
}
WITH_CHECKPOINTS = {"a truncated checkpoint", "a bit of a checkpoint flipped"}


def try_fault(stage, fault, command, whole, seconds, folder, number) -> tuple[int, int, float]:
    """One run under a fault: (rows lost, rows doubled or changed, seconds of the last start)."""
    draw = random.Random(f"{stage} {fault} {number}")
    name = "a [b] *ü?" if FAULTS[fault] is odd_name else "out"
    out_dir = folder / f"{stage}_{number}" / name
    shutil.rmtree(out_dir.parent, ignore_errors=True)
    out_dir.parent.mkdir(parents=True)
    # Up to three times in a row: a run can be hit again while it recovers. Of a checkpoint once,
    # because the one before it must be whole.
    times = 1 if fault in WITH_CHECKPOINTS else draw.randint(1, 3)
    for _ in range(times):
        FAULTS[fault](command, out_dir, seconds, draw)
    last = run_to_its_end(command, out_dir)
    return *compare(results(out_dir), whole), last


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=3, help="of SIGKILL; others at most 3")
    parser.add_argument("--only", nargs="+", default=["sft", "generate", "prime", "evaluate"])
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=FAULTS)
    arguments = parser.parse_args()

    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        commands = stages(folder)
        run_to_its_end(commands["sft"], folder / "guesser")

        print(f"{'stage':<10}{'fault':<32}{'tried':>6}{'lost':>6}{'other':>6}  seconds (whole run)")
        for stage in arguments.only:
            whole = folder / f"{stage}_whole"
            seconds = run_to_its_end(commands[stage], whole)
            expected = results(whole)
            for fault in arguments.fault:
                if fault in WITH_CHECKPOINTS and stage not in ("sft", "prime"):
                    continue
                times = arguments.times if fault == "SIGKILL" else min(3, arguments.times)
                tries = []
                for number in range(times):
                    case = (stage, fault, commands[stage], expected, seconds, folder, number)
                    tries.append(try_fault(*case))
                lost, others, last = zip(*tries)
                bad += sum(lost) + sum(others)
                recovery = statistics.median(last)
                print(
                    f"{stage:<10}{fault:<32}{times:>6}{sum(lost):>6}{sum(others):>6}"
                    f"  {recovery:.1f} ({seconds:.1f})",
                    flush=True,
                )
    print(
        "nothing lost, nothing twice" if bad == 0 else f"{bad} rows or files are not as they were"
    )
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
