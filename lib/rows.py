"""Files and hub data sets -> rows: dicts, each with the place where it stands."""

import csv
import glob
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from configurator import UserError
from lib.run import print0

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
KINDS = (*JSON_LINES, ".json", ".csv", ".parquet")
# Python makes no numbers of more digits than 4,300.
MOST_DIGITS = 4000
# Lists and dicts inside each other. No data set has a tenth of it, and functions that go down call
# themselves at each level.
MOST_LEVELS = 100


def read_rows(
    source: str, split: str = "train", config: str | None = None, max_bad_share: float = 0.01
) -> list[tuple[str, dict]]:
    """List of (where, row) of a file, a folder of .parquet files, or a hub data set.

    Files: .jsonl or .ndjson, also with .gz; .json, .csv, .parquet. `where` names the row
    ("file.jsonl line 7"). Rows that are not JSON objects are reported and skipped.
    Raises UserError if there is nothing to read, or too many rows are bad.
    """
    name = os.fspath(source)
    try:
        rows = read_any(name, split, config)
    except Exception as error:
        # `datasets` raises a dozen kinds: not found, no network, no such split.
        raise UserError(
            f"cannot load the data set {name!r} (split {split!r}): {error!s:.200}"
        ) from None
    if not rows:
        raise UserError(f"{name} has no rows")

    good = []
    bad = []
    for where, row in rows:
        if isinstance(row, UnicodeError):
            bad.append(f"{where}: not UTF-8")
        elif not isinstance(row, dict):
            bad.append(where)
        elif is_too_deep(row):
            bad.append(f"{where}: more than {MOST_LEVELS} levels deep")
        else:
            good.append((where, row))
    what = "not a JSON object"
    if name.lower().endswith(".csv"):
        what = "more or fewer fields than the header"
    report_bad(bad, len(rows), max_bad_share, what)
    return good


def report_bad(bad: list[str], total: int, max_share: float, what: str) -> None:
    """Print how many rows are skipped; `bad` has their places.

    Raises UserError if they are more than max_share of the total, or all.
    """
    line = f"{len(bad)} of {total} rows skipped ({what}): {', '.join(bad[:4])}"
    if len(bad) > max_share * total or len(bad) == total:
        raise UserError(
            f"{line}; more than max_bad_share={max_share} is not accepted: fix the file"
        )
    if bad:
        print0(" ".join(line.split()))


# ----------------------------------------------------------------------------------------------
# kinds of files


def read_any(name: str, split: str, config: str | None) -> list[tuple[str, object]]:
    """What read_rows() returns, before anything is checked."""
    kind = name.lower()
    if kind.endswith(JSON_LINES):
        return read_json_lines(name)
    if kind.endswith(".csv"):
        return read_csv(name)
    if kind.endswith(".json"):
        return read_json(name)
    if kind.endswith(".parquet"):
        table = read_parquet([name])
    elif os.path.isfile(name):
        raise ValueError(f"known kinds of files are {', '.join(KINDS)}")
    else:
        table = read_table(name, split, config)
    return [(f"{name} row {number}", row) for number, row in enumerate(table)]


def read_table(name: str, split: str, config: str | None):
    """The rows of a folder of .parquet files, or of a hub data set."""
    # Path.glob() takes the name as it is: it may have brackets.
    parts = sorted(str(path) for path in Path(name).glob("*.parquet"))
    if parts:
        return read_parquet(parts)

    from datasets import load_dataset

    if not os.path.isdir(name) or glob.escape(name) == name:
        return load_dataset(name, config, split=split)
    # `datasets` takes the name for a pattern: it gets a folder of links with another one.
    with tempfile.TemporaryDirectory() as folder:
        links = os.path.join(folder, "data")
        shutil.copytree(os.path.abspath(name), links, copy_function=os.symlink)
        return load_dataset(links, config, split=split)


def read_parquet(names: list[str]) -> Iterator[dict]:
    """The rows of .parquet files. Not by `datasets`, which takes a file's name as a pattern."""
    from pyarrow.parquet import ParquetFile

    for name in names:
        file = ParquetFile(name)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns have the same name: {', '.join(columns)}")
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def read_json(name: str) -> list[tuple[str, object]]:
    """The rows of a file that is one list; or a row per line, as some .json files have it.

    Not by `datasets`, which turns strings like 2020-01-01 into dates.
    """
    try:
        table = parse_json(Path(name).read_bytes())
    except json.JSONDecodeError:
        rows = read_json_lines(name)
        if rows and isinstance(rows[0][1], dict):
            return rows
        raise
    return [(f"{name} row {number}", row) for number, row in enumerate(table)]


def read_json_lines(name: str) -> list[tuple[str, object]]:
    """A row per line; an exception for a line that is no JSON."""
    open_file = gzip.open if name.lower().endswith(".gz") else open
    rows = []
    with open_file(name, "rt", encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            # Files that were joined may have several byte order marks.
            line = line.lstrip("\ufeff")
            if line.strip():
                rows.append((f"{name} line {number}", read_json_line(line)))
    return rows


def read_json_line(line: str):
    """What a line of JSON says, or the exception if it says nothing."""
    try:
        # Bytes that are no UTF-8 are surrogates here.
        line.encode()
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        return error


def parse_json(text: str | bytes):
    """What a text of JSON says.

    Raises ValueError if it says nothing, or if an object has a key twice: one of the two would be
    lost.
    """
    return json.loads(text, parse_int=read_int, object_pairs_hook=object_of)


def object_of(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def read_int(digits: str) -> int | str:
    """A number of a JSON file; one with more digits than Python takes stays a text."""
    return int(digits) if len(digits) <= MOST_DIGITS else digits


def read_csv(name: str) -> list[tuple[str, object]]:
    """A row per record, all values strings; None for a record with more or fewer fields.

    Raises ValueError if two columns have one name, csv.Error for an open quote.
    """
    # The default limit, 131,072 characters, is less than the tests of some programming problems.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = []
    with open(name, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, skipinitialspace=True)
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns have the same name: {', '.join(columns)}")

        # DictReader collects surplus fields under None, and fills missing ones with None.
        for number, row in enumerate(reader, 1):
            complete = None not in row and None not in row.values()
            rows.append((f"{name} record {number}", row if complete else None))
    return rows


# ----------------------------------------------------------------------------------------------
# values


def is_too_deep(row: dict) -> bool:
    """Are there lists or dicts of more than MOST_LEVELS levels?"""
    values = [row]
    for _ in range(MOST_LEVELS):
        inner = []
        for value in values:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, (list, tuple)):
                inner += value
        if not inner:
            return False
        values = inner
    return True


def name_columns(rows: list[tuple[str, dict]]) -> str:
    """The names of the columns of rows, for a message: some of them if there are many."""
    columns = sorted({key for _, row in rows for key in row})
    shown = [f"{column:.40}" for column in columns[:20]]
    if len(columns) > len(shown):
        shown.append(f"and {len(columns) - len(shown)} more")
    return ", ".join(shown)


def is_missing(value) -> bool:
    """Is this what files have in place of a value: None, NaN, a blank text, [], {}?

    A list or dict of such values is missing, too, and the text "nan", which is what a table whose
    values were all made texts has for NaN.
    """
    if isinstance(value, str) and value.strip() in ("nan", "NaN"):
        return True
    if isinstance(value, str):
        # Zero-width signs and byte order marks are not printable.
        return not any(sign.isprintable() and not sign.isspace() for sign in value)
    if isinstance(value, dict):
        return all(is_missing(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_missing(item) for item in value)
    # NaN is the only number that is not itself.
    return value is None or (isinstance(value, float) and value != value)


def without_none(value):
    """A value without the keys that are None, at any depth.

    Tables of Arrow, .parquet and the hub's, have every key in every row, None where it is absent.
    """
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def check_text(value) -> None:
    """Raise UnicodeEncodeError if a text in this value, at any depth, has half a surrogate pair.

    No tokenizer takes it, and no file.
    """
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key)
            check_text(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item)
