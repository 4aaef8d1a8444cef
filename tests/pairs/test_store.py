"""What has its name is whole, and what is in the journal is read back in the table's order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from p2p.pairs.store import SCRATCH, Store, StoreError


def rows(*numbers: int) -> list[dict]:
    return [
        {"row": f"{n:016x}", "line": n, "count": 1, "tries": [{"id": str(n), "text": '\u00e9, "tries"'}]}
        for n in numbers
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "set"))
    store.prepare()
    return store


def test_the_journal_is_read_in_the_tables_order_and_the_last_line_of_a_row_counts(store: Store) -> None:
    store.append(rows(5, 2))
    store.append(rows(9, 1))
    later = [{**rows(2)[0], "count": 3}]
    store.append(later)
    assert list(store.rows()) == [*rows(1), *later, *rows(5, 9)]
    assert {name: place.tries for name, place in store.finished().items()}[f"{2:016x}"] == 3


def test_a_full_disk_leaves_no_file_under_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.commit("a/before", b"x")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("a/before", "a/after"):
        with pytest.raises(OSError, match="No space left"):
            store.commit(name, b"yy")
    assert store.read("a/before") == b"x" and not store.exists("a/after")
    assert not list(Path(store.path(SCRATCH)).iterdir())


def test_what_killed_processes_left_is_swept(store: Store) -> None:
    Path(store.path(SCRATCH), "half").write_bytes(b"h")
    store.commit("whole", b"w")
    store.sweep()
    assert not list(Path(store.path(SCRATCH)).iterdir()) and store.read("whole") == b"w"


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(tmp_path / "file" / "set")).prepare()


def test_two_runs_on_one_folder_are_refused(store: Store) -> None:
    with store.locked(), pytest.raises(StoreError, match="another run"), store.locked():
        pass


def test_an_object_store_does_as_well() -> None:
    store = Store("memory://pairs-test/set")
    store.prepare()
    store.commit("images/a.png", b"a")
    store.append(rows(2))
    store.append(rows(1))
    store.sweep()
    assert list(store.rows()) == rows(1, 2) and store.read("images/a.png") == b"a"
    store.remove("images/a.png")
    assert not store.exists("images/a.png")
