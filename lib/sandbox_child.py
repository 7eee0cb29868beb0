"""
The sandbox's other side: everything that runs inside the box.

lib/sandbox.py starts this file as a process of its own (lib/sandbox.py tells the protocol). It uses
the standard library only and imports nothing of this project, because bubblewrap shows a program
this one file and the Python installation, nothing else. Three kinds of process run this code:

the child    waits for requests, forks a process for each, collects its output. It never runs a
             program itself and never holds a test.
a program    one program that a model wrote. Nothing that it sends or leaves behind is trusted.
a test       runs the assertions about a program. It and the program are two processes, so that a
             program cannot read its test or declare it passed. They exchange expressions
             and JSON.
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import errno
import gc
import json
import math
import os
import re
import resource
import secrets
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from multiprocessing import connection
from pathlib import Path

# The only folder that a program in namespaces can write to: 64 MB of memory.
SCRATCH = "/dev/shm"
# Bytes of one file that a program writes; its stdout and stderr are files too.
OUTPUT_LIMIT = 8 << 20
# Bytes of stderr that the caller gets.
ERROR_LIMIT = 64 << 10
# Processes and threads of one program, its test included.
MAX_TASKS = 16

# What a test may use without importing it.
MODULES = (
    "import sys, math, re, string, random, heapq, bisect, itertools, functools, collections, "
    "datetime\n"
)

# Runs before a tested program, as in PRIME's own scorer, so that `List[int]` and `gcd` just work.
PRELUDE = (
    MODULES
    + """\
from typing import *
from collections import *
from heapq import *
from bisect import *
from itertools import *
from functools import *
from math import *
from builtins import *
"""
)


# --- The child: waits for requests and answers them


def no_state():
    """The state of a child that runs no programs: nothing that could change."""
    return None


def serve(answer, state=no_state):
    """
    Answers requests until the caller is gone, then ends this process.

    A request is a JSON list over standard input. `answer(*request)` computes the reply, which is
    sent as {"answer": value}; {"memory": true} if there was not enough memory for it; or
    {"bug": traceback} if `answer` raised an exception.

    `state()` returns what a program could have changed. If it is not what it was at the start, a
    program has tampered with this child: the child ends, and its caller starts another.
    """
    caller = connection.Connection(0)
    fresh = state()
    caller.send_bytes(b"ready")

    # The pipe raises an exception when the caller has gone: that is the normal end.
    with contextlib.suppress(OSError, EOFError):
        while state() == fresh:
            request = json.loads(caller.recv_bytes())
            if not isinstance(request, list):
                # A test, left unread because a program killed the process that was to read it.
                break
            try:
                reply = {"answer": answer(*request)}
            except MemoryError:
                reply = {"memory": True}
            except Exception:
                if state() != fresh:
                    # Not a bug: a program has lowered this child's limits, for example.
                    break
                reply = {"bug": traceback.format_exc()}
            caller.send_bytes(json.dumps(reply).encode())
    os._exit(0)


def prctl(option, value):
    """Sets an attribute of this process; does nothing where there is no prctl (macOS)."""
    call = getattr(ctypes.CDLL(None), "prctl", None)
    if call is not None:
        call(option, value, 0, 0, 0)


def system_call(number, *arguments):
    """A system call of Linux that has no function in the C library; -1 if it fails."""
    if sys.platform != "linux" or number is None:
        return -1
    return ctypes.CDLL(None).syscall(number, *arguments)


def end_with_parent():
    """Attack: a busy child outlives its caller. The kernel kills it when the caller dies."""
    PR_SET_PDEATHSIG = 1
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# --- Entering the box: what the child does once, before its first request


def enter():
    """Prepares this process for programs, which inherit all of it, one step per line."""
    load_libraries()
    be_killed_first()
    leave_keyring()
    drop_root()
    forbid_new_privileges()
    forbid_mounts()
    hide_from_programs()
    end_on_interrupt()
    go_to_scratch()


def load_libraries():
    """Loads what programs may import, once: a fork is faster than the import of sympy."""
    exec(PRELUDE, {})
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401
        import sympy

        # sympy loads much of itself only when it is used.
        x = sympy.Symbol("x")
        sympy.solve(sympy.integrate(x * sympy.exp(x), x) - 1)
        sympy.simplify(sympy.sqrt(8) * x / 2)

    # The garbage collector of a fork must not touch these pages: each touched page is copied.
    gc.freeze()


def be_killed_first():
    """Attack: many programs fill the memory. The kernel kills them then, and not the trainer."""
    # Where there is no such file, or it cannot be written, nothing changes.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def leave_keyring():
    """Attack: a program reads keys (passwords, tokens) of the session that it was started in."""
    numbers = {"x86_64": 250, "aarch64": 219}
    KEYCTL_JOIN_SESSION_KEYRING = 1
    # Without a name: a new, empty keyring.
    system_call(numbers.get(os.uname().machine), KEYCTL_JOIN_SESSION_KEYRING, None)


def drop_root():
    """Attack: a program acts as root. It runs as a user that owns nothing and has no name."""
    if os.getuid() != 0:
        return
    # One of the numbers that systemd keeps for users made on the fly (61184 to 65519), drawn at
    # random: two children are two users, with hardly an exception, and cannot signal each other.
    user = 61184 + secrets.randbelow(4336)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def forbid_new_privileges():
    """Attack: a program runs a setuid file (su, sudo, mount) to become root."""
    PR_SET_NO_NEW_PRIVS = 38
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def forbid_mounts():
    """
    Attack: a program makes namespaces of its own, in which it may mount file systems.

    It could mount the cgroups and kill its caller through cgroup.kill, or fill memory through a
    tmpfs. Under Landlock the kernel refuses mount and move_mount. A detached mount (fsopen,
    fsmount) is still possible. This needs Linux 5.19 or newer; elsewhere nothing changes. Our rules
    forbid device files, which programs cannot make anyway, and allow moving files between folders,
    which Landlock forbids otherwise.
    """
    CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
    MAKE_CHAR = 1 << 6
    REFER = 1 << 13
    PATH_BENEATH = 1
    handled = struct.pack("=Q", MAKE_CHAR | REFER)
    ruleset = system_call(CREATE_RULESET, handled, len(handled), 0)
    if ruleset < 0:
        return
    root = os.open("/", os.O_PATH)
    system_call(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", REFER, root), 0)
    system_call(RESTRICT_SELF, ruleset, 0)
    os.close(root)
    os.close(ruleset)


def hide_from_programs():
    """
    Attack: a program, of the same user, reads this child or a test by ptrace or /proc/PID.

    Forks inherit this, so tests are hidden too; a program shows itself again (load_program).
    """
    PR_SET_DUMPABLE = 4
    prctl(PR_SET_DUMPABLE, 0)


def show_to_itself():
    """A program may read its own /proc/self, as any program can."""
    PR_SET_DUMPABLE = 4
    prctl(PR_SET_DUMPABLE, 1)


def end_on_interrupt():
    """Attack: a program sends SIGINT, and Python raises KeyboardInterrupt anywhere in the child."""
    # Without a handler, process 1 of a namespace ignores the signal; elsewhere the child ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def go_to_scratch():
    """Programs run in the box's own memory, or without namespaces in the folder we started in."""
    if in_namespaces():
        os.chdir(SCRATCH)


def in_namespaces():
    """Is this child process 1, that is, alone with its programs in namespaces of its own?"""
    return os.getpid() == 1


def box_state():
    """
    What a program could change for the programs after it: limits, priorities, the scratch folder
    (its files, mode and attributes) and shared memory.

    Attack: a program tampers with the child or leaves messages for later programs. A child whose
    state has changed ends, and its namespaces with it; the caller starts another. Without
    namespaces the folder and the shared memory are those of the machine, and not compared.
    """
    if sys.platform != "linux":
        return None
    limits = [resource.getrlimit(number) for number in range(16)]
    scheduling = [
        os.nice(0),
        os.sched_getscheduler(0),
        sorted(os.sched_getaffinity(0)),
        io_priority(),
    ]
    if not in_namespaces():
        return [limits, scheduling]
    # Attack: a program of our user's closes the folder for all later programs.
    folder = [os.stat(".").st_mode, os.listxattr(".")]
    files = os.listdir()
    shared_memory = [path.read_text() for path in sorted(Path("/proc/sysvipc").iterdir())]
    return [limits, scheduling, folder, files, shared_memory]


def io_priority():
    """The priority of this process at the disk; -1 where it cannot be asked for."""
    numbers = {"x86_64": 252, "aarch64": 31}
    IOPRIO_WHO_PROCESS = 1
    return system_call(numbers.get(os.uname().machine), IOPRIO_WHO_PROCESS, 0)


# --- One request: a program, or a test of it, in a process of its own


def execute(code, stdin, prelude, timeout, memory_mb, tested):
    """
    Runs a program, or the test of one, and ends everything that it started.

    Returns [stdout, stderr, return code, timed out?]; the return code is 128 + the signal if a
    signal ended the process. With `tested`, the test follows this request as the caller's next
    message; only the test's own process reads it. Raises MemoryError if there is not enough memory.
    """
    folder = tempfile.mkdtemp(dir=os.getcwd())
    with contextlib.ExitStack() as stack:
        stack.callback(remove_folder, folder)
        # Files, not pipes: nobody has to drain them, and a daemon that holds one delays nothing.
        files = [stack.enter_context(tempfile.TemporaryFile(dir=".")) for _ in range(3)]
        os.pwrite(files[0].fileno(), stdin.encode("utf-8", "replace"), 0)

        process = fork()
        if process == 0:
            run(code, prelude, tested, files, folder, timeout, memory_mb)

        status = wait_for(process, time.monotonic() + timeout)
        timed_out = status is None
        kill_all(process)
        status = reap_all(process, status)

        stdout = os.pread(files[1].fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace")
        stderr = os.pread(files[2].fileno(), ERROR_LIMIT, 0).decode("utf-8", "replace")

    returncode = os.waitstatus_to_exitcode(status)
    if returncode < 0:
        returncode = 128 - returncode
    return [stdout, shorten(stderr), returncode, timed_out]


def fork():
    """Forks this process. Raises MemoryError if there is no memory, or no process left, for it."""
    try:
        return os.fork()
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            raise MemoryError from error
        raise


def wait_for(process, deadline):
    """The wait status of a process; None if time runs out or the caller goes away."""
    # No events are asked for, so the poll reports one thing only: the caller's end is closed.
    caller = select.poll()
    caller.register(0, 0)
    while time.monotonic() < deadline:
        if caller.poll(2):
            return None
        # In namespaces all processes that lost their parent are ours to reap, not only this one.
        pid, status = os.waitpid(-1, os.WNOHANG)
        # Attack: a program asks to be traced and stops; a stopped process has not ended.
        if pid == process and not os.WIFSTOPPED(status):
            return status
    return None


def kill_all(process):
    """
    Attack: a program leaves processes behind that outlive it or disturb the next program.

    In namespaces this kills every process but the child itself. Outside it kills the program's
    process group, which a daemon can leave.
    """
    targets = [-1] if in_namespaces() else [-process, process]
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def reap_all(process, status):
    """Waits until all processes have ended. Returns the wait status of `process`."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, ended = os.wait()
            # A process that had ended earlier keeps its status: its number may be used again.
            if pid == process and status is None and not os.WIFSTOPPED(ended):
                status = ended
    return status


def remove_folder(folder):
    """Attack: a program leaves files. What cannot be removed shows up in box_state."""
    # A folder may be nested too deeply to be removed.
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)


def shorten(stderr):
    """
    Shortens an error as NuminaMath shows it to the model.

    Of a traceback remain its first line, the program's own lines and the last; of all text
    directories and addresses are removed:

        Traceback (most recent call last):
          File "program.py", line 4, in <module>
            f(2)
        ValueError: <object object at 0x...>
    """
    head = "Traceback (most recent call last):"
    lines = stderr.rstrip().split("\n")
    if head in lines:
        kept = []
        before = ""
        for line in lines[:-1]:
            own = 'File "program.py"'
            if line == head or own in line or own in before:
                kept.append(line)
            before = line
        stderr = "\n".join([*kept, lines[-1], ""])
    stderr = re.sub(r"(?<![\w/:])(/[\w.+-]+)+/", "", stderr)
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", stderr)


# --- The process of a program or a test


def run(code, prelude, tested, files, folder, timeout, memory_mb):
    """
    Runs a program, or the test of one, under limits, then ends this process.

    Attack: an exception that leaves this function would go on in the child's code, and a process
    that has failed could end with status 0, which means that a test is passed. So the status is 1
    until all is done, and nothing goes on after the last line.
    """
    status = 1
    streams = [sys.stdout, sys.stderr]
    try:
        leave_the_child(tested, files, folder)
        limit_resources(timeout, memory_mb)
        if tested:
            examine(code, prelude)
        else:
            load_program(code, prelude, "__main__")
        status = 0
    except SystemExit as end:
        status = exit_status(end)
    except BaseException as error:
        print_error(error)
    finally:
        try:
            finish(streams)
        finally:
            # Without the interpreter's own end, which takes 50 ms to free memory.
            os._exit(status)


def leave_the_child(tested, files, folder):
    """Attack: a program uses what the child has open: the pipe to the caller, other files."""
    # Attack: a program signals its process group (os.killpg(0, 9)). The child is in another one.
    os.setsid()
    os.chdir(folder)
    if not tested:
        os.dup2(files[0].fileno(), 0)
    # A test keeps the pipe at 0 until it has read itself from it (see read_test).
    os.dup2(files[1].fileno(), 1)
    os.dup2(files[2].fileno(), 2)
    os.closerange(3, 1024)


def limit_resources(timeout, memory_mb):
    """Attack: a program fills memory, disk, the process table or the kernel's tables."""
    limits = {
        "RLIMIT_CPU": math.ceil(timeout) + 1,
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_FSIZE": OUTPUT_LIMIT,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": task_limit(),
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in limits.items():
        # macOS does not have all of them.
        with contextlib.suppress(ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))


def task_limit():
    """Attack: a fork bomb. Returns how many processes and threads the program's user may have."""
    if os.getppid() == 1 or not os.path.exists("/proc/loadavg"):
        return MAX_TASKS
    # Without namespaces all processes of the user count: allow for all of the machine's.
    # The fourth word is "running/all".
    running_and_all = Path("/proc/loadavg").read_text().split()[3]
    return MAX_TASKS + int(running_and_all.split("/")[1])


def exit_status(end):
    """The exit status that a SystemExit asks for, with its message printed, as Python does it."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 255
    print(end.code, file=sys.stderr)
    return 1


def print_error(error):
    """Prints an exception with its traceback, without the lines of this file."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def finish(streams):
    """Ends as the interpreter does: waits for threads, runs atexit functions, writes output."""
    threading._shutdown()
    atexit._run_exitfuncs()
    # The program may have replaced or closed its streams.
    for stream in [*streams, sys.stdout, sys.stderr]:
        with contextlib.suppress(Exception):
            stream.flush()


def load_program(code, prelude, name):
    """
    Runs a program's code as the module `name`.

    Returns the module's names (a dict) and those of them that the program defines or mentions,
    without what the prelude brought.
    """
    show_to_itself()
    Path("program.py").write_text(code, "utf-8", "replace")
    module = types.ModuleType(name)
    module.__file__ = os.path.abspath("program.py")
    sys.modules[name] = module
    sys.argv = ["program.py"]
    sys.path[0] = os.getcwd()

    names = vars(module)
    exec(prelude, names)
    before = dict(names)
    compiled = compile(code, "program.py", "exec", dont_inherit=True)
    exec(compiled, names)

    defined = {}
    for key, value in names.items():
        is_new = key not in before or before[key] is not value
        # `from math import gcd` defines gcd, although the prelude has brought the same one.
        if is_new or key in compiled.co_names:
            defined[key] = value
    return names, defined


# --- Tests that are code: the test's process


def examine(code, prelude):
    """
    Forks a process for a program, then runs the test of it in this one.

    The test sees what the program defines as Remotes. It raises an exception if it fails.
    """
    link, programs_end = connection.Pipe()
    if os.fork() == 0:
        # Attack: the program ends with a status, or an exception, that is taken for the test's.
        try:
            link.close()
            answer_expressions(code, prelude, programs_end)
        finally:
            os._exit(1)
    programs_end.close()

    test = read_test()
    link.send_bytes(b"go")
    Remote._link = link

    names = {}
    exec(MODULES, names)
    defined = Remote._ask("objects[0]")
    names["defined"] = defined

    # Attack: a program replaces builtins and modules that its test uses (range, abs, math). It
    # cannot, unless the test uses no other name: then the program is tested under such a name.
    used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    visible = used - set(dir(builtins)) - set(names)
    if not visible:
        visible = used
    for name in visible & set(defined):
        names[name] = defined[name]
    exec(test, names)


def read_test():
    """Reads the test from the caller and closes the pipe: nobody in this process needs it again."""
    with connection.Connection(0) as caller:
        return json.loads(caller.recv_bytes())


class Remote:
    """
    In a test: an object that lives in the program's process.

    Calling it, its attributes and iterating over it happen there. Nothing else does: a Remote
    equals only itself.
    """

    def __init__(self, number):
        # Attack: a program forges {"Remote": text}, to choose what str() of a Remote is.
        if type(number) is not int:
            raise TypeError("the number of a Remote is an integer")
        vars(self)["_number"] = number

    def __repr__(self):
        return f"objects[{self._number}]"

    def __call__(self, *args, **kwargs):
        return Remote._ask(f"{self!r}(*{args!r}, **{kwargs!r})")

    def __getattr__(self, name):
        # Attack: libraries ask objects how to handle them (numpy for __array_interface__, copy for
        # __deepcopy__), and a program would tell numpy an address of the test's own memory.
        if name.startswith("__"):
            raise AttributeError(f"{self!r}.{name} cannot be used in a test")
        return Remote._ask(f"{self!r}.{name}")

    def __setattr__(self, name, value):
        Remote._ask(f"setattr({self!r}, {name!r}, {value!r})")

    def __iter__(self):
        return iter(Remote._ask(f"[*{self!r}]"))

    @staticmethod
    def _ask(expression):
        """The value of an expression in the program's process; an exception there is raised."""
        Remote._link.send_bytes(expression.encode())
        # Attack: a program replies with code. A pickle would run it in the test; JSON is data.
        value = json.loads(Remote._link.recv_bytes(), object_hook=unpack)
        if isinstance(value, StopIteration):
            # Attack: it would end the test's own loops in silence, before their assertions.
            raise RuntimeError(value)
        if isinstance(value, Exception):
            raise value
        return value


# --- Tests that are code: the program's process


def answer_expressions(code, prelude, test):
    """
    Runs a program, then evaluates the expressions that its test sends over the pipe `test`.

    objects[0] is the dict of what the program defines. The values go back as JSON (see pack).
    """
    # Attack: a program reads or writes the test's input and output. It gets none of them.
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)

    # Attack: a program kills its test's process at once, and the child reads the test in its
    # place. The program starts when the test has been read.
    test.recv_bytes()
    names, defined = load_program(code, prelude, "program")

    objects = [defined]
    while True:
        expression = test.recv_bytes()
        try:
            value = eval(expression, names | {"inf": math.inf, "nan": math.nan, "objects": objects})
        except Exception as error:
            value = error
        test.send_bytes(json.dumps(pack(value, objects)).encode())


def plain_kinds():
    """The types that travel as JSON {name: content}: containers, complex, exceptions; Remote."""
    bases = (list, tuple, set, frozenset, dict, complex, Exception)
    kinds = {"Remote": Remote}
    for name, kind in vars(builtins).items():
        if isinstance(kind, type) and issubclass(kind, bases):
            kinds[name] = kind
    return kinds


KINDS = plain_kinds()


def pack(value, objects):
    """
    A value of the program as JSON: plain data as the builtin type that it is an instance of.

    A subclass becomes its builtin base. Any other object is put in the list `objects`, and its
    place there is sent: (1, {2}, f) gives {"tuple": [1, {"set": [2]}, {"Remote": 3}]}.
    """
    # Arrays and numbers of numpy.
    if hasattr(type(value), "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in type(value).__mro__:
        name = kind.__name__
        if KINDS.get(name) is not kind:
            continue
        if issubclass(kind, (complex, Exception)):
            return {name: str(value)}
        items = value.items() if kind is dict else value
        return {name: [pack(item, objects) for item in items]}
    objects.append(value)
    return {"Remote": len(objects) - 1}


def unpack(pair):
    """The inverse of pack for one JSON object, {name: content}; KeyError if it is no such kind."""
    ((name, content),) = pair.items()
    return KINDS[name](content)


if __name__ == "__main__":
    enter()
    serve(execute, box_state)
