"""Reading a table of edits: JSON lines, CSV or Parquet, row by row, bad rows named by their line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec

from .fields import PROMPTS

RANGES = {"cross_end": (0.0, 1.0), "self_end": (0.0, 1.0), "cfg": (0.0, 100.0)}
"""Settings that a row may give, as a number or as a range `low:high` from which each try draws."""
WORDS = ("blend_words", "blend_source_words")
OPTIONS = (*RANGES, *WORDS, "seed", "steps")
SEEDS = 2**63
"""So many seeds there are: what signed columns hold."""
SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


MORE_CELLS = "\0"


class TableError(ValueError):
    """The table as a whole cannot be used."""


@dataclass(frozen=True)
class Row:
    """An edit to make. line: where it stands in the table, from 1. options: settings of its own.

    more: the table's further columns, as they are.
    """

    line: int
    original_prompt: str
    edit_prompt: str
    edited_prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str


def read_range(value: Any, name: str) -> tuple[float, float]:
    """`0.8`, `"0.8"`, `"0.1:0.9"` or `[0.1, 0.9]` as (low, high).

    Raises ValueError for anything else, and out of the setting's limits.
    """
    parts = value.split(":") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        low, high = float(parts[0]), float(parts[-1])
        if len(parts) not in (1, 2):
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"{name} is {value!r}; expected a number or a range like 0.1:0.9") from None
    least, most = RANGES[name]
    if not least <= low <= high <= most:
        raise ValueError(f"{name} is {value!r}; expected {least:g} to {most:g}, the lower end first")
    return low, high


def read_table(path: str) -> Iterator[Row | BadRow]:
    """The rows of a table in their order.

    path: a file or fsspec address that ends with .jsonl, .csv or .parquet. Raises TableError for a file that
    is not there, of another kind, or without the columns `original_prompt` and `edited_prompt`.
    """
    kind = next((kind for end, kind in SUFFIXES.items() if path.lower().endswith(end)), None)
    if kind is None:
        raise TableError(f"{path} is no table that can be read; expected a .jsonl, .csv or .parquet file")
    reader = {"json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[kind]
    try:
        for line, found in reader(path):
            yield found if isinstance(found, BadRow) else _row(line, found)
    except FileNotFoundError:
        raise TableError(f"the table {path} is not there") from None
    except (IsADirectoryError, PermissionError) as error:
        raise TableError(f"the table {path} cannot be read: {error.strerror}") from None


def _row(line: int, values: dict[str, Any]) -> Row | BadRow:
    """A checked row. Cells of CSV files are text; an empty one sets nothing."""
    try:
        prompts = [_prompt(values, name) for name in PROMPTS]
        options = {
            name: _option(name, values[name]) for name in OPTIONS if values.get(name) not in (None, "")
        }
    except ValueError as error:
        return BadRow(line, str(error))
    more = {name: value for name, value in values.items() if name not in (*PROMPTS, *OPTIONS)}
    original, edit, edited = prompts
    return Row(line, original, edit, edited, options, more)


def _prompt(values: dict[str, Any], name: str) -> str:
    text = values.get(name)
    if name == "edit_prompt" and text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {'missing' if text is None else repr(text)}; expected a text")
    if "\ufffd" in text:
        raise ValueError(f"{name} is not UTF-8")
    if name != "edit_prompt" and not text.strip():
        raise ValueError(f"{name} is empty; expected at least one word")
    return text


def _option(name: str, value: Any) -> Any:
    if name in RANGES:
        return read_range(value, name)
    if name in WORDS:
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; expected words separated by commas")
        return value
    try:
        number = int(value)
        if number != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; expected a whole number") from None
    least, most = (0, SEEDS - 1) if name == "seed" else (1, 10_000)
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r}; expected {least} to {most}")
    return number


def _json_rows(path: str) -> Iterator[tuple[int, Any]]:
    with fsspec.open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                values = json.loads(raw.strip())
            except ValueError as error:  # JSON and UTF-8
                yield number, BadRow(number, f"not JSON: {error}")
                continue
            good = isinstance(values, dict)
            yield number, values if good else BadRow(number, "not an object with the names of the fields")


def _csv_rows(path: str) -> Iterator[tuple[int, Any]]:
    with fsspec.open(path, "r", encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restkey=MORE_CELLS)
        _check_columns(path, reader.fieldnames or [])
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, BadRow(line, str(error))
                continue
            extra = values.pop(MORE_CELLS, None)
            if extra is not None:
                yield line, BadRow(line, f"has {len(extra)} cells more than the first line has names")
            else:
                yield line, values


def _parquet_rows(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    with fsspec.open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file)
            _check_columns(path, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(1_000):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
        except pyarrow.ArrowException as error:
            raise TableError(f"the table {path} is not Parquet, or is damaged: {error}") from None


def _check_columns(path: str, names: Any) -> None:
    missing = {"original_prompt", "edited_prompt"} - set(names)
    if missing:
        raise TableError(
            f"the table {path} has no column {' and no column '.join(sorted(missing))}; "
            f"it has {', '.join(map(str, names)) or 'none'}"
        )
