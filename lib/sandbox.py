"""
The sandbox for programs that models write: the caller's side.

The protocol, and the life of a child:

1. `start` starts a file as a process of its own, a child. For programs that is
   lib/sandbox_child.py, in a box (bubblewrap or namespaces); grader.py starts itself, without one.
2. The child's standard input is one end of a socket pair. Each message is JSON, with its length
   before it.
3. The child loads its libraries, drops its rights, and tells what its caller has to know: its user,
   its folder, and which defences this kernel does not have.
4. `ask` sends a request, a list, and waits for the reply for a limited time.
5. For each program the child forks a process; it never runs a program itself.
6. A program with a test has two processes, and the test is a second message, with a random token.
   Only the test's process reads it: neither the child nor the program ever holds the test. The
   test is passed only if this process gives the token back, which it does at its end.
7. The child kills all that the program started, collects the output, and replies.
8. Then it is idle, and is kept for the next request; a concurrent call starts another child.
9. Before each request the child compares what programs could have changed (box_state lists it). If
   anything differs, it ends and the caller starts another.
10. A child that is late, or dies, is killed with all that is in its box, and replaced. That costs
    one program, also if it happens while the child starts.
11. A child ends when its caller does, because its standard input is then closed.
12. The caller compares outputs and values of functions: what is expected never enters a box.
    Assertions do, in the test's process only.

A comment that begins with "Attack:" names what the lines below it prevent.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

from lib.sandbox_child import PRELUDE, SCRATCH, TOO_LONG, family, kill_groups, remove_folder

__all__ = [
    "PRELUDE",
    "REPLAY",
    "GraderError",
    "ChildDied",
    "ChildTimeout",
    "RunResult",
    "ask",
    "start",
    "isolation",
    "describe_isolation",
    "run_python",
]

# The levels of isolation, the best first (docs/sandbox.md).
LEVELS = ("bubblewrap", "namespaces", "limits")
CHILD_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
# Seconds that a child has to load its libraries.
START_SECONDS = 120
# If no child has started for so many seconds, the machine is at fault.
NO_START_SECONDS = 600
# Seconds that it may take to end what a child without namespaces has left.
END_SECONDS = 5
# Seconds after which a child that does not read a message counts as dead.
SEND_SECONDS = 60
# Seconds after which a child that stops in the middle of a reply is late.
RECEIVE_SECONDS = 60
# Seconds that a child has beyond the program's own time, to end it and to collect its output.
GRACE_SECONDS = 10
# An idle child that dies so many seconds after a request, or earlier, was already ending.
AT_ONCE_SECONDS = 5
# Bytes of memory that programs in a box may fill with files.
SCRATCH_BYTES = 64 << 20

# Attack: a program reads tokens and passwords in environment variables. It gets these alone.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": ".",
    "TMPDIR": ".",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONNOUSERSITE": "1",
}

# Put before a program: runs the earlier programs of an answer. What they define is there, what
# they and their children print goes nowhere.
REPLAY = """def replay(programs):
    import contextlib, os, sys
    shown, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    for program in programs:
        with contextlib.suppress(SystemExit): exec(program, globals())
    sys.stdout.flush()
    os.dup2(shown, 1)
"""


class GraderError(RuntimeError):
    """The grader itself failed: a bug to fix, never a reward."""


class ChildDied(Exception):
    """A child died, or had not enough memory for a request."""


class IdleChildDied(ChildDied):
    """A child that had been idle died at once: it was about to end before the request."""


class ChildTimeout(Exception):
    """A child did not reply in time; it has been killed."""


# What is still open to programs where the kernel lacks a defence of lib/sandbox_child.py.
OPEN = {
    "files": "without Landlock (Linux 5.19) they can mount file systems in namespaces of their own",
    "system calls": "without seccomp they can use all system calls",
}
# What is open beyond bubblewrap's box.
OPEN_AT_LEVEL = {
    "bubblewrap": "",
    "namespaces": "they see the names of this machine's files",
    "limits": "they see the names of this machine's files and processes, and can fill its disk",
}
# The same where files are not protected by Landlock.
OPEN_FILES = "they can read this machine's files and write the user's"


class RunResult(NamedTuple):
    """The outcome of a program; the return code is 128 + the signal if a signal ended it."""

    stdout: str
    stderr: str
    returncode: int
    timed_out: bool


@dataclass
class Child:
    """
    A process that answers requests, and the caller's end of its pipe.

    about: its first message (sandbox_child.enter). mark: a word in its environment, and in that of
    all that it starts.
    """

    process: subprocess.Popen
    pipe: connection.Connection
    mark: str = ""
    about: dict = field(default_factory=dict)


# Idle children for programs: a list for each (level, interpreter).
IDLE: dict[tuple[str, str], list[Child]] = {}
# A fork of this process must not talk to its parent's children, nor keep their pipes open.
os.register_at_fork(after_in_child=IDLE.clear)
# For each (file, level) that has ever started a child: when starts began to fail, or None.
FAILING_SINCE: dict[tuple[str, str | None], float | None] = {}
# What this kernel leaves open, for each level of which a child has started.
LEFT_OPEN: dict[str, list[str]] = {}


# --- Programs


def run_python(
    code: str,
    stdin: str = "",
    timeout: float = 10.0,
    memory_mb: int = 1024,
    level: str | None = None,
    prelude: str = "",
    test: str | None = None,
) -> RunResult:
    """
    Runs a program in the sandbox, or a test of it (then the result is the test's).

    timeout: seconds of wall clock. memory_mb: address space of each process. level: one of LEVELS
    (default: the best that works here). prelude: code that runs before the program. test: code
    that uses what the program defines; it passes if the return code is 0. A program has one
    thread for numerics and no GPU. stderr is shortened as NuminaMath shows it to the model.
    Thread-safe: each concurrent call has a child of its own. Raises GraderError on a bug of ours.

        run_python("print(input())", "3").stdout == "3\\n"
    """
    level = level or isolation()
    messages = [[code, stdin, prelude, timeout, memory_mb, bool(test)]]
    # Attack: a program ends its test's process in a way that looks like success.
    token = secrets.token_hex(16) if test else ""
    if test:
        messages.append({"test": test, "token": token})

    idle = IDLE.setdefault((level, sys.executable), [])
    seconds = timeout + GRACE_SECONDS
    try:
        try:
            reply = ask(idle, CHILD_FILE, level, seconds, *messages)
        except IdleChildDied:
            # An earlier program had tampered with it. A new child, in a list of its own: when this
            # call is over, the list and with it the child's input are gone, and the child ends.
            reply = ask([], CHILD_FILE, level, seconds, *messages)
    except ChildTimeout:
        # The program has stopped its child.
        return RunResult("", "", 128 + signal.SIGKILL, True)
    except ChildDied:
        # The program has killed its child, or there was not enough memory for it.
        return RunResult("", "", 128 + signal.SIGKILL, False)
    *outcome, returned = reply
    result = RunResult(*outcome)
    if result.stderr == TOO_LONG:
        warnings.warn(f"{len(stdin)} characters: {TOO_LONG.strip()}", stacklevel=2)
    if returned != token and result.returncode == 0:
        return result._replace(returncode=1)
    return result


@functools.cache
def isolation(sandbox: str | None = None) -> str:
    """
    What separates programs from this machine: the first of LEVELS that works here.

    sandbox="required" accepts the first level only, from then on and in processes started later
    (by PRIME_SANDBOX in the environment). Raises RuntimeError if there is no such level.
    """
    required = "required" in (sandbox, os.environ.get("PRIME_SANDBOX"))
    sandbox = "required" if required else "auto"
    levels = LEVELS[:1] if required else LEVELS
    for level in levels:
        with contextlib.suppress(GraderError):
            # Twice: a child may be killed while it works, which says nothing about the level.
            for _ in range(2):
                result = run_python("print(6 * 7)", timeout=START_SECONDS, level=level)
                if result.stdout == "42\n":
                    os.environ["PRIME_SANDBOX"] = sandbox
                    return level
    raise RuntimeError(f"sandbox={sandbox!r} is not available on this machine")


def describe_isolation(sandbox: str | None = None) -> str:
    """
    The level of `isolation`, and what programs can still do at it on this machine, in words.

    Raises RuntimeError as `isolation` does.
    """
    level = isolation(sandbox)
    left_open = LEFT_OPEN.get(level, [])
    words = [OPEN[name] for name in left_open]
    if level != "bubblewrap" and "files" in left_open:
        words.append(OPEN_FILES)
    words.append(OPEN_AT_LEVEL[level])
    text = "; ".join(filter(None, words))
    return f"{level} ({text})" if text else level


# --- Children


def ask(idle: list[Child], file: str, level: str | None, seconds: float, *messages):
    """
    The reply of an idle child to these messages; of a new one, if none is idle.

    idle: the caller's list of children that run `file` at `level`; the child that replied goes
    back to it. Raises ChildTimeout if there is no reply within `seconds`, ChildDied if the child
    ended or had not enough memory (IdleChildDied: it may not have begun with the request),
    GraderError with a traceback if it reports a bug of its own.
    """
    child = take_idle(idle)
    was_idle = child is not None
    if child is None:
        child = start(file, level)

    began = time.monotonic()
    try:
        for message in messages:
            child.pipe.send_bytes(json.dumps(message).encode())
        if not child.pipe.poll(seconds):
            raise ChildTimeout(f"no reply within {seconds} seconds")
        reply = json.loads(receive(child.pipe))
    except ChildTimeout:
        kill(child)
        raise
    except (OSError, EOFError):
        at_once = time.monotonic() - began < AT_ONCE_SECONDS
        kill(child)
        if was_idle and at_once:
            raise IdleChildDied("an idle child process has ended") from None
        raise ChildDied("the child process has ended") from None

    idle.append(child)
    if "bug" in reply:
        raise GraderError(reply["bug"])
    if "memory" in reply:
        raise ChildDied("not enough memory")
    return reply["answer"]


def receive(pipe: connection.Connection) -> bytes:
    """A message that has begun to arrive. Raises ChildTimeout if the rest of it does not."""
    try:
        return pipe.recv_bytes()
    except BlockingIOError:
        raise ChildTimeout(f"no end of a reply within {RECEIVE_SECONDS} seconds") from None


def take_idle(idle: list[Child]) -> Child | None:
    """Takes a child that still lives from the list; None if there is none. Thread-safe."""
    with contextlib.suppress(IndexError):
        while True:
            child = idle.pop()
            if child.process.poll() is None:
                return child
            kill(child)
    return None


def kill(child: Child):
    """Ends a child and all that is in its box."""
    folder = child.about.get("folder")
    if folder is not None:
        kill_programs(child)
    # The child leads a process group, to which bubblewrap and what it started belong. If it has
    # been waited for, its number may be another's already.
    if child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
    child.pipe.close()
    if folder is not None:
        # Attack: so many files that removing them takes minutes. Nobody waits for that.
        threading.Thread(target=remove_folder, args=[folder], daemon=True).start()


def kill_programs(child: Child):
    """Attack: without namespaces, programs outlive their child, which they have stopped."""
    # From the child's first message, which it sent before any program ran.
    user = child.about["user"]
    if user is not None:
        # All processes of the child's own user, at a time: a fork bomb cannot run away.
        command = ["sh", "-c", "kill -9 -1"]
        rights = {"user": user, "group": user, "extra_groups": []}
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL, **rights)
        return

    # Programs have our user. What descends from the child is theirs, and what has its mark. One
    # that drops the mark cannot leave its group, and orphans go to the child (sandbox_child.py).
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        groups = groups_of_mark(child.mark)
        if child.process.returncode is None:
            groups |= {relative.group for relative in family(child.process.pid)}
        if not groups:
            break
        kill_groups(groups)


def groups_of_mark(mark: str) -> set[int]:
    """The groups of all processes that were started with this word in their environment."""
    groups = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                groups.add(os.getpgid(int(environment.parent.name)))
    return groups


def start(file: str, level: str | None) -> Child:
    """
    Starts a child that runs `file`, and waits until it is ready.

    level: one of LEVELS, for programs; None for a child without a box, in this environment. Raises
    ChildDied if it does not start, twice: it was killed, or the machine is slow. Raises GraderError
    instead if none has ever started, or none for ten minutes.
    """
    kind = (os.path.abspath(file), level)
    for _ in range(2):
        child = try_to_start(*kind)
        if child is not None:
            FAILING_SINCE[kind] = None
            return child

    now = time.monotonic()
    has_started = kind in FAILING_SINCE
    since = FAILING_SINCE.get(kind) or now
    if has_started and now - since < NO_START_SECONDS:
        FAILING_SINCE[kind] = since
        raise ChildDied("a child process has not started")
    raise GraderError(f"a child process ({file}, {level}) does not start")


def try_to_start(file: str, level: str | None) -> Child | None:
    """Starts a child; None if there is no such command, or the child is not ready in time."""
    ours, theirs = connection.Pipe()
    limit_waiting(ours)
    mark = f"sandbox-{secrets.token_hex(16)}"
    environment = os.environ
    arguments = []
    if level:
        environment = ENVIRONMENT | {"PRIME_MARK": mark}
        arguments = [level, *visible_paths(file)]
    try:
        # Attack: a program pushes keystrokes into the caller's terminal (TIOCSTI). A new session
        # has no terminal. stderr stays the caller's, for what the child itself has to complain of:
        # programs get files for theirs, and may not look into the child's (hide_from_programs).
        process = subprocess.Popen(
            [*box(level, file), sys.executable, file, *arguments],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env=environment,
            start_new_session=True,
        )
    except OSError:
        return None
    finally:
        theirs.close()

    child = Child(process, ours, mark)
    with contextlib.suppress(OSError, EOFError, ValueError):
        if ours.poll(START_SECONDS):
            child.about = json.loads(receive(ours)) or {}
            LEFT_OPEN[level] = child.about.get("open", [])
            return child
    kill(child)
    return None


def limit_waiting(pipe: connection.Connection):
    """Attack: a program stops its child in the middle of a message; the caller waits for ever."""
    limits = {socket.SO_SNDTIMEO: SEND_SECONDS, socket.SO_RCVTIMEO: RECEIVE_SECONDS}
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        for option, seconds in limits.items():
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


# --- Boxes


def box(level: str | None, file: str) -> list[str]:
    """The command that puts another command, which runs `file`, in a box of this level."""
    if level == "bubblewrap":
        return bubblewrap(file)
    if level == "namespaces":
        return namespaces()
    return []


def bubblewrap(file: str) -> list[str]:
    """The best box: of this machine's files only its programs and libraries can be seen."""
    command = ["bwrap"]
    # Attack: a program uses the network, or sockets and shared memory of other processes.
    command += ["--unshare-net", "--unshare-ipc", "--unshare-uts"]
    # Attack: a program sees, signals or outlives other processes. The child is process 1: when
    # it ends, the kernel kills all others in the box.
    command += ["--unshare-pid", "--as-pid-1", "--proc", "/proc", "--dev", "/dev"]
    # The child of a root user needs these two to become another user (drop_root).
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # Attack: a program reads or changes files. It sees the system's programs and libraries and this
    # Python's folders, read-only, and nothing else.
    for path in visible_paths(file):
        for folder in reversed(Path(path).parents[:-1]):
            # Without permissions of its own a folder is open to root alone.
            command += ["--perms", "0755", "--dir", str(folder)]
        command += ["--ro-bind-try", path, path]
    # Attack: a program fills the disk. It writes to a little memory, and nowhere else.
    command += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return command


def visible_paths(file: str) -> list[str]:
    """What programs in bubblewrap see of this machine's files, each by its name and its target."""
    paths = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"]
    paths += [sys.prefix, sys.base_prefix, file]
    names = set()
    for path in paths:
        names.add(os.path.abspath(path))
        names.add(os.path.realpath(path))
    return sorted(names)


def namespaces() -> list[str]:
    """The second box: no network and no other process, but this machine's files can be read."""
    # The same attacks as in bubblewrap; the child is process 1 here too.
    command = ["unshare", "--net", "--ipc", "--pid", "--fork", "--mount-proc"]
    # An ordinary user may mount in a user namespace only, with rights that setpriv takes away.
    if os.getuid() != 0:
        command += ["--map-current-user", "--keep-caps"]
    mount = f"mount -t tmpfs -o size={SCRATCH_BYTES},mode=1777 - {SCRATCH}"
    drop_rights = "exec setpriv --inh-caps=-all --ambient-caps=-all"
    return [*command, "sh", "-c", f'{mount} && {drop_rights} "$@"', "sh"]
