"""A small pipeline, stage by stage, and what a run of a stage leaves: for faults.py, long_run.py.

The stages are sft.py, generate.py, prime.py and evaluate.py on forty guessing problems, one process
on a CPU; "sft x2" and "prime x2" have two processes.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 300  # seconds of one start
STARTS = 20  # of one run, at most
ENDING = 10  # seconds in which all that a run has started must be gone

# Every process of a run inherits it: the run's number.
MARK = "SMALL_PIPELINE_RUN"

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
    """{stage: its command without out_dir}; the model of all but sft's is what it has made."""
    guesser = folder / "guesser/model"
    data = f"--data={folder}/problems.jsonl"
    sampling = ["--device=cpu", "--max_prompt_tokens=32", "--temperature=1.0", "--engine=hf"]
    alone = {
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
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return alone | {"sft x2": two + alone["sft"], "prime x2": two + alone["prime"]}


def start(command, out_dir=None, log=None):
    """A script in a process group of its own, and marked with the number of its run."""
    arguments = [*command]
    if out_dir is not None:
        arguments.append(f"--out_dir={out_dir}")
    environment = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    environment[MARK] = str(out_dir)
    with open(log or os.devnull, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(process, out_dir, seconds=LONGEST) -> int:
    """The exit code of a run; nothing of it may be left.

    Raises subprocess.TimeoutExpired if it does not end in so many seconds.
    """
    code = process.wait(seconds)
    end = time.monotonic() + ENDING
    while processes_of(out_dir):
        assert time.monotonic() < end, f"{out_dir}: left behind are {processes_of(out_dir)}"
        time.sleep(0.05)
    return code


def processes_of(out_dir) -> dict[int, str]:
    """{process id: command line} of all processes of a run that have not ended."""
    mark = f"{MARK}={out_dir}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace")
        except OSError:
            # It has just ended.
            continue
    return found


def run_to_its_end(command, out_dir) -> float:
    """Start a command until it ends by itself. Returns the seconds of the last start."""
    for _ in range(STARTS):
        began = time.monotonic()
        code = wait(start(command, out_dir, log_of(out_dir)), out_dir)
        if code == 0:
            return time.monotonic() - began
        # A stage that stopped as it was asked to goes on with the next start.
        assert code in (-signal.SIGKILL, -signal.SIGTERM), last_words(out_dir)
    raise AssertionError(f"{command} did not end in {STARTS} starts")


def log_of(out_dir) -> Path:
    """What all starts of a run have printed."""
    return Path(f"{out_dir}.log")


def last_words(out_dir) -> str:
    return log_of(out_dir).read_text(errors="replace")[-3000:]


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
