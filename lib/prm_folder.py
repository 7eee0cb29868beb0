"""What a PRM's folder says besides its weights: without its reference a PRM has no rewards."""

import json
from pathlib import Path

from configurator import UserError

NAME = "prm.json"


def write_prm_file(folder: str, reference: str, beta: float) -> None:
    """folder/prm.json. reference: folder or hub id of the model that log-ratios are taken to."""
    text = json.dumps(dict(reference=reference, beta=beta), indent=1)
    Path(folder, NAME).write_text(text + "\n", encoding="utf-8")


def read_prm_file(folder: str) -> dict | None:
    """{reference, beta} of a PRM's folder; None where there is no such file, or for a hub id.

    Raises UserError if the file says something else.
    """
    path = Path(folder, NAME)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reference = found["reference"]
        beta = found["beta"]
    except (OSError, ValueError, TypeError, KeyError):
        reference = beta = None
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not isinstance(reference, str) or not is_number:
        raise UserError(f'{path}: {{"reference": "a folder or hub id", "beta": a number}}')
    return dict(reference=reference, beta=beta)
