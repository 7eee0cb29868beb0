"""Sandboxed Python (run_python) and code rewards (grade_code), for Linux: util-linux, and bubblewrap if it is there."""
import ast, builtins, contextlib, functools, inspect, json, math, os, re, secrets, signal, subprocess, sys, tempfile, textwrap
from collections import namedtuple
from pathlib import Path

OUTPUT_LIMIT = 8 << 20  # bytes that a program may write to one file, stdout and stderr included
MAX_TASKS = 16          # processes and threads of one program; each process has the memory limit to itself
RunResult = namedtuple("RunResult", "stdout stderr returncode timed_out")  # returncode: 128 + signal if one has ended it

@functools.cache
def isolation(sandbox="auto"):
    """What separates programs from this machine: the first of these that works. RuntimeError if none does, or if
    sandbox="required" and it is not the first.
    "bubblewrap" (0.7 or newer): a program can read the interpreter and /usr only, write to its scratch directory only, has no
        network, sees no other process, and all that it has started ends with it. The kernel is the machine's.
    "namespaces" (what util-linux can do): it can read and write the user's files; the rest holds.
    "limits": on time, memory, tasks and output; an empty environment. But it has the network, can kill the user's processes,
        and leave daemons behind.
    Root's programs run as a user that nobody is: without bubblewrap, others must be able to reach the interpreter."""
    for level in ("bubblewrap", "namespaces", "limits") if sandbox != "required" else ("bubblewrap",):
        with contextlib.suppress(OSError):
            if run_python("print(6 * 7)", timeout=60, level=level).stdout == "42\n":
                return level
    raise RuntimeError(f"sandbox={sandbox!r} cannot be had on this machine")

def _command(level, timeout, memory_mb, scratch):
    """Words that run scratch/program.py. Root's programs get a user, of those that systemd keeps for users made on the fly."""
    root, user = os.getuid() == 0, 61184 + secrets.randbelow(4336)
    others = 0 if root or level != "limits" else int(Path("/proc/loadavg").read_text().split("/")[1].split()[0])
    words = ["prlimit", f"--cpu={math.ceil(timeout) + 1}", f"--as={memory_mb << 20}", f"--fsize={OUTPUT_LIMIT}", "--nofile=64",
             "--core=0", f"--nproc={MAX_TASKS + others}", sys.executable, "-s", "program.py"]  # nproc counts all of the user's
    if root:
        os.chown(scratch, user, user)
        words = [f"--reuid={user}", f"--regid={user}", "--clear-groups", *words]
    words = ["setpriv", "--no-new-privs", "--pdeathsig=KILL", *words]  # nor shall it outlive us
    if level == "namespaces":
        flags = "--net --ipc --pid --mount-proc --fork --kill-child" + " --user --map-current-user" * (not root)
        return ["setpriv", "--pdeathsig=KILL", "unshare", *flags.split(), *words]
    if level == "bubblewrap":
        box = "bwrap --unshare-net --unshare-ipc --unshare-pid --unshare-uts --die-with-parent --proc /proc --dev /dev".split()
        paths = "/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", sys.prefix, sys.base_prefix
        paths = sorted({q for p in paths if os.path.exists(p) for q in (p, os.path.realpath(p))})
        for parent in sorted({parent for path in paths for parent in Path(path).parents} - {Path("/")}):
            box += "--perms", "0755", "--dir", parent  # else it copies the 0700 of /root
        for path in paths:
            box += "--ro-bind", path, path
        box += f"--size {64 << 20} --perms 1777 --tmpfs /scratch --chdir /scratch --ro-bind".split()
        box += f"{scratch}/program.py", "/scratch/program.py", "--remount-ro", "/dev", "--remount-ro", "/"
        return [*box, *["--cap-add", "ALL"] * root, *words]  # setpriv needs them and drops them
    return words

def run_python(code, stdin="", timeout=10.0, memory_mb=1024, level=None):
    """Run a program in the sandbox -> RunResult. `timeout`: seconds of wall clock; `memory_mb`: address space of each of its
    processes; `level`: see isolation. One thread, no GPU. stderr is shortened to the program's own lines of the traceback,
    without directories, as NuminaMath shows it to the model. Thread-safe. A start takes 0.03 s of a core, sympy 0.5 s."""
    level = level or isolation()
    env = dict(PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8", PYTHONUTF8="1", PYTHONHASHSEED="0", HOME=".", TMPDIR=".",
               CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
          tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr):  # files do not fill up as pipes do
        Path(scratch, "program.py").write_text(code, "utf-8", "replace")
        process = subprocess.Popen(_command(level, timeout, memory_mb, scratch), cwd=scratch, env=env, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(stdin.encode("utf-8", "replace"), timeout)
        timed_out = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # after a normal end, too
        status = process.wait()
        texts = [os.pread(file.fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace") for file in (stdout, stderr)]
    return RunResult(texts[0], _shorten(texts[1]), status if status >= 0 else 128 - status, timed_out)

def _shorten(stderr):
    """Of a traceback its first line, the program's own lines and the last; directories and addresses removed."""
    stderr = re.sub(r'(?<=File ")/\S*/(?=program\.py")', "", stderr)
    _, start, trace = stderr.rpartition("Traceback (most recent call last):\n")
    *lines, last = trace.rstrip().split("\n") if start else [stderr]
    own = [line for before, line in zip(["", *lines], lines) if '  File "program.py"' in (before[:19], line[:19])]
    last = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"(?<![\w/:])(/[\w.+-]+)+/", "", last))
    return "\n".join([start.strip(), *own, last, ""]) if start else last

# ---- code rewards ----

# Run before the program: names that PRIME's scorer imports, too, so that `List[int]` and `gcd` just work.
PRELUDE = "import sys, math, re, string, random, heapq, bisect, itertools, functools, collections, datetime\n" + "".join(
    f"from {name} import *\n" for name in "typing collections heapq bisect itertools functools math builtins".split())

def grade_code(response, tests, timeout=10.0):
    """Share of `tests` that the last ```python block of `response` passes, in [0, 1]; 0.0 without a block.
    tests, or its JSON: {"inputs": [...], "outputs": [...]}, stdin and stdout; with "fn_name": arguments and value of that
    function, or method of class Solution; or a list of assert statements or whole check programs (MBPP, HumanEval).
    `timeout`: seconds for each test, which is run in a process of its own. ValueError if `tests` is none of these, or empty.

    Outputs never enter the sandbox. Asserts do, and share an interpreter with the program: patched builtins and objects that
    equal everything are of no use there, but a program that searches its callers' frames can find the test and fake a pass.
    So evaluate with asserts, but do not optimize them. PRIME's scorer gives the whole suite 6 s; if that fails, the first ten
    tests count alone, with full marks if they pass. Here all count, but the rest is not run if the first five all fail."""
    blocks = re.findall(r"```python[^\n]*\n(.*?)(?:```|\Z)", response, re.S)
    tests = json.loads(tests) if isinstance(tests, str) else tests
    passes, cases = _passes_assert, [(test,) for test in tests]
    if isinstance(tests, dict):
        name, cases = tests.get("fn_name"), list(zip(tests["inputs"], tests["outputs"], strict=True))
        passes = functools.partial(_passes_call, name) if name else _passes_stdin
    if not cases:
        raise ValueError("no tests")
    passed = 0
    for number, case in enumerate(cases if blocks else (), 1):
        passed += passes(*case, textwrap.dedent(blocks[-1]), timeout)
        if number == 5 and not passed:
            break
    return passed / len(cases)

def _passes_stdin(given, wanted, program, timeout):
    given, wanted = ("\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, wanted))
    result = run_python(f"{PRELUDE}exec(compile({program!r}, 'program.py', 'exec', dont_inherit=True))", given, timeout)
    got, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (result.stdout, wanted))
    return result.returncode == 0 and _same(got, wanted)

def _passes_call(name, given, wanted, program, timeout):
    given = [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else given  # one JSON value a line
    function = f"(Solution().{name} if hasattr(globals().get('Solution'), {name!r}) else {name})"
    got = _result(f"result = [_plain({function}(*{given!r}))]", [name], program, timeout)
    return got is not None and (_same(got, [wanted]) or _same(got, wanted))  # some data sets wrap the value in a list

def _passes_assert(test, program, timeout):
    tree = ast.parse(test)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in list(ast.walk(tree)):  # x == y becomes _plain(x) == _plain(y)
        if isinstance(node, ast.Compare):
            node.left, *node.comparators = [ast.Call(ast.Name("_plain"), [x], []) for x in (node.left, *node.comparators)]
    names = names if names <= set(dir(builtins)) else ()  # a test of nothing but builtin names is of a program that defines one
    return _result(ast.unparse(tree) + "\nresult = [True]", list(names), program, timeout) == [True]

def _result(test, names, program, timeout):
    """The value of `result` after the program and the test, as JSON knows it; None if they did not get there."""
    job = dict(prelude=PRELUDE, program=program, test=test, names=names, mark=secrets.token_hex(8))
    judge = "import json, os, sys\n" + inspect.getsource(_plain) + inspect.getsource(_judge) + "_judge(**json.load(sys.stdin))"
    judge = f"import builtins; exec({judge!r}, dict(__builtins__=dict(vars(builtins))))"  # a copy that no program has patched
    _, found, result = run_python(judge, json.dumps(job), timeout).stdout.rpartition(job["mark"])
    with contextlib.suppress(ValueError):
        return json.loads(result.partition("\n")[0]) if found else None

def _judge(prelude, program, test, names, mark):
    """In the sandbox: run the program, then the test, with the builtins of this function; write the mark and `result`."""
    main, test, write, own = type(sys)("program"), compile(test, "test", "exec"), os.write, globals()["__builtins__"]
    sys.modules["program"], main.__builtins__ = main, sys.modules["builtins"]
    exec(prelude, vars(main))
    exec(compile(program, "program.py", "exec"), vars(main))
    scope = vars(main) | own | {name: vars(main)[name] for name in names if name in vars(main)}
    scope.update(__builtins__=own, _plain=_plain)
    exec(test, scope)
    write(1, f"\n{mark}{json.dumps(scope['result'])}\n".encode())

def _plain(x):
    """A copy of plain data as exactly that; of anything else, which could claim to equal everything, what equals nothing."""
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(x, kind) and type(value := kind(x)) is kind:
            return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return kind(map(_plain, x))
    if isinstance(x, dict):
        return {_plain(key): _plain(value) for key, value in x.items()}
    if x is None or type(x) in (type, range):
        return x
    return _plain(x.tolist()) if hasattr(x, "tolist") else object()  # numpy's have it

def _same(got, wanted):
    """Equal: integers exactly, other numbers within 1e-5 relative; (1, 2) is [1, 2]."""
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(_same, got, wanted))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(_same(got[key], wanted[key]) for key in got)
    whole = [bool(re.fullmatch(r"[-+]?\d+", str(x))) for x in (got, wanted)]
    if got == wanted or all(whole) or isinstance(got, str) != isinstance(wanted, str):
        return got == wanted
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return abs(float(got) - float(wanted)) <= 1e-8 + abs(float(wanted)) * (1e-9 if whole[1] else 1e-5)
    return False
