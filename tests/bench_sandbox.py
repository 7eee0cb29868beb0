"""Programs a second through grader.run_python, against an interpreter started for each program without any sandbox.

    python tests/bench_sandbox.py
"""
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import grader

PROGRAMS = {"print(6 * 7)": 200, "import numpy, sympy; print(sympy.__version__)": 40,
            "import sympy as sp; x = sp.Symbol('x'); print(sp.solve(sp.integrate(x**2, (x, 0, x)) - 9, x))": 40}


def plain(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")).stdout


def rate(run, code, n, threads):
    with ThreadPoolExecutor(threads) as pool:
        outputs = set(pool.map(run, [code] * threads))      # starts what is started once
        began = time.time()
        outputs |= set(pool.map(run, [code] * n))
    assert len(outputs) == 1 and outputs != {""}
    return n / (time.time() - began)


if __name__ == "__main__":
    threads = os.cpu_count()
    print(f"isolation: {grader.isolation()}; {threads} at a time")
    for code, n in PROGRAMS.items():
        ours, theirs = rate(lambda c: grader.run_python(c).stdout, code, n, threads), rate(plain, code, max(4, n // 5), threads)
        print(f"{ours:7.1f} programs/s, {theirs:6.1f} with an interpreter for each, ratio {ours / theirs:5.1f}: {code}", flush=True)
