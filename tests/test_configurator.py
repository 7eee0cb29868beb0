"""Settings from config files and the command line. python -m pytest tests/test_configurator.py"""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import configurator
from configurator import UserError

ROOT = os.path.dirname(os.path.abspath(configurator.__file__))
SCRIPT = '''"""Trains nothing at all.

Second paragraph.
"""
import json
import os
from dataclasses import dataclass
from os.path import join
import configurator

# --- output
out_dir = "out/x"       # where everything is written
run_name = None         # name of the run, or None

# --- the algorithm
learning_rate = 1e-3    # peak, reached after the warm-up
max_steps = 5 * 20      # optimizer steps,
                        # not micro-batches
# The exponential averages of AdamW,
# of gradients and of their squares.
betas = [0.9, 0.95]
# Leave this on the line.
compile_model = False  # torch.compile
stages = ["sft", "rl"]  # which stages to run
# This comment is about nothing below.

seeds = []              # any numbers
engine_args = {
    # Everything is passed through,
    "a": 1,  # this as well
}
prompt = """#1
x = 1  # no comment"""  # two lines
limit: int = None       # none, or a number
annotated: int = (
    3  # also a setting
)

# a plain comment
CONSTANT = 7
_private = 8
def helper(): pass

# --- a section of code, without settings

@dataclass
class Row:
    number: int = 0  # not a setting

def main():
    values = configurator.values(globals())  # a local name
    print("VALUES " + json.dumps(values))
    exec(os.environ.get("BODY", ""))

if __name__ == "__main__":
    configurator.run(main, globals())
'''
NAMES = [
    "out_dir",
    "run_name",
    "learning_rate",
    "max_steps",
    "betas",
    "compile_model",
    "stages",
    "seeds",
    "engine_args",
    "prompt",
    "limit",
    "annotated",
]


@pytest.fixture
def script(tmp_path):
    """The script above, as a file."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def configure(script, tmp_path):
    """configure("--a=1", "file.py", files={"file.py": text}) -> settings, in this process."""

    def call(*arguments, files=None):
        files = files or {}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        argv = []
        for argument in arguments:
            is_file = argument in files
            argv.append(str(tmp_path / argument) if is_file else argument)
        settings = runpy.run_path(str(script), run_name="not_main")
        return configurator.configure(settings, argv)

    return call


def start(*command, **env):
    """Run a script as a user does, in its folder."""
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}
    script = next(word for word in command if isinstance(word, pathlib.Path))
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONPATH": ROOT} | env,
        cwd=script.parent,
        timeout=50,
    )


def test_settings_are_lower_case_plain_values(configure):
    assert list(configure()) == NAMES


def test_configure_writes_into_the_globals_and_returns_all(script):
    settings = runpy.run_path(str(script), run_name="not_main")
    config = configurator.configure(settings, ["--max_steps=3"])
    assert settings["max_steps"] == 3
    assert config["max_steps"] == 3
    assert config == configurator.values(settings)
    assert settings["CONSTANT"] == 7
    assert settings["_private"] == 8


# --- values on the command line


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--out_dir=a=b=c", "a=b=c"),  # only the first '=' separates
        ("--out_dir=", ""),
        ("--out_dir=1", "1"),
        ("--out_dir='q'", "'q'"),
        ("--out_dir=None", None),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-4", 1e-4),
        ("--learning_rate=-1", -1.0),
        ("--learning_rate=None", None),
        ("--max_steps=7", 7),
        ("--max_steps=1_000", 1000),
        ("--max_steps=-1", -1),
        ("--max_steps=None", None),
        ("--run_name=abc", "abc"),
        ("--run_name=None", None),
        ("--run_name=3", 3),
        ("--run_name=1e-3", 1e-3),
        ("--run_name=true", True),
        ("--run_name=[1, 2]", [1, 2]),
        ("--run_name=2025-11-21", "2025-11-21"),
        ("--run_name=a b='c", "a b='c"),
        ("--compile_model=True", True),
        ("--compile_model=true", True),
        ("--compile_model=False", False),
        ("--compile_model=false", False),
        ("--compile_model=None", None),
        ("--betas=[0.8, 1]", [0.8, 1.0]),
        ("--stages=['a']", ["a"]),
        ("--stages=[\"a\", 'b']", ["a", "b"]),
        ("--stages=[]", []),
        ("--stages=None", None),
        ("--seeds=[1, 'a']", [1, "a"]),
        ("--engine_args={'b': 2}", {"b": 2}),
        ("--limit=5", 5),
    ],
)
def test_value(configure, argument, value):
    name = argument.removeprefix("--").partition("=")[0]
    got = configure(argument)[name]
    # 1 is not 1.0.
    assert repr(got) == repr(value)


def test_key_space_value(configure):
    command = "--learning_rate -1e-2 --compile_model true --out_dir a=b --max_steps 5"
    config = configure(*command.split())
    assert config["learning_rate"] == -0.01
    assert config["compile_model"] is True
    assert config["out_dir"] == "a=b"
    assert config["max_steps"] == 5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat=1"], ["learning_rat", "did you mean learning_rate?", "command line"]),
        (["--zzz=1"], ["zzz", "--help"]),
        (["--CONSTANT=1"], ["CONSTANT"]),
        (["--_private=1"], ["_private"]),
        (["--helper=1"], ["helper"]),
        (["--join=1"], ["join"]),
        (["--number=1"], ["number"]),
        (["--max_steps=1.5"], ["max_steps", "expects int (like 100), got 1.5"]),
        (["--max_steps=abc"], ["int", "'abc'"]),
        (["--max_steps=True"], ["int", "True"]),
        (["--max_steps="], ["int", "''"]),
        (["--learning_rate=fast"], ["learning_rate", "float", "'fast'"]),
        (["--compile_model=maybe"], ["bool", "'maybe'"]),
        (["--compile_model=1"], ["bool"]),
        (["--betas=0.9"], ["betas", "list", "[0.9, 0.95]"]),
        (["--limit=few"], ["limit", "int", "'few'"]),
        (["--betas=[0.9"], ["betas", "list"]),
        (["--betas=[0.9, 'x']"], ["betas", "float", "'x'"]),
        (["--stages=sft"], ["list", "['sft', 'rl']"]),
        (["--engine_args=3"], ["engine_args"]),
        (["--max_steps"], ["max_steps", "needs a value"]),
        (["--max_steps", "--compile_model=True"], ["max_steps", "needs a value"]),
        (["train"], ["'train'"]),
        (["-x"], ["'-x'"]),
        (["--max_steps=().__class__"], ["max_steps"]),
        (["no_such_file.py"], ["no_such_file.py", "No such file"]),
    ],
)
def test_mistake_on_the_command_line(configure, argv, words):
    with pytest.raises(UserError) as caught:
        configure(*argv)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("annotation", ["int", "int | None", "None | int"])
def test_annotation_of_a_setting_that_is_none(tmp_path, annotation):
    path = tmp_path / "annotated.py"
    path.write_text(f"limit: {annotation} = None\n")
    settings = runpy.run_path(str(path))
    assert configurator.configure(settings, ["--limit=5"])["limit"] == 5
    assert configurator.configure(settings, ["--limit=None"])["limit"] is None
    with pytest.raises(UserError, match="limit: expects int"):
        configurator.configure(settings, ["--limit=few"])


def test_nothing_changes_after_a_mistake(script):
    settings = runpy.run_path(str(script), run_name="not_main")
    with pytest.raises(UserError):
        configurator.configure(settings, ["--max_steps=3", "--learning_rate=x"])
    assert settings["max_steps"] == 100


# --- config files

CONFIG = '''# Header.
max_steps = 2000        # comment
learning_rate = 1
run_name = out_dir + "-run"
out_dir = """two
annotated = 2"""
seeds = [max_steps, 8 * 2 ** 3,
         -1]
betas = [0.5, 1]
compile_model = not False
stages = None
'''


def test_config_file(configure):
    config = configure("a.py", files={"a.py": CONFIG})
    assert config["max_steps"] == 2000
    assert config["run_name"] == "out/x-run"
    assert config["out_dir"] == "two\nannotated = 2"
    assert repr(config["learning_rate"]) == "1.0"
    assert repr(config["betas"]) == "[0.5, 1.0]"
    assert config["seeds"] == [2000, 64, -1]
    assert config["compile_model"] is True
    assert config["stages"] is None
    assert config["annotated"] == 3


def test_later_files_win_and_the_command_line_wins_over_files(configure):
    files = {
        "a.py": "max_steps = 1\nannotated = 1\nlearning_rate = 1\n",
        "b.py": "max_steps = 2\nannotated = max_steps * 10\n",
    }
    config = configure("--learning_rate=9", "a.py", "b.py", files=files)
    assert config["max_steps"] == 2
    assert config["annotated"] == 20
    assert config["learning_rate"] == 9.0
    assert configure("b.py", "a.py", files=files)["max_steps"] == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_steps = 1\nmax_step = 2\n", ["a.py:2", "max_step", "did you mean max_steps?"]),
        (
            "max_steps = 1\n\nlearning_rate = '1e-3'\n",
            ["a.py:3", "learning_rate", "float", "'1e-3'"],
        ),
        ("out_dir = 3\n", ["a.py:1", "out_dir", "str"]),
        ("compile_model = 'yes'\n", ["a.py:1", "bool"]),
        ("stages = 'sft'\n", ["a.py:1", "stages"]),
        ("stages = ['sft', 1]\n", ["a.py:1", "stages", "str"]),
        ("out_dir = here\n", ["a.py:1", "out_dir", "'here'"]),
        ("max_steps = max_stepps\n", ["a.py:1", "max_stepps"]),
        ("_gpus = 8\n", ["a.py:1", "_gpus"]),
        ("max_steps: int = 1\n", ["a.py:1", "assignments only"]),
        ("import os\n", ["a.py:1", "assignments only"]),
        ("print('x')\n", ["a.py:1", "assignments only"]),
        ("max_steps += 1\n", ["a.py:1", "assignments only"]),
        ("max_steps = annotated = 1\n", ["a.py:1", "assignments only"]),
        ("max_steps, annotated = 1, 2\n", ["a.py:1", "assignments only"]),
        ("if True:\n    max_steps = 1\n", ["a.py:1", "assignments only"]),
        ("out_dir = open('/etc/passwd').read()\n", ["a.py:1", "out_dir"]),
        ("max_steps = 1 / 0\n", ["a.py:1", "zero"]),
        ("max_steps = 'a' - 1\n", ["a.py:1"]),
        ("max_steps = 1\nlearning_rate = = 2\n", ["a.py:2", "syntax"]),
    ],
)
def test_mistake_in_a_config_file(configure, text, words):
    with pytest.raises(UserError) as caught:
        configure("a.py", files={"a.py": text})
    for word in words:
        assert word in str(caught.value)


def test_config_file_that_is_no_text(configure, tmp_path):
    (tmp_path / "bin.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bin.py"):
        configure(str(tmp_path / "bin.py"))


# --- what is printed


def test_changes_are_printed_with_their_origin(script):
    (script.parent / "a.py").write_text("max_steps = 7\nlearning_rate = 1e-3\n")
    done = start(script, "a.py", "--compile_model=True", "--out_dir=o")
    assert done.returncode == 0
    assert done.stderr == ""

    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "max_steps 100 -> 7 (a.py:1)" in lines
    assert "compile_model False -> True (command line)" in lines
    assert "out_dir 'out/x' -> 'o' (command line)" in lines
    assert '"max_steps": 7' in lines[-1]

    # The learning rate is set to its default.
    assert not any(line.startswith("learning_rate") for line in lines)


@pytest.fixture(scope="module")
def help_text(tmp_path_factory):
    """What --help prints."""
    path = tmp_path_factory.mktemp("help") / "train.py"
    path.write_text(SCRIPT)
    done = start(path, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    return done.stdout


def test_help_begins_with_the_docstring_and_runs_nothing(help_text):
    assert help_text.startswith("Trains nothing at all.\n\nSecond paragraph.\n")
    assert "VALUES" not in help_text


def test_help_lists_everything_from_the_source(help_text):
    assert re.findall(r"^  --(\w+)=", help_text, re.M) == NAMES


@pytest.mark.parametrize(
    "name, default, description",
    [
        ("run_name", "None", "name of the run, or None"),
        ("learning_rate", "0.001", "peak, reached after the warm-up"),
        # A comment that goes on below the setting.
        ("max_steps", "100", "optimizer steps, not micro-batches"),
        # Comments above.
        (
            "betas",
            "[0.9, 0.95]",
            "The exponential averages of AdamW, of gradients and of their squares.",
        ),
        ("compile_model", "False", "Leave this on the line. torch.compile"),
        # A comment above that a blank line separates is not shown.
        ("stages", "['sft', 'rl']", "which stages to run"),
        ("seeds", "[]", "any numbers"),
        # Values of several lines.
        ("engine_args", "{'a': 1}", "Everything is passed through, this as well"),
        ("prompt", r"'#1\nx = 1  # no comment'", "two lines"),
        ("annotated", "3", "also a setting"),
    ],
)
def test_help_shows_default_and_comments(help_text, name, default, description):
    lines = help_text.splitlines()
    line = next(line for line in lines if line.startswith(f"  --{name}="))
    shown, description_shown = re.split(r" {2,}(?=[A-Za-z])", line.strip(), maxsplit=1)
    assert shown == f"--{name}={default}"
    assert description_shown == description


def test_help_prints_headings_above_their_settings(help_text):
    lines = help_text.splitlines()
    headings = []
    for before, line in zip(lines, lines[1:]):
        if before == "" and not line.startswith((" ", "usage")):
            headings.append(line)
    assert headings == ["Second paragraph.", "output", "the algorithm"]
    assert lines[lines.index("output") + 1].startswith("  --out_dir=")
    assert lines[lines.index("the algorithm") + 1].startswith("  --learning_rate=")


def test_only_rank_0_prints(script):
    done = start(script, "--max_steps=3", RANK="1")
    assert done.returncode == 0
    assert done.stdout.startswith("VALUES")
    assert done.stderr == ""

    done = start(script, "--max_steps=3", RANK="0")
    assert "100 -> 3" in done.stdout

    done = start(script, "--help", RANK="1")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == ""

    done = start(script, "--nope=3", RANK="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ""


# --- how a script ends


@pytest.mark.parametrize(
    "argv", [["--learning_rat=1"], ["--max_steps=x"], ["nofile.py"], ["--out_dir"]]
)
def test_a_mistake_is_one_line_and_exit_code_2(script, argv):
    done = start(script, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["max_steps", "learning_rate", "compile_model"])
def test_a_script_gets_no_none_for_a_number(script, name):
    done = start(script, f"--{name}=None")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name}=None: ")
    assert done.stderr.count("\n") == 1


def test_a_script_gets_none_where_it_is_the_default_or_a_text(script):
    assert start(script, "--limit=None", "--out_dir=None").returncode == 0


def test_a_mistake_in_main_is_told_in_one_line(script):
    done = start(script, BODY="raise configurator.UserError('data.jsonl:3:\\n no prompt')")
    assert done.returncode == 2
    assert done.stderr == "error: data.jsonl:3: no prompt\n"


def test_a_mistake_of_one_rank_is_told_by_that_rank(script):
    body = "raise configurator.UserError('x', rank_local=True)"
    done = start(script, BODY=body, RANK="1")
    assert done.returncode == 2
    assert done.stderr == "[rank 1] error: x\n"


@pytest.mark.parametrize("env, line", [({}, "interrupted\n"), ({"RANK": "1"}, "")])
def test_interrupted(script, env, line):
    done = start(script, BODY="raise KeyboardInterrupt", **env)
    assert done.returncode == 130
    assert done.stderr == line


FULL_FILE = "open('/dev/full', 'w').write('x' * 99999)"
FULL_SYSTEM = "import errno; raise OSError(errno.ENOSPC, 'No space left on device', 'm.bin')"
FULL_SAFETENSORS = "raise Exception('I/O error: No space left on device (os error 28)')"
FULL_TORCH = (
    "raise BaseException('CheckpointException: [enforce fail at inline_container.cc:672] ."
    " unexpected pos 704 vs 598')"
)
FULL_AS_A_CAUSE = """
try:
    raise OSError(28, 'No space left on device')
except OSError:
    raise RuntimeError('saving failed')
"""
needs_dev_full = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no /dev/full here"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(FULL_FILE, marks=needs_dev_full),
        FULL_SYSTEM,
        FULL_SAFETENSORS,
        FULL_TORCH,
        FULL_AS_A_CAUSE,
    ],
)
def test_a_full_disk_is_told_in_one_line(script, body):
    done = start(script, BODY=body)
    assert done.returncode == 2
    expected = "error: disk full or read-only: free some space and run the same command again\n"
    assert done.stderr == expected


@pytest.mark.parametrize(
    "body, line",
    [
        ("os.makedirs('train.py/out')", "error: [Errno 20] Not a directory: 'train.py/out'\n"),
        ("os.makedirs('train.py', exist_ok=True)", "error: [Errno 17] File exists: 'train.py'\n"),
    ],
)
def test_an_impossible_folder_is_told_in_one_line(script, body, line):
    done = start(script, BODY=body)
    assert done.returncode == 2
    assert done.stderr == line


def test_an_exit_code_is_kept(script):
    done = start(script, BODY="import sys; sys.exit(5)")
    assert done.returncode == 5
    assert done.stderr == ""


def test_a_bug_keeps_its_traceback(script):
    done = start(script, BODY="{}['bug']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'bug'" in done.stderr


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_told_once_also_when_rank_0_is_late(script):
    body = """
import time
if os.environ["RANK"] == "0":
    time.sleep(1)
raise configurator.UserError("wrong column")
"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = start(*launcher, script, BODY=body, OMP_NUM_THREADS="1")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert errors == ["error: wrong column"]


@pytest.mark.parametrize(
    "end, code, error",
    [
        ("raise configurator.UserError('wrong column')", 2, "error: wrong column\n"),
        ("pass", 0, ""),
        ("{}['bug']", 1, "KeyError: 'bug'\n"),
    ],
)
def test_exit_does_not_wait_for_other_processes(script, end, code, error):
    body = f"""
import atexit, os, time
os.environ["RANK"] = "0"
atexit.register(time.sleep, 60)
print("last words")
{end}
"""
    done = start(script, BODY=body)
    assert done.returncode == code
    if code == 1:
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith(error)
    else:
        assert done.stderr == error
    assert done.stdout.endswith("last words\n")
