r"""
What a small pipeline survives: each stage is killed, stopped and damaged, and started again.

    python tests/faults.py                         # every fault three times: some 25 minutes
    python tests/faults.py --times=25 --fault SIGKILL      # a hundred kills of four stages
    python tests/faults.py --only sft prime --fault SIGKILL SIGTERM --times=1

The stages are in tests/small_pipeline.py. A run under faults is started with the same command
until it ends, and must then have what a run without faults has: the same weights, rows and metrics,
bit for bit, none missing and none twice. No process of a run may be left when it has ended. Prints
a line per fault: how often it was tried, how many rows were lost or doubled, and the seconds from
the last start to the end, beside those of a whole run. Faults that need a file system of their own
take root.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from small_pipeline import (
    CLOCKS,
    compare,
    last_words,
    log_of,
    make_data,
    processes_of,
    results,
    run_to_its_end,
    stages,
    start,
    wait,
)

SABOTAGE = "tests/sabotage.py"


@dataclass
class Case:
    """A stage's run that is to be hit.

    command: as in stages(). seconds, size: how long a run without faults takes, and its bytes.
    occasions: as sabotage.py counts them in such a run. number: of the try. draw: random numbers.
    """

    stage: str
    command: list[str]
    out_dir: Path
    seconds: float
    size: int
    occasions: dict
    number: int
    draw: random.Random

    def start(self):
        return start(self.command, self.out_dir, log_of(self.out_dir))

    def sabotaged(self, word: str, number: int) -> int:
        """The exit code of a start that is harmed at the n-th occasion."""
        command = [SABOTAGE, word, str(number), *self.command]
        return wait(start(command, self.out_dir, log_of(self.out_dir)), self.out_dir)


# ----------------------------------------------------------------------------------------------
# faults: each does its harm to an unfinished run


def interrupt(case: Case, number: int) -> None:
    """Start a run, and send it a signal at a random moment of its first `seconds`."""
    process = case.start()
    try:
        process.wait(case.draw.uniform(1, case.seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
    wait(process, case.out_dir)


def several_times(fault):
    """Up to three times in a row: a run can be hit again while it recovers."""

    def hit(case):
        for _ in range(case.draw.randint(1, 3)):
            fault(case)

    return hit


def killed(case):
    interrupt(case, signal.SIGKILL)


def asked_to_stop(case):
    interrupt(case, signal.SIGTERM)


def torn_line(case):
    """Killed in the middle of a write: the last line of each .jsonl file is half there.

    Not that of a step with a checkpoint, before which it is brought to the disk.
    """
    killed(case)
    names = [path.name for path in checkpoints(case.out_dir)]
    saved = int(names[-1].removeprefix("step_")) if names else 0
    for path in case.out_dir.rglob("*.jsonl*"):
        size = path.stat().st_size
        if size and step_of_last_line(path) >= saved:
            os.truncate(path, size - min(size, case.draw.randint(1, 40)))


def step_of_last_line(path: Path) -> float:
    """Infinite where it has none."""
    last = path.read_bytes().splitlines()[-1]
    try:
        return json.loads(last).get("step", math.inf)
    except ValueError:
        return math.inf


def killed_at_a_write(case):
    """When it opens, removes or renames a file: a checkpoint's, a model's, a log's."""
    case.sabotaged("write", case.draw.randint(1, case.occasions["write"]))


def asked_to_stop_in_each_phase(case):
    """The tries go through the phases of a step in the middle of the run, one after the other."""
    code = case.sabotaged("phase", case.occasions["phase"] // 2 + case.number)
    assert code == 0, last_words(case.out_dir)


def engine_raises(case):
    code = case.sabotaged("engine", case.draw.randint(1, case.occasions["engine"]))
    assert code == 1, last_words(case.out_dir)
    assert "the engine is sabotaged" in last_words(case.out_dir)


def clock_set_back(case):
    """The run goes on, and no time that it tells is negative."""
    code = case.sabotaged("clock", case.draw.randint(1, case.occasions["clock"]))
    assert code == 0, last_words(case.out_dir)
    for path in case.out_dir.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for name in CLOCKS & row.keys():
                value = row[name]
                times = value.values() if isinstance(value, dict) else [value]
                assert min(times) >= 0, row


def grading_child_killed(case):
    """A process that grades is killed, three times at random moments: the run goes on."""
    process = case.start()
    for _ in range(3):
        time.sleep(case.draw.uniform(0, case.seconds / 4))
        for pid, command in processes_of(case.out_dir).items():
            if "grader.py" in command:
                kill(pid)
    code = wait(process, case.out_dir)
    assert code == 0, last_words(case.out_dir)


def process_killed(case):
    """One of two ranks is killed: torchrun ends the other, and says so with its exit code."""
    process = case.start()
    time.sleep(case.draw.uniform(1, case.seconds))
    script = next(word for word in case.command if word.endswith(".py"))
    ranks = []
    for pid, command in processes_of(case.out_dir).items():
        if script in command and "torch.distributed.run" not in command:
            ranks.append(pid)
    if ranks:
        kill(case.draw.choice(sorted(ranks)))
    code = wait(process, case.out_dir)
    assert code in (0, 1), last_words(case.out_dir)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def newest_shard(case) -> Path:
    """Of a run that is killed when it has two checkpoints."""
    process = case.start()
    while process.poll() is None and len(checkpoints(case.out_dir)) < 2:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wait(process, case.out_dir)
    return next(checkpoints(case.out_dir)[-1].glob("*.distcp"))


def checkpoints(out_dir) -> list[Path]:
    return sorted(Path(out_dir, "checkpoints").glob("step_??????"))


def truncated_checkpoint(case):
    shard = newest_shard(case)
    os.truncate(shard, case.draw.randrange(shard.stat().st_size))


def flipped_bit(case):
    shard = newest_shard(case)
    content = bytearray(shard.read_bytes())
    content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
    shard.write_bytes(content)


def full_disk(case):
    """Its file system is too small for what a run writes; then it is made larger."""
    mount(case.out_dir, f"size={int(case.size * case.draw.uniform(0.05, 0.9))}")
    ends_with_one_line(case)
    mount(case.out_dir, "remount,size=1g")


def read_only(case):
    """Killed, and started again when nothing can be written; then it can again."""
    mount(case.out_dir, "size=1g")
    killed(case)
    mount(case.out_dir, "remount,ro")
    ends_with_one_line(case)
    mount(case.out_dir, "remount,rw")


def mount(folder, options: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def ends_with_one_line(case) -> None:
    """A start that must end with exit code 2 and one line for the user."""
    before = log_of(case.out_dir).stat().st_size if log_of(case.out_dir).exists() else 0
    code = wait(case.start(), case.out_dir)
    said = log_of(case.out_dir).read_bytes()[before:].decode(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said[-3000:]


# ----------------------------------------------------------------------------------------------

ALONE = ["sft", "generate", "prime", "evaluate"]
TRAINED = ["sft", "prime"]
SAMPLED = ["generate", "prime", "evaluate"]
TOGETHER = ["sft x2", "prime x2"]
ODD_NAME = "SIGKILL, a folder 'a [b] *ü?'"
PHASES = 8  # of a step of prime.py, at most

# {what happens: (what does it, to which stages)}
FAULTS = {
    "SIGKILL": (several_times(killed), ALONE),
    "SIGKILL at a write": (several_times(killed_at_a_write), ALONE),
    "SIGTERM": (several_times(asked_to_stop), ALONE),
    "SIGTERM in each phase": (asked_to_stop_in_each_phase, TRAINED),
    "SIGKILL and a torn last line": (several_times(torn_line), ALONE),
    ODD_NAME: (several_times(killed), ALONE),
    "a truncated checkpoint": (truncated_checkpoint, TRAINED),
    "a bit of a checkpoint flipped": (flipped_bit, TRAINED),
    "a grading process killed": (grading_child_killed, SAMPLED),
    "the engine raises": (engine_raises, SAMPLED),
    "the clock set back": (clock_set_back, ALONE),
    "a full disk": (full_disk, ALONE),
    "a read-only disk": (read_only, ALONE),
    "one of two processes killed": (process_killed, TOGETHER),
}
NEED_ROOT = {"a full disk", "a read-only disk"}


def tries_of(fault: str, times: int) -> int:
    """SIGKILL as often as asked for, the others at most three times."""
    if fault == "SIGTERM in each phase":
        return min(PHASES, 3 * times)
    return times if fault.startswith("SIGKILL") else min(3, times)


def try_fault(fault, stage, whole, folder, number) -> tuple[int, int, float]:
    """One run under a fault: (rows lost, rows doubled or changed, seconds of the last start)."""
    draw = random.Random(f"{stage} {fault} {number}")
    name = "a [b] *ü?" if fault == ODD_NAME else "out"
    out_dir = folder / f"{stage}_{number}".replace(" ", "_") / name
    shutil.rmtree(out_dir.parent, ignore_errors=True)
    out_dir.parent.mkdir(parents=True)

    harm, _ = FAULTS[fault]
    case = Case(
        stage, whole.command, out_dir, whole.seconds, whole.size, whole.occasions, number, draw
    )
    try:
        harm(case)
        last = run_to_its_end(case.command, out_dir)
        lost, others = compare(results(out_dir), whole.results)
    finally:
        if os.path.ismount(out_dir):
            subprocess.run(["umount", "--lazy", str(out_dir)], check=True)
    return lost, others, last


@dataclass
class Whole:
    """A run without faults: what it has made, how long it took, its bytes and its occasions."""

    command: list[str]
    results: dict
    seconds: float
    size: int
    occasions: dict


def run_whole(command, out_dir: Path) -> Whole:
    began = time.monotonic()
    counted = command
    if command[0] != "-m":
        counted = [SABOTAGE, "count", "0", *command]
    code = wait(start(counted, out_dir, log_of(out_dir)), out_dir)
    assert code == 0, last_words(out_dir)
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in out_dir.rglob("*") if file.is_file())
    occasions = {}
    if counted is not command:
        occasions = json.loads(Path(f"{out_dir}.occasions").read_text())
    return Whole(command, results(out_dir), seconds, size, occasions)


def main():
    every_stage = [*ALONE, *TOGETHER]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=3, help="of SIGKILL; others at most 3")
    parser.add_argument("--only", nargs="+", default=every_stage, choices=every_stage)
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
            faults = [fault for fault in arguments.fault if stage in FAULTS[fault][1]]
            if not faults:
                continue
            whole = run_whole(commands[stage], folder / f"{stage}_whole".replace(" ", "_"))
            for fault in faults:
                if fault in NEED_ROOT and os.geteuid() != 0:
                    print(f"{stage:<10}{fault:<32}  takes root")
                    continue
                tries = []
                for number in range(tries_of(fault, arguments.times)):
                    tries.append(try_fault(fault, stage, whole, folder, number))
                bad += print_tries(stage, fault, tries, whole.seconds)
    print(
        "nothing lost, nothing twice" if bad == 0 else f"{bad} rows or files are not as they were"
    )
    sys.exit(bad > 0)


def print_tries(stage, fault, tries, seconds) -> int:
    """A line of the table. Returns how many rows were lost, doubled or changed."""
    lost = sum(row[0] for row in tries)
    others = sum(row[1] for row in tries)
    recovery = statistics.median(row[2] for row in tries)
    print(
        f"{stage:<10}{fault:<32}{len(tries):>6}{lost:>6}{others:>6}"
        f"  {recovery:.1f} ({seconds:.1f})",
        flush=True,
    )
    return lost + others


if __name__ == "__main__":
    main()
