"""README.md, docs/, CONTRIBUTING.md, runs/ and config/ keep in step with the code."""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT

import configurator

SCRIPTS = ["generate", "sft", "prime", "evaluate", "data/arithmetic/prepare", "data/words/prepare"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
CONFIGS = sorted((ROOT / "config").glob("*.py"))
RUNS = sorted((ROOT / "runs").glob("*.sh"))


def each(name, paths):
    """The test runs for each of the files, which is its argument `name`."""
    return pytest.mark.parametrize(name, paths, ids=lambda path: path.name)


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


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(words.replace(" ", "-"))
    return names


@each("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        # Not to lines: their numbers go out of date with every change.
        if anchor:
            assert path.suffix == ".md" and anchor in anchors(path), target


@each("page", PAGES)
def test_named_files_exist(page):
    pattern = (
        r"(?<![\w/])(?:config|runs|tests|assets|lib|bench|docs)/[\w/]+\.(?:py|sh|png|jinja|md)\b"
    )
    for path in re.findall(pattern, page.read_text("utf-8")):
        assert (ROOT / path).exists(), path


@each("page", PAGES)
def test_named_settings_exist(page):
    known = {"help"}
    for script in SCRIPTS:
        known.update(configurator.values(vars(load(script))))
    text = page.read_text("utf-8")
    named = set(re.findall(r"`--(\w+)", text)) | set(re.findall(r"`([a-z_]+) = ", text))
    # A stand-in, and two arguments of bench/train.py.
    assert named <= known | {"name", "each", "trl"}


# ----------------------------------------------------------------------------------------------
# commands


def commands(text):
    """[(script, arguments)] of all lines that start one of the scripts, by python or torchrun."""
    found = []
    for line in text.splitlines():
        if not re.search(r"\.py\b", line) or line.lstrip().startswith(("#", "|", "*")):
            continue
        # Variables that stand for several arguments are left out, others become numbers.
        line = re.sub(r'(?<=\S )("\$@"|\$\w+)(?= |$)', "", line)
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
    torchrun --nproc_per_node 8 prime.py config/a.py $more --seed=$SEED "$@"    # 256 steps
    $train sft.py config/b.py
    OMP_NUM_THREADS=1 python generate.py --max_tokens 5 | tee log
    `python sft.py` in prose isn't one
    python tests/other.py --x
    """
    assert commands(text) == [
        ("prime", ["config/a.py", "--seed=1"]),
        ("sft", ["config/b.py"]),
        ("generate", ["--max_tokens", "5"]),
    ]


@each("page", [*PAGES, *RUNS])
def test_commands_fit_their_script(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, arguments in commands(page.read_text("utf-8")):
        # Dots stand for what the reader has to say.
        arguments = [argument for argument in arguments if "..." not in argument]
        if "--help" not in arguments:
            settings_after(script, arguments)


def test_every_config_file_is_named_somewhere():
    """In a recipe of runs/, in a page, or in the header of a config file."""
    text = "".join(path.read_text("utf-8") for path in [*PAGES, *RUNS, *CONFIGS])
    for path in CONFIGS:
        assert f"config/{path.name}" in text


@each("path", CONFIGS)
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
