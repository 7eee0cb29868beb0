"""Who imports whom: arrows go down only, from scripts to modules to lib/ to configurator.py.

generate, sft, prime, evaluate, data/*/prepare.py     scripts: have settings, import no script
engine, model, grader                                 modules: do not import each other
lib/*                                                 without circles
configurator
"""

import ast
import functools
import json
import sys

import pytest
from conftest import ROOT, run

SCRIPTS = ["generate", "sft", "prime", "evaluate"]
MODULES = ["engine", "model", "grader"]
LIBRARY = sorted(
    f"lib.{path.stem}" for path in (ROOT / "lib").glob("*.py") if path.stem != "__init__"
)
PREPARE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("data/*/*.py")
)
OURS = [*SCRIPTS, *MODULES, *LIBRARY, *PREPARE, "configurator"]


@functools.cache
def tree_of(name: str) -> ast.Module:
    """A file of ours, parsed."""
    file = ROOT / (name.replace(".", "/") + ".py")
    return ast.parse(file.read_text("utf-8"))


def imported_names(tree: ast.AST) -> set[str]:
    """Full names of all that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # from . import x: the package is lib.
            module = node.module or ""
            if node.level:
                module = f"lib.{module}".strip(".")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            # importlib.import_module("sft") and __import__("sft")
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and node.args:
                names.add(str(getattr(node.args[0], "value", "?")))
    return names


@functools.cache
def own_imports(name: str) -> set[str]:
    """Which of our files a file imports."""
    return imported_names(tree_of(name)) & set(OURS)


def test_imported_names():
    source = """
import a, b.c
from d import e
def f():
    from . import g
    from .h import i
    importlib.import_module("j")
"""
    expected = {"a", "b.c", "d", "d.e", "lib", "lib.g", "lib.h", "lib.h.i", "j"}
    assert imported_names(ast.parse(source)) == expected


def test_the_files_are_those_that_are_known():
    """A new file at the top belongs to one of the layers."""
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == {*SCRIPTS, *MODULES, "configurator"}
    assert list((ROOT / "runs").glob("**/*.py")) == []
    assert (ROOT / "lib/__init__.py").exists()


@pytest.mark.parametrize("name", [*SCRIPTS, *PREPARE])
def test_no_script_imports_a_script(name):
    allowed = {*MODULES, *LIBRARY, "configurator"}
    assert own_imports(name) <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_lib_only(name):
    allowed = {*LIBRARY, "configurator"}
    assert own_imports(name) <= allowed


@pytest.mark.parametrize("name", LIBRARY)
def test_lib_imports_lib_only(name):
    allowed = {*LIBRARY, "configurator"}
    assert own_imports(name) <= allowed


def test_configurator_imports_nothing_of_ours():
    assert own_imports("configurator") == set()


def test_lib_has_no_circle():
    """Files are taken away whose imports are all gone already; a circle would remain."""
    remaining = {name: own_imports(name) & set(LIBRARY) for name in LIBRARY}
    while remaining:
        ready = [name for name, needed in remaining.items() if not needed & remaining.keys()]
        assert ready, f"a circle: {remaining}"
        for name in ready:
            del remaining[name]


def test_what_runs_in_the_sandbox_is_one_file():
    """The interpreter in the box sees none of our files, and starts without any package."""
    assert own_imports("lib.sandbox_child") == set()
    tree = tree_of("lib.sandbox_child")
    at_the_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imported_names(ast.Module(at_the_top, []))
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [*MODULES, *LIBRARY])
def test_modules_have_no_settings(name):
    """What they depend on comes as parameters: no plain values in lower case, no globals()."""
    tree = tree_of(name)
    for node in tree.body:
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
                assert not target.id.islower(), f"{target.id} looks like a setting"

    called = {node.func.id for node in calls(tree) if isinstance(node.func, ast.Name)}
    assert "globals" not in called


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


# Prints what differs in a process after it has imported one of our files, a JSON object per file.
# Each is imported in a copy of a process that has the large packages already.
IMPORTS = """
import importlib
import json
import os
import signal
import sys
import tempfile
import threading

import datasets
import matplotlib
import torch
import torch._dynamo  # sets a variable of the environment, of torch's own
import transformers

sys.path.insert(0, os.getcwd())


def state():
    # Packages may add folders of their own.
    path = [entry for entry in sys.path if "site-packages" not in entry]
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    return dict(
        environment=dict(os.environ),
        folder=os.getcwd(),
        path=path,
        handlers=handlers,
        threads=threading.active_count(),
        torch_threads=torch.get_num_threads(),
        seed=torch.initial_seed(),
        standard_output=str(sys.stdout),
    )


def report(name, ours):
    before = state()
    with tempfile.TemporaryFile() as captured:
        real_output = os.dup(1)
        os.dup2(captured.fileno(), 1)
        os.dup2(captured.fileno(), 2)
        importlib.import_module(name)
        sys.stdout.flush()
        os.dup2(real_output, 1)
        captured.seek(0)
        output = captured.read().decode()
    after = state()
    changed = [what for what in before if before[what] != after[what]]
    loaded = [other for other in ours if other in sys.modules]
    print(json.dumps(dict(name=name, output=output, changed=changed, loaded=loaded)), flush=True)


ours = sys.argv[1:]
for name in ours:
    child = os.fork()
    if child == 0:
        report(name, ours)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_importing_a_file_has_no_effect():
    """No output, no other script's settings, nothing changed in the process."""
    done = run("-W", "ignore", "-c", IMPORTS, *OURS)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["name"] for report in reports] == OURS, done.stderr

    for report in reports:
        name = report["name"]
        assert report["output"] == "", name
        assert report["changed"] == [], name
        other_scripts = {*SCRIPTS, *PREPARE} - {name}
        assert not other_scripts & set(report["loaded"]), name


# ----------------------------------------------------------------------------------------------
# installed packages that have the names of our folders


@pytest.fixture
def foreign_packages(tmp_path):
    """A folder that Python searches before site-packages, with packages of our folders' names."""
    for name in ("lib", "runs", "config", "data", "bench", "tests"):
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise RuntimeError('a foreign {name}')")
    return tmp_path / "site"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["prime", "evaluate", "data/arithmetic/prepare"])
def test_foreign_packages_do_no_harm_to_scripts(foreign_packages, script):
    """The folder of `python script.py` comes first in sys.path."""
    done = run(f"{script}.py", "--help", env=dict(PYTHONPATH=str(foreign_packages)))
    assert "--seed" in done.stdout


JUDGE = """
from grader import Grader, run_python

tests = dict(inputs=["1\\n"], outputs=["2\\n"])
references = [
    dict(ability="math", ground_truth="2"),
    dict(ability="code", ground_truth=tests),
]
program = "```python\\nprint(int(input()) + 1)\\n```"
if __name__ == "__main__":
    with Grader(workers=1) as grader:
        print(grader.grade(["\\\\boxed{2}", program], references))
    print(run_python("print(7)").stdout)
"""


@pytest.mark.slow
def test_foreign_packages_do_no_harm_to_the_judges_processes(foreign_packages):
    done = run("-c", JUDGE, env=dict(PYTHONPATH=str(foreign_packages)))
    assert done.stdout.split() == ["[1.0,", "1.0]", "7"]
