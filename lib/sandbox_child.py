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

How a test is passed: the caller draws a token and sends it with the test. Only the process of the
test reads the two, and the program has been forked before it does. At the end of the test, and
nowhere else, this process gives the token back, through the child. Whatever ends it earlier (an
exception, an exit, a signal) leaves the test without its token, and so failed.
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import errno
import functools
import gc
import glob
import json
import math
import os
import random
import re
import resource
import secrets
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
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
# Seconds between two looks at the memory of a program that is still running.
LOOK_SECONDS = 0.05
# Of the time that a look takes, so many times go by until the next one.
LOOK_PAUSE = 20
# Where the process of a test has the pipe for its token.
TOKEN = 3
# What a program gets whose input is longer than the scratch.
TOO_LONG = "the standard input does not fit into the sandbox\n"
# What the machine can be short of: processes, memory, room on a disk, open files. It costs the
# program, and is no bug of ours.
SHORTAGES = {
    *(errno.EAGAIN, errno.ENOMEM),
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EMFILE, errno.ENFILE),
}
# The longest integer that travels in decimals, in bits: Python writes 4,300 digits at most.
MAX_BITS = 10_000
# The process that has started this one.
CALLER = os.getppid()
# The user that programs are if we were root, which has no other processes (see drop_root).
OWN_USER = None

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


def nothing():
    """The state of a child that runs no programs, and what it does at its end."""
    return None


def serve(answer, state=nothing, about=None, at_end=nothing):
    """
    Answers requests until the caller is gone, then ends this process.

    The first message to the caller is `about`, as JSON.

    A request is a JSON list over standard input. `answer(*request)` computes the reply, which is
    sent as {"answer": value}; {"memory": true} if there was not enough memory for it; or
    {"bug": traceback} if `answer` raised an exception.

    `state()` returns what a program could have changed. If it is not what it was at the start, a
    program has tampered with this child: the child ends, and its caller starts another.
    `at_end()` is called before any end.
    """
    caller = connection.Connection(0)
    fresh = state()
    caller.send_bytes(json.dumps(about).encode())

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
    try:
        at_end()
    finally:
        os._exit(0)


# --- System calls that are refused to programs

# The numbers of system calls on x86_64 and on aarch64.
NUMBERS = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fcntl": (72, 25),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioprio_get": (252, 31),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "lsetxattr": (189, 6),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "seccomp": (317, 277),
    "semget": (64, 190),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "setsid": (112, 157),
    "setxattr": (188, 5),
    "setxattrat": (463, 463),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}

# Refused whatever their arguments are: the error that a program gets, and the system calls.
REFUSED = {
    # Attack: namespaces of its own, in which a program mounts file systems (cgroups, a tmpfs of
    # any size, FUSE), and is root to code of the kernel that ordinary users never reach.
    errno.EPERM: [
        *("unshare", "setns", "chroot", "pivot_root", "mount", "umount2", "mount_setattr"),
        *("open_tree", "open_tree_attr", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
        # Attack: the keys of the user, which processes of other problems have, too.
        *("keyctl", "add_key", "request_key"),
        # Attack: the memory and descriptors of other processes.
        *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
        *("pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
        # Attack: parts of the kernel in which many faults have been found.
        *("bpf", "perf_event_open", "userfaultfd", "name_to_handle_at", "open_by_handle_at"),
        # Attack: the child's priority at the disk.
        "ioprio_set",
    ],
    errno.ENOSYS: [
        # Its flags are in memory, where a filter cannot see them. Libraries use clone instead.
        "clone3",
        # Attack: system calls that pass by this filter.
        *("io_uring_setup", "io_uring_enter", "io_uring_register"),
        # Attack: memory that belongs to no process, so that no limit of one counts it, and
        # queues and memory that outlive their program.
        *("memfd_create", "memfd_secret", "shmget", "semget", "msgget"),
    ],
    # Attack: attributes of files, in which a program leaves messages. Copying a file still works.
    errno.EOPNOTSUPP: ["setxattr", "lsetxattr", "fsetxattr", "setxattrat"],
}

# Attack: a program has the kernel send signals to any process, or types into a terminal. Refused
# are these values of an argument: F_SETSIG, F_SETOWN_EX, F_SETOWN; TIOCSTI, FIOSETOWN, SIOCSPGRP.
REFUSED_VALUES = [
    ("fcntl", 1, [10, 15, 8]),
    ("ioctl", 1, [0x5412, 0x8901, 0x8902]),
]

# Attack: a program changes the limits or the priority of its child, or of the caller. The argument
# with this index is a process, or what kind of number a process has; only 0 is allowed, which is
# the program itself.
OWN_ONLY = [
    ("prlimit64", 0),
    ("setpriority", 0),
    ("setpriority", 1),
    ("sched_setaffinity", 0),
    ("sched_setattr", 0),
    ("sched_setparam", 0),
    ("sched_setscheduler", 0),
]

# Flags of clone: a new mount, cgroup, uts, ipc, user, pid or network namespace.
NEW_NAMESPACES = 0x7E020000

# Machines that we know the numbers for: their index in NUMBERS, and how the kernel calls them.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of a filter: load a word of the call, compare it and jump, return.
LOAD = 0x20
IS_EQUAL = 0x15
IS_AT_LEAST = 0x35
HAS_ANY_BIT = 0x45
RETURN = 0x06
# What a filter returns: the system call goes on, or fails with the error in the lower bits.
ALLOW = 0x7FFF0000
FAIL = 0x00050000
# Where a call has its number, its machine and its first argument, in bytes. We look at the lower
# half of arguments: the kernel takes all that we look at as numbers of 32 bits.
NUMBER_AT = 0
MACHINE_AT = 4
ARGUMENTS_AT = 16


def instruction(code, value, if_true=0, if_false=0):
    """One instruction of a filter; the jumps count the instructions that are left out."""
    return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def rule(name, body):
    """A rule of a filter: these instructions, for this system call alone; [] if it is unknown."""
    number = system_call_number(name)
    if number is None:
        return []
    start = [instruction(LOAD, NUMBER_AT), instruction(IS_EQUAL, number, 0, len(body))]
    return start + body


def refuse(name, error):
    """The rule that a system call fails with this error."""
    return rule(name, [instruction(RETURN, FAIL | error)])


def refuse_values(name, error, argument, values):
    """The rule that a system call fails if an argument has one of these values."""
    body = [instruction(LOAD, ARGUMENTS_AT + 8 * argument)]
    for value in values:
        body += [instruction(IS_EQUAL, value, 0, 1), instruction(RETURN, FAIL | error)]
    return rule(name, body)


def refuse_others(name, error, argument, value):
    """The rule that a system call fails unless an argument has this value."""
    body = [instruction(LOAD, ARGUMENTS_AT + 8 * argument)]
    body += [instruction(IS_EQUAL, value, 1, 0), instruction(RETURN, FAIL | error)]
    return rule(name, body)


def refuse_bits(name, error, argument, bits):
    """The rule that a system call fails if an argument has one of these bits."""
    body = [instruction(LOAD, ARGUMENTS_AT + 8 * argument)]
    body += [instruction(HAS_ANY_BIT, bits, 0, 1), instruction(RETURN, FAIL | error)]
    return rule(name, body)


def filter_system_calls(rules):
    """
    Puts a filter on this process and all that it forks, for good; returns whether that worked.

    seccomp(2) and linux/filter.h describe the format.
    """
    index_and_machine = MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or index_and_machine is None:
        return False
    no_such_call = instruction(RETURN, FAIL | errno.ENOSYS)
    # Attack: the same calls by the numbers of 32-bit programs, which the rules do not know.
    program = [instruction(LOAD, MACHINE_AT)]
    program += [instruction(IS_EQUAL, index_and_machine[1], 1, 0), no_such_call]
    program += [instruction(LOAD, NUMBER_AT)]
    program += [instruction(IS_AT_LEAST, 1 << 30, 0, 1), no_such_call]
    for one in rules:
        program += one
    program += [instruction(RETURN, ALLOW)]

    SET_MODE_FILTER = 1
    # Without slowing the processor down: the filter is no defence against its faults.
    SPEC_ALLOW = 4
    content = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("@HP", len(program), ctypes.addressof(content))
    return system_call(system_call_number("seccomp"), SET_MODE_FILTER, SPEC_ALLOW, header) == 0


def system_call_number(name):
    """The number of a system call on this machine; None if we do not know it."""
    index_and_machine = MACHINES.get(os.uname().machine)
    if index_and_machine is None:
        return None
    return NUMBERS[name][index_and_machine[0]]


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


def enter(level, paths):
    """
    Prepares this process for programs, which inherit all of it, one step per line.

    paths: what programs may read. Returns what the caller has to know: "user" and "folder" are
    there for the caller to clean up, "open" lists the defences that this kernel does not have.
    """
    load_libraries()
    be_killed_first()
    leave_keyring()
    drop_root()
    adopt_orphans()
    forbid_new_privileges()
    go_to_scratch()
    is_open = {
        "files": not limit_files([*paths, "/proc"], os.getcwd()),
        "system calls": not limit_system_calls(level),
    }
    hide_from_programs()
    end_on_interrupt()

    missing = [name for name, value in is_open.items() if value]
    # In namespaces the kernel cleans up.
    folder = None if in_namespaces() else os.getcwd()
    return {"user": OWN_USER, "folder": folder, "open": missing}


@functools.cache
def brought_by(source):
    """The names that these imports bring, with their values."""
    names = {}
    exec(source, names)
    return names


def load_libraries():
    """Loads what programs may import, once: a fork is faster than the import of sympy."""
    brought_by(PRELUDE)
    brought_by(MODULES)
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
    JOIN_SESSION_KEYRING = 1
    # Without a name: a new, empty keyring.
    system_call(system_call_number("keyctl"), JOIN_SESSION_KEYRING, None)


def drop_root():
    """
    Attack: a program acts as root. It runs as a user that owns nothing and has no name.

    No other process has this user: all of its processes belong to a program, and end with it.
    """
    global OWN_USER
    if os.getuid() != 0:
        return
    # Numbers that systemd keeps for users made on the fly.
    numbers = list(set(range(61184, 65520)) - users_of_processes())
    random.SystemRandom().shuffle(numbers)
    OWN_USER = next(number for number in numbers if is_ours_alone(number))
    os.setgroups([])
    os.setgid(OWN_USER)
    os.setuid(OWN_USER)


def users_of_processes():
    """The numbers of all users that have a process now."""
    users = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            found = re.search(r"^Uid:\s+(\d+)", status.read_text(), re.MULTILINE)
            users.add(int(found[1]))
    return users


def is_ours_alone(user):
    """
    Reserves a user for this process, against the other children that start just now.

    In namespaces no child sees another. Two may then have the same user, and share the limit on
    its processes (RLIMIT_NPROC), but nothing else: they cannot signal or read each other.
    """
    if sys.platform != "linux":
        return True
    # An abstract socket has a name that one process at a time can hold, and no file.
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0prime-sandbox-user-{user}")
    except OSError:
        lock.close()
        return False
    # Open until this process ends.
    lock.detach()
    return True


def adopt_orphans():
    """Attack: a daemon loses its parent, to outlive its program. It becomes our child instead."""
    PR_SET_CHILD_SUBREAPER = 36
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges():
    """Attack: a program runs a setuid file (su, sudo, mount) to become root."""
    PR_SET_NO_NEW_PRIVS = 38
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit_files(paths, scratch):
    """
    Attack: without bubblewrap, a program reads tests and writes the user's files.

    It may read and run what is below `paths`, and do all below `scratch`. Under such rules
    (Landlock, Linux 5.19 or newer) the kernel also refuses to mount, to trace processes outside,
    and, from Linux 6.12 on, to send signals to them. Returns whether the kernel has such rules.
    landlock(7) and linux/landlock.h describe the numbers.
    """
    CREATE_RULESET, RESTRICT_SELF = 444, 446
    # Run a file, read a file, list a folder.
    READ = 0b1101
    WRITE_FILE = 0b10
    REMOVE_FOLDER = 0b10000
    # The number of rights grows with the version of Landlock; earlier than 2 none can be used.
    rights = {2: 14, 3: 15, 4: 15}
    version = system_call(CREATE_RULESET, None, 0, 1)
    if version < 2:
        return False
    everything = (1 << rights.get(version, 16)) - 1

    # Three sets: rights of files, of the network (none is handled, seccomp refuses it), and what
    # may not go outside: abstract sockets and signals.
    handled = struct.pack("=QQQ", everything, 0, 0b11)
    size = 24 if version >= 6 else 8
    ruleset = system_call(CREATE_RULESET, handled, size, 0)
    if ruleset < 0:
        return False
    allow(ruleset, scratch, everything)
    if not in_namespaces():
        # The child removes its folder in the end.
        allow(ruleset, os.path.dirname(scratch), REMOVE_FOLDER)
    for path in paths:
        allow(ruleset, path, READ)
    for name in ("null", "zero", "full", "random", "urandom"):
        allow(ruleset, f"/dev/{name}", READ | WRITE_FILE)
    is_limited = system_call(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_limited


def allow(ruleset, path, rights):
    """Adds a rule of Landlock: these rights below this path, if there is such a path."""
    ADD_RULE = 445
    PATH_BENEATH = 1
    # Those that a rule for a single file may have: run, write, read, truncate, ioctl.
    RIGHTS_OF_FILES = 0b1100000000000111
    try:
        place = os.open(path, os.O_PATH)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= RIGHTS_OF_FILES
    system_call(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def limit_system_calls(level):
    """
    Attack: a program uses what the kernel offers beyond the need of any answer.

    A filter (seccomp) refuses the system calls of REFUSED, and sockets. Local ones are allowed in
    bubblewrap, where they reach no other process, and everywhere as a pair, which reaches nobody.
    Returns whether there is a filter.
    """
    rules = []
    for error, names in REFUSED.items():
        for name in names:
            rules.append(refuse(name, error))
    for name, argument, values in REFUSED_VALUES:
        rules.append(refuse_values(name, errno.EPERM, argument, values))
    for name, argument in OWN_ONLY:
        rules.append(refuse_others(name, errno.EPERM, argument, 0))
    rules.append(refuse_bits("clone", errno.EPERM, 0, NEW_NAMESPACES))
    # Attack: a pair of sockets of any kind, for which the kernel may even load a module.
    rules.append(refuse_others("socketpair", errno.EAFNOSUPPORT, 0, socket.AF_UNIX))
    if level == "bubblewrap":
        rules.append(refuse_others("socket", errno.EAFNOSUPPORT, 0, socket.AF_UNIX))
    else:
        rules.append(refuse("socket", errno.EAFNOSUPPORT))
    return filter_system_calls(rules)


def protect_processes(processes):
    """
    Attack: without namespaces, a program stops or kills its child or its caller.

    processes: their numbers, which no signal of this process may go to from now on. The kernel
    also takes the number of a thread for its process; only Landlock sees to that (limit_files).
    """
    targets = [-1]
    for process in processes:
        targets += [process, -process, -os.getpgid(process)]
    rules = []
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        rules.append(refuse_values(name, errno.EPERM, 0, targets))
    rules.append(refuse("tkill", errno.ENOSYS))
    if not is_alone():
        # Attack: processes that fork and end faster than we look for them. All stay in one group,
        # which one call kills.
        rules += [refuse("setsid", errno.EPERM), refuse("setpgid", errno.EPERM)]
    filter_system_calls(rules)


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
    """Programs run in the box's own memory, or without namespaces in a new folder of the child."""
    folder = SCRATCH
    if not in_namespaces():
        folder = tempfile.mkdtemp(prefix="prime-sandbox-", dir=os.getcwd())
    os.chdir(folder)


def leave():
    """Without namespaces, removes the folder of this child, in which all programs ran."""
    if not in_namespaces():
        remove_folder(os.getcwd())


def in_namespaces():
    """Is this child process 1, that is, alone with its programs in namespaces of its own?"""
    return os.getpid() == 1


def box_state():
    """
    What a program could change for the programs after it: limits, priorities, the scratch folder
    (its files, mode and attributes) and shared memory.

    Attack: a program tampers with the child or leaves messages for later programs. A child whose
    state has changed ends, and its namespaces with it; the caller starts another. Without
    namespaces the shared memory is the machine's, and not compared.
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
    # Attack: a program of our user's closes the folder for all later programs.
    folder = [os.stat(".").st_mode, os.listxattr(".")]
    files = os.listdir()
    if not in_namespaces():
        return [limits, scheduling, folder, files]
    shared_memory = [path.read_text() for path in sorted(Path("/proc/sysvipc").iterdir())]
    return [limits, scheduling, folder, files, shared_memory]


def io_priority():
    """The priority of this process at the disk; -1 where it cannot be asked for."""
    WHO_PROCESS = 1
    return system_call(system_call_number("ioprio_get"), WHO_PROCESS, 0)


# --- One request: a program, or a test of it, in a process of its own


def execute(code, stdin, prelude, timeout, memory_mb, tested):
    """
    Runs a program, or the test of one, and ends everything that it started.

    Returns [stdout, stderr, return code, timed out?, token]; the return code is 128 + the signal if
    a signal ended the process. With `tested`, the test follows this request as the caller's next
    message; only the test's own process reads it, and gives the token back that comes with it.
    Raises MemoryError if there is not enough memory.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_errors())
        folder = tempfile.mkdtemp(dir=os.getcwd())
        stack.callback(remove_folder, folder)
        # Files, not pipes: nobody has to drain them, and a daemon that holds one delays nothing.
        files = [stack.enter_context(tempfile.TemporaryFile(dir=".")) for _ in range(3)]
        if not tested and not write_all(files[0].fileno(), stdin.encode("utf-8", "replace")):
            return ["", TOO_LONG, 1, False, ""]
        numbers = [file.fileno() for file in files]
        tokens, token_end = open_pipe(stack)

        process = os.fork()
        if process == 0:
            numbers.append(token_end)
            run(code, prelude, tested, numbers, folder, timeout, memory_mb)

        status = wait_for(process, time.monotonic() + timeout, memory_mb)
        timed_out = status is None
        kill_all(process)
        status = reap_all(process, status)

        stdout = os.pread(files[1].fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace")
        stderr = os.pread(files[2].fileno(), ERROR_LIMIT, 0).decode("utf-8", "replace")
        token = ""
        with contextlib.suppress(BlockingIOError):
            token = os.read(tokens, 100).decode("ascii", "replace")

    returncode = os.waitstatus_to_exitcode(status)
    if returncode < 0:
        returncode = 128 - returncode
    return [stdout, shorten(stderr), returncode, timed_out, token]


def write_all(file, content):
    """Writes a file from its start. Returns whether there was room for all of it."""
    try:
        return os.pwrite(file, content, 0) == len(content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False


def open_pipe(stack):
    """Both ends of a pipe, open until the stack ends; reading from it never waits."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    stack.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing


@contextlib.contextmanager
def memory_errors():
    """Turns an error of the machine, which is short of something, into a MemoryError."""
    try:
        yield
    except OSError as error:
        if error.errno in SHORTAGES:
            raise MemoryError from error
        raise


def wait_for(process, deadline, memory_mb):
    """
    The wait status of a process; None if time runs out or the caller goes away.

    Attack: a program fills the machine's memory by many processes, each below its own limit. All
    together have the same limit, and are killed if they exceed it.
    """
    # No events are asked for, so the poll reports one thing only: the caller's end is closed.
    caller = select.poll()
    caller.register(0, 0)
    next_look = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < deadline:
        if caller.poll(2):
            return None
        # In namespaces all processes that lost their parent are ours to reap, not only this one.
        pid, status = os.waitpid(-1, os.WNOHANG)
        # Attack: a program asks to be traced and stops; a stopped process has not ended.
        if pid == process and not os.WIFSTOPPED(status):
            return status

        began = time.monotonic()
        if began > next_look:
            # Twice: for a moment, a process that starts another program counts as two.
            if not has_modest_family(memory_mb):
                time.sleep(LOOK_SECONDS / 2)
                if not has_modest_family(memory_mb):
                    kill_all(process)
            took = time.monotonic() - began
            next_look = began + max(LOOK_SECONDS, LOOK_PAUSE * took)
    return None


class Relative(typing.NamedTuple):
    """A process that descends from another: its group, its threads, its bytes in memory."""

    pid: int
    group: int
    threads: int
    memory: float


def family(ancestor):
    """All processes that descend from this one, as Relatives; [] where there is no /proc."""
    by_parent = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid = int(stat.split("/")[2])
            parent, relative = read_stat(pid, Path(stat).read_bytes())
            by_parent.setdefault(parent, []).append(relative)

    members = []
    parents = [ancestor]
    while parents:
        for relative in by_parent.pop(parents.pop(), []):
            members.append(relative)
            parents.append(relative.pid)
    # One that has ended has no threads and only waits for its parent.
    return [relative for relative in members if relative.threads > 0]


def read_stat(pid, text):
    """(the number of a process's parent, the process as a Relative), from its /proc/PID/stat."""
    # What follows the name of the program, in parentheses, which may hold anything.
    state, parent, group, *others = text.rpartition(b")")[2].split()
    threads = int(others[14])
    memory = int(others[18]) * resource.getpagesize()
    if state in b"ZX":
        # Attack: the first thread ends, so that the memory of the others is not shown.
        memory = math.inf
        threads -= 1
    return int(parent), Relative(pid, int(group), threads, memory)


def has_modest_family(memory_mb):
    """Have the processes of the program few threads, and less memory than this together?"""
    members = family(os.getpid())
    if sum(relative.threads for relative in members) > MAX_TASKS:
        return False
    limit = memory_mb << 20
    # First what is cheap to know: here pages that several processes share count several times.
    if sum(relative.memory for relative in members) <= limit:
        return True
    return sum(map(own_memory, members)) <= limit


def own_memory(relative):
    """Bytes of memory of a process, where a page that n processes share counts as 1/n."""
    try:
        rollup = Path(f"/proc/{relative.pid}/smaps_rollup").read_text()
    except OSError:
        # The process has ended, or is hidden, as tests are. It shares with us what we have.
        shared = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        return max(0, relative.memory - shared)
    found = re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)
    return int(found[1]) << 10 if found else relative.memory


def kill_all(process):
    """
    Attack: a program leaves processes behind that outlive it or disturb the next program.

    If all other processes that we may signal are the program's, one call kills them, at a time.
    Else this kills the program's process group, and reap_all what has left it.
    """
    targets = [-1] if is_alone() else [-process, process]
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def is_alone():
    """Belong all processes that this child may signal to its programs?"""
    return in_namespaces() or OWN_USER is not None


def reap_all(process, status):
    """Waits until all processes have ended. Returns the wait status of `process`."""
    flags = 0 if is_alone() else os.WNOHANG
    # What is killed takes a moment to end: a look at all processes would take longer.
    look_from = time.monotonic() + LOOK_SECONDS / 5
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, ended = os.waitpid(-1, flags)
            # A process that had ended earlier keeps its status: its number may be used again.
            if pid == process and status is None and not os.WIFSTOPPED(ended):
                status = ended
            if pid == 0 and time.monotonic() < look_from:
                time.sleep(0.0005)
            elif pid == 0:
                # Attack: a daemon leaves the group of its program.
                kill_groups({relative.group for relative in family(os.getpid())})
    return status


def kill_groups(groups):
    """Kills all processes of these groups, but for the group of this process."""
    for group in groups - {os.getpgid(0)}:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def remove_folder(folder):
    """
    Attack: a program leaves files, in folders that are closed, or nested too deep for rmtree.

    All folders below this one are opened and moved into it; so they need not be walked down. What
    cannot be removed shows up in box_state.
    """
    places = [folder]
    with contextlib.suppress(OSError):
        for place in places:
            os.chmod(place, 0o700)
            for entry in list(os.scandir(place)):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                places.append(os.path.join(folder, secrets.token_hex(16)))
                os.rename(entry.path, places[-1])
        for place in reversed(places):
            os.rmdir(place)


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
    that has failed could end with status 0. So the status is 1 until all is done, nothing goes on
    after the last line, and a test has passed only if it has given its token back, too.
    """
    status = 1
    token = b""
    streams = [sys.stdout, sys.stderr]
    try:
        leave_the_child(tested, files, folder)
        limit_resources(timeout, memory_mb)
        if tested:
            token = examine(code, prelude)
        else:
            load_program(code, prelude, "__main__")
        status = 0
    except SystemExit as end:
        # A test that exits early has not come to its end.
        status = 1 if tested else exit_status(end)
    except BaseException as error:
        print_error(error)
    finally:
        try:
            finish(streams)
            if token:
                os.write(TOKEN, token)
        finally:
            # Without the interpreter's own end, which takes 50 ms to free memory.
            os._exit(status)


def leave_the_child(tested, files, folder):
    """Attack: a program uses what the child has open: the pipe to the caller, other files."""
    child = os.getppid()
    # Attack: a program signals its process group (os.killpg(0, 9)). The child is in another one.
    os.setsid()
    # Attack: a program outlives its child, which is killed.
    end_with_parent()
    os.chdir(folder)
    if not tested:
        os.dup2(files[0], 0)
    # A test keeps the pipe at 0 until it has read itself from it (see read_test).
    os.dup2(files[1], 1)
    os.dup2(files[2], 2)
    os.dup2(files[3], TOKEN)
    os.closerange(TOKEN + 1 if tested else TOKEN, 1024)
    if child != 1:
        protect_processes([child, CALLER])


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
    is_in_namespaces = os.getppid() == 1
    if is_in_namespaces or OWN_USER is not None or not os.path.exists("/proc/loadavg"):
        return MAX_TASKS
    # All other processes of the user count: allow for all of the machine's. wait_for counts those
    # of the program.
    # The fourth word is "running/all".
    running_and_all = Path("/proc/loadavg").read_text().split()[3]
    return MAX_TASKS + int(running_and_all.split("/")[1])


def exit_status(end):
    """The exit status that a SystemExit asks for, with its message printed, as Python does it."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        # Attack: a number of a class of its own, with an & that returns no number.
        return int.__and__(end.code, 255)
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

    The test sees what the program defines as Remotes. It raises an exception if it fails; returns
    the token of the test if it comes to its end.
    """
    link, programs_end = connection.Pipe()
    if os.fork() == 0:
        # Attack: the program ends with a status, or an exception, that is taken for the test's.
        try:
            link.close()
            os.close(TOKEN)
            answer_expressions(code, prelude, programs_end)
        finally:
            os._exit(1)
    programs_end.close()

    test, token = read_test()
    link.send_bytes(b"go")
    Remote._link = link

    names = dict(brought_by(PRELUDE))
    defined = Remote._ask("objects[0]")
    names["defined"] = defined
    tree = ast.parse(test)
    for name in names_of_the_program(tree) & set(defined):
        names[name] = defined[name]
    names["eval"] = evaluator(tree, names)
    exec(test, names)
    return token


def names_of_the_program(tree):
    """
    The names in a test that are the program's, where the program defines them.

    Attack: a program replaces what its test uses (range, abs, math, isclose). It cannot, unless the
    test uses no other name: then the program is tested under such a name.
    """
    used = set()
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names = used if isinstance(node.ctx, ast.Load) else bound
            names.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])

    # The test's own are all that the prelude brings, if the test needs anything else; or else all
    # modules and builtins.
    for source in (PRELUDE, MODULES):
        own = {"defined", *brought_by(source), *dir(builtins)}
        if used - bound - own:
            return used - own
    return used


# What an expression of constants consists of: no names, calls or attributes.
PLAIN_NODES = (
    *(ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Load, ast.Compare),
    *(ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.unaryop, ast.operator, ast.boolop, ast.cmpop),
)


def evaluator(tree, names):
    """
    A function in place of eval, for a test.

    Attack: a test evaluates what a program returns, and it is code: exit(), for example. Only an
    expression of constants is evaluated, or a text that the test itself has.
    """
    own_texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]

    def evaluate(text, *_):
        if text in own_texts:
            return eval(text, names)
        expression = ast.parse(text.strip(), mode="eval")
        for node in ast.walk(expression):
            if not isinstance(node, PLAIN_NODES):
                raise ValueError("eval in a test takes an expression of constants")
        return eval(compile(expression, "<text>", "eval"), {})

    return evaluate


def read_test():
    """Reads the test and its token, and closes the pipe: this process does not need it again."""
    with connection.Connection(0) as caller:
        message = json.loads(caller.recv_bytes())
    return message["test"], message["token"].encode()


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
    bases = (list, tuple, set, frozenset, dict, bytes, bytearray, range, complex, Exception)
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
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        return {"int": hex(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in type(value).__mro__:
        name = kind.__name__
        if KINDS.get(name) is not kind:
            continue
        if issubclass(kind, (complex, Exception)):
            return {name: str(value)}
        if kind is range:
            value = (value.start, value.stop, value.step)
        items = value.items() if kind is dict else value
        return {name: [pack(item, objects) for item in items]}
    objects.append(value)
    return {"Remote": len(objects) - 1}


def unpack(pair):
    """The inverse of pack for one JSON object, {name: content}; KeyError if it is no such kind."""
    ((name, content),) = pair.items()
    if name == "int":
        return int(content, 16)
    if name == "range":
        return range(*content)
    return KINDS[name](content)


if __name__ == "__main__":
    told = enter(sys.argv[1], sys.argv[2:])
    serve(execute, box_state, told, leave)
