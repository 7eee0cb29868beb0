"""
The sandbox for programs that models write. run_python starts this file as a process of its own, in bubblewrap or namespaces,
and asks it to run programs. That child has numpy and sympy loaded, waits, and forks for each program; it imports nothing of
ours and knows no answers. grader.py starts and asks children in the same way, itself run as a script, to judge answers.
"""
import ast, atexit, builtins, contextlib, ctypes, functools, gc, json, math, os, re, resource, secrets, select, shutil, signal
import subprocess, sys, tempfile, threading, time, traceback
from collections import namedtuple
from multiprocessing import connection
from pathlib import Path

OUTPUT_LIMIT, MAX_TASKS = 8 << 20, 16  # bytes of a file, stdout and stderr included; processes and threads of a program
ERROR_LIMIT = 64 << 10  # bytes of stderr that the caller gets
SCRATCH = "/dev/shm"  # where programs in namespaces may write: 64 MB in memory
PRCTL = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # macOS has none
ENVIRONMENT = dict(PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8", HOME=".", TMPDIR=".", CUDA_VISIBLE_DEVICES="",
                   OMP_NUM_THREADS="1", PYTHONUTF8="1", PYTHONHASHSEED="0", PYTHONNOUSERSITE="1")
RunResult = namedtuple("RunResult", "stdout stderr returncode timed_out")  # returncode: 128 + signal if one has ended it
IDLE = {}  # children for programs, without work, by level and interpreter
os.register_at_fork(after_in_child=IDLE.clear)
class GraderError(RuntimeError): "the grader itself failed: a bug to mend, never a reward"

# --- the caller's side: children, processes that answer its questions, in JSON
def ask(idle, file, level, seconds, *messages):
    "the reply of an idle child that runs this file, or of a new one; (0.0, failure) if it is late or dies"
    try:
        while (child := idle.pop()).poll() is not None:  # it has died meanwhile
            pass
    except IndexError:
        child = start(file, level)
    failure = "crashes"
    with contextlib.suppress(OSError, EOFError):
        for message in messages:
            child.pipe.send_bytes(json.dumps(message).encode())
        if child.pipe.poll(seconds):
            reply = json.loads(child.pipe.recv_bytes())
            idle.append(child)
            if isinstance(reply, str):
                raise GraderError(reply)
            return reply
        failure = "timeouts"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # bubblewrap and what is in it
    child.wait()
    return 0.0, failure

def start(file, level):
    "a child that is ready; for programs, at a level, it is alone in an environment of its own"
    command, (ours, theirs) = [*box(level), sys.executable, os.path.abspath(file)], connection.Pipe()
    with contextlib.suppress(OSError, EOFError):
        child = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir(),
                                 start_new_session=True, env=ENVIRONMENT if level else os.environ)
        theirs.close()
        child.pipe = ours
        if ours.poll(60) and ours.recv_bytes():
            return child
    raise GraderError(f"a child process ({file}, {level}) does not start")

@functools.cache
def isolation(sandbox=None):
    """What separates programs from this machine (README: The sandbox): the first level that works. RuntimeError if none does,
    or not the first although sandbox="required", now or before (PRIME_SANDBOX in the environment)."""
    sandbox = "required" if "required" in (sandbox, os.environ.get("PRIME_SANDBOX")) else "auto"
    for level in ("bubblewrap", "namespaces", "limits")[:1 if sandbox == "required" else 3]:
        with contextlib.suppress(GraderError):
            if run_python("print(6 * 7)", timeout=60, level=level).stdout == "42\n":
                os.environ["PRIME_SANDBOX"] = sandbox
                return level
    raise RuntimeError(f"sandbox={sandbox!r} cannot be had on this machine")

def run_python(code, stdin="", timeout=10.0, memory_mb=1024, level=None, prelude="", test=None):
    """Run a program in the sandbox -> RunResult, or that of a `test` of it (see examine). `timeout`: seconds of wall clock;
    `memory_mb`: address space of each of its processes; `level`: see isolation. One thread, no GPU. stderr is shortened as
    NuminaMath shows it to the model. Thread-safe: each concurrent call has a child of its own."""
    level, messages = level or isolation(), [[code, stdin, prelude, timeout, memory_mb, bool(test)], *[test] * bool(test)]
    for idle in IDLE.setdefault((level, sys.executable), []), []:  # an idle child may be about to end, a new one is not
        stdout, stderr, *end = ask(idle, __file__, level, timeout + 10, *messages)
        if end:
            return RunResult(stdout, stderr, *end)
    return RunResult("", "", 128 + signal.SIGKILL, False)  # it has stopped or killed its parent, twice

def box(level):
    "the command that isolates another: it is process 1 of namespaces, and bubblewrap shows it the interpreter only, read-only"
    if level == "namespaces":
        rights = "--map-current-user --keep-caps" if os.getuid() else ""  # for the mount; setpriv gives them back
        script = f'mount -t tmpfs -o size=64m,mode=1777 - {SCRATCH} && exec setpriv --inh-caps=-all --ambient-caps=-all "$@"'
        return [*f"unshare --net --ipc --pid --fork --mount-proc {rights} sh -c".split(), script, "sh"]
    if level != "bubblewrap":
        return []
    words = "bwrap --unshare-net --unshare-ipc --unshare-pid --unshare-uts --as-pid-1 --proc /proc --dev /dev".split()
    words += "--cap-add CAP_SETUID --cap-add CAP_SETGID".split() * (os.getuid() == 0)
    paths = [*"/usr /bin /lib /lib64 /etc/ld.so.cache /etc/alternatives".split(), sys.prefix, sys.base_prefix, __file__]
    for path in sorted({form(path) for path in paths for form in (os.path.abspath, os.path.realpath)}):
        for folder in [*Path(path).parents][-2::-1]:
            words += "--perms", "0755", "--dir", folder  # else root's alone
        words += "--ro-bind-try", path, path
    return [*words, *f"--perms 1777 --size {64 << 20} --tmpfs {SCRATCH} --remount-ro /dev --remount-ro /".split()]

# --- the child's side
def serve(answer, traces=bool):
    """The life of a child: it answers requests, JSON over its standard input, and ends with its caller; or when the traces that
    requests leave are not those of the beginning."""
    caller, fresh = connection.Connection(0), traces()
    caller.send_bytes(b"ready")
    with contextlib.suppress(OSError, EOFError):
        while traces() == fresh and isinstance(request := json.loads(caller.recv_bytes()), list):  # not a test left unread
            try:
                reply = answer(*request)
            except MemoryError:
                reply = 0.0, "crashes"
            except Exception:
                reply = traceback.format_exc() if traces() == fresh else (0.0, "crashes")  # a program has changed our limits
            caller.send_bytes(json.dumps(reply).encode())
    os._exit(0)

def enter():
    "loads what programs may import, and gives up its rights, among them those to read any interpreter"
    exec(PRELUDE, {})
    with contextlib.suppress(ImportError):
        import numpy, sympy  # noqa: F401
        x = sympy.Symbol("x")
        sympy.solve(sympy.integrate(x * sympy.exp(x), x) - 1), sympy.simplify(sympy.sqrt(8) * x / 2)  # loads what it loads late
    gc.freeze()  # collections in the forks shall not touch, and so copy, these pages
    if os.getuid() == 0:
        user = 61184 + secrets.randbelow(4336)  # one of those that systemd makes on the fly
        os.setgroups([]), os.setgid(user), os.setuid(user)
    PRCTL(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    PRCTL(4, 0, 0, 0, 0)   # PR_SET_DUMPABLE: programs, of the same user, may not look into this process, nor into tests
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 ignores signals of its namespace that it has no handler for
    os.chdir(SCRATCH if os.getpid() == 1 else ".")

def traces():
    "what programs can leave in their namespaces to those that come after them"
    settings = os.nice(0), os.sched_getscheduler(0), os.sched_getaffinity(0), *map(resource.getrlimit, range(16))
    return os.getpid() == 1 and [os.listdir(), settings, *(path.read_text() for path in Path("/proc/sysvipc").iterdir())]

def execute(code, stdin, prelude, timeout, memory_mb, tested):
    "forks a program, or a test that forks its program: stdout, stderr, return code, was its time over?"
    folder, files = tempfile.mkdtemp(dir=os.getcwd()), [tempfile.TemporaryFile(dir=".") for _ in range(3)]
    os.pwrite(files[0].fileno(), stdin.encode("utf-8", "replace"), 0)
    if (first := os.fork()) == 0:
        run(code, prelude, tested, files, folder, timeout, memory_mb)
    ended, deadline, gone = {}, time.monotonic() + timeout, select.poll()
    gone.register(0, 0)  # the caller
    while first not in ended and time.monotonic() < deadline and not gone.poll(2):
        ended.update(pair for pair in [os.waitpid(-1, os.WNOHANG)] if not os.WIFSTOPPED(pair[1]))  # ptrace stops it
    timed_out = first not in ended
    for target in [-1] if os.getpid() == 1 else [-first, first]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            ended = dict(pair for pair in [os.wait()] if not os.WIFSTOPPED(pair[1])) | ended  # numbers may be used again
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    status = os.waitstatus_to_exitcode(ended[first])
    stdout, stderr = (os.pread(file.fileno(), size, 0).decode("utf-8", "replace")
                      for file, size in zip(files[1:], (OUTPUT_LIMIT, ERROR_LIMIT)))
    return stdout, shorten(stderr), status if status >= 0 else 128 - status, timed_out

def shorten(stderr):
    "of tracebacks the first line, the program's own lines and the last; directories and addresses removed"
    lines = stderr.rstrip().split("\n")
    if (head := "Traceback (most recent call last):") in lines:
        own = [line for before, line in zip(["", *lines], lines[:-1]) if line == head or 'File "program.py"' in before + line]
        stderr = "\n".join([*own, lines[-1], ""])
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"(?<![\w/:])(/[\w.+-]+)+/", "", stderr))

def run(code, prelude, tested, files, folder, timeout, memory_mb):
    "in a process of its own: limits, a program or its test, and the interpreter's normal end"
    status, stdout, tasks = 0, sys.stdout, MAX_TASKS
    try:
        os.setsid()
        os.chdir(folder)
        for number in range(tested, 3):  # a test reads itself from the caller, at 0
            os.dup2(files[number].fileno(), number)
        os.closerange(3, 1024)
        if os.getppid() != 1 and os.path.exists("/proc/loadavg"):  # all tasks of the user count: allow for all of the machine
            tasks += int(Path("/proc/loadavg").read_text().split("/")[1].split()[0])
        limits = dict(CPU=math.ceil(timeout) + 1, AS=memory_mb << 20, FSIZE=OUTPUT_LIMIT, NOFILE=64, NPROC=tasks, CORE=0)
        for name, value in dict(limits, MSGQUEUE=0).items():
            with contextlib.suppress(ValueError, AttributeError):  # macOS has not all of them
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        examine(code, prelude) if tested else program(code, prelude)
    except Exception as error:
        status, trace = 1, error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in stdout, sys.stdout:
        with contextlib.suppress(Exception):  # closed, say
            stream.flush()
    os._exit(status)  # saves the 50 ms of freeing memory

def program(code, prelude, link=None):
    "a program; then, if there is a link to its test, expressions that come over it"
    if link:
        link.recv_bytes()  # the test has been read from the caller
    PRCTL(4, 1, 0, 0, 0)  # it may look into itself
    Path("program.py").write_text(code, "utf-8", "replace")
    main = type(sys)("program" if link else "__main__")
    main.__file__ = os.path.abspath("program.py")
    sys.modules[main.__name__], sys.argv, sys.path[0] = main, ["program.py"], os.getcwd()
    exec(prelude, names := vars(main))
    before, objects, module = dict(names), [], compile(code, "program.py", "exec", dont_inherit=True)
    exec(module, names)
    objects.append({name: x for name, x in names.items() if before.get(name, before) is not x or name in module.co_names})
    while link:
        expression = link.recv_bytes()
        try:
            value = eval(expression, names | {"inf": math.inf, "nan": math.nan, "objects": objects})
        except Exception as error:
            value = error
        link.send_bytes(json.dumps(pack(value, objects)).encode())

# --- tests that are code. They and the program have a process each; between them go expressions, and JSON as their values
def pack(x, objects):
    "as JSON: plain data, without the subclasses that it is of; of what else there is the place where it is among objects"
    x = x.tolist() if hasattr(type(x), "tolist") else x  # numpy
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    for kind in type(x).__mro__:
        if KINDS.get(kind.__name__) is kind:
            text = issubclass(kind, (complex, Exception))
            return {kind.__name__: str(x) if text else [pack(item, objects) for item in (x.items() if kind is dict else x)]}
    objects.append(x)
    return {"Remote": len(objects) - 1}

class Remote:
    "in a test: an object of the program. Calls, attributes and items are the program's; `==` and all else are not."
    def __init__(self, number): vars(self)["_number"] = number
    def __repr__(self): return f"objects[{self._number}]"
    def __call__(self, *args, **kwargs): return Remote._ask(f"{self!r}(*{args!r}, **{kwargs!r})")
    def __getattr__(self, name): return Remote._ask(f"{self!r}.{name}")
    def __setattr__(self, name, value): Remote._ask(f"setattr({self!r}, {name!r}, {value!r})")
    def __iter__(self): return iter(Remote._ask(f"[*{self!r}]"))
    @staticmethod
    def _ask(expression):
        Remote._link.send_bytes(expression.encode())
        value = json.loads(Remote._link.recv_bytes(), object_hook=lambda pair: [KINDS[kind](x) for kind, x in pair.items()][0])
        if isinstance(value, Exception):  # a StopIteration would end the test's own loops in silence
            raise RuntimeError(value) if isinstance(value, StopIteration) else value
        return value

KINDS = {name: kind for name, kind in (vars(builtins) | {"Remote": Remote}).items() if isinstance(kind, type) and issubclass(
    kind, (list, tuple, set, frozenset, dict, complex, Exception, Remote))}
MODULES = "import sys, math, re, string, random, heapq, bisect, itertools, functools, collections, datetime\n"
REPLAY = """def replay(programs):
    import contextlib, os, sys
    shown, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    for program in programs:
        with contextlib.suppress(SystemExit): exec(program, globals())
    sys.stdout.flush()
    os.dup2(shown, 1)
"""  # earlier programs of an answer: what they define is there, what they and their children print goes nowhere
PRELUDE = MODULES + "".join(  # imported before tested programs, as by PRIME's scorer, so that `List[int]` and `gcd` just work
    f"from {name} import *\n" for name in "typing collections heapq bisect itertools functools math builtins".split())

def examine(code, prelude):
    "forks a program, which has none of its descriptors, then runs the test of it, with what the program defines as Remotes"
    Remote._link, link = connection.Pipe()
    if os.fork() == 0:
        Remote._link.close()
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        program(code, prelude, link)
    link.close()
    test, names = json.loads(connection.Connection(0).recv_bytes()), {}
    Remote._link.send_bytes(b"go")
    exec(MODULES, names)
    names["defined"] = defined = Remote._ask("objects[0]")
    used, known = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}, {*dir(builtins), *names}
    # a program cannot replace builtins and modules, unless it is tested under such a name
    exec(test, names | {name: defined[name] for name in (used - known or used) & {*defined}})

if __name__ == "__main__":
    enter()
    serve(execute, traces)
