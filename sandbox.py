"""
Runs Python that a model wrote, apart from this machine and from other programs: run_python(code) -> RunResult.

    caller --> template: an interpreter with numpy and sympy loaded, in the sandbox; one for each concurrent call
                 keeper, forked for each program: at its end or deadline kills all that is left of it
                   init: the first process of the program's own namespaces; gives up all rights
                     the program

Templates start on first use (0.6 s), are commands of their own (so this is safe after CUDA has started), and end with their
caller. On two shared cores 40 to 90 programs a second that import numpy and sympy; with an interpreter for each, 1 or 2. Linux,
and macOS with limits alone (never run by us); standard library only.
"""
import atexit, builtins, contextlib, ctypes, functools, gc, json, math, os, re, resource, secrets, select, shutil, signal
import subprocess, sys, tempfile, threading, time, traceback
from collections import namedtuple
from pathlib import Path

OUTPUT_LIMIT = 8 << 20  # bytes that a program may write to one file, stdout and stderr included
MAX_TASKS = 16          # processes and threads of one program; each process has the memory limit to itself
SCRATCH = "/dev/shm"    # where a program with namespaces finds its directory, 64 MB in memory
RunResult = namedtuple("RunResult", "stdout stderr returncode timed_out")  # returncode: 128 + signal if one has ended it
# Imported before tested programs, as by PRIME's scorer, so that `List[int]` and `gcd` just work.
PRELUDE = "import sys, math, re, string, random, heapq, bisect, itertools, functools, collections, datetime\n" + "".join(
    f"from {name} import *\n" for name in "typing collections heapq bisect itertools functools math builtins".split())
IDLE = {}               # templates without work, by level and interpreter
os.register_at_fork(after_in_child=IDLE.clear)

@functools.cache
def isolation(sandbox="auto"):
    """What separates programs from this machine: the first of these that works. RuntimeError if none does, or if
    sandbox="required" and it is not the first.
    "bubblewrap" (0.7 or newer): a program can read the interpreter and /usr only, write to its scratch directory only, has no
        network, sees no other process, and all that it has started ends with it. The kernel is the machine's.
    "namespaces": it can read and write the user's files; the rest holds.
    "limits": on time, memory, tasks and output; an empty environment. But it has the network, can kill the user's processes,
        and leave daemons behind.
    Root's programs run as a user that nobody is: without bubblewrap, others must be able to reach the interpreter."""
    for level in ("bubblewrap", "namespaces", "limits")[:1 if sandbox == "required" else 3]:
        with contextlib.suppress(OSError):
            IDLE.setdefault((level, sys.executable), []).append(start(level))
            return level
    raise RuntimeError(f"sandbox={sandbox!r} cannot be had on this machine")

def run_python(code, stdin="", timeout=10.0, memory_mb=1024, level=None, **more):
    """Run a program in the sandbox -> RunResult. `timeout`: seconds of wall clock; `memory_mb`: address space of each of its
    processes; `level`: see isolation. One thread, no GPU. stderr is shortened to the program's own lines of the traceback,
    without directories, as NuminaMath shows it to the model. Thread-safe. `more`: prelude, and what run_test gives to run()."""
    level = level or isolation()
    idle = IDLE.setdefault((level, sys.executable), [])
    for _ in range(2):  # an idle template may have been killed meanwhile
        template = idle.pop() if idle else start(level)
        if reply := ask(template, dict(more, code=code, stdin=stdin, timeout=timeout, memory_mb=memory_mb)):
            idle.append(template)
            return RunResult(reply[0], shorten(reply[1]), *reply[2:])
    return RunResult("", "", 128 + signal.SIGKILL, False)  # it has killed its template

def run_test(program, test, names, timeout):
    """The value of `result` after the program and a test of it, as JSON knows it; None if they did not get there. The test has
    clean builtins, `plain`, and what the program defines under other names than builtins have, or under these names."""
    mark = secrets.token_hex(8)
    run = run_python(program, timeout=timeout, prelude=PRELUDE, test=test, names=names, mark=mark)
    _, found, result = run.stdout.rpartition(mark)
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(result.partition("\n")[0]) if found else None

def start(level):
    "a new template; OSError if this level does not work here"
    user = 61184 + secrets.randbelow(4336) if os.getuid() == 0 else os.getuid()  # of those that systemd makes on the fly
    command = [sys.executable, "-s", os.path.abspath(__file__), "program.py", level, str(user)]
    if level == "bubblewrap":
        command = [*bubblewrap(), *command]
    env = dict(PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8", PYTHONUTF8="1", PYTHONHASHSEED="0", HOME=".", TMPDIR=".",
               CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    template = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
                                cwd=tempfile.gettempdir(), start_new_session=True)
    if ask(template, dict(code="print(6 * 7)", stdin="", timeout=60, memory_mb=1024)) != ["42\n", "", 0, False]:
        raise OSError(f"the sandbox {level!r} does not work")
    return template

def bubblewrap():
    "the command that shows a template the interpreter, read-only, and nothing else"
    box = "bwrap --unshare-net --unshare-ipc --unshare-pid --unshare-uts --proc /proc --dev /dev --cap-add ALL".split()
    paths = "/usr /bin /lib /lib64 /etc/ld.so.cache /etc/alternatives".split() + [sys.prefix, sys.base_prefix]
    paths = sorted({q for p in [*paths, os.path.abspath(__file__)] if os.path.exists(p) for q in (p, os.path.realpath(p))})
    for parent in sorted({parent for path in paths for parent in Path(path).parents} - {Path("/")}):
        box += "--perms", "0755", "--dir", parent  # else it copies the 0700 of /root
    for path in paths:
        box += "--ro-bind", path, path
    return [*box, *f"--perms 1777 --tmpfs {SCRATCH} --chdir {SCRATCH} --remount-ro /dev --remount-ro /".split()]

def ask(template, job):
    "a template's reply to a job; None, and an end to the template, if it has died or hangs"
    poll = select.poll()  # select.select() fails on descriptors above 1023
    poll.register(template.stdout, select.POLLIN)
    with contextlib.suppress(BrokenPipeError):
        template.stdin.write(json.dumps(job).encode() + b"\n")
        template.stdin.flush()
        if poll.poll((job["timeout"] + 10) * 1000) and (line := template.stdout.readline()).endswith(b"\n"):
            return json.loads(line)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(template.pid, signal.SIGKILL)
    template.communicate()

def shorten(stderr):
    "of a traceback its first line, the program's own lines and the last; directories and addresses removed"
    _, start, trace = stderr.rpartition("Traceback (most recent call last):\n")
    *lines, last = trace.rstrip().split("\n") if start else [stderr]
    own = [line for before, line in zip(["", *lines], lines) if '  File "program.py"' in (before[:19], line[:19])]
    last = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"(?<![\w/:])(/[\w.+-]+)+/", "", last))
    return "\n".join([start.strip(), *own, last, ""]) if start else last

# --- in the sandbox

def serve(level, user):
    "the template: a line of JSON in, a line out, until the caller goes away. Returns in the program's process."
    with contextlib.suppress(ImportError):
        import numpy, sympy  # noqa: F401
        x = sympy.Symbol("x")
        sympy.solve(sympy.integrate(x * sympy.exp(x), x) - 1), sympy.simplify(sympy.sqrt(8) * x / 2)  # loads what it loads late
    jobs, replies, libc = open(os.dup(0)), open(os.dup(1), "w"), ctypes.CDLL(None)
    gc.freeze()  # collections in the children shall not touch, and so copy, these pages
    if level == "limits" and sys.platform == "linux":
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: processes of the same user may not look into this one
    for line in jobs:
        if os.fork() == 0:
            job = json.loads(line)
            keep(job, level, user, libc, jobs, replies)
            return job
        if os.wait()[1]:  # the keeper has failed or was killed
            break
    os._exit(0)

def keep(job, level, user, libc, jobs, replies):
    "run one program, kill what it leaves behind, reply"
    files = [tempfile.TemporaryFile(dir=".") for _ in range(3)]  # they do not fill up as pipes do
    files[0].write(job["stdin"].encode("utf-8", "replace"))
    files[0].seek(0)
    scratch = tempfile.mkdtemp(dir=os.getcwd()) if level == "limits" else SCRATCH
    spaces, maps = 0x28020000, {}  # new namespaces for mounts, IPC and processes
    if level == "namespaces":
        spaces |= 0x40000000  # and for the network; a user who is not root gets them in one for users, where he stays who he is
        if uid := os.getuid():
            spaces |= 0x10000000
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{os.getgid()} {os.getgid()} 1"}
    if level != "limits" and libc.unshare(spaces):
        os._exit(1)
    for name, text in maps.items():
        Path("/proc/self", name).write_text(text)
    if (pid := os.fork()) == 0:
        return confine(job, level, user, libc, scratch, files)
    end, deadline = (0, 0), time.monotonic() + job["timeout"]
    while not end[0] and time.monotonic() < deadline and not select.select([jobs], [], [], 0.002)[0]:  # the caller is gone?
        end = os.waitpid(pid, os.WNOHANG)
    for kill in os.killpg, os.kill:  # namespaces end with their first process
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode((end if end[0] else os.waitpid(pid, 0))[1])
    if level == "limits":
        shutil.rmtree(scratch, ignore_errors=True)
    texts = [os.pread(file.fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace") for file in files[1:]]
    print(json.dumps([*texts, status if status >= 0 else 128 - status, not end[0]]), file=replies, flush=True)
    os._exit(0)

def confine(job, level, user, libc, scratch, files):
    "init: directory, limits, descriptors, no rights; then fork the program, and end as it ends"
    os.setsid()
    limits = dict(CPU=math.ceil(job["timeout"]) + 1, AS=job["memory_mb"] << 20, FSIZE=OUTPUT_LIMIT, NOFILE=64, CORE=0,
                  NPROC=MAX_TASKS)
    if level != "limits":
        mounts = (None, b"/", None, 0x44000, None), (b"proc", b"/proc", b"proc", 14, None), \
                 (b"tmpfs", SCRATCH.encode(), b"tmpfs", 6, b"size=64m,mode=1777")
        if any(libc.mount(*mount) for mount in mounts):  # the first keeps the others from spreading
            os._exit(1)
    elif user != os.getuid():
        os.chown(scratch, user, user)
    elif os.path.exists("/proc/loadavg"):
        limits["NPROC"] += int(Path("/proc/loadavg").read_text().split("/")[1].split()[0])  # all of the user's processes count
    else:
        del limits["NPROC"]
    os.chdir(scratch)
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    os.closerange(3, 1024)
    for name, value in limits.items():
        with contextlib.suppress(ValueError):  # macOS knows no limit of memory
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    if user != os.getuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if pid := os.fork():
        while (end := os.wait())[0] != pid:
            pass
        status = os.waitstatus_to_exitcode(end[1])
        os._exit(status if status >= 0 else 128 - status)
    if sys.platform == "linux":
        libc.prctl(4, 1, 0, 0, 0)
    Path("program.py").write_text(job["code"], "utf-8", "replace")
    sys.argv, sys.path[0] = ["program.py"], scratch

def run(code, prelude="", test="", names=(), mark="", **_):
    "the program, then the test of it; then the interpreter's normal end, less the 50 ms of freeing memory"
    main, status = type(sys)("program" if test else "__main__"), 0
    sys.modules[main.__name__], main.__file__ = main, os.path.abspath("program.py")
    own, write, dumps = dict(vars(builtins)), os.write, json.dumps  # which the program cannot patch
    own["plain"] = type(plain)(plain.__code__, own)
    try:
        test = compile(test, "test", "exec")
        exec(prelude, vars(main))
        exec(compile(Path("program.py").read_bytes(), "program.py", "exec", dont_inherit=True), vars(main))
        if mark:
            scope = main.__dict__ | own | {name: main.__dict__[name] for name in names if name in main.__dict__}
            scope["__builtins__"] = own
            own["exec"](test, scope)
            write(1, f"\n{mark}{dumps(scope['result'])}\n".encode())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        status = 1
    for finish in threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush:
        try:
            finish()
        except BaseException:
            status = status or 120  # as the interpreter does
    os._exit(status & 255)

def plain(x):
    "a copy of plain data as exactly that; of anything else, which could claim to equal everything, what equals nothing"
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(x, kind) and type(value := kind(x)) is kind:
            return value
    for kind in (list, tuple, set, frozenset, dict):
        if isinstance(x, kind):
            return kind(map(plain, x.items() if kind is dict else x))
    if x is None or type(x) in (type, range):
        return x
    return plain(x.tolist()) if hasattr(x, "tolist") else object()  # numpy's have it

if __name__ == "__main__":
    run(**serve(sys.argv[2], int(sys.argv[3])))
