"""The short forms of tests/faults.py and tests/long_run.py."""

import pytest
from conftest import run


@pytest.mark.slow
def test_a_run_survives():
    fault = "SIGKILL at a write"
    done = run("tests/faults.py", "--times=1", "--only", "prime", "--fault", fault)
    assert "nothing lost, nothing twice" in done.stdout
    assert done.stdout.count("prime ") == 1


@pytest.mark.slow
def test_a_run_leaves_no_process_behind():
    done = run("tests/long_run.py", "--steps=10")
    assert "processes left: 0" in done.stdout
    assert "seconds per step" in done.stdout
