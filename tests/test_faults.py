"""The short forms of tests/faults.py and tests/long_run.py."""

import pytest
from conftest import run


@pytest.mark.slow
def test_a_run_survives(tmp_path):
    faults = ("SIGKILL at a write", "a bit of a checkpoint flipped")
    done = run("tests/faults.py", "--times=1", "--only", "prime", "--fault", *faults)
    assert "nothing lost, nothing twice" in done.stdout
    assert done.stdout.count("prime ") == len(faults)


@pytest.mark.slow
def test_a_run_leaves_no_process_behind():
    done = run("tests/long_run.py", "--steps=20")
    assert "processes left: 0" in done.stdout
    assert "seconds per step" in done.stdout
