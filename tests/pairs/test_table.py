"""Tables: every row is read or named by its line, whatever the format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from p2p.pairs.table import BadRow, Row, TableError, read_range, read_table

GOOD = {"original_prompt": "a cat", "edit_prompt": "a dog!", "edited_prompt": "a dog"}


def write(path: Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{**GOOD, "cfg": "5:7", "seed": 3, "note": "kept"}, {**GOOD, "cfg": "", "seed": None, "note": "x"}]
    found = list(read_table(write(tmp_path / f"t.{suffix}", rows)))
    assert [type(row) for row in found] == [Row, Row]
    assert found[0].options == {"cfg": (5.0, 7.0), "seed": 3} and found[0].more == {"note": "kept"}
    assert found[1].options == {} and found[1].edited_prompt == "a dog"


def test_a_bad_row_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = json.dumps(GOOD).encode()
    bad = [
        b"{",
        b"[1]",
        b'{"original_prompt": "a cat"}',
        b"\xff\xfe",
        json.dumps({**GOOD, "cfg": "9:1"}).encode(),
    ]
    path.write_bytes(b"\n".join([good, *bad, b"", good]) + b"\n")
    found = list(read_table(str(path)))
    assert [row.line for row in found if isinstance(row, BadRow)] == [2, 3, 4, 5, 6]
    assert [row.line for row in found if isinstance(row, Row)] == [1, 8]


def test_a_bad_row_of_a_csv_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b'original_prompt,edited_prompt\na cat,a dog\n"two\nlines",a dog\na,b,c\n\xff,b\n,b\na cat,a fox\n'
    )
    found = list(read_table(str(path)))
    assert [row.line for row in found if isinstance(row, BadRow)] == [5, 6, 7]
    assert [row.edited_prompt for row in found if isinstance(row, Row)] == ["a dog", "a dog", "a fox"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", None, "not there"),
        ("t.txt", b"x", "expected a .jsonl"),
        ("t.csv", b"a,b\n1,2\n", "no column edited_prompt"),
        ("t.parquet", b"no parquet", "not Parquet"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TableError, match=message):
        list(read_table(str(tmp_path / name)))


@pytest.mark.parametrize("value", ["x", "0.9:0.1", "1.5", [0.1, 0.2, 0.3], None, "-1", float("nan")])
def test_a_range_out_of_order_or_limits_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="cross_end is"):
        read_range(value, "cross_end")
