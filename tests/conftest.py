"""What the tests share: the repository on sys.path, and the folder of real data that the variable PRIME_SHARED names."""
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared():
    """Folder with the reference numbers and benchmark files; without the variable such tests are skipped."""
    if "PRIME_SHARED" not in os.environ:
        pytest.skip("set PRIME_SHARED to the folder with the reference data")
    folder = pathlib.Path(os.environ["PRIME_SHARED"])
    assert folder.is_dir(), f"PRIME_SHARED={folder} is not a folder"
    return folder
