"""A script of the repository that is harmed from the inside, at its n-th occasion.

    python tests/sabotage.py write 17 prime.py --max_steps=6 --out_dir=out/x

write     SIGKILL when the n-th file below out_dir is opened for writing, removed or renamed
phase     SIGTERM when the n-th phase of prime.py or sft.py begins
engine    the engine raises in its n-th batch
clock     the clock goes back by two hours at its n-th reading
count     no harm: at the end {word: its number of occasions} is written to out_dir + ".occasions"
"""

import atexit
import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRITING = os.O_WRONLY | os.O_RDWR

occasions = Counter()


def occurs(word: str) -> None:
    """An occasion; the harm is done if it is its turn."""
    occasions[word] += 1
    if word == fault and occasions[word] == number:
        HARM[word]()


def end_at_once() -> None:
    os.killpg(0, signal.SIGKILL)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("the engine is sabotaged")


def set_back() -> None:
    global offset
    offset = -7200


HARM = dict(write=end_at_once, phase=ask_to_stop, engine=fail, clock=set_back)


def watch_files(out_dir: str) -> None:
    """Occasions of "write"."""

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if not flags & WRITING:
                return
        elif event in ("os.rename", "os.remove"):
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(out_dir):
            occurs("write")

    sys.addaudithook(hook)


def watch_the_clock() -> None:
    """Occasions of "clock". To be called before anything imports the function."""
    real_time = time.time

    def time_now():
        occurs("clock")
        return real_time() + offset

    time.time = time_now


def watch_calls() -> None:
    """Occasions of "phase" and "engine"."""
    import engine
    import lib.report

    for owner, name, word in (
        (lib.report.Stopwatch, "start", "phase"),
        (engine.HFEngine, "_answer", "engine"),
    ):
        setattr(owner, name, after_an_occasion(getattr(owner, name), word))


def after_an_occasion(function, word: str):
    def wrapped(*arguments, **options):
        occurs(word)
        return function(*arguments, **options)

    return wrapped


def count_at_the_end(out_dir: str) -> None:
    """Scripts that train end with os._exit()."""
    real_exit = os._exit

    def write():
        Path(out_dir + ".occasions").write_text(json.dumps(occasions))

    def end(code):
        write()
        real_exit(code)

    os._exit = end
    atexit.register(write)


if __name__ == "__main__":
    fault, number, script, *arguments = sys.argv[1:]
    number = int(number)
    offset = 0
    (out_dir,) = (word[len("--out_dir=") :] for word in arguments if word.startswith("--out_dir="))
    sys.path.insert(0, str(ROOT))
    watch_the_clock()
    watch_calls()
    watch_files(out_dir)
    if fault == "count":
        count_at_the_end(out_dir)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
