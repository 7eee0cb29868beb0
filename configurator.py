"""
The settings of a script are its module globals. Config files and the command line change them:

    python sft.py config/toy_sft.py --learning_rate=1e-4 --max_steps 200

A script assigns its settings at the top, in lower case, and ends with run(main, globals()). Names
in CAPITALS or with a leading underscore are not settings, nor is anything but a plain value: no
functions, classes or modules. --help shows the comments behind and above each setting, and lines
such as `# --- optimizer` as headings.

Config files are applied from left to right, then the command line. A value must have the type of
its default; an int is accepted for a float, and None for a text. Where the default is None, an
annotation can state the type (shard: int = None). A config file contains assignments only; they may
use other settings:  save_interval = max_steps // 10
"""

import ast
import difflib
import errno
import os
import re
import sys
import time
import tokenize
import traceback
import types
from dataclasses import dataclass

# What a full or read-only disk says: the operating system, the safetensors library and torch.save.
DISK_ERRORS = "No space left|quota exceeded|Read-only file|unexpected pos"

LONGEST_MESSAGE = 2000  # characters

PLAIN_TYPES = (type(None), bool, int, float, str, list, tuple, dict)


class UserError(Exception):
    """A mistake of the user's: one line that says what, where, and what to do about it.

    Rank 0 prints it for all ranks, unless it is `rank_local`: then each rank prints its own.
    """

    def __init__(self, message: str, rank_local: bool = False):
        super().__init__(message)
        self.rank_local = rank_local


@dataclass
class Assignment:
    """`name = value` as a config file or the command line states it."""

    where: str  # "config/toy_sft.py:3" or "command line"
    name: str
    value: ast.Expression | str  # the expression in a config file, or the text on the command line


@dataclass
class Description:
    """What --help says about a setting: the heading it is under and its comments."""

    heading: str
    comments: list[str]


# --------------------------------------------------------------------------------------------------
# The frame of a script


def run(main, settings: dict):
    """Apply the settings, call main(), and end the process.

    A mistake of the user's ends in one line on stderr and exit code 2, Ctrl-C in exit code 130, and
    a bug in its traceback.
    """
    code = 0
    defaults = values(settings)
    # A path can have bytes that are no text, and a terminal may not know every sign.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        new = configure(settings)
        _check_numbers(defaults, new)
        main()
    except BaseException as error:  # torch's CheckpointException is not an Exception
        code, message, rank_local = _explain(error)
        if message is not None:
            _print_error(message, rank_local)
        elif "RANK" in os.environ and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        else:
            raise

    # One of several processes must not exit the normal way: that could wait for ranks which are
    # waiting for this one. It also aborted one run in twelve, when a thread of torch's asked for
    # Python's lock too late.
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def _check_numbers(defaults: dict, new: dict) -> None:
    """Raise UserError for a setting that is None where a script has a number, a list or a dict."""
    for name, default in defaults.items():
        if new[name] is None and isinstance(default, (bool, int, float, list, dict)):
            raise UserError(f"{name}=None: a value like {default} (--help lists the settings)")


def _explain(error):
    """(exit code, message, rank_local) for an error; the message is None if the error is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", False
    if isinstance(error, UserError):
        return 2, f"error: {error}", error.rank_local

    # An out_dir that cannot be written to, for example.
    path_errors = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
    bad_names = (errno.ENAMETOOLONG, errno.ELOOP)
    if isinstance(error, path_errors) or getattr(error, "errno", None) in bad_names:
        return 2, f"error: {error}", True

    # The traceback includes the causes, and a full disk is often only the cause of an error.
    trace = "".join(traceback.format_exception(error))
    if re.search(DISK_ERRORS, trace):
        message = "error: disk full or read-only: free some space and run the same command again"
        return 2, message, isinstance(error, OSError)
    return 1, None, False


def _print_error(message, rank_local):
    """Print the message on one line of stderr, on rank 0 or, if it is rank_local, on every rank."""
    rank = _rank()
    line = " ".join(message.split())
    if len(line) > LONGEST_MESSAGE:
        line = line[:LONGEST_MESSAGE] + " ..."
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    elif rank_local:
        print(f"[rank {rank}] {line}", file=sys.stderr, flush=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun stops all processes as soon as one has ended: give rank 0 the time to print.
        time.sleep(5)


def _rank():
    return int(os.environ.get("RANK", 0))


# --------------------------------------------------------------------------------------------------
# Applying config files and the command line


def configure(settings: dict, argv: list[str] | None = None) -> dict:
    """Apply argv (default: the command line) to settings, a script's globals().

    Returns {name: value} of all settings and prints those that differ from their defaults. --help
    prints all of them with their comments instead, and exits with code 0. Raises UserError for an
    unknown name, a value of another type or a missing file; the settings are unchanged then.
    """
    if argv is None:
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        if _rank() == 0:
            _print_help(settings)
        sys.exit(0)

    defaults = values(settings)
    new = dict(defaults)
    origin = {}
    for assignment in _read_arguments(argv):
        name = assignment.name
        if name not in defaults:
            raise UserError(f"{assignment.where}: unknown setting {name} ({_hint(name, defaults)})")
        like = defaults[name]
        if like is None:
            like = _example_of_annotation(name, settings)
        try:
            new[name] = _check_type(_evaluate(assignment.value, like, new), like)
        except Exception as error:
            raise UserError(f"{assignment.where}: {name}: {error}") from None
        origin[name] = assignment.where
    settings.update(new)

    if _rank() == 0:
        _print_changes(defaults, new, origin)
    return new


def values(settings: dict) -> dict:
    """{name: value} of all settings as they are now: what a script writes to its config.json."""
    found = {}
    for name, value in settings.items():
        is_public = name == name.lower() and not name.startswith("_")
        if is_public and isinstance(value, PLAIN_TYPES):
            found[name] = value
    return found


def _read_arguments(argv):
    """The assignments in argv, in the order in which they count: config files, then the rest."""
    in_files = []
    on_command_line = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            in_files += _read_config(argument)
            continue

        # Only the first "=" separates; without one, the next argument is the value.
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                advice = f"--{name}=... (--help lists the settings)"
                raise UserError(f"command line: --{name} needs a value, {advice}")
            text = remaining.pop(0)
        on_command_line.append(Assignment("command line", name, text))
    return in_files + on_command_line


def _read_config(path):
    """The assignments in a config file."""
    try:
        # Editors on Windows begin a file with a byte order mark.
        with open(path, encoding="utf-8-sig") as f:
            statements = ast.parse(f.read()).body
    except SyntaxError as error:
        raise UserError(f"config file {path}:{error.lineno or 1}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"config file {path}: an expression has too many levels") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {path}: {error}") from None

    assignments = []
    for node in statements:
        where = f"{path}:{node.lineno}"
        name = _assigned_name(node)
        if name is None or isinstance(node, ast.AnnAssign):
            raise UserError(f"{where}: a config file holds assignments only, name = value")
        assignments.append(Assignment(where, name, ast.Expression(node.value)))
    return assignments


def _assigned_name(node):
    """The name to which a statement assigns a value, or None if it is no such statement."""
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return None
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        return targets[0].id
    return None


def _hint(name, known):
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        return f"did you mean {matches[0]}?"
    return "--help lists the settings"


def _example_of_annotation(name, settings):
    """An empty value of the type a setting is annotated with, such as 0 or ""; None without one."""
    annotations = settings.get("__annotations__")
    if annotations is None and "__annotate__" in settings:
        # Python 3.14 evaluates annotations on demand; 1 asks for their values.
        annotations = settings["__annotate__"](1)
    if not annotations or name not in annotations:
        return None

    annotation = annotations[name]
    if isinstance(annotation, types.UnionType):
        # int | None: the one that is not None.
        annotation = next(kind for kind in annotation.__args__ if kind is not types.NoneType)
    return annotation()


def _evaluate(given, default, settings):
    """The value of an expression in a config file, or of text for a setting with this default."""
    if isinstance(given, ast.Expression):
        # Without builtins, so that a name is a setting or a mistake.
        return eval(compile(given, "config", "eval"), {"__builtins__": {}, **settings})

    # Text for a string is taken as it is: model ids and paths need no quotes.
    if isinstance(default, str) and given != "None":
        return given
    literal = given
    if given in ("true", "false"):
        literal = given.title()
    try:
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # It is a string, then. _check_type refuses it if the setting is of another type.
        return given


def _check_type(value, default):
    """The value, as a float if the default is one.

    Raises ValueError if the types differ, or for a text or number that can be in no file.
    """
    _check_content(value)
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is list and type(value) is list and default:
        if None in value:
            raise ValueError(f"has None in a list like {default!r:.60}")
        # Every item must be like the first.
        return [_check_type(item, default[0]) for item in value]
    if value is None or default is None or type(value) is type(default):
        return value
    expected = type(default).__name__
    raise ValueError(f"expects {expected} (like {default!r:.60}), got {value!r:.60}")


def _check_content(value):
    """Raise ValueError for what cannot be written down, at any depth."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int):
        # Nothing that counts or seeds takes more, and Python prints no number of 5,000 digits.
        if not -(2**63) <= value < 2**63:
            raise ValueError("a whole number of more than 64 bits")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_content(key)
            _check_content(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_content(item)


def _check_text(text):
    # What is no UTF-8 on the command line is one of the surrogates that os.fsencode() takes.
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a character at {error.start}: {text!r:.60}") from None
    if "\0" in text:
        raise ValueError(f"has a NUL at {text.index(chr(0))}: {text!r:.60}")


# --------------------------------------------------------------------------------------------------
# What is printed


def _print_changes(defaults, new, origin):
    changed = [name for name in new if new[name] != defaults[name]]
    if not changed:
        print("all settings have their defaults")
        return
    print("settings that differ from their defaults:")
    for name in changed:
        print(f"  {name:<24} {defaults[name]!r:.60} -> {new[name]!r:.60}  ({origin[name]})")


def _print_help(settings):
    """Print the script's docstring and its settings: heading, name, default, comments."""
    print(settings["__doc__"].strip())
    print("\nusage: [config/file.py ...] [--setting=value ...]")

    defaults = values(settings)
    heading = None
    for name, description in _read_descriptions(settings["__file__"], defaults).items():
        if description.heading != heading:
            heading = description.heading
            print(f"\n{heading}")
        option = f"--{name}={defaults[name]!r:.60}"
        print(f"  {option:<42}  {' '.join(description.comments)}".rstrip())


def _read_descriptions(path, names):
    """{name: Description} of the settings called `names`, from the source of their script.

    What describes a setting are the unindented comment lines directly above it, and all indented
    comments from there to the next statement: behind the value, inside of it, or below it.
    """
    descriptions = {}
    heading = ""
    above = []
    current = Description(heading, above)
    with tokenize.open(path) as f:
        for token in tokenize.generate_tokens(f.readline):
            is_comment = token.type == tokenize.COMMENT
            is_indented = token.start[1] > 0
            text = token.string.removeprefix("#").strip()

            if is_comment and is_indented:
                current.comments.append(text)
            elif is_comment and text.startswith("--- "):
                heading = text.removeprefix("--- ")
                above = []
            elif is_comment:
                above.append(text)
            elif token.type == tokenize.NL and token.line.isspace():
                # A blank line separates the comments above it from the setting below.
                above = []
            elif token.type == tokenize.NAME and not is_indented:
                # The first word of a statement: a setting, or def, import and so on.
                current = Description(heading, above)
                above = []
                if token.string in names:
                    descriptions[token.string] = current
    return descriptions
