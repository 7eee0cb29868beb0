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
import configurator

# --- output
out_dir = "out/x"       # where everything is written
run_name = None         # name of the run, or None
# --- optimizer
learning_rate = 1e-3    # peak, reached after the warm-up
max_steps = 5 * 20      # optimizer steps,
                        # not micro-batches
betas = [0.9, 0.95]     # AdamW
compile_model = False   # torch.compile
stages = ["sft", "rl"]  # which stages to run
seeds = []              # any numbers
engine_args = {"a": 1}  # passed through
prompt = """#1
x = 1  # no comment"""  # two lines
limit: int = None       # none, or a number
annotated: int = 3      # also a setting
# a plain comment
CONSTANT = 7
_private = 8
def helper(): pass

def main():
    print("VALUES " + json.dumps(configurator.values(globals())))
    exec(os.environ.get("BODY", ""))

if __name__ == "__main__":
    configurator.run(main, globals())
'''
NAMES = ["out_dir", "run_name", "learning_rate", "max_steps", "betas", "compile_model", "stages", "seeds", "engine_args",
         "prompt", "limit", "annotated"]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


@pytest.fixture
def configure(script, tmp_path):
    """configure("--a=1", "file.py", files={"file.py": text}) -> settings, in this process."""
    def call(*argv, files={}):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        argv = [str(tmp_path / a) if a in files else a for a in argv]
        return configurator.configure(runpy.run_path(str(script), run_name="not_main"), argv)
    return call


def start(*command, **env):
    """Run a script as a user does, in its folder."""
    env = {**{k: v for k, v in os.environ.items() if k != "RANK"}, "PYTHONPATH": ROOT, **env}
    folder = next(word.parent for word in command if isinstance(word, pathlib.Path))
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=folder, timeout=50)


def test_settings_are_lower_case_plain_values(configure):
    assert list(configure()) == NAMES


def test_configure_writes_into_the_globals_and_returns_all(script):
    settings = runpy.run_path(str(script), run_name="not_main")
    config = configurator.configure(settings, ["--max_steps=3"])
    assert settings["max_steps"] == config["max_steps"] == 3
    assert config == configurator.values(settings)
    assert settings["CONSTANT"] == 7 and settings["_private"] == 8


# --- values on the command line

@pytest.mark.parametrize("arg, value", [
    ("--out_dir=a=b=c", "a=b=c"),                       # only the first '=' separates
    ("--out_dir=", ""), ("--out_dir=1", "1"), ("--out_dir='q'", "'q'"), ("--out_dir=None", None),
    ("--learning_rate=1", 1.0), ("--learning_rate=1e-4", 1e-4), ("--learning_rate=-1", -1.0), ("--learning_rate=None", None),
    ("--max_steps=7", 7), ("--max_steps=1_000", 1000), ("--max_steps=-1", -1), ("--max_steps=None", None),
    ("--run_name=abc", "abc"), ("--run_name=None", None), ("--run_name=3", 3), ("--run_name=1e-3", 1e-3),
    ("--run_name=true", True), ("--run_name=[1, 2]", [1, 2]), ("--run_name=2025-11-21", "2025-11-21"),
    ("--run_name=a b='c", "a b='c"),
    ("--compile_model=True", True), ("--compile_model=true", True), ("--compile_model=False", False),
    ("--compile_model=false", False), ("--compile_model=None", None),
    ("--betas=[0.8, 1]", [0.8, 1.0]), ("--stages=['a']", ["a"]), ("--stages=[\"a\", 'b']", ["a", "b"]), ("--stages=[]", []),
    ("--stages=None", None), ("--seeds=[1, 'a']", [1, "a"]),
    ("--engine_args={'b': 2}", {"b": 2}),
])
def test_value(configure, arg, value):
    got = configure(arg)[arg[2:].partition("=")[0]]
    assert repr(got) == repr(value)                         # 1 is not 1.0


def test_key_space_value(configure):
    config = configure("--learning_rate", "-1e-2", "--compile_model", "true", "--out_dir", "a=b", "--max_steps", "5")
    assert (config["learning_rate"], config["compile_model"], config["out_dir"], config["max_steps"]) == (-0.01, True, "a=b", 5)


@pytest.mark.parametrize("argv, words", [
    (["--learning_rat=1"], ["learning_rat", "did you mean learning_rate?", "command line"]),
    (["--zzz=1"], ["zzz", "--help"]), (["--CONSTANT=1"], ["CONSTANT"]), (["--_private=1"], ["_private"]),
    (["--helper=1"], ["helper"]),
    (["--max_steps=1.5"], ["max_steps", "expects int (like 100), got 1.5"]), (["--max_steps=abc"], ["int", "'abc'"]),
    (["--max_steps=True"], ["int", "True"]), (["--max_steps="], ["int", "''"]),
    (["--learning_rate=fast"], ["learning_rate", "float", "'fast'"]), (["--compile_model=maybe"], ["bool", "'maybe'"]),
    (["--compile_model=1"], ["bool"]), (["--betas=0.9"], ["betas", "list", "[0.9, 0.95]"]), (["--limit=few"], ["limit", "int", "'few'"]),
    (["--betas=[0.9"], ["betas", "list"]),
    (["--betas=[0.9, 'x']"], ["betas", "float", "'x'"]), (["--stages=sft"], ["list", "['sft', 'rl']"]),
    (["--engine_args=3"], ["engine_args"]), (["--max_steps"], ["max_steps", "needs a value"]),
    (["--max_steps", "--compile_model=True"], ["max_steps", "needs a value"]),
    (["train"], ["'train'"]), (["-x"], ["'-x'"]), (["--max_steps=().__class__"], ["max_steps"]),
    (["no_such_file.py"], ["no_such_file.py", "No such file"]),
])
def test_mistake_on_the_command_line(configure, argv, words):
    with pytest.raises(UserError) as e:
        configure(*argv)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_nothing_changes_after_a_mistake(script):
    settings = runpy.run_path(str(script), run_name="not_main")
    with pytest.raises(UserError):
        configurator.configure(settings, ["--max_steps=3", "--learning_rate=x"])
    assert settings["max_steps"] == 100


# --- config files

def test_config_file(configure):
    config = configure("a.py", files={"a.py": '''# Header.
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
'''})
    assert config["max_steps"] == 2000 and config["run_name"] == "out/x-run" and config["out_dir"] == "two\nannotated = 2"
    assert repr(config["learning_rate"]) == "1.0" and repr(config["betas"]) == "[0.5, 1.0]"
    assert config["seeds"] == [2000, 64, -1]
    assert config["compile_model"] is True and config["stages"] is None and config["annotated"] == 3


def test_later_files_win_and_the_command_line_wins_over_files(configure):
    files = {"a.py": "max_steps = 1\nannotated = 1\nlearning_rate = 1\n", "b.py": "max_steps = 2\nannotated = max_steps * 10\n"}
    config = configure("--learning_rate=9", "a.py", "b.py", files=files)
    assert (config["max_steps"], config["annotated"], config["learning_rate"]) == (2, 20, 9.0)
    assert configure("b.py", "a.py", files=files)["max_steps"] == 1


@pytest.mark.parametrize("text, words", [
    ("max_steps = 1\nmax_step = 2\n", ["a.py:2", "max_step", "did you mean max_steps?"]),
    ("max_steps = 1\n\nlearning_rate = '1e-3'\n", ["a.py:3", "learning_rate", "float", "'1e-3'"]),
    ("out_dir = 3\n", ["a.py:1", "out_dir", "str"]), ("compile_model = 'yes'\n", ["a.py:1", "bool"]),
    ("stages = 'sft'\n", ["a.py:1", "stages"]), ("stages = ['sft', 1]\n", ["a.py:1", "stages", "str"]),
    ("out_dir = here\n", ["a.py:1", "out_dir", "'here'"]),
    ("max_steps = max_stepps\n", ["a.py:1", "max_stepps"]),
    ("_gpus = 8\n", ["a.py:1", "_gpus"]), ("max_steps: int = 1\n", ["a.py:1"]),
    ("import os\n", ["a.py:1", "assignments only"]), ("print('x')\n", ["a.py:1", "assignments only"]),
    ("max_steps += 1\n", ["a.py:1"]), ("max_steps = annotated = 1\n", ["a.py:1"]),
    ("max_steps, annotated = 1, 2\n", ["a.py:1"]),
    ("if True:\n    max_steps = 1\n", ["a.py:1"]),
    ("out_dir = open('/etc/passwd').read()\n", ["a.py:1", "out_dir"]), ("max_steps = 1 / 0\n", ["a.py:1", "zero"]),
    ("max_steps = 'a' - 1\n", ["a.py:1"]), ("max_steps = 1\nlearning_rate = = 2\n", ["a.py:2", "syntax"]),
])
def test_mistake_in_a_config_file(configure, text, words):
    with pytest.raises(UserError) as e:
        configure("a.py", files={"a.py": text})
    assert all(word in str(e.value) for word in words), str(e.value)


def test_config_file_that_is_no_text(configure, tmp_path):
    (tmp_path / "bin.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bin.py"):
        configure(str(tmp_path / "bin.py"))


# --- what is printed

def test_changes_are_printed_with_their_origin(script):
    (script.parent / "a.py").write_text("max_steps = 7\nlearning_rate = 1e-3\n")
    done = start(script, "a.py", "--compile_model=True", "--out_dir=o")
    assert done.returncode == 0 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "max_steps 100 -> 7 (a.py:1)" in lines and "compile_model False -> True (command line)" in lines
    assert "out_dir 'out/x' -> 'o' (command line)" in lines
    assert not any(line.startswith("learning_rate") for line in lines)      # set to its default
    assert '"max_steps": 7' in lines[-1]


def test_help_lists_everything_from_the_source(script):
    done = start(script, "--help")
    assert done.returncode == 0 and "VALUES" not in done.stdout and done.stdout.startswith("Trains nothing at all.\n")
    assert re.findall(r"^  --(\w+)=", done.stdout, re.M) == NAMES
    assert re.search(r"--learning_rate=0.001 +peak, reached after the warm-up\n", done.stdout)
    assert re.search(r"--max_steps=100 +optimizer steps, not micro-batches\n", done.stdout)
    assert re.search(r"--prompt='#1\\nx = 1  # no comment' +two lines\n", done.stdout)
    assert re.search(r"--annotated=3 +also a setting\n$", done.stdout)      # and nothing of what follows
    assert done.stdout.index("\noutput\n") < done.stdout.index("--out_dir") < done.stdout.index("\noptimizer\n")


def test_only_rank_0_prints(script):
    done = start(script, "--max_steps=3", RANK="1")
    assert done.returncode == 0 and done.stdout.startswith("VALUES") and done.stderr == ""
    assert "100 -> 3" in start(script, "--max_steps=3", RANK="0").stdout
    done = start(script, "--help", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = start(script, "--nope=3", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


# --- how a script ends

@pytest.mark.parametrize("argv", [["--learning_rat=1"], ["--max_steps=x"], ["nofile.py"], ["--out_dir"]])
def test_a_mistake_is_one_line_and_exit_code_2(script, argv):
    done = start(script, *argv)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("body, env, code, line", [
    ("raise configurator.UserError('data.jsonl:3:\\n no prompt')", {}, 2, "error: data.jsonl:3: no prompt\n"),
    ("raise configurator.UserError('x', rank_local=True)", {"RANK": "1"}, 2, "[rank 1] error: x\n"),
    ("raise KeyboardInterrupt", {}, 130, "interrupted\n"), ("raise KeyboardInterrupt", {"RANK": "1"}, 130, ""),
    pytest.param("open('/dev/full', 'w').write('x' * 99999)", {}, 2,
                 "error: disk full or read-only: free it, start the command again\n",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")),
    ("import errno; raise OSError(errno.ENOSPC, 'No space left on device', 'm.bin')", {}, 2,
     "error: disk full or read-only: free it, start the command again\n"),
    ("raise Exception('I/O error: No space left on device (os error 28)')", {}, 2,
     "error: disk full or read-only: free it, start the command again\n"),
    ("raise BaseException('CheckpointException: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598')", {}, 2,
     "error: disk full or read-only: free it, start the command again\n"),
    ("try: raise OSError(28, 'No space left on device')\nexcept OSError: raise RuntimeError('saving failed')", {}, 2,
     "error: disk full or read-only: free it, start the command again\n"),
    ("os.makedirs('train.py/out')", {}, 2, "error: [Errno 20] Not a directory: 'train.py/out'\n"),
    ("os.makedirs('train.py', exist_ok=True)", {}, 2, "error: [Errno 17] File exists: 'train.py'\n"),
    ("import sys; sys.exit(5)", {}, 5, ""),
])
def test_end(script, body, env, code, line):
    done = start(script, BODY=body, **env)
    assert (done.returncode, done.stderr) == (code, line), done.stderr


def test_a_bug_keeps_its_traceback(script):
    done = start(script, BODY="{}['bug']")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'bug'" in done.stderr


def test_a_mistake_under_torchrun_is_told_once_also_when_rank_0_is_late(script):
    body = "import time; time.sleep(os.environ['RANK'] == '0'); raise configurator.UserError('wrong column')"
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, BODY=body, OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line] == ["error: wrong column"]


@pytest.mark.parametrize("end, code, error", [("raise configurator.UserError('wrong column')", 2, "error: wrong column\n"), ("pass", 0, "")])
def test_exit_does_not_wait_for_other_processes(script, end, code, error):
    body = f"""import atexit, os, time
os.environ["RANK"] = "0"
atexit.register(time.sleep, 60)
print("last words")
{end}"""
    done = start(script, BODY=body)
    assert (done.returncode, done.stderr) == (code, error) and done.stdout.endswith("last words\n")
