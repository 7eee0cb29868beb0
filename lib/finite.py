"""Numbers that are not finite (nan, inf): found before they reach a weight, told in one line.

    with stops_if_not_finite(out_dir, clock, lambda: [dict(tokens=...), ...]):
        ...
        check_finite("log-probabilities of the reference", logprobs)
        optimizer_step(...)     # model.py: it raises NotFinite, too
        save_checkpoint(...)    # the same

Every check is the same on all ranks, so that all of them stop at the same place.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from configurator import UserError
from lib.run import on_first_rank


class NotFinite(UserError):
    """A number that training must not go on with. All ranks raise it, or none.

    rows: numbers of the batch's rows that have it; None where nobody knows.
    """

    def __init__(self, message: str, rows: list[int] | None = None):
        super().__init__(message)
        self.rows = rows


def check_finite(what: str, values: torch.Tensor) -> None:
    """Raise NotFinite if one of values [N] or [N, T] of a batch's N rows is not finite.

    what: names the values in the message, which names the rows as well. Collective.
    """
    rows = rows_not_finite(values)
    if rows:
        raise NotFinite(f"{what} are not finite in {row_list(rows)} of {len(values)}", rows)


def rows_not_finite(values: torch.Tensor) -> list[int]:
    """The numbers of the rows of [N] or [N, T] that are not finite on any rank. Collective."""
    bad = ~values.isfinite()
    if bad.dim() > 1:
        bad = bad.flatten(1).any(-1)
    return on_any_rank(bad).nonzero().squeeze(-1).tolist()


def row_list(rows: list[int]) -> str:
    """Row numbers for a message, the first ten.

    >>> row_list([3]), row_list([0, 7])
    ('row 3', 'rows 0, 7')
    """
    listed = ", ".join(str(row) for row in rows[:10])
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {listed}{more}"


def names_not_finite(tensors: dict, dtype: torch.dtype | None = None) -> list[str]:
    """The names of tensors with a number that is not finite, the same on every rank. Collective.

    tensors: {name: tensor or this rank's shard of it}, of one device. dtype: what they are going to
    be cast to, where a large number may become inf.
    """
    if not tensors:
        return []
    flags = []
    for tensor in tensors.values():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        flags.append(~local.to(dtype or local.dtype).isfinite().all())
    bad = on_any_rank(torch.stack(flags)).tolist()
    return [name for name, is_bad in zip(tensors, bad) if is_bad]


def on_any_rank(flags: torch.Tensor) -> torch.Tensor:
    """Flags [n], each of them True if it is so on any rank. Collective."""
    counts = flags.int()
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return counts > 0


@contextmanager
def stops_if_not_finite(out_dir: str, where, rows: Callable[[], Iterable[dict]]):
    """End the run with one line, and the batch in a file, if this block raises NotFinite.

    where: a text, or an object that becomes one when it is asked, such as a Stopwatch ("step 3,
    policy"). rows() is called only then, on rank 0: what to write of each row of the batch of that
    moment, as JSON takes it. out_dir/not_finite.jsonl has a line per row, with its number and
    whether it is one of those that are known to be bad.
    Raises UserError in place of NotFinite.
    """
    try:
        yield
    except NotFinite as error:
        # Rank 0 says so for all; the others wait until the file is there.
        path = os.path.join(out_dir, "not_finite.jsonl")
        bad = error.rows or []
        count = on_first_rank(lambda: write_rows(path, rows(), bad))
        raise UserError(
            f"{where}: {error}. Nothing of this step is kept. Its {count} rows are in {path}: look "
            "at them, or lower the learning rate. The same command goes on after the last "
            "checkpoint, if there is one"
        ) from None


def write_rows(path: str, rows: Iterable[dict], bad: list[int]) -> int:
    """Write a line per row. Returns how many there are."""
    known = set(bad)
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps(dict(row=number, not_finite=number in known, **row)) + "\n")
            count += 1
    return count
