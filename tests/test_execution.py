"""The sandbox against hostile programs, and code rewards against programs that cheat. Half a minute on two free cores."""
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import evaluate
import grader
from runs import sandbox

HERE = sys.executable


def interpreter(level):
    """This one. But root's programs run as another user, who outside bubblewrap may not get to it: then the system's."""
    reachable = all(path.stat().st_mode & 1 for path in pathlib.Path(sys.executable).resolve().parents)
    return sys.executable if level == "bubblewrap" or os.getuid() or reachable else "/usr/bin/python3"


def works(level):
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(grader.GraderError):
        patch.setattr(sys, "executable", interpreter(level))
        return grader.run_python("print(1)", timeout=60, level=level).stdout == "1\n"


LEVELS = [level for level in ("bubblewrap", "namespaces", "limits") if works(level)]  # that this machine offers


def use(request, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda sandbox="auto": request.param)
    monkeypatch.setattr(sys, "executable", interpreter(request.param))
    return request.param


@pytest.fixture(params=LEVELS)
def any_level(request, monkeypatch):
    return use(request, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level != "namespaces"])
def outer_level(request, monkeypatch):
    """For what does not depend on the level."""
    return use(request, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level != "limits"])
def level(request, monkeypatch):
    """For what limits alone do not promise: no network, no other process, no daemons."""
    return use(request, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level == "bubblewrap"])
def bubblewrap(request, monkeypatch):
    """For what concerns files."""
    return use(request, monkeypatch)


def wait_until(condition, seconds=3):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def running(word):
    """Is a process of this machine running with `word` in its command line?"""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word in open(f"/proc/{pid}/cmdline").read():
                return True
        except OSError:
            pass
    return False


# ---- what programs may expect ----

def test_output_stdin_exit_status(outer_level):
    assert grader.run_python("print('a', input(), input())", "b\nc") == grader.RunResult("a b c\n", "", 0, False)
    assert grader.run_python("print(len(open(0).read()))", "x" * 10**6).stdout == "1000000\n"
    assert grader.run_python("import sys; sys.exit(3)").returncode == 3
    assert grader.run_python("import sys; sys.exit('sorry')") == grader.RunResult("", "sorry\n", 1, False)
    assert grader.run_python("raise SystemExit") == grader.RunResult("", "", 0, False)
    assert grader.run_python("print('no newline', end='')\nimport os; os._exit(0)").returncode == 0
    assert grader.run_python("") == grader.RunResult("", "", 0, False)
    assert grader.run_python("import ctypes; ctypes.string_at(0)").returncode == 128 + 11
    assert grader.run_python("print('\ud800')").returncode in (0, 1)  # not encodable: at most an error of the program
    assert "EOFError" in grader.run_python("input()").stderr


def test_is_a_normal_main_program(outer_level):
    assert grader.run_python("if __name__ == '__main__': print(__file__)").stdout.endswith("/program.py\n")
    assert grader.run_python("import atexit; atexit.register(print, 'end'); print('start')").stdout == "start\nend\n"
    assert grader.run_python("import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('t'))).start()").stdout == "t\n"
    assert grader.run_python("import dataclasses\n@dataclasses.dataclass\nclass A: x: 'int' = 1\nprint(A())").stdout == "A(x=1)\n"
    assert grader.run_python("open('f', 'w').write('x'); print(open('f').read())").stdout == "x\n"
    assert grader.run_python("import tempfile; print(len(tempfile.TemporaryFile().read()))").stdout == "0\n"
    assert grader.run_python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(5)'])").stdout == "5\n"
    deep = "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n" \
           "def f(n): return n and f(n - 1) + 1\nt = threading.Thread(target=lambda: print(f(50000))); t.start(); t.join()"
    assert grader.run_python(deep).stdout == "50000\n"


def test_sympy_and_numpy_are_there():
    code = "import sympy, numpy; x = sympy.Symbol('x'); print(sympy.integrate(2 * x, x), numpy.linalg.det(numpy.eye(3)))"
    assert grader.run_python(code).stdout == "x**2 1.0\n"


def test_tracebacks_are_short_and_free_of_directories(outer_level):
    result = grader.run_python("import json\ndef f(x):\n    return json.loads('1 +')\nf(2)")
    lines = result.stderr.splitlines()
    assert lines[:5] == ["Traceback (most recent call last):", '  File "program.py", line 4, in <module>', "    f(2)",
                         '  File "program.py", line 3, in f', "    return json.loads('1 +')"]
    assert len(lines) == 6 and "Error" in lines[5] and result.returncode == 1
    assert grader.run_python("x = (").stderr.splitlines() == [
        '  File "program.py", line 1', "    x = (", "        ^", "SyntaxError: '(' was never closed"]
    missing = grader.run_python("import os; open(os.getcwd() + '/nothing')").stderr.splitlines()
    assert missing[2:] == ["    import os; open(os.getcwd() + '/nothing')",
                           "FileNotFoundError: [Errno 2] No such file or directory: 'nothing'"]
    assert "0x..." in grader.run_python("raise ValueError(object())").stderr


def test_fresh_directory_each_time_and_nothing_left_behind(any_level):
    code = "import os; print(os.listdir()); open('left', 'w'); print(os.getcwd())"
    first, second = grader.run_python(code).stdout.split("\n"), grader.run_python(code).stdout.split("\n")
    assert first[0] == second[0] == "['program.py']"
    assert not os.path.exists(first[1] + "/left")


def test_programs_share_no_state(outer_level):
    grader.run_python("import math, builtins; math.pi = 3; builtins.print = None")
    assert grader.run_python("import math; print(math.pi > 3)").stdout == "True\n"


def test_programs_share_no_loaded_module(bubblewrap):
    grader.run_python("import sympy, numpy; sympy.pi = 3; numpy.pi = 3; sympy.Symbol.__add__ = None; sympy.cos.eval = None")
    assert grader.run_python("import sympy, numpy; x = sympy.Symbol('x'); print(numpy.pi > 3, x + sympy.cos(0), sympy.pi > 3)").stdout == "True x + 1 True\n"


def test_programs_are_forked_from_a_loaded_interpreter(bubblewrap):
    """What they would have to load is there before their first line; how much that saves: tests/bench_sandbox.py."""
    assert grader.run_python("import sys; print({'numpy', 'sympy'} <= set(sys.modules))").stdout == "True\n"


def test_a_killed_template_is_replaced(any_level):
    grader.run_python("print(1)")
    for templates in sandbox.IDLE.values():
        for template in templates:
            template.kill(), template.wait()
    assert grader.run_python("print(1)").stdout == "1\n"
    result = grader.run_python("import os; os.kill(os.getppid(), 9)")
    assert result.returncode in (0, 137) and not result.timed_out and grader.run_python("print(1)").stdout == "1\n"


def test_programs_share_no_memory_of_the_kernel(level):
    code = """import os, ctypes
libc = ctypes.CDLL(None)
print(libc.shmget(4711, 100, 0o666), libc.semget(4711, 1, 0o666), libc.msgget(4711, 0o666), os.listdir("/dev/shm") == [os.path.basename(os.getcwd())])
libc.shmget(4711, 100, 0o1666), libc.semget(4711, 1, 0o1666), libc.msgget(4711, 0o1666), open("/dev/shm/left", "w").write("x")"""
    assert grader.run_python(code).stdout == grader.run_python(code).stdout == "-1 -1 -1 True\n"


def test_programs_cannot_spoil_their_template(level):
    """It has the same user. What they can change in it must not last."""
    spoil = ["import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (10, 10))", "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
             "import os; os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))", "import os; os.mkdir('a'); os.mkdir('a/b'); os.chmod('a', 0); os.chmod('.', 0)",
             "import os\nfor _ in range(2000): os.mkdir('deep'); os.chdir('deep')",
             "import os\nfor n in range(1, 65):\n    try: os.kill(1, n)\n    except OSError: pass"]
    look = "import os, resource; print(resource.getrlimit(resource.RLIMIT_FSIZE)[1], os.nice(0), os.sched_getscheduler(0), len(os.listdir('/dev/shm')))"
    for code in spoil:
        assert grader.run_python(code).returncode == 0
        assert grader.run_python(look).stdout == f"{sandbox.OUTPUT_LIMIT} 0 0 1\n"
    for file in "mem", "environ", "maps", "fd/0":
        assert "PermissionError" in grader.run_python(f"import os; open(f'/proc/{{os.getppid()}}/{file}', 'rb')").stderr


def test_namespaces_of_its_own_do_not_protect_a_process(level):
    """A program may make user and process namespaces; what runs there dies with it."""
    word = f"nested-{os.getpid()}-{level}"
    code = f"""import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).unshare(0x30020000) == 0
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{word}"], start_new_session=True)
input()"""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(grader.run_python, code + "\nimport time; time.sleep(3)", "\n")
        assert wait_until(lambda: running(f"sleep(60)\0{word}"))
    assert result.result().returncode == 0 and wait_until(lambda: not running(word))


def test_clean_environment(outer_level, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = grader.run_python("import os; print(os.environ); print(open('/proc/self/environ').read() if os.path.exists("
                     "'/proc/self/environ') else '')").stdout
    assert "hf_secret" not in out and "'CUDA_VISIBLE_DEVICES': ''" in out and "'OMP_NUM_THREADS': '1'" in out


def test_concurrent_callers(outer_level):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: grader.run_python(f"print({i})" if i % 5 else "while True: pass", timeout=1.5), range(20)))
    assert [r.stdout for r in results] == [f"{i}\n" if i % 5 else "" for i in range(20)]
    assert [r.timed_out for r in results] == [i % 5 == 0 for i in range(20)]


# ---- time and size ----

ENDLESS = ["while True: pass", "import time; time.sleep(100)", "import sys; sys.stdout.close()\nwhile True: pass",
    "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass"]


def test_time_limit(any_level):
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda code: grader.run_python("print('so far', flush=True)\n" + code, timeout=1.5), ENDLESS))
    assert results == [grader.RunResult("so far\n", "", 128 + 9, True)] * 4
    assert time.monotonic() - start < 10


def test_memory_limit(outer_level):
    result = grader.run_python("x = bytearray(10 ** 11)")
    assert result.returncode == 1 and result.stderr.endswith("MemoryError\n")
    assert grader.run_python("x = []\nwhile True: x.append(bytes(10 ** 6))", memory_mb=512).stderr.endswith("MemoryError\n")


def test_a_gigabyte_of_output(outer_level):
    start = time.monotonic()
    result = grader.run_python("line = 'x' * 10 ** 6\nfor i in range(1000): print(line)")
    assert len(result.stdout) <= sandbox.OUTPUT_LIMIT and result.returncode != 0 and time.monotonic() - start < 5
    result = grader.run_python("import os\nwhile True:\n    try: os.write(2, b'x' * 10 ** 6)\n    except OSError: pass", timeout=1)
    assert len(result.stderr) <= sandbox.OUTPUT_LIMIT and result.timed_out
    assert grader.run_python("open('big', 'wb').write(bytes(10 ** 9))").returncode == 1


def test_background_processes_die_with_the_program(any_level):
    word = f"left-behind-{os.getpid()}-{any_level}"
    leave_group = "os.setsid()" if any_level != "limits" else "pass"  # limits do not promise that daemons die
    code = f"""import os, subprocess, sys, time
if os.fork() == 0:
    {leave_group}
    if os.fork() == 0:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", "{word}"])
    os._exit(0)
time.sleep(0.5)
print("done", flush=True)
"""
    start = time.monotonic()
    assert grader.run_python(code).stdout == "done\n" and time.monotonic() - start < 3  # holding stdout open delays nothing
    assert wait_until(lambda: not running(word))
    assert grader.run_python(code + "time.sleep(60)", timeout=1.5).timed_out
    assert wait_until(lambda: not running(word))


def test_programs_die_with_a_killed_caller(any_level):
    word = f"orphan-{os.getpid()}-{any_level}"  # exec makes it the program's own command line
    code = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{word}'])"
    call = f"import sys, grader as g; sys.executable = {sys.executable!r}; g.run_python(sys.argv[1], timeout=50, level='{any_level}')"
    caller = subprocess.Popen([HERE, "-c", call, code], cwd=os.path.dirname(grader.__file__))
    assert wait_until(lambda: running(f"sleep(60)\0{word}"), 10)
    caller.kill(), caller.wait()
    assert wait_until(lambda: not running(f"sleep(60)\0{word}"))


# ---- escape ----

def test_fork_bomb(level):
    forked = int(grader.run_python("""import os, time
n = 0
while n < 60:
    try: pid = os.fork()
    except OSError: break
    if pid == 0: time.sleep(60)
    n += 1
print(n)""", timeout=5).stdout)
    assert 0 < forked < sandbox.MAX_TASKS  # the limit holds: now a real one
    assert grader.run_python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout=1).timed_out
    assert grader.run_python("print(1)").stdout == "1\n"


def test_outside_files_cannot_be_read_or_written(bubblewrap, tmp_path):
    secret, name = tmp_path / "secret", f"new-{os.getpid()}"
    secret.write_text("secret"), secret.chmod(0o666), tmp_path.chmod(0o777)
    for path in secret, "/etc/passwd", os.path.expanduser("~/.bashrc"), __file__, "/dev/sda", "/dev/vda":
        assert grader.run_python(f"print(open({str(path)!r}).read())").returncode == 1
    for path in tmp_path / "new", f"/tmp/{name}", f"/{name}", f"/dev/{name}", os.__file__, json.__file__ + "x", pytest.__file__:
        assert grader.run_python(f"open({str(path)!r}, 'a')").returncode == 1
    assert os.listdir(tmp_path) == ["secret"] and not os.path.exists(f"/tmp/{name}")
    assert "'sys'" not in grader.run_python("import os\nfor up in range(20): os.chdir('..')\nprint(os.listdir())").stdout


def test_mounts_cannot_be_undone(bubblewrap):
    result = grader.run_python("""import ctypes, os
libc = ctypes.CDLL(None)
print([libc.umount2(p, 2) for p in (b"/proc", b"/scratch", b"/")], libc.chroot(b"/scratch"), libc.mount(b"x", b"/scratch", b"tmpfs", 0, None))
print(libc.unshare(0x10020000) and -1)
print([libc.umount2(p, 2) for p in (b"/proc", b"/", b"/dev")])
print([p for p in os.listdir("/proc") if p.isdigit()] == ["1", str(os.getpid())])""")
    lines = result.stdout.splitlines()
    assert lines[0] == "[-1, -1, -1] -1 -1" and lines[2] == "[-1, -1, -1]" and lines[3] == "True"


def test_no_network(level):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in ("127.0.0.1", port), ("1.1.1.1", 53):
            assert grader.run_python(f"import socket; socket.create_connection({address!r}, 2)").returncode == 1
    name = f"\0grader-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name), server.listen()
        assert grader.run_python(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})").returncode == 1


def test_other_processes_cannot_be_seen_or_killed(level):
    assert grader.run_python("import os; print(os.getppid())").stdout == "1\n"
    seen = grader.run_python("import os; print(*[open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()])").stdout
    assert "sandbox.py" in seen and "pytest" not in seen
    code = f"import os, signal\nfor pid in ({os.getpid()}, {os.getppid()}, *range(2, 5000), -1):\n" \
           f"    try: pid == os.getpid() or os.kill(pid, 9)\n    except OSError: pass"
    assert grader.run_python(code).returncode in (0, 137)
    assert grader.run_python("import os; os.kill(os.getppid(), 9); os.killpg(0, 9)").timed_out is False
    assert grader.run_python("print(1)").stdout == "1\n"


def test_the_parents_environment_cannot_be_read(level, monkeypatch):
    code = "import os\nfor p in os.listdir('/proc'):\n    try: print(open(f'/proc/{p}/environ').read())\n    except OSError: pass"
    child = subprocess.Popen(["sleep", "20"], env=dict(os.environ, HF_TOKEN="hf_secret"))  # has it in /proc, as callers have
    assert wait_until(lambda: "hf_secret" in open(f"/proc/{child.pid}/environ").read())
    out = grader.run_python(code).stdout
    child.kill(), child.wait()
    assert "PYTHONUTF8" in out and "hf_secret" not in out


def test_no_descriptors_and_no_privileges(level):
    code = "import os\nfor fd in range(3, 2000):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass"
    assert grader.run_python(code).stdout == ""
    assert grader.run_python("import os; os.setuid(0)" if os.getuid() == 0 else "import os; os.setuid(1)").returncode == 1
    status = grader.run_python("print(open('/proc/self/status').read())").stdout
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status


def test_required(monkeypatch):
    grader.isolation.cache_clear()
    assert grader.isolation() == LEVELS[0]
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda words, popen=sandbox.subprocess.Popen, **kw: popen(
        words if words[0] != "bwrap" else ["no-such-program"], **kw))
    monkeypatch.setattr(sandbox, "IDLE", {})
    grader.isolation.cache_clear()
    with pytest.raises(RuntimeError, match="required"):
        grader.isolation("required")
    monkeypatch.setattr(sys, "executable", "/no/interpreter")
    with pytest.raises(RuntimeError, match="auto"):
        grader.isolation()
    monkeypatch.undo()
    grader.isolation.cache_clear()


# ---- code rewards ----

def block(code):
    return f"Some words.\n```python\n{code}\n```\n"


IO = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "0 0\n"], "outputs": ["3\n", "7\n", "11\n", "1\n"]}  # the last is wrong on purpose
ADD = "a, b = map(int, input().split())\nprint(a + b)"


def test_stdin_shares():
    assert grader.grade_code(block(ADD), IO) == 0.75
    assert grader.grade_code(block(ADD), json.dumps(IO)) == 0.75
    assert grader.grade_code(block("print(3)"), IO) == 0.25
    assert grader.grade_code(block("print(3); 1/0"), IO) == 0.0
    assert grader.grade_code("no block, print(3)", IO) == 0.0
    assert grader.grade_code(block("print(3)") + block(ADD), IO) == 0.75  # the last one counts
    assert grader.grade_code("```python\n" + ADD, IO) == 0.75  # cut off after the program
    assert grader.grade_code(block("from __future__ import annotations\nif __name__ == '__main__':\n    " + ADD.replace("\n", "\n    ")), IO) == 0.75


@pytest.mark.parametrize("got, wanted, same", [
    ("1 2 \n\n3\n\n", "1 2\n3", True), ("1  2", "1 2", True), ("1 2", "1\n2", False), ("yes", "YES", False), ("", "1", False),
    ("0.3333333", "0.33333333333", True), ("0.3334", "0.33333333333", False), ("3.0", "3", True), ("3.00001", "3", False),
    ("100001", "100000", False), ("1e5", "100000", True), ("nan", "1", False), ("9" * 5000, "8" * 5000, False),
    ("12345678901234567891", "12345678901234567890", False), ("inf", "1" * 400, False)])
def test_stdout_comparison(got, wanted, same):
    assert grader.grade_code(block(f"print({got!r})"), {"inputs": [""], "outputs": [wanted]}) == same


def test_call_based_shares():
    tests = {"fn_name": "add", "inputs": [[1, 2], [3, 4], ["a", "b"]], "outputs": [[3], 7, "ba"]}
    assert grader.grade_code(block("def add(a, b): return a + b"), tests) == pytest.approx(2 / 3)
    method = "class Solution:\n    def add(self, a: List[int], b) -> Optional[int]:\n        print('noise')\n        return a + b"
    assert grader.grade_code(block(method), tests) == pytest.approx(2 / 3)
    assert grader.grade_code(block("def sub(a, b): return a + b"), tests) == 0.0
    assert grader.grade_code(block("def f(x): return (x, {1: [x * 0.1]}, {x})"),
                      {"fn_name": "f", "inputs": ["3"], "outputs": [[3, {"1": [0.3]}, [3]]]}) == 0.0  # a set is no list
    assert grader.grade_code(block("def f(x): return (x, {1: [x * 0.1]})"), {"fn_name": "f", "inputs": ["3"], "outputs": [[3, {"1": [0.3]}]]}) == 1.0
    assert grader.grade_code(block("import numpy as np\ndef f(x): return np.array(x).sum()"), {"fn_name": "f", "inputs": [[[1, 2]]], "outputs": [3]}) == 1.0
    texts = {"fn_name": "add", "inputs": ["1\n2\n\n", "[1]\n[2]", '"a"\n"b\u2028"', "no JSON"], "outputs": ["3", "[1, 2]", "ab\u2028", "1"]}
    assert grader.grade_code(block("def add(a, b): return a + b"), texts) == 0.75        # arguments and values as texts


def test_assert_shares():
    tests = ["assert f(2) == 4", "assert f(3) == 9", "assert f(0) == 1", "import math\nassert math.isclose(f(1.5), 2.25)"]
    assert grader.grade_code(block("def f(x): return x * x"), tests) == 0.75
    assert grader.grade_code(block("def f(x): return 4"), tests) == 0.25
    program = "def check(candidate):\n    for i in range(50):\n        assert candidate(i) == i * i\n    assert candidate(candidate(2)) == 16\ncheck(f)"
    assert grader.grade_code(block("def f(x): return x * x"), [program]) == 1.0
    assert grader.grade_code(block("def f(x): return x * x if x < 49 else 0"), [program]) == 0.0
    assert grader.grade_code(block("class Pair:\n    def __init__(self, a): self.a = a\n    def get(self): return self.a\ndef f(p): return p.a"),
                      ["p = Pair(3)\nassert f(p) == 3 and p.get() == 3", "assert f(Pair(4)) == 3"]) == 0.5
    assert grader.grade_code(block("def sum(a, b): return a - b"), ["assert sum(5, 2) == 3"]) == 1.0


def test_malformed_tests_are_an_error():
    for tests in {"inputs": [], "outputs": []}, [], {"inputs": ["1"], "outputs": []}, "nonsense", "3":
        with pytest.raises((ValueError, TypeError)):
            grader.grade_code(block("print(1)"), tests)


def test_gives_up_and_time_limit_per_test():
    tests = {"inputs": [str(i) for i in range(100)], "outputs": ["x"] * 100}
    start = grader.isolation() and time.monotonic()
    assert grader.grade_code(block("while True: pass"), tests, timeout=0.3) == 0.0
    assert time.monotonic() - start < 5
    slow_once = "n = int(input())\nwhile n == 1: pass\nprint(n)"
    assert grader.grade_code(block(slow_once), {"inputs": ["0", "1", "2"], "outputs": ["0", "1", "2"]}, timeout=1) == pytest.approx(2 / 3)


CHEATS = {
    "exits early": "import os, sys\nprint('passed', 'ok', 1); sys.stdout.flush(); os._exit(0)",
    "exits politely": "import sys\nprint('passed')\nsys.exit(0)",
    "equals everything": "class E:\n    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
        "    __repr__ = lambda s: '4'\n    __sub__ = __rsub__ = __abs__ = lambda *a: E()\n    __hash__ = lambda s: 0\ndef f(*a): return E()",
    "subclass of int": "class E(int):\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: '4'\n    __hash__ = lambda s: 0\ndef f(*a): return E(-1)",
    "patches builtins": "import builtins\nbuiltins.print = lambda *a, **k: None\nbuiltins.AssertionError = Warning\nbuiltins.abs = builtins.set = "
        "builtins.repr = builtins.isinstance = builtins.eval = lambda *a: True\ndef f(*a): return None",
    "redefines set": "def set(*a): return 0\ndef abs(*a): return 0\ndef f(*a): return [1]",
    "searches memory": "import gc, sys, re\ndef f(*a):\n    frame = sys._getframe()\n    while frame:\n        m = re.search(r'== *(\\d+)', "
        "str(frame.f_locals) + str(frame.f_globals))\n        if m: return int(m[1])\n        frame = frame.f_back",
    "searches files": "import os, glob, re\ndef f(*a):\n    for p in glob.glob('/scratch/*') + glob.glob('/tmp/**'):\n        try:\n            m = "
        "re.search(r'f\\(2\\) == *(\\d+)', open(p).read())\n            if m: return int(m[1])\n        except OSError: pass",
    "prints marks": "import sys, re\nfor v in list(sys.modules['__main__'].__dict__.values()): print(v)\nprint('passed', '[]')\ndef f(*a): return []",
    "raises": "raise AssertionError",
    "walks frames": "import sys\ndef f(*a):\n    frame = sys._getframe(1)\n    while frame:\n        found = [c for c in frame.f_code.co_consts "
        "if type(c) is int and c > 99]\n        if found: return found[0]\n        frame = frame.f_back",
    "inspects the stack": "import inspect, re\ndef f(*a):\n    for info in inspect.stack()[1:]:\n        for value in [*info.frame.f_locals.values(), "
        "*info.frame.f_code.co_consts]:\n            if value in (1234, '1234'): return 1234",
    "asks the collector": "import gc, types\ndef f(*a):\n    for x in gc.get_objects():\n        if isinstance(x, types.FunctionType) and x.__name__ == "
        "'check': return max(c for c in x.__code__.co_consts if type(c) is int)",
    "reads its memory": "import re\ndef f(*a):\n    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:\n"
        "        for line in maps:\n            start, end = (int(x, 16) for x in line.split()[0].split('-'))\n            try:\n"
        "                memory.seek(start)\n                found = re.search(rb'f\\(2\\)\\)? == (?:exactly\\()?(\\d+)', memory.read(end - start))\n"
        "            except (OSError, ValueError, OverflowError): continue\n            if found: return int(found[1])",
    "kills its parent": "import os\ndef f(*a):\n    os.kill(os.getppid(), 9)",
    "forges an exit": "import os, struct\ndef f(*a):\n    for text in b'{\"SystemExit\": 0}', b'{\"Remote\": \"0]; exit()\"}', b'[' * 10 ** 5:\n"
        "        for fd in 3, 4, 5:\n            try: os.write(fd, struct.pack('!i', len(text)) + text)\n            except OSError: pass\n    return 0",
    "exits when called": "def f(*a): raise SystemExit(0)",
    "defines what tests use": "class same: __new__ = lambda *a: True\nclass json: loads = dumps = lambda *a: 1234\nclass math: isclose = lambda *a: True\n"
        "def f(*a): return 7\nsame = lambda *a: True\nabs = lambda *a: 0\nset = lambda *a: 0\ndefined = {'f': lambda *a: 1234}",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_nothing(name):
    cheat = block(CHEATS[name])
    assert grader.grade_code(cheat, ["assert f(2) == 1234", "assert set(f(2)) == set([7, 8])", "assert abs(f(2) - 77) < 1e-3"]) == 0.0
    assert grader.grade_code(cheat, ["def check(candidate):\n    assert candidate(2) == 1234\n    assert True\ncheck(f)"]) == 0.0
    assert grader.grade_code(cheat, {"fn_name": "f", "inputs": [[2]], "outputs": [1234]}) == 0.0
    assert grader.grade_code(cheat + "\n", {"inputs": ["2\n"], "outputs": ["1234\n"]}) == 0.0


def test_no_test_stays_in_the_memory_of_the_template(outer_level):
    """Neither another process nor a later program of the same template, which is often that of the same problem, sees a test."""
    assert grader.grade_code(block("def f(x): return x"), ["assert f(2) == 987654 - 987652"]) == 1.0
    search = CHEATS["reads its memory"].replace("(\\d+)", "(98765\\d) - ")
    assert grader.run_python(search + "\nprint(f(), len(open('/proc/self/maps').read()) > 100)").stdout == "None True\n"


def test_what_goes_between_a_test_and_its_program(outer_level):
    """Plain data as it is, exceptions as their builtin kind, other objects as what they are asked for; they equal nothing."""
    code = block("import collections\nclass MyError(KeyError): pass\nclass Node:\n    def __init__(self, v, *rest): self.v, self.rest = v, rest\n"
                 "    def __eq__(self, other): return True\ndef same_thing(x, *a, **k): return x\ndef fail(): raise MyError('no')\n"
                 "def count(x): return collections.Counter(x)\n"
                 "def numbers(n): return (i for i in range(n))\nBIG = 10 ** 40")
    passing = ["x = [(1, 2.5, None), {3: {4}}, 'a\\n\\ud800', b'b' * 3, 1j, frozenset([True]), float('inf'), -0.0, range(2)]\n"
               "y = same_thing(x)\nassert y[:3] + y[4:8] == x[:3] + x[4:8] and type(y[0]) is tuple and list(y[8]) == [0, 1]",
               "assert same_thing(float('nan')) != same_thing(float('nan')) and BIG == 10 ** 40 and same_thing(x=3, k=4) == 3",
               "try: fail()\nexcept KeyError as e: assert 'no' in str(e)\nelse: assert False", "assert count('abca') == {'a': 2, 'b': 1, 'c': 1}",
               "assert list(numbers(3)) == sorted(numbers(3)) == [0, 1, 2]",
               "n = Node(3, Node(4))\nn.w = n.rest\nassert n.w[0].v == 4 and n.v == 3 and n.rest[0].v == 4 and same_thing(n).v == 3", "assert Node(3) != 5 and Node(3) != Node(3)",
               "assert not hasattr(Node(3), 'w') and same_thing([Node(5)])[0].v == 5"]
    assert grader.grade_code(code, passing) == 1.0
    assert grader.grade_code(code, ["assert Node(3) == 5", "assert Node(3) == Node(3)", "assert len(Node(3))", "assert MISSING"]) == 0.0


def test_numpy_between_a_test_and_its_program(bubblewrap):
    """In bubblewrap, where programs have this interpreter and its packages."""
    code = block("import numpy\ndef array(): return numpy.array([[1, 2]]), numpy.float32(0.5), numpy.bool_(True)")
    assert grader.grade_code(code, ["assert array() == ([[1, 2]], 0.5, True)"]) == 1.0


def test_a_test_keeps_its_own_loops(outer_level):
    """A program that defines builtins, or raises what ends a loop, does not keep the assertions in them from running."""
    loops = ["for x in range(5):\n    assert f(x) == x * x", "for x, y in zip([1, 2], [1, 4]):\n    assert f(x) == y",
             "for x, y in zip(map(f, [1, 2]), [1, 4]):\n    assert x == y"]
    assert grader.grade_code(block("def f(x): return x * x"), loops) == 1.0
    for cheat in ("def range(*a): return []\ndef zip(*a): return []", "def f(x): raise StopIteration", "f = zip = range = lambda *a: []"):
        assert grader.grade_code(block(cheat), loops) == 0.0


@pytest.mark.parametrize("code", [
    "import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.kill(os.getpid(), 10)",
    "import resource, time; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0)); time.sleep(.3)"])
def test_programs_that_upset_their_parent_score_nothing(level, code):
    """No exception reaches the caller, whose run would end; the next program is as well as ever."""
    assert grader.grade_code(block("import os\n" + code + "\n" + ADD), IO, timeout=2) == 0.0
    assert grader.grade_code(block(ADD), IO) == 0.75


def test_values_that_compare_badly(outer_level):
    assert grader.grade_code(block("print(5)"), {"inputs": ["1"] * 3, "outputs": ["inf", "Infinity", "nan"]}) == 0.0
    assert grader.grade_code(block("print(float('inf'))"), {"inputs": ["1"], "outputs": ["inf"]}) == 1.0
    assert grader.grade_code(block("from math import gcd"), {"fn_name": "gcd", "inputs": [[4, 6]], "outputs": [2]}) == 1.0
    assert grader.grade_code(block("def f(x): return x > 9"), {"fn_name": "f", "inputs": [[float("inf")]], "outputs": [True]}) == 1.0


def test_code_in_the_pool():
    """One test has `timeout` seconds, the item code_timeout; a malformed item is an error."""
    reference = dict(ability="code", ground_truth=json.dumps(IO))
    with grader.Grader(workers=2, timeout=1.0, code_timeout=2.5) as pool:
        scores = pool.grade([block(ADD), "no block", block("while True: pass")], [reference] * 2 + [dict(reference, ground_truth=dict(inputs=["1"] * 9, outputs=["1"] * 9))])
        assert scores == [0.75, 0.0, 0.0] and [score.failure for score in scores] == [None, None, "timeouts"]
        assert (pool.timeouts, pool.crashes, pool.unparsed) == (1, 0, 0)
        with pytest.raises(ValueError):
            pool.grade([block(ADD)], [dict(reference, ground_truth="[]")])


# ---- real benchmark files ----

def load(path):
    """(rows, check programs) of a file, by evaluate.py's reading of it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, [evaluate.code_row(path.name, row)["ground_truth"] for row in rows]


def scores(items):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda item: grader.grade_code(block(item[0]), item[1]), items))


def test_humaneval(shared):
    rows, tests = (column[::6] for column in load(shared / "data/humaneval.jsonl"))
    assert scores([(row["prompt"] + row["canonical_solution"], test) for row, test in zip(rows, tests)]) == [1.0] * len(rows)
    assert sum(scores([(row["prompt"] + "    return None", test) for row, test in zip(rows[::4], tests[::4])])) == 0


def test_mbpp(shared):
    rows, tests = load(shared / "data/mbpp_prime.jsonl")
    chosen = [i for i, row in enumerate(rows) if row["task_id"] == 126] + list(range(0, len(rows), 40))
    rows, tests = [rows[i] for i in chosen], [tests[i] for i in chosen]
    assert scores([(row["code"], test) for row, test in zip(rows, tests)]) == [1.0] * len(rows)
    mutated = [(row["code"].replace("return", "return None or 7 if True else"), test) for row, test in zip(rows[::2], tests[::2])]
    assert sum(score == 1.0 for score in scores(mutated)) <= 1


def test_leetcode(shared):
    rows, tests = load(shared / "data/leetcode_sample.jsonl")
    test = next(test for row, test in zip(rows, tests) if "sum-of-squares-of-special" in row["task_id"])
    # the file holds no solutions; this one is ours
    solution = "class Solution:\n    def sumOfSquares(self, nums: List[int]) -> int:\n        n = len(nums)\n" \
               "        return sum(x * x for i, x in enumerate(nums, 1) if n % i == 0)"
    assert grader.grade_code(block(solution), test) == 1.0
    assert grader.grade_code(block(solution.replace("x * x", "x")), test) == 0.0


@pytest.mark.parametrize("end", ["import io, sys; sys.stdout = io.StringIO(); print('b')", "import sys; sys.stdout.flush(); sys.stdout.close()",
                                 "import builtins; builtins.print = None"])
def test_what_was_printed_is_there_at_the_end(end):
    result = grader.run_python(f"print('a')\n{end}")
    assert (result.stdout, result.returncode) == ("a\n", 0)
