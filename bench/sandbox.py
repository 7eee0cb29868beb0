"""
Programs per second in the sandbox, and by an interpreter started for each without any sandbox.

    python bench/sandbox.py
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.sandbox import isolation, run_python  # noqa: E402

# How often each program runs.
PROGRAMS = {
    "print(6 * 7)": 200,
    "import numpy, sympy; print(sympy.__version__)": 40,
    "import sympy as sp; x = sp.Symbol('x'); "
    "print(sp.solve(sp.integrate(x**2, (x, 0, x)) - 9, x))": 40,
}


def sandboxed(code):
    return run_python(code).stdout


def plain(code):
    """The output of a program in an interpreter of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stdout


def rate(run, code, repeats, threads):
    """Programs per second, `threads` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        # The first round starts what is started once.
        outputs = set(pool.map(run, [code] * threads))
        began = time.perf_counter()
        outputs.update(pool.map(run, [code] * repeats))
        seconds = time.perf_counter() - began
    assert len(outputs) == 1 and outputs != {""}, outputs
    return repeats / seconds


def main():
    threads = os.cpu_count()
    print(f"isolation: {isolation()}; {threads} at a time")
    for code, repeats in PROGRAMS.items():
        ours = rate(sandboxed, code, repeats, threads)
        theirs = rate(plain, code, max(4, repeats // 5), threads)
        print(
            f"{ours:7.1f} programs/s, {theirs:6.1f} with an interpreter for each, "
            f"ratio {ours / theirs:5.1f}: {code}",
            flush=True,
        )


if __name__ == "__main__":
    main()
