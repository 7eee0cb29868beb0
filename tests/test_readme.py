"""The README keeps in step with the code: links to lines, files, settings and config files."""
import ast
import importlib
import re

import pytest

import configurator
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["generate", "sft", "prime", "evaluate"]


def test_links_to_lines():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", TEXT)
    assert len(links) >= 8
    for name, file, number in links:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        there = [i for i, line in enumerate(lines, 1) if line.startswith(f"def {name}(") or name in line]
        assert name in lines[int(number) - 1], f"{name} is in {file} at lines {there}, not {number}"


def test_named_files_exist():
    for path in re.findall(r"\b(?:config|runs|tests|assets|data)/[\w/]+\.(?:py|sh|png|jinja)\b", TEXT):
        assert (ROOT / path).exists(), path


def test_named_settings_exist():
    known = set().union(*(configurator.values(vars(importlib.import_module(s))) for s in SCRIPTS))
    named = set(re.findall(r"`--(\w+)", TEXT)) | set(re.findall(r"`(\w+) = ", TEXT)) 
    assert named and named <= known | {"help", "setting", "habits"}, named - known


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config_files_fit_their_script(path):
    """Each config is taken by the script that its header names."""
    script = re.search(r"(generate|sft|prime|evaluate)\.py", path.read_text(encoding="utf-8"))[1]
    module = importlib.import_module(script)
    before = configurator.values(vars(module))
    try:
        after = configurator.configure(vars(module), [str(path)])
    finally:
        vars(module).update(before)
    assigned = {node.targets[0].id for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)}
    assert assigned <= set(after) and after != before
