"""The short form of tests/faults.py."""

import pytest
from conftest import run


@pytest.mark.slow
def test_a_run_survives(tmp_path):
    faults = ("SIGKILL", "a bit of a checkpoint flipped")
    done = run("tests/faults.py", "--times=1", "--only", "prime", "--fault", *faults)
    assert "nothing lost, nothing twice" in done.stdout
    assert done.stdout.count("prime ") == len(faults)
