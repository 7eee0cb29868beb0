"""The sandbox against hostile programs, and code rewards against programs that cheat."""

import ast
import contextlib
import errno
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest

import grader
from lib import sandbox, sandbox_child
from lib.sandbox import RunResult, run_python

ROOT = pathlib.Path(__file__).resolve().parent.parent
INTERPRETER = sys.executable


def reachable_interpreter(level):
    """
    The interpreter for a level: this one, if programs can get to it.

    Root's programs run as another user, who outside bubblewrap may not enter the folder of this
    interpreter; then it is the system's.
    """
    folders = pathlib.Path(sys.executable).resolve().parents
    open_to_all = all(folder.stat().st_mode & 1 for folder in folders)
    if level == "bubblewrap" or os.getuid() != 0 or open_to_all:
        return sys.executable
    return "/usr/bin/python3"


def works(level):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", reachable_interpreter(level))
        try:
            return run_python("print(1)", timeout=60, level=level).stdout == "1\n"
        except sandbox.GraderError:
            return False


# The levels that this machine offers.
LEVELS = [level for level in sandbox.LEVELS if works(level)]


def use(level, monkeypatch):
    """From now on programs run at this level."""
    monkeypatch.setattr(sandbox, "isolation", lambda sandbox=None: level)
    monkeypatch.setattr(sys, "executable", reachable_interpreter(level))
    return level


@pytest.fixture(params=LEVELS)
def any_level(request, monkeypatch):
    return use(request.param, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level != "namespaces"])
def outer_level(request, monkeypatch):
    """For what does not depend on the level."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level != "limits"])
def level(request, monkeypatch):
    """For what limits alone do not promise: that other processes cannot be seen."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=[level for level in LEVELS if level == "bubblewrap"])
def bubblewrap(request, monkeypatch):
    """For what concerns files."""
    return use(request.param, monkeypatch)


def run(code, *args, **kwargs):
    """run_python of an indented program."""
    return run_python(dedent(code), *args, **kwargs)


KILLED = RunResult("", "", 128 + 9, False)


def wait_until(condition, seconds=3):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def running(word):
    """Is a process of this machine running with `word` in its command line?"""
    for pid in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if pid.isdigit() and word in pathlib.Path(f"/proc/{pid}/cmdline").read_text():
                return True
    return False


def idle_children():
    return [child for children in sandbox.IDLE.values() for child in children]


# ---- what programs may expect ----


def test_output_stdin_exit_status(outer_level):
    assert run("print('a', input(), input())", "b\nc") == RunResult("a b c\n", "", 0, False)
    assert run("print(len(open(0).read()))", "x" * 10**6).stdout == "1000000\n"
    assert run("") == RunResult("", "", 0, False)
    assert "EOFError" in run("input()").stderr
    assert run("import ctypes; ctypes.string_at(0)").returncode == 128 + 11
    assert run("print('no newline', end='')\nimport os; os._exit(0)").returncode == 0

    # Not encodable: at most an error of the program.
    assert run("print('\ud800')").returncode in (0, 1)


@pytest.mark.parametrize(
    "code, wanted",
    [
        ("import sys; sys.exit(3)", RunResult("", "", 3, False)),
        ("import sys; sys.exit('sorry')", RunResult("", "sorry\n", 1, False)),
        ("import sys; print('x', end=''); sys.exit()", RunResult("x", "", 0, False)),
        ("import sys; sys.exit(-1)", RunResult("", "", 255, False)),
        ("raise SystemExit", RunResult("", "", 0, False)),
        ("import sys; sys.stderr.write('no newline')", RunResult("", "no newline", 0, False)),
        ("raise SystemExit(type('E', (int,), {'__and__': str})(7))", RunResult("", "", 7, False)),
    ],
)
def test_the_ways_to_end(outer_level, code, wanted):
    assert run_python(code) == wanted


def test_is_a_normal_main_program(outer_level):
    named = "if __name__ == '__main__': print(__file__)"
    assert run(named).stdout.endswith("/program.py\n")

    at_exit = "import atexit; atexit.register(print, 'end'); print('start')"
    assert run(at_exit).stdout == "start\nend\n"

    files = "open('f', 'w').write('x'); print(open('f').read())"
    assert run(files).stdout == "x\n"

    temporary = "import tempfile; print(len(tempfile.TemporaryFile().read()))"
    assert run(temporary).stdout == "0\n"

    other_process = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(5)'])"
    assert run(other_process).stdout == "5\n"

    thread = """
        import threading, time
        def late():
            time.sleep(0.1)
            print('t')
        threading.Thread(target=late).start()
    """
    assert run(thread).stdout == "t\n"

    data_class = """
        import dataclasses
        @dataclasses.dataclass
        class A: x: 'int' = 1
        print(A())
    """
    assert run(data_class).stdout == "A(x=1)\n"

    deep_recursion = """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(1 << 27)
        def f(n): return n and f(n - 1) + 1
        t = threading.Thread(target=lambda: print(f(50000)))
        t.start()
        t.join()
    """
    assert run(deep_recursion).stdout == "50000\n"


def test_sympy_and_numpy_are_there():
    code = """
        import sympy, numpy
        x = sympy.Symbol('x')
        print(sympy.integrate(2 * x, x), numpy.linalg.det(numpy.eye(3)))
    """
    assert run(code).stdout == "x**2 1.0\n"


def test_tracebacks_are_short_and_free_of_directories(outer_level):
    result = run_python("import json\ndef f(x):\n    return json.loads('1 +')\nf(2)")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[:5] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 4, in <module>',
        "    f(2)",
        '  File "program.py", line 3, in f',
        "    return json.loads('1 +')",
    ]
    assert len(lines) == 6
    assert "Error" in lines[5]

    assert run("x = (").stderr.splitlines() == [
        '  File "program.py", line 1',
        "    x = (",
        "        ^",
        "SyntaxError: '(' was never closed",
    ]

    code = "import os; open(os.getcwd() + '/nothing')"
    assert run(code).stderr.splitlines()[2:] == [
        "    import os; open(os.getcwd() + '/nothing')",
        "FileNotFoundError: [Errno 2] No such file or directory: 'nothing'",
    ]
    assert "0x..." in run("raise ValueError(object())").stderr


def test_fresh_directory_each_time_and_nothing_left_behind(any_level):
    code = "import os; print(os.listdir()); open('left', 'w'); print(os.getcwd())"
    first_files, first_folder, _ = run(code).stdout.split("\n")
    second_files, _, _ = run(code).stdout.split("\n")
    assert first_files == second_files == "['program.py']"
    assert not os.path.exists(first_folder + "/left")


def test_programs_share_no_state(outer_level):
    run("import math, builtins; math.pi = 3; builtins.print = None")
    assert run("import math; print(math.pi > 3)").stdout == "True\n"


def test_programs_share_no_loaded_module(bubblewrap):
    run("""
        import sympy, numpy
        sympy.pi = 3
        numpy.pi = 3
        sympy.Symbol.__add__ = None
        sympy.cos.eval = None
    """)
    look = """
        import sympy, numpy
        print(numpy.pi > 3, sympy.Symbol('x') + sympy.cos(0), sympy.pi > 3)
    """
    assert run(look).stdout == "True x + 1 True\n"


def test_programs_are_forked_from_a_loaded_interpreter(bubblewrap):
    """What they would have to load is there before their first line (bench/sandbox.py)."""
    code = "import sys; print({'numpy', 'sympy'} <= set(sys.modules))"
    assert run(code).stdout == "True\n"


@pytest.mark.slow
def test_a_killed_template_is_replaced(any_level):
    run("print(1)")
    for child in idle_children():
        child.process.kill()
        child.process.wait()
    assert run("print(1)").stdout == "1\n"

    # Without namespaces the signal is refused.
    result = run("import os; os.kill(os.getppid(), 9)")
    assert result.returncode in (0, 1, 137)
    assert not result.timed_out
    assert run("print(1)").stdout == "1\n"


@pytest.mark.slow
def test_programs_share_no_memory_of_the_kernel(level):
    code = """
        import os, ctypes
        libc = ctypes.CDLL(None)
        print(libc.shmget(4711, 100, 0o666), libc.semget(4711, 1, 0o666), libc.msgget(4711, 0o666))
        print(os.listdir("/dev/shm") == [os.path.basename(os.getcwd())])
        libc.shmget(4711, 100, 0o1666)
        libc.semget(4711, 1, 0o1666)
        libc.msgget(4711, 0o1666)
        open("/dev/shm/left", "w").write("x")
    """
    assert run(code).stdout == "-1 -1 -1\nTrue\n"
    assert run(code).stdout == "-1 -1 -1\nTrue\n"


SPOILERS = {
    "file size": """
        import contextlib, os, resource
        with contextlib.suppress(OSError):
            resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (10, 10))
    """,
    "priority": """
        import contextlib, os
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
    """,
    "scheduler": """
        import contextlib, os
        with contextlib.suppress(OSError):
            os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))
    """,
    "folders that cannot be entered": """
        import os
        os.mkdir('a')
        os.mkdir('a/b')
        os.chmod('a', 0)
        os.chmod('.', 0)
    """,
    "a closed scratch": """
        import contextlib, os
        folder = os.getcwd()
        os.unlink('program.py')
        os.rmdir(folder)
        # Root's programs are another user, to whom the scratch does not belong.
        with contextlib.suppress(PermissionError): os.chmod('/dev/shm', 0o555)
    """,
    "attributes of the scratch": """
        import contextlib, os
        with contextlib.suppress(OSError): os.setxattr('/dev/shm', 'user.x', b'x')
    """,
    "deep folders": """
        import os
        for _ in range(2000):
            os.mkdir('deep')
            os.chdir('deep')
    """,
    "signals": """
        import os
        for n in range(1, 65):
            try: os.kill(1, n)
            except OSError: pass
    """,
}
LOOK = """
    import os, resource
    print(resource.getrlimit(resource.RLIMIT_FSIZE)[1], os.nice(0), os.sched_getscheduler(0))
    print(len(os.listdir('/dev/shm')) + len(os.listxattr('/dev/shm')))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILERS)
def test_programs_cannot_spoil_their_template(level, name):
    """It has the same user. What they can change in it must not last."""
    assert run(SPOILERS[name]).returncode == 0
    limits = f"{sandbox_child.OUTPUT_LIMIT} {os.nice(0)} 0"
    assert run(LOOK).stdout == f"{limits}\n1\n"


@pytest.mark.parametrize("name", ["file size", "priority", "scheduler"])
def test_limits_of_the_template_are_kept_without_namespaces(name, monkeypatch):
    use("limits", monkeypatch)
    look = LOOK.replace("len(os.listdir('/dev/shm')) + len(os.listxattr('/dev/shm'))", "'ok'")
    fresh = run(look).stdout
    run(SPOILERS[name])
    assert run(look).stdout == fresh
    assert fresh.endswith("ok\n")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_the_io_priority_of_the_template_is_kept(any_level):
    look = """
        import ctypes
        print(ctypes.CDLL(None).syscall(252, 1, 0))
    """
    spoil = """
        import ctypes, os
        IDLE = 3 << 13
        print(ctypes.CDLL(None).syscall(251, 1, os.getppid(), IDLE))
    """
    fresh = run(look).stdout
    assert run(spoil).stdout == "-1\n"
    assert run(look).stdout == fresh


def test_the_state_of_a_box_has_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox_child, "in_namespaces", lambda: True)
    monkeypatch.chdir(tmp_path)
    fresh = sandbox_child.box_state()
    assert sandbox_child.box_state() == fresh
    tmp_path.chmod(0o555)
    assert sandbox_child.box_state() != fresh
    tmp_path.chmod(0o700)
    assert sandbox_child.box_state() == fresh
    (tmp_path / "left").touch()
    assert sandbox_child.box_state() != fresh


@pytest.mark.parametrize("file", ["mem", "environ", "maps", "fd/0"])
def test_programs_cannot_read_their_template(level, file):
    code = f"import os; open(f'/proc/{{os.getppid()}}/{file}', 'rb')"
    assert "PermissionError" in run(code).stderr


CHANGES = [
    "os.nice(1)",
    "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))",
    "open('left', 'w').close()",
    "os.chmod('.', 0o500)",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_child_that_was_changed_knows_it(change, tmp_path):
    """Also where the kernel has no filter of system calls, and outside namespaces."""
    check = f"""
        import os, resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from lib.sandbox_child import box_state
        fresh = box_state()
        assert box_state() == fresh
        {change}
        assert box_state() != fresh
    """
    if "affinity" in change and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core")
    subprocess.run([INTERPRETER, "-c", dedent(check)], cwd=tmp_path, check=True)


def test_clean_environment(outer_level, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = """
        import os
        print(os.environ)
        if os.path.exists('/proc/self/environ'):
            print(open('/proc/self/environ').read())
    """
    out = run(code).stdout
    assert "hf_secret" not in out
    assert "'CUDA_VISIBLE_DEVICES': ''" in out
    assert "'OMP_NUM_THREADS': '1'" in out


@pytest.mark.slow
def test_concurrent_callers(outer_level):
    def call(i):
        code = "while True: pass" if i % 5 == 0 else f"print({i})"
        return run(code, timeout=1.5)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(20)))
    for i, result in enumerate(results):
        late = i % 5 == 0
        assert result.timed_out == late
        assert result.stdout == ("" if late else f"{i}\n")


@pytest.mark.parametrize(
    "end",
    [
        "import io, sys; sys.stdout = io.StringIO(); print('b')",
        "import sys; sys.stdout.flush(); sys.stdout.close()",
        "import builtins; builtins.print = None",
    ],
)
def test_what_was_printed_is_there_at_the_end(end):
    result = run_python(f"print('a')\n{end}")
    assert (result.stdout, result.returncode) == ("a\n", 0)


# ---- time and size ----

ENDLESS = [
    "while True: pass",
    "import time; time.sleep(100)",
    "import sys; sys.stdout.close()\nwhile True: pass",
    "import signal\n"
    "for s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
    "while True: pass",
]


@pytest.mark.slow
def test_time_limit(any_level):
    def call(code):
        return run_python("print('so far', flush=True)\n" + code, timeout=4)

    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, ENDLESS))
    assert results == [RunResult("so far\n", "", 128 + 9, True)] * 4
    # Far less than the hundred seconds that one of them wants to sleep.
    assert time.monotonic() - start < 30


def test_memory_limit(outer_level):
    result = run("x = bytearray(10 ** 11)")
    assert result.returncode == 1
    assert result.stderr.endswith("MemoryError\n")

    little_by_little = "x = []\nwhile True: x.append(bytes(10 ** 6))"
    assert run_python(little_by_little, memory_mb=512).stderr.endswith("MemoryError\n")


@pytest.mark.slow
def test_a_gigabyte_of_output(outer_level):
    start = time.monotonic()
    result = run("line = 'x' * 10 ** 6\nfor i in range(1000): print(line)")
    assert len(result.stdout) <= sandbox_child.OUTPUT_LIMIT
    assert result.returncode != 0
    assert time.monotonic() - start < 5

    insists = """
        import os
        while True:
            try: os.write(2, b'x' * 10 ** 6)
            except OSError: pass
    """
    result = run(insists, timeout=1)
    assert len(result.stderr) <= sandbox_child.OUTPUT_LIMIT
    assert result.timed_out

    assert run("open('big', 'wb').write(bytes(10 ** 9))").returncode == 1


@pytest.mark.slow
def test_background_processes_die_with_the_program(any_level):
    word = f"left-behind-{os.getpid()}-{any_level}"
    code = dedent(f"""
        import contextlib, os, subprocess, sys, time
        if os.fork() == 0:
            with contextlib.suppress(PermissionError): os.setsid()
            if os.fork() == 0:
                subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", "{word}"])
            os._exit(0)
        time.sleep(0.5)
        print("done", flush=True)
    """)
    start = time.monotonic()
    assert run(code).stdout == "done\n"
    # The daemon holds stdout open, which delays nothing.
    assert time.monotonic() - start < 3
    assert wait_until(lambda: not running(word))

    assert run(code + "time.sleep(60)", timeout=1.5).timed_out
    assert wait_until(lambda: not running(word))


@pytest.mark.slow
def test_programs_die_with_a_killed_child(any_level, monkeypatch):
    """The kernel kills it for want of memory, for example. A daemon of its program goes, too."""
    word = f"daemon-{os.getpid()}-{any_level}"
    code = f"""
        import contextlib, os, sys, time
        if os.fork() == 0:
            with contextlib.suppress(PermissionError): os.setsid()
            sleep = [sys.executable, '-c', 'import time; time.sleep(60)', '{word}']
            os.execv(sys.executable, sleep)
        time.sleep(60)
    """
    start = sandbox.start
    started = []

    def start_and_keep(*kind):
        started.append(start(*kind))
        return started[-1]

    monkeypatch.setattr(sandbox, "start", start_and_keep)
    monkeypatch.setattr(sandbox, "IDLE", {})
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, code, timeout=20)
        assert wait_until(lambda: running(f"sleep(60)\0{word}"), 10)
        os.killpg(started[0].process.pid, signal.SIGKILL)
        assert result.result() == KILLED
    assert wait_until(lambda: not running(f"sleep(60)\0{word}"))
    assert run("print(1)").stdout == "1\n"


@pytest.mark.slow
def test_programs_die_with_a_killed_caller(any_level):
    word = f"orphan-{os.getpid()}-{any_level}"
    # exec makes the word part of the program's own command line.
    code = f"""
        import os, sys
        sleep = [sys.executable, '-c', 'import time; time.sleep(60)', '{word}']
        os.execv(sys.executable, sleep)
    """
    call = f"""
        import sys
        from lib.sandbox import run_python
        sys.executable = {sys.executable!r}
        run_python(sys.argv[1], timeout=50, level='{any_level}')
    """
    caller = subprocess.Popen([INTERPRETER, "-c", dedent(call), dedent(code)], cwd=ROOT)
    assert wait_until(lambda: running(f"sleep(60)\0{word}"), 10)
    caller.kill()
    caller.wait()
    assert wait_until(lambda: not running(f"sleep(60)\0{word}"))


# ---- escape ----


@pytest.mark.slow
def test_fork_bomb(any_level):
    counting = """
        import os, time
        n = 0
        while n < 60:
            try: pid = os.fork()
            except OSError: break
            if pid == 0: time.sleep(60)
            n += 1
        print(n)
    """
    result = run(counting, timeout=5)
    if any_level == "limits" and os.getuid() != 0:
        # They are counted, and killed, unless they end before the first look.
        assert result == KILLED or result.stdout == "60\n"
    else:
        assert 0 < int(result.stdout) < sandbox_child.MAX_TASKS

    # The limit holds: now a real one.
    bomb = """
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """
    start = time.monotonic()
    assert run(bomb, timeout=1).returncode == 137
    assert time.monotonic() - start < 5
    assert run("print(1)").stdout == "1\n"


# A shell, each of whose processes starts the next one and ends: none lives for a millisecond.
CHAIN = """
    import os, subprocess, time
    os.environ["PATH"] = "/usr/bin:/bin"
    again = "f() { f & }; f # true WORD"
    subprocess.Popen(["sh", "-c", again])
    if LEAVES: os._exit(0)
    time.sleep(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [True, False])
def test_a_chain_of_processes_is_caught(any_level, leaves):
    code = CHAIN.replace("WORD", "chain").replace("LEAVES", str(leaves))
    start = time.monotonic()
    assert run(code, timeout=3).returncode == 0
    assert time.monotonic() - start < 4
    for _ in range(50):
        assert not running("true chain")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_fork_that_fails_is_no_bug_of_ours(monkeypatch, tmp_path, number):
    """The machine has no memory, or no process, left: serve reports it to the caller as that."""

    def fail():
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fork", fail)
    with pytest.raises(MemoryError):
        sandbox_child.execute("print(1)", "", "", 1, 1024, False)
    assert os.listdir(tmp_path) == []


def landlock_version():
    """The version of Landlock in this kernel; -1 if there is none."""
    return sandbox_child.system_call(444, None, 0, 1)


needs_landlock = pytest.mark.skipif(
    landlock_version() < 2, reason="this kernel has no Landlock, or an old one"
)


@needs_landlock
def test_outside_files_cannot_be_read_or_written(any_level, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    home = os.path.expanduser("~/.bashrc")
    for path in secret, "/etc/passwd", home, __file__, "/dev/sda", "/dev/vda":
        assert run(f"print(open({str(path)!r}).read())").returncode == 1

    name = f"new-{os.getpid()}"
    modules = [os.__file__, json.__file__ + "x", pytest.__file__, sandbox_child.__file__]
    for path in [tmp_path / "new", f"/tmp/{name}", f"/{name}", f"/dev/{name}", *modules]:
        assert run(f"open({str(path)!r}, 'a')").returncode == 1
    assert os.listdir(tmp_path) == ["secret"]
    assert not os.path.exists(f"/tmp/{name}")

    if any_level == "bubblewrap":
        upwards = "import os\nfor up in range(20): os.chdir('..')\nprint(os.listdir())"
        assert "'sys'" not in run(upwards).stdout


def test_mounts_cannot_be_undone(bubblewrap):
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print([libc.umount2(p, 2) for p in (b"/proc", b"/scratch", b"/")])
        print(libc.chroot(b"/scratch"), libc.mount(b"x", b"/scratch", b"tmpfs", 0, None))
        libc.unshare(0x10020000)
        print([libc.umount2(p, 2) for p in (b"/proc", b"/", b"/dev")])
        print([p for p in os.listdir("/proc") if p.isdigit()] == ["1", str(os.getpid())])
    """
    assert run(code).stdout.splitlines() == ["[-1, -1, -1]", "-1 -1", "[-1, -1, -1]", "True"]


def test_files_can_be_moved_between_folders(outer_level):
    code = """
        import os
        os.mkdir("a")
        os.mkdir("b")
        open("a/x", "w").close()
        os.rename("a/x", "b/x")
        os.link("b/x", "a/y")
        print(os.listdir("a"), os.listdir("b"))
    """
    assert run(code).stdout == "['y'] ['x']\n"


@pytest.mark.slow
def test_keys_of_the_callers_session_cannot_be_read(any_level):
    search = """
        import ctypes
        SESSION = ctypes.c_int(-3)
        print(ctypes.CDLL(None).syscall(250, 10, SESSION, b"user", b"token", 0))
    """
    # The caller is a process of its own: its session gets a key.
    call = f"""
        import ctypes, os, sys
        from lib.sandbox import run_python
        system_call = ctypes.CDLL(None).syscall
        system_call(250, 1, None)
        if os.uname().machine != "x86_64": sys.exit()
        if system_call(248, b"user", b"token", b"secret", 6, ctypes.c_int(-3)) < 0: sys.exit()
        exec(sys.argv[1])
        sys.executable = {sys.executable!r}
        print(run_python(sys.argv[1], level="{any_level}").stdout)
    """
    command = [INTERPRETER, "-c", dedent(call), dedent(search)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this kernel lets us make no keys")
    callers, programs = done.stdout.split()
    assert int(callers) > 0
    assert programs == "-1"


needs_seccomp = pytest.mark.skipif(
    os.uname().machine != "x86_64" or not os.path.exists("/proc/sys/kernel/seccomp"),
    reason="no seccomp, or the numbers are others",
)
EPERM = errno.EPERM
ENOSYS = errno.ENOSYS
# What is refused to programs: the number of a system call, its arguments, and the error. The
# numbers are those of Linux's own table (arch/x86/entry/syscalls/syscall_64.tbl).
REFUSED = {
    "user namespace": ([272, 0x10000000], EPERM),
    "clone into one": ([56, 0x10000011, 0, 0, 0, 0], EPERM),
    "clone3": ([435, 0, 0], ENOSYS),
    "setns": ([308, 0, 0], EPERM),
    "mount": ([165, 0, 0, 0, 0, 0], EPERM),
    "detached mount": ([430, b"tmpfs", 0], EPERM),
    "fsmount": ([432, 0, 0, 0], EPERM),
    "move_mount": ([429, 0, 0, 0, 0, 0], EPERM),
    "open_tree": ([428, 0, 0, 0], EPERM),
    "chroot": ([161, b"/"], EPERM),
    "keyctl": ([250, 0, -4, 0], EPERM),
    "add_key": ([248, b"user", b"x", b"y", 1, -4], EPERM),
    "request_key": ([249, b"user", b"x", 0, -4], EPERM),
    "bpf": ([321, 0, 0, 0], EPERM),
    "perf": ([298, 0, 0, -1, -1, 0], EPERM),
    "userfaultfd": ([323, 0], EPERM),
    "ptrace": ([101, 0, 0, 0, 0], EPERM),
    "memory of others": ([310, 1, 0, 0, 0, 0, 0], EPERM),
    "pidfd_open": ([434, 1, 0], EPERM),
    "limits of others": ([302, 1, 1, 0, 0], EPERM),
    "priority of others": ([141, 0, 1, 19], EPERM),
    "priority of a group": ([141, 1, 0, 19], EPERM),
    "scheduler of others": ([144, 1, 0, 0], EPERM),
    "cores of others": ([203, 1, 0, 0], EPERM),
    "owner of signals": ([72, 0, 8, 1], EPERM),
    "terminal": ([16, 0, 0x5412, 0], EPERM),
    "io_uring": ([425, 1, 0], ENOSYS),
    "memfd": ([319, b"x", 0], ENOSYS),
    "shared memory": ([29, 0, 4096, 0o1600], ENOSYS),
    "queue": ([68, 0, 0o1600], ENOSYS),
    "attributes": ([188, b".", b"user.x", b"y", 1, 0], errno.EOPNOTSUPP),
    "packet socket": ([41, 17, 3, 0], errno.EAFNOSUPPORT),
    "socket of virtual machines": ([41, 40, 1, 0], errno.EAFNOSUPPORT),
    "network socket": ([41, 2, 1, 0], errno.EAFNOSUPPORT),
    "pair of network sockets": ([53, 2, 1, 0, 0], errno.EAFNOSUPPORT),
    "pair of packet sockets": ([53, 17, 3, 0, 0], errno.EAFNOSUPPORT),
    "numbers of 32-bit programs": ([0x40000000 + 39], ENOSYS),
}


@needs_seccomp
def test_system_calls_that_no_answer_needs_are_refused(any_level):
    code = f"""
        import ctypes
        call = ctypes.CDLL(None, use_errno=True).syscall
        for name, (arguments, error) in {REFUSED!r}.items():
            found = call(*arguments)
            if (found, ctypes.get_errno()) != (-1, error):
                print(name, found, ctypes.get_errno())
        print("done")
    """
    assert run(code).stdout == "done\n"


def test_a_machine_whose_system_calls_we_do_not_know(monkeypatch):
    monkeypatch.setattr(sandbox_child, "MACHINES", {})
    assert not sandbox_child.limit_system_calls("limits")
    # Nothing to protect with, and no exception.
    sandbox_child.protect_processes([os.getpid()])


@needs_seccomp
def test_what_programs_need_is_not_refused(any_level):
    """Own limits and priority, threads, processes, pipes, signals to them, copies of files."""
    # Without namespaces an ordinary user's programs stay in one group, so that all can be killed.
    may_leave = any_level != "limits" or os.getuid() == 0
    code = f"""
        import asyncio, concurrent.futures, os, resource, shutil, signal, socket, subprocess, sys
        resource.setrlimit(resource.RLIMIT_CPU, (2, 3))
        os.nice(1)
        os.sched_setaffinity(0, os.sched_getaffinity(0))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            print(list(pool.map(abs, [1, -2])))
        print(subprocess.check_output([sys.executable, "-c", "print(3)"]).decode().strip())
        sleeping = subprocess.Popen(["sleep", "9"], start_new_session={may_leave})
        os.kill(-sleeping.pid if {may_leave} else sleeping.pid, signal.SIGTERM)
        print(sleeping.wait())
        a, b = socket.socketpair()
        a.send(b"4")
        print(b.recv(9))
        shutil.copy2("program.py", "copy.py")
        async def say():
            process = await asyncio.create_subprocess_exec("true")
            print(await process.wait())
        asyncio.run(say())
    """
    wanted = ["[1, 2]", "3", "-15", "b'4'", "0"]
    result = run(code)
    assert result.stdout.splitlines() == wanted, result.stderr


@needs_seccomp
def test_the_child_and_the_caller_cannot_be_stopped(monkeypatch):
    """Without namespaces the kernel lets a user's processes signal each other."""
    use("limits", monkeypatch)
    code = f"""
        import ctypes, os, signal
        call = ctypes.CDLL(None).syscall
        found = []
        for pid in (os.getppid(), {os.getpid()}, -1, -os.getppid(), -os.getpgid({os.getpid()})):
            for system_call in (62, 129):
                found.append(call(system_call, pid, int(signal.SIGSTOP), 0))
        for pid in (os.getppid(), {os.getpid()}):
            found.append(call(234, pid, pid, int(signal.SIGSTOP)))
            found.append(call(200, pid, int(signal.SIGSTOP)))
        print(set(found))
    """
    start = time.monotonic()
    assert run(code).stdout == "{-1}\n"
    assert run("print(1)").stdout == "1\n"
    assert time.monotonic() - start < 5


MANY = """
    import os, threading, time
    pages = bytearray(b"1") * (SHARED << 20)
    for _ in range(PROCESSES):
        if os.fork() == 0:
            own = bytearray(b"1") * (EACH << 20)
            time.sleep(TIME)
            os._exit(0)
    time.sleep(TIME)
    print("done")
"""


def many(**values):
    code = MANY
    for name, value in values.items():
        code = code.replace(name, str(value))
    return code


@pytest.mark.slow
def test_memory_of_all_processes_together(any_level):
    """Each may have the limit, all together as well; a page that several share counts once."""
    hoard = many(SHARED=1, PROCESSES=4, EACH=150, TIME=20)
    start = time.monotonic()
    assert run(hoard, memory_mb=300) == KILLED
    assert time.monotonic() - start < 8

    shared = many(SHARED=150, PROCESSES=4, EACH=1, TIME=0.4)
    assert run(shared, memory_mb=300).stdout == "done\n"


@pytest.mark.slow
def test_memory_of_a_process_without_its_first_thread(outer_level):
    """Then /proc shows none."""
    code = """
        import ctypes, os, threading, time
        def hold():
            own = bytearray(b"1") * (150 << 20)
            time.sleep(20)
        for _ in range(4):
            if os.fork() == 0:
                threading.Thread(target=hold).start()
                ctypes.CDLL(None).pthread_exit(None)
        time.sleep(20)
    """
    assert run(code, memory_mb=512) == KILLED


@pytest.mark.slow
def test_input_that_does_not_fit_is_said(level):
    """In a box its files are in 64 MB of memory."""
    with pytest.warns(UserWarning, match="does not fit"):
        result = run("print(len(input()))", "x" * (70 << 20))
    assert result == RunResult("", sandbox_child.TOO_LONG, 1, False)
    assert run("print(len(input()))", "x" * (7 << 20)).stdout == f"{7 << 20}\n"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["deep folders", "folders that cannot be entered"])
def test_no_folder_stays_on_the_disk(folder, monkeypatch):
    use("limits", monkeypatch)
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None) as parent:
        os.chmod(parent, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", parent)
        monkeypatch.setattr(sandbox, "IDLE", {})
        run(SPOILERS[folder])
        (child,) = idle_children()
        assert os.listdir(parent) == [os.path.basename(child.about["folder"])]
        child.pipe.close()
        child.process.wait()
        assert os.listdir(parent) == []


def test_programs_are_killed_first_when_memory_is_short(any_level):
    assert run("print(open('/proc/self/oom_score_adj').read())").stdout.strip() == "1000"


def test_no_network(any_level):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in ("127.0.0.1", port), ("1.1.1.1", 53):
            code = f"import socket; socket.create_connection({address!r}, 2)"
            assert run(code).returncode == 1

    name = f"\0grader-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        assert run_python(code).returncode == 1


def test_other_processes_cannot_be_seen_or_killed(level):
    assert run("import os; print(os.getppid())").stdout == "1\n"
    list_all = """
        import os
        for pid in os.listdir('/proc'):
            if pid.isdigit(): print(open(f'/proc/{pid}/cmdline').read())
    """
    seen = run(list_all).stdout
    assert "sandbox_child.py" in seen
    assert "pytest" not in seen

    kill_all = f"""
        import os, signal
        for pid in ({os.getpid()}, {os.getppid()}, *range(2, 5000), -1):
            try:
                if pid != os.getpid(): os.kill(pid, 9)
            except OSError: pass
    """
    assert run(kill_all).returncode in (0, 137)
    kill_parent = "import os; os.kill(os.getppid(), 9); os.killpg(0, 9)"
    assert run(kill_parent).timed_out is False
    assert run("print(1)").stdout == "1\n"


def test_the_parents_environment_cannot_be_read(level):
    # This process has the secret in /proc, as callers have.
    environment = dict(os.environ, HF_TOKEN="hf_secret")
    other = subprocess.Popen(["sleep", "20"], env=environment)
    shown = pathlib.Path(f"/proc/{other.pid}/environ")
    assert wait_until(lambda: "hf_secret" in shown.read_text())
    read_all = """
        import os
        for pid in os.listdir('/proc'):
            try: print(open(f'/proc/{pid}/environ').read())
            except OSError: pass
    """
    out = run(read_all).stdout
    other.kill()
    other.wait()
    assert "PYTHONUTF8" in out
    assert "hf_secret" not in out


def test_no_descriptors_and_no_privileges(level):
    descriptors = """
        import os
        for fd in range(3, 2000):
            try:
                os.fstat(fd)
                print(fd)
            except OSError: pass
    """
    assert run(descriptors).stdout == ""

    other_user = 0 if os.getuid() == 0 else 1
    assert run(f"import os; os.setuid({other_user})").returncode == 1

    status = run("print(open('/proc/self/status').read())").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_what_is_left_open_is_said(monkeypatch):
    described = {}
    for level in LEVELS:
        use(level, monkeypatch)
        run("print(1)")
        described[level] = sandbox.describe_isolation()
        assert described[level].startswith(level)
        monkeypatch.setitem(sandbox.LEFT_OPEN, level, ["files", "system calls"])
        assert "Landlock" in sandbox.describe_isolation()
        assert "seccomp" in sandbox.describe_isolation()
    assert "disk" in described["limits"]
    assert "read this machine's files" in sandbox.describe_isolation()


def test_required(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIME_SANDBOX", "auto")
    sandbox.isolation.cache_clear()
    try:
        assert sandbox.isolation() == LEVELS[0]

        # No bubblewrap, nor anything else: its command is looked for in an empty folder.
        monkeypatch.setitem(sandbox.ENVIRONMENT, "PATH", str(tmp_path))
        monkeypatch.setattr(sandbox, "IDLE", {})
        sandbox.isolation.cache_clear()
        with pytest.raises(RuntimeError, match="required"):
            sandbox.isolation("required")

        # Not even an interpreter.
        monkeypatch.setattr(sys, "executable", "/no/interpreter")
        with pytest.raises(RuntimeError, match="auto"):
            sandbox.isolation()
    finally:
        monkeypatch.undo()
        sandbox.isolation.cache_clear()


# ---- children ----


@pytest.fixture
def echo(tmp_path):
    """A file that a child can run: it returns a value, or fails in the way that it is told."""
    file = tmp_path / "echo.py"
    program = f"""
        import os, struct, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from lib.sandbox_child import serve

        def answer(what, value):
            if what == "die": os._exit(1)
            if what == "sleep": time.sleep(value)
            if what == "half":
                os.write(0, struct.pack("!i", 10) + b"half")
                time.sleep(60)
            if what == "fail": raise ValueError(value)
            if what == "eat": raise MemoryError
            return value

        serve(answer)
    """
    file.write_text(dedent(program))
    return str(file)


def test_a_child_answers_dies_or_is_late(echo):
    idle = []
    assert sandbox.ask(idle, echo, None, 9, ["say", [1, "a"]]) == [1, "a"]
    (child,) = idle

    # A bug, or too little memory, does not cost the child.
    with pytest.raises(sandbox.GraderError, match="ValueError: nonsense"):
        sandbox.ask(idle, echo, None, 9, ["fail", "nonsense"])
    with pytest.raises(sandbox.ChildDied):
        sandbox.ask(idle, echo, None, 9, ["eat", None])
    assert idle == [child]

    with pytest.raises(sandbox.ChildDied):
        sandbox.ask(idle, echo, None, 9, ["die", None])
    assert idle == []
    assert child.process.poll() is not None

    start = time.monotonic()
    with pytest.raises(sandbox.ChildTimeout):
        sandbox.ask(idle, echo, None, 0.2, ["sleep", 60])
    assert time.monotonic() - start < 5
    assert idle == []
    assert sandbox.ask(idle, echo, None, 9, ["say", "again"]) == "again"


@pytest.mark.slow
def test_a_child_that_takes_no_message_is_replaced(echo, monkeypatch):
    monkeypatch.setattr(sandbox, "SEND_SECONDS", 1)
    idle = []
    sandbox.ask(idle, echo, None, 9, ["say", 1])
    os.kill(idle[0].process.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(sandbox.ChildDied):
        sandbox.ask(idle, echo, None, 9, ["say", "x" * 10**7])
    assert time.monotonic() - start < 5
    assert sandbox.ask(idle, echo, None, 9, ["say", 2]) == 2


@pytest.mark.slow
def test_a_child_that_stops_in_the_middle_of_its_reply_is_late(echo, monkeypatch):
    monkeypatch.setattr(sandbox, "RECEIVE_SECONDS", 1)
    idle = []
    start = time.monotonic()
    with pytest.raises(sandbox.ChildTimeout):
        sandbox.ask(idle, echo, None, 90, ["half", None])
    # It did not have the program's 90 seconds; to start a child takes a while on a busy machine.
    assert time.monotonic() - start < 60
    assert idle == []

    # The limit is not one for the program: its time is the caller's.
    assert sandbox.ask(idle, echo, None, 9, ["sleep", 1.5]) == 1.5


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Programs that are not run but written down: a function that tells how often each was."""
    log = tmp_path / "log"
    file = tmp_path / "counts.py"
    program = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from lib.sandbox_child import serve

        def answer(code, *others):
            with open({str(log)!r}, "a") as log:
                log.write(code + ";")
            if code == "stop": time.sleep(60)
            if code == "die late": time.sleep(1.5)
            if code.startswith("die"): os._exit(1)
            if code == "eat": raise MemoryError
            return [code, "", 0, False, ""]

        serve(answer)
    """
    file.write_text(dedent(program))
    monkeypatch.setattr(sandbox, "CHILD_FILE", str(file))
    monkeypatch.setattr(sandbox, "IDLE", {})
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0)
    monkeypatch.setattr(sandbox, "AT_ONCE_SECONDS", 1)
    return lambda code: log.read_text().split(";").count(code)


@pytest.mark.slow
@pytest.mark.parametrize("is_idle", [True, False])
@pytest.mark.parametrize(
    "code, wanted",
    [("stop", KILLED._replace(timed_out=True)), ("die late", KILLED), ("eat", KILLED)],
)
def test_no_program_runs_twice(counted, is_idle, code, wanted):
    if is_idle:
        assert run_python("say", level="limits") == RunResult("say", "", 0, False)
    assert run_python(code, timeout=3, level="limits") == wanted
    assert counted(code) == 1


def test_an_idle_child_that_dies_at_once_is_replaced_once(counted):
    assert run_python("die", level="limits") == KILLED
    assert counted("die") == 1
    run_python("say", level="limits")
    assert run_python("die", level="limits") == KILLED
    assert counted("die") == 3


def test_a_child_that_does_not_start_costs_one_item(echo, tmp_path, monkeypatch):
    """It is killed, or slow, twice in a row. If that goes on, or has always been so, it is said."""
    file = tmp_path / "starts_sometimes.py"
    broken = tmp_path / "broken"
    content = f"""
        import os, runpy, time
        if os.path.exists("{broken}"):
            time.sleep(float(open("{broken}").read()))
            os._exit(1)
        runpy.run_path({echo!r})
    """
    file.write_text(dedent(content))
    broken.write_text("0")
    with pytest.raises(sandbox.GraderError):
        sandbox.ask([], str(file), None, 9, ["say", 1])
    broken.unlink()
    assert sandbox.ask([], str(file), None, 9, ["say", 1]) == 1

    broken.write_text("0")
    with pytest.raises(sandbox.ChildDied):
        sandbox.ask([], str(file), None, 9, ["say", 2])
    broken.write_text("60")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "START_SECONDS", 0.2)
        with pytest.raises(sandbox.ChildDied):
            sandbox.ask([], str(file), None, 9, ["say", 2])
    broken.unlink()
    assert sandbox.ask([], str(file), None, 9, ["say", 3]) == 3

    broken.write_text("0")
    with pytest.raises(sandbox.ChildDied):
        sandbox.ask([], str(file), None, 9, ["say", 4])
    monkeypatch.setattr(sandbox, "NO_START_SECONDS", 0)
    with pytest.raises(sandbox.GraderError):
        sandbox.ask([], str(file), None, 9, ["say", 4])


def test_a_child_that_dies_while_it_starts_gets_a_second_chance(echo, tmp_path):
    file = tmp_path / "dies_once.py"
    first = f"""
        import os, runpy
        if not os.path.exists("{tmp_path}/started"):
            os.mkdir("{tmp_path}/started")
            os._exit(1)
        runpy.run_path({echo!r})
    """
    file.write_text(dedent(first))
    assert sandbox.ask([], str(file), None, 9, ["say", 3]) == 3


# ---- code rewards ----


def block(code):
    """A response whose last python block is this code, which may be indented."""
    return f"Some words.\n```python\n{dedent(code)}\n```\n"


# The last one is wrong on purpose.
IO = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "0 0\n"], "outputs": ["3\n", "7\n", "11\n", "1\n"]}
ADD = "a, b = map(int, input().split())\nprint(a + b)"
ADD_FUNCTION = block("def add(a, b): return a + b")
SQUARE = block("def f(x): return x * x")


def test_stdin_shares():
    assert grader.grade_code(block(ADD), IO) == 0.75
    assert grader.grade_code(block(ADD), json.dumps(IO)) == 0.75
    assert grader.grade_code(block("print(3)"), IO) == 0.25
    assert grader.grade_code(block("print(3); 1/0"), IO) == 0.0
    assert grader.grade_code("no block, print(3)", IO) == 0.0

    # The last block counts; it may be cut off after the program.
    assert grader.grade_code(block("print(3)") + block(ADD), IO) == 0.75
    assert grader.grade_code("```python\n" + ADD, IO) == 0.75

    body = ADD.replace("\n", "\n    ")
    main = f"from __future__ import annotations\nif __name__ == '__main__':\n    {body}"
    assert grader.grade_code(block(main), IO) == 0.75


@pytest.mark.parametrize(
    "got, wanted, same",
    [
        ("1 2 \n\n3\n\n", "1 2\n3", True),
        ("1  2", "1 2", True),
        ("1 2", "1\n2", False),
        ("yes", "YES", False),
        ("", "1", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.33333333333", False),
        ("3.0", "3", True),
        ("3.00001", "3", False),
        ("100001", "100000", False),
        ("1e5", "100000", True),
        ("nan", "1", False),
        ("9" * 5000, "8" * 5000, False),
        ("12345678901234567891", "12345678901234567890", False),
        ("inf", "1" * 400, False),
    ],
)
def test_stdout_comparison(got, wanted, same):
    tests = {"inputs": [""], "outputs": [wanted]}
    assert grader.grade_code(block(f"print({got!r})"), tests) == same


def grade_call(code, name, given, wanted):
    """The score of a program by one call of a function."""
    tests = {"fn_name": name, "inputs": [given], "outputs": [wanted]}
    return grader.grade_code(block(code), tests)


def test_call_based_shares():
    tests = {"fn_name": "add", "inputs": [[1, 2], [3, 4], ["a", "b"]], "outputs": [[3], 7, "ba"]}
    assert grader.grade_code(ADD_FUNCTION, tests) == pytest.approx(2 / 3)
    method = """
        class Solution:
            def add(self, a: List[int], b) -> Optional[int]:
                print('noise')
                return a + b
    """
    assert grader.grade_code(block(method), tests) == pytest.approx(2 / 3)
    assert grader.grade_code(block("def sub(a, b): return a + b"), tests) == 0.0

    # A set is no list; a tuple is one.
    with_set = "def f(x): return (x, {1: [x * 0.1]}, {x})"
    assert grade_call(with_set, "f", "3", [3, {"1": [0.3]}, [3]]) == 0.0
    without = "def f(x): return (x, {1: [x * 0.1]})"
    assert grade_call(without, "f", "3", [3, {"1": [0.3]}]) == 1.0
    array = "import numpy as np\ndef f(x): return np.array(x).sum()"
    assert grade_call(array, "f", [[1, 2]], 3) == 1.0

    # Arguments and values as texts.
    inputs = ["1\n2\n\n", "[1]\n[2]", '"a"\n"b\u2028"', "no JSON"]
    texts = {"fn_name": "add", "inputs": inputs, "outputs": ["3", "[1, 2]", "ab\u2028", "1"]}
    assert grader.grade_code(ADD_FUNCTION, texts) == 0.75


def test_assert_shares():
    tests = [
        "assert f(2) == 4",
        "assert f(3) == 9",
        "assert f(0) == 1",
        "import math\nassert math.isclose(f(1.5), 2.25)",
    ]
    assert grader.grade_code(SQUARE, tests) == 0.75
    assert grader.grade_code(block("def f(x): return 4"), tests) == 0.25

    program = """
        def check(candidate):
            for i in range(50):
                assert candidate(i) == i * i
            assert candidate(candidate(2)) == 16
        check(f)
    """
    assert grader.grade_code(SQUARE, [dedent(program)]) == 1.0
    late_mistake = block("def f(x): return x * x if x < 49 else 0")
    assert grader.grade_code(late_mistake, [dedent(program)]) == 0.0

    objects = """
        class Pair:
            def __init__(self, a): self.a = a
            def get(self): return self.a
        def f(p): return p.a
    """
    tests = ["p = Pair(3)\nassert f(p) == 3 and p.get() == 3", "assert f(Pair(4)) == 3"]
    assert grader.grade_code(block(objects), tests) == 0.5

    builtin = block("def sum(a, b): return a - b")
    assert grader.grade_code(builtin, ["assert sum(5, 2) == 3"]) == 1.0


@pytest.mark.parametrize(
    "tests", [{"inputs": [], "outputs": []}, [], {"inputs": ["1"], "outputs": []}, "nonsense", "3"]
)
def test_malformed_tests_are_an_error(tests):
    with pytest.raises((ValueError, TypeError)):
        grader.grade_code(block("print(1)"), tests)


@pytest.mark.parametrize("empty", ["", " \n", "# nothing", "\n  # assert f(2) == 4\n"])
def test_a_test_without_code_is_an_error(empty):
    """Every program would pass it."""
    for tests in [[empty], ["assert f(2) == 4", empty]]:
        with pytest.raises(ValueError, match="no tests"):
            grader.grade_code(SQUARE, tests)
        with pytest.raises(ValueError, match="no tests"):
            grader.grade_code(SQUARE, json.dumps(tests))
    assert grader.grade_code(SQUARE, ["# two\nassert f(2) == 4"]) == 1.0


@pytest.mark.slow
def test_gives_up_and_time_limit_per_test():
    run("print(1)")
    tests = {"inputs": [str(i) for i in range(100)], "outputs": ["x"] * 100}
    start = time.monotonic()
    assert grader.grade_code(block("while True: pass"), tests, timeout=0.3) == 0.0
    assert time.monotonic() - start < 5

    slow_once = block("n = int(input())\nwhile n == 1: pass\nprint(n)")
    tests = {"inputs": ["0", "1", "2"], "outputs": ["0", "1", "2"]}
    assert grader.grade_code(slow_once, tests, timeout=1) == pytest.approx(2 / 3)


CHEATS = {
    "exits early": """
        import os, sys
        print('passed', 'ok', 1)
        sys.stdout.flush()
        os._exit(0)
    """,
    "exits politely": """
        import sys
        print('passed')
        sys.exit(0)
    """,
    "equals everything": """
        class E:
            __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda s, o: True
            __ne__ = lambda s, o: False
            __repr__ = lambda s: '4'
            __sub__ = __rsub__ = __abs__ = lambda *a: E()
            __hash__ = lambda s: 0
        def f(*a): return E()
    """,
    "subclass of int": """
        class E(int):
            __eq__ = lambda s, o: True
            __repr__ = lambda s: '4'
            __hash__ = lambda s: 0
        def f(*a): return E(-1)
    """,
    "patches builtins": """
        import builtins
        builtins.print = lambda *a, **k: None
        builtins.AssertionError = Warning
        builtins.abs = builtins.set = lambda *a: True
        builtins.repr = builtins.isinstance = builtins.eval = lambda *a: True
        def f(*a): return None
    """,
    "redefines set": """
        def set(*a): return 0
        def abs(*a): return 0
        def f(*a): return [1]
    """,
    "searches memory": r"""
        import gc, sys, re
        def f(*a):
            frame = sys._getframe()
            while frame:
                m = re.search(r'== *(\d+)', str(frame.f_locals) + str(frame.f_globals))
                if m: return int(m[1])
                frame = frame.f_back
    """,
    "searches files": r"""
        import os, glob, re
        def f(*a):
            for p in glob.glob('/scratch/*') + glob.glob('/tmp/**'):
                try:
                    m = re.search(r'f\(2\) == *(\d+)', open(p).read())
                    if m: return int(m[1])
                except OSError: pass
    """,
    "prints marks": """
        import sys, re
        for v in list(sys.modules['__main__'].__dict__.values()): print(v)
        print('passed', '[]')
        def f(*a): return []
    """,
    "raises": """
        raise AssertionError
    """,
    "raises more than a file holds": """
        def f(*a): raise ValueError('x' * 10 ** 7)
    """,
    "looks up more than a file holds": """
        def f(*a): return {}['x' * 10 ** 7]
    """,
    "fills the scratch": """
        def f(*a):
            for n in range(9): open(str(n), 'wb').write(bytes(8 << 20))
    """,
    "takes its test's files away": """
        import os, resource
        def f(*a): resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))
    """,
    "walks frames": """
        import sys
        def f(*a):
            frame = sys._getframe(1)
            while frame:
                found = [c for c in frame.f_code.co_consts if type(c) is int and c > 99]
                if found: return found[0]
                frame = frame.f_back
    """,
    "inspects the stack": """
        import inspect, re
        def f(*a):
            for info in inspect.stack()[1:]:
                frame = info.frame
                for value in [*frame.f_locals.values(), *frame.f_code.co_consts]:
                    if value in (1234, '1234'): return 1234
    """,
    "asks the collector": """
        import gc, types
        def f(*a):
            for x in gc.get_objects():
                if isinstance(x, types.FunctionType) and x.__name__ == 'check':
                    return max(c for c in x.__code__.co_consts if type(c) is int)
    """,
    "reads its memory": r"""
        import re
        def f(*a):
            with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
                for line in maps:
                    start, end = (int(x, 16) for x in line.split()[0].split('-'))
                    try:
                        memory.seek(start)
                        text = memory.read(end - start)
                        found = re.search(rb'f\(2\)\)? == (?:exactly\()?(\d+)', text)
                    except (OSError, ValueError, OverflowError): continue
                    if found: return int(found[1])
    """,
    "kills its parent": """
        import os
        def f(*a): os.kill(os.getppid(), 9)
    """,
    "forges an exit": """
        import os, struct
        def f(*a):
            for text in b'{"SystemExit": 0}', b'{"Remote": "0]; exit()"}', b'[' * 10 ** 5, b'{}':
                for fd in 3, 4, 5:
                    try: os.write(fd, struct.pack('!i', len(text)) + text)
                    except OSError: pass
            return 0
    """,
    "exits when called": """
        def f(*a): raise SystemExit(0)
    """,
    "defines what tests use": """
        class same: __new__ = lambda *a: True
        class json: loads = dumps = lambda *a: 1234
        class math: isclose = lambda *a: True
        def f(*a): return 7
        same = lambda *a: True
        abs = lambda *a: 0
        set = lambda *a: 0
        defined = {'f': lambda *a: 1234}
    """,
}
CHEATED_ASSERTIONS = [
    "assert f(2) == 1234",
    "assert set(f(2)) == set([7, 8])",
    "assert abs(f(2) - 77) < 1e-3",
]
CHEATED_PROGRAM = (
    "def check(candidate):\n    assert candidate(2) == 1234\n    assert True\ncheck(f)"
)


# These three handle tens of megabytes.
LARGE = ["reads its memory", "raises more than a file holds", "looks up more than a file holds"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in CHEATS],
)
def test_cheats_score_nothing(name):
    cheat = block(CHEATS[name])
    assert grader.grade_code(cheat, CHEATED_ASSERTIONS) == 0.0
    assert grader.grade_code(cheat, [CHEATED_PROGRAM]) == 0.0
    call = {"fn_name": "f", "inputs": [[2]], "outputs": [1234]}
    assert grader.grade_code(cheat, call) == 0.0
    assert grader.grade_code(cheat + "\n", {"inputs": ["2\n"], "outputs": ["1234\n"]}) == 0.0


ENDS = {
    "more than a file holds": "def f(x): raise ValueError('x' * 10 ** 7)",
    "a full scratch": """
        def f(x):
            for n in range(9): open(str(n), 'wb').write(bytes(8 << 20))
    """,
    "no file size": """
        import os, resource
        def f(x): resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))
    """,
    "an exit": """
        import os
        def f(x): os._exit(0)
    """,
    "an exit at the end": """
        import atexit, os
        atexit.register(os._exit, 0)
        def f(x): raise SystemExit(0)
    """,
    "a thread": """
        import os, threading
        def f(x): threading.Thread(target=os._exit, args=[0]).start()
    """,
    "an exception of its own kind": "def f(x): raise type('E', (BaseException,), {})()",
    "an exception that exits": """
        class E(Exception):
            def __str__(self): raise SystemExit(0)
        def f(x): raise E
    """,
    "a deleted object": """
        import sys
        class E:
            def __del__(self): sys.exit(0)
        def f(x): return [E()] and None
    """,
    "signals": """
        import os
        def f(x):
            for number in (1, 2, 10, 12, 13, 14, 15, 24, 25): os.kill(os.getppid(), number)
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_only_a_test_itself_says_that_it_is_passed(any_level, end):
    tests = ["assert f(2) == 4", "x = f(2)\nassert x == 4, x"]
    assert grader.grade_code(block(ENDS[end]), tests, timeout=3) == 0.0
    assert grader.grade_code(block("def f(x): return x * x"), tests) == 1.0


@pytest.mark.parametrize(
    "test", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"]
)
def test_a_test_that_ends_early_is_not_passed(outer_level, test):
    """Not even by its own will: the rest of it was not run."""
    assert grader.grade_code(SQUARE, [f"{test}\nassert f(2) == 5"]) == 0.0


def test_a_return_code_alone_passes_no_test(counted):
    """A child that a program has taken over can send this; it has never held the token."""
    assert run_python("say", level="limits", test="assert f(2) == 4").returncode == 1


EVALUATED = [
    "__import__('os')._exit(0)",
    "exit()",
    "type('E', (), dict(__eq__=lambda s, o: True))()",
    "(lambda: 4)()",
    "[].__class__",
    "f(2)",
]


@pytest.mark.parametrize("text", EVALUATED)
def test_a_test_that_evaluates_what_a_program_returns(text):
    """It is code of the program, in the process of the test."""
    code = block(f"def f(x): return {text!r}")
    assert grader.grade_code(code, ["assert eval(f(2)) == 4"]) == 0.0


def test_honest_evaluations():
    code = block("def f(x): return '(2 + 2) * 1 == 4 and [1, {2: 3}]'\ndef g(x): return x")
    tests = ["assert eval(f(2)) == [1, {2: 3}]", "g(1)\nassert eval('g(4) == 4')"]
    assert grader.grade_code(code, tests) == 1.0


def test_tests_have_their_own_prelude():
    """A program that defines isclose, or sqrt, does not choose what its test means by it."""
    tests = ["assert isclose(f(2), sqrt(2))", "for k in range(3): assert f(k) == sqrt(k)"]
    honest = block("def f(x): return math.sqrt(x)")
    assert grader.grade_code(honest, tests) == 1.0
    cheat = "isclose = lambda *a: True\ndef sqrt(x): return 7\ndef f(x): return 7"
    assert grader.grade_code(block(cheat), tests) == 0.0


@pytest.mark.parametrize(
    "test, wanted",
    [
        ("x = f(1)\nassert isclose(x, 2)", "f x"),
        ("for f in [f, g]: assert f(1)", "f g"),
        ("assert set(f(1)) == {2}", "f"),
        ("assert comb(5, 2) == 10", "comb"),
        ("x = comb(5, 2)\nassert x == 10", "comb x"),
        ("def check(c):\n    assert c(1) == 2\ncheck(count)", "count check c"),
        ("import math as m\nassert m.comb(5, 2) == gcd(1, 2)", "gcd m"),
        ("assert sum([1, 2]) == 3", "sum"),
    ],
)
def test_names_that_a_program_may_define_for_its_test(test, wanted):
    names = sandbox_child.names_of_the_program(ast.parse(test))
    assert names == set(wanted.split())


@pytest.mark.parametrize(
    "test", ["assert comb(5, 2) == 10", "x = comb(5, 2)\nassert x == 10", "assert set(comb(5, 2))"]
)
def test_a_program_may_be_asked_for_a_name_of_the_prelude(test):
    right = block(
        "def comb(n, k): return {10} if 'set' in test else 10".replace("test", repr(test))
    )
    assert grader.grade_code(right, [test]) == 1.0
    assert grader.grade_code(block("def comb(n, k): return []"), [test]) == 0.0


def test_a_failure_that_cannot_be_printed_is_a_failure(outer_level):
    """The program means no harm: its wrong value is longer than a file may be."""
    long = block("def f(x): return 'x' * 9_000_000")
    assert grader.grade_code(long, ["x = f(2)\nassert x == 'y', x"]) == 0.0


def test_no_test_stays_in_the_memory_of_the_template(outer_level):
    """Neither another process nor a later program of the same template sees a test."""
    tests = ["assert f(2) == 987654 - 987652"]
    assert grader.grade_code(block("def f(x): return x"), tests) == 1.0
    search = dedent(CHEATS["reads its memory"]).replace(r"(\d+)", r"(98765\d) - ")
    look = "\nprint(f(), len(open('/proc/self/maps').read()) > 100)"
    assert run_python(search + look).stdout == "None True\n"


EXCHANGE = """
    import collections
    class MyError(KeyError): pass
    class Node:
        def __init__(self, v, *rest):
            self.v = v
            self.rest = rest
        def __eq__(self, other): return True
    def same_thing(x, *a, **k): return x
    def fail(): raise MyError('no')
    def count(x): return collections.Counter(x)
    def numbers(n): return (i for i in range(n))
    def power(x, n): return x ** n
    BIG = 10 ** 40
"""


@pytest.mark.parametrize(
    "test",
    [
        """
        x = [(1, 2.5, None), {3: {4}}, 'a\\n\\ud800', b'b' * 3, 1j, frozenset([True]),
             float('inf'), -0.0, range(2)]
        y = same_thing(x)
        assert y[:3] + y[4:8] == x[:3] + x[4:8]
        assert type(y[0]) is tuple and list(y[8]) == [0, 1]
        """,
        "assert same_thing(float('nan')) != same_thing(float('nan'))",
        "assert BIG == 10 ** 40 and same_thing(x=3, k=4) == 3",
        # More digits than Python prints.
        "assert power(7, 20000) == 7 ** 20000 and [-(7 ** 20000)] == [-power(7, 20000)]",
        """
        try: fail()
        except KeyError as e: assert 'no' in str(e)
        else: assert False
        """,
        "assert count('abca') == {'a': 2, 'b': 1, 'c': 1}",
        "assert list(numbers(3)) == sorted(numbers(3)) == [0, 1, 2]",
        """
        n = Node(3, Node(4))
        n.w = n.rest
        assert n.w[0].v == 4 and n.v == 3 and n.rest[0].v == 4 and same_thing(n).v == 3
        """,
        "assert Node(3) != 5 and Node(3) != Node(3)",
        "assert not hasattr(Node(3), 'w') and same_thing([Node(5)])[0].v == 5",
    ],
)
def test_what_goes_between_a_test_and_its_program(outer_level, test):
    """Plain data as it is, exceptions as their builtin kind, objects as what is asked of them."""
    assert grader.grade_code(block(EXCHANGE), [dedent(test)]) == 1.0


def test_objects_of_a_program_equal_nothing(outer_level):
    failing = [
        "assert Node(3) == 5",
        "assert Node(3) == Node(3)",
        "assert len(Node(3))",
        "assert MISSING",
    ]
    assert grader.grade_code(block(EXCHANGE), failing) == 0.0


def test_numpy_between_a_test_and_its_program(bubblewrap):
    """In bubblewrap, where programs have this interpreter and its packages."""
    code = """
        import numpy
        def array(): return numpy.array([[1, 2]]), numpy.float32(0.5), numpy.bool_(True)
    """
    tests = ["assert array() == ([[1, 2]], 0.5, True)"]
    assert grader.grade_code(block(code), tests) == 1.0


def test_numpy_asks_an_object_of_a_program_for_nothing(bubblewrap):
    """It would read the test's own memory, at an address that the program names."""
    code = """
        import numpy
        class E:
            @property
            def __array_interface__(self):
                freed = numpy.empty(2)
                address = freed.__array_interface__['data'][0]
                del freed
                data = (address, False)
                return {'shape': (2,), 'typestr': '<f8', 'data': data, 'version': 3}
            def __deepcopy__(self, memo): return 1234
        def f(x): return E()
    """
    tests = [
        "import numpy as np\nassert np.allclose(f(2), [77.5, 78.25])",
        "import copy\nassert copy.deepcopy(f(2)) == 1234",
        "assert hasattr(f(2), '__array_interface__')",
    ]
    assert grader.grade_code(block(code), tests) == 0.0


@pytest.mark.parametrize("number", ["0]; exit()", "1", 1.0, True, None, [1]])
def test_the_number_of_a_remote_is_an_integer(number):
    """Programs can forge what is sent to their test, and str() of a Remote contains the number."""
    assert str(sandbox_child.unpack({"Remote": 1})) == "objects[1]"
    with pytest.raises(TypeError):
        sandbox_child.unpack({"Remote": number})


def test_a_test_keeps_its_own_loops(outer_level):
    """A program that defines builtins, or ends a loop, does not switch off the assertions in it."""
    loops = [
        "for x in range(5):\n    assert f(x) == x * x",
        "for x, y in zip([1, 2], [1, 4]):\n    assert f(x) == y",
        "for x, y in zip(map(f, [1, 2]), [1, 4]):\n    assert x == y",
    ]
    assert grader.grade_code(SQUARE, loops) == 1.0
    cheats = [
        "def range(*a): return []\ndef zip(*a): return []",
        "def f(x): raise StopIteration",
        "f = zip = range = lambda *a: []",
    ]
    for cheat in cheats:
        assert grader.grade_code(block(cheat), loops) == 0.0


UPSETTING = {
    "is traced": """
        import ctypes, os
        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        os.kill(os.getpid(), 10)
    """,
    "takes descriptors": """
        import os, resource, time
        resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))
        time.sleep(.3)
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UPSETTING)
def test_programs_that_upset_their_parent_score_nothing(level, name):
    """No exception reaches the caller, whose run would end; the next program is unharmed."""
    code = dedent(UPSETTING[name]) + ADD
    assert grader.grade_code(block(code), IO, timeout=2) == 0.0
    assert grader.grade_code(block(ADD), IO) == 0.75


def test_values_that_compare_badly(outer_level):
    infinities = {"inputs": ["1"] * 3, "outputs": ["inf", "Infinity", "nan"]}
    assert grader.grade_code(block("print(5)"), infinities) == 0.0
    one = {"inputs": ["1"], "outputs": ["inf"]}
    assert grader.grade_code(block("print(float('inf'))"), one) == 1.0
    assert grade_call("from math import gcd", "gcd", [4, 6], 2) == 1.0
    assert grade_call("def f(x): return x > 9", "f", [float("inf")], True) == 1.0


@pytest.mark.slow
def test_code_in_the_pool():
    """One test has `timeout` seconds, the item code_timeout; a malformed item is an error."""
    reference = dict(ability="code", ground_truth=json.dumps(IO))
    nine = dict(ability="code", ground_truth=dict(inputs=["1"] * 9, outputs=["1"] * 9))
    responses = [block(ADD), "no block", block("while True: pass")]
    with grader.Grader(workers=2, timeout=1.0, code_timeout=2.5) as pool:
        found = pool.grade(responses, [reference, reference, nine])
        assert found == [0.75, 0.0, 0.0]
        assert [score.failure for score in found] == [None, None, "timeouts"]
        assert (pool.timeouts, pool.crashes, pool.unparsed) == (1, 0, 0)
        with pytest.raises(ValueError):
            pool.grade([block(ADD)], [dict(reference, ground_truth="[]")])


# ---- real benchmark files ----


def load(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def grade_all(programs, tests):
    """The scores of programs, each by its own check program."""

    def grade(program, test):
        return grader.grade_code(f"```python\n{program}\n```", [test])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(grade, programs, tests))


def humaneval_test(row):
    # The check may use what stands before the function.
    head = row["prompt"].rpartition(f"def {row['entry_point']}")[0]
    return f"{head}\n{row['test']}\ncheck({row['entry_point']})"


@pytest.mark.slow
def test_humaneval(shared):
    rows = load(shared / "data/humaneval.jsonl")[::6]
    solutions = [row["prompt"] + row["canonical_solution"] for row in rows]
    assert grade_all(solutions, map(humaneval_test, rows)) == [1.0] * len(rows)

    wrong = [row["prompt"] + "    return None" for row in rows[::4]]
    assert sum(grade_all(wrong, map(humaneval_test, rows[::4]))) == 0


def mbpp_test(row):
    imports = row.get("test_imports", [])
    return "\n".join([*imports, row.get("test_setup_code", ""), *row["test_list"]])


@pytest.mark.slow
def test_mbpp(shared):
    rows = load(shared / "data/mbpp_prime.jsonl")
    rows = [row for row in rows if row["task_id"] == 126] + rows[::40]
    programs = [row["code"] for row in rows]
    assert grade_all(programs, map(mbpp_test, rows)) == [1.0] * len(rows)

    mutated = [code.replace("return", "return None or 7 if True else") for code in programs[::2]]
    found = grade_all(mutated, map(mbpp_test, rows[::2]))
    assert sum(score == 1.0 for score in found) <= 1


def test_leetcode(shared):
    rows = load(shared / "data/leetcode_sample.jsonl")
    test = next(row["test"] for row in rows if "sum-of-squares-of-special" in row["task_id"])
    # The file holds no solutions; this one is ours.
    solution = block("""
        class Solution:
            def sumOfSquares(self, nums: List[int]) -> int:
                n = len(nums)
                return sum(x * x for i, x in enumerate(nums, 1) if n % i == 0)
    """)
    assert grader.grade_code(solution, [test]) == 1.0
    assert grader.grade_code(solution.replace("x * x", "x"), [test]) == 0.0
