"""
A reward of the user's own: a file with `reward(response, problem) -> float`.

grader.py's child processes import the file once and call the function. Whatever the file does, it
costs at most the response that it fails on: exceptions come back as a message; for hangs and
crashes the caller has a deadline, and replaces the child.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import reprlib
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Characters of an exception's text that are passed on.
MAX_MESSAGE = 500


@dataclass
class OwnReward:
    """An imported file. size: the address space of this process after the import, in bytes."""

    function: Callable[[str, dict], float]
    size: int


# What this process has imported, by path.
LOADED: dict[str, OwnReward] = {}


def reward_name(path: str | None) -> str | None:
    """A reward's name in the rows that it has graded: my_reward.py@1a2b3c4d; None for None.

    An edited file has another name. What the file imports is not looked at.
    """
    if path is None:
        return None
    return f"{Path(path).name}@{short_hash(Path(path).read_bytes())}"


def hash_columns(row: dict) -> str:
    """A short hash of all that an own reward sees of a problem."""
    text = json.dumps(row, sort_keys=True, default=as_json)
    return short_hash(text.encode())


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def as_json(value):
    """What JSON has no form for: arrays become lists, all else text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def as_plain_json(value):
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=as_json))


def load(path: str, folder: str) -> str | None:
    """Imports a file and looks for its function `reward`. Returns None, or what is wrong.

    folder: the caller's working directory, which becomes this process's.
    """
    if path in LOADED:
        return None
    sys.path.insert(0, os.path.dirname(path))
    try:
        with empty_stdin():
            os.chdir(folder)
            module = import_file(path)
    except BaseException as error:
        return describe(error, path)
    if not callable(getattr(module, "reward", None)):
        return f"{path} has no function reward(response, problem)"
    LOADED[path] = OwnReward(module.reward, address_space())
    return None


def import_file(path: str):
    # Not under the file's own name: that may be the name of another module, json.py say.
    name = "own_reward_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Not exec_module(), which may take stored bytecode for that of a file edited a moment later.
    code = spec.loader.source_to_code(Path(path).read_bytes(), path)
    exec(code, module.__dict__)
    return module


def call(path: str, response: str, problem: dict, memory_mb: int) -> tuple:
    """(reward, what is wrong or None, is this process out of memory?). The file must be loaded.

    memory_mb: address space that calls may take beyond what the imports have taken.
    """
    own = LOADED[path]
    process = os.getpid()
    limit_memory(own.size + (memory_mb << 20))
    try:
        with empty_stdin():
            value = own.function(response, problem)
            reward = number_between_0_and_1(value)
    except BaseException as error:
        limit_memory(None)
        return 0.0, describe(error, path), isinstance(error, MemoryError)
    finally:
        # A process that the function has forked must not answer in place of this one.
        if os.getpid() != process:
            os._exit(0)
    limit_memory(None)
    if reward is None:
        shown = reprlib.repr(value)
        return 0.0, f"{path}: reward returned {shown}, not a number from 0 to 1", False
    return reward, None, False


def number_between_0_and_1(value) -> float | None:
    """A bool, an int, a float, or what converts to one (numpy's and torch's scalars)."""
    if not hasattr(type(value), "__float__"):
        return None
    number = float(value)
    if math.isfinite(number) and 0 <= number <= 1:
        return number
    return None


def describe(error: BaseException, path: str) -> str:
    """An exception in one line: my_reward.py, line 7: ZeroDivisionError: division by zero"""
    # No line of the file has run if `reward` takes other arguments, say.
    place = path
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            place = f"{path}, line {frame.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{place}: {text:.{MAX_MESSAGE}}"


@contextlib.contextmanager
def empty_stdin():
    """Hides standard input, over which the caller sends its requests."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(pipe, 0)
        os.close(pipe)


def limit_memory(size: int | None):
    """Limits the address space of this process, in bytes; None ends the limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    # macOS has no such limit.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (hard if size is None else size, hard))


def address_space() -> int:
    """The address space of this process in bytes; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()
