"""README.md, CONTRIBUTING.md, runs/ and config/ keep in step with the code."""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT

import configurator

SCRIPTS = ["generate", "sft", "prime", "evaluate", "data/arithmetic/prepare"]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
CONFIGS = sorted((ROOT / "config").glob("*.py"))
RUNS = sorted((ROOT / "runs").glob("*.sh"))


def load(script):
    return importlib.import_module(script.replace("/", "."))


def settings_after(script, arguments):
    """All settings of a script with these arguments. Raises UserError if it does not take them."""
    module = load(script)
    before = configurator.values(vars(module))
    try:
        return configurator.configure(vars(module), arguments)
    finally:
        vars(module).update(before)


# ----------------------------------------------------------------------------------------------
# links, files and settings


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add("#" + words.replace(" ", "-"))
    return names


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target in anchors(text)
        elif not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            # Line numbers go out of date with every change.
            assert not re.fullmatch(r"L\d+.*", anchor), target


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_named_files_exist(text):
    pattern = r"\b(?:config|runs|tests|assets|data|lib|bench|docs)/[\w/]+\.(?:py|sh|png|jinja|md)\b"
    for path in re.findall(pattern, text):
        assert (ROOT / path).exists(), path


def test_named_settings_exist():
    known = {"help"}
    for script in SCRIPTS:
        known.update(configurator.values(vars(load(script))))
    named = set(re.findall(r"`--(\w+)", README)) | set(re.findall(r"`(\w+) = ", README))
    assert named
    assert named <= known | {"setting"}


# ----------------------------------------------------------------------------------------------
# commands


def commands(text):
    """[(script, arguments)] of all lines that start one of the scripts, by python or torchrun."""
    found = []
    for line in text.splitlines():
        if not re.search(r"\.py\b", line) or line.lstrip().startswith(("#", "|", "*")):
            continue
        # Variables of the shell become numbers; arguments that are passed on are none.
        line = re.sub(r'"\$@"', "", line)
        line = re.sub(r"\$\{?\w+(:-\w+)?\}?", "1", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            # Prose with an apostrophe.
            continue
        scripts = [number for number, word in enumerate(words) if word[:-3] in SCRIPTS]
        started = words and words[0].rpartition("=")[0].isupper()
        if scripts and (started or words[0] in ("python", "torchrun", "1")):
            script = words[scripts[0]][:-3]
            found.append((script, until_operator(words[scripts[0] + 1 :])))
    return found


def until_operator(words):
    """The words of a command line up to a pipe, a redirection or the like."""
    arguments = []
    for word in words:
        if word[0] in "|&;>" or word.startswith("2>"):
            break
        arguments.append(word)
    return arguments


def test_commands():
    text = """
    torchrun --nproc_per_node 8 prime.py config/a.py --seed=$SEED "$@"    # 256 steps
    OMP_NUM_THREADS=1 python generate.py --max_tokens 5 | tee log
    `python sft.py` in prose isn't one
    python tests/other.py --x
    """
    assert commands(text) == [
        ("prime", ["config/a.py", "--seed=1"]),
        ("generate", ["--max_tokens", "5"]),
    ]


PAGES = {"README": README, "CONTRIBUTING": CONTRIBUTING}
PAGES |= {path.name: path.read_text("utf-8") for path in [*RUNS, *CONFIGS]}


@pytest.mark.parametrize("page", ["README", *(path.name for path in RUNS)])
def test_commands_fit_their_script(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    started = commands(PAGES[page])
    assert started or page == "setup.sh"
    for script, arguments in started:
        # Dots stand for what the reader has to say.
        arguments = [argument for argument in arguments if "..." not in argument]
        if "--help" not in arguments:
            settings_after(script, arguments)


def test_every_config_file_is_started_somewhere():
    """By a recipe of runs/, by README, or by the header of another config file."""
    started = " ".join(PAGES.values())
    for path in CONFIGS:
        assert f"config/{path.name}" in started


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_files_fit_their_script(path):
    """Each is taken by the script that its header names, and changes something."""
    text = path.read_text("utf-8")
    script = re.search(r"(generate|sft|prime|evaluate)\.py", text)[1]
    defaults = configurator.values(vars(load(script)))
    after = settings_after(script, [str(path)])
    assert after != defaults

    assigned = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            assigned.update(target.id for target in node.targets)
    assert assigned <= after.keys()
