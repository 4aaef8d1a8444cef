"""The set on disk or in an object store: what is finished, and how a file or a line becomes finished.

DIR/metadata.jsonl         the pairs that were kept
DIR/images/ab/ab..._0.png  source, _1.png target, _mask.png where a local blend acted; ab... is the try's id
DIR/.pairs/journal/        a line for each row of the table that is done, with all its tries and their scores
DIR/.pairs/run.json        the settings

A file is written under another name and renamed. A row's line is written after all its images. Whatever is
killed, what has its name is whole, and what is in the journal has its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

JOURNAL, SCRATCH, RUN, METADATA = ".pairs/journal", ".pairs/scratch", ".pairs/run.json", "metadata.jsonl"


class StoreError(RuntimeError):
    """The folder cannot be used."""


@dataclass(frozen=True)
class Done:
    """A row's line in the journal: in which part, and where in it."""

    line: int
    tries: int
    part: str
    offset: int


class Store:
    """A set's folder: a path, or an address that fsspec knows (s3://, gs:// ...)."""

    def __init__(self, address: str):
        self.address = address
        self.fs, self.root = fsspec.core.url_to_fs(address)
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def prepare(self) -> None:
        """Make the folder and write to it once. Raises StoreError if that fails."""
        probe = f"{SCRATCH}/probe"
        try:
            for name in (JOURNAL, SCRATCH):
                self.fs.makedirs(self.path(name), exist_ok=True)
            self.commit(probe, b"")
            self.fs.rm_file(self.path(probe))
        except Exception as error:  # every file system has its own
            raise StoreError(f"the folder {self.address} cannot be written: {_reason(error)}") from None

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def commit(self, name: str, data: bytes) -> None:
        """Write a file that is either whole or not there."""
        path = self.path(name)
        if not self.local:
            self.fs.pipe_file(path, data)  # an object appears when it is whole
            return
        part = self.path(f"{SCRATCH}/{uuid.uuid4().hex}")
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.replace(part, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.fs.ls(self.path(SCRATCH), detail=False, refresh=True):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(path)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to the journal, all or none, as a part of their own."""
        parts = self._parts()
        number = 1 + (int(parts[-1].rsplit("/", 1)[-1].split(".")[0]) if parts else 0)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.commit(f"{JOURNAL}/{number:08}.jsonl", text.encode())

    def finished(self) -> dict[str, Done]:
        """The row's id -> its last line in the journal."""
        done = {}
        for part in self._parts():
            with self.fs.open(part, "rb") as file:
                offset = 0
                for raw in file:
                    head = json.loads(raw[: raw.index(b', "tries"')] + b"}")
                    done[head["row"]] = Done(head["line"], head["count"], part, offset)
                    offset += len(raw)
        return done

    def rows(self) -> Iterator[dict[str, Any]]:
        """The journal's rows in the order of the table, each once."""
        done = sorted(self.finished().items(), key=lambda item: (item[1].line, item[0]))
        open_files: dict[str, Any] = {}
        try:
            for _, place in done:
                file = open_files.pop(place.part, None) or self.fs.open(place.part, "rb")
                open_files[place.part] = file  # the last one used is the last in the dict
                if len(open_files) > 64:
                    open_files.pop(next(iter(open_files))).close()
                file.seek(place.offset)
                yield json.loads(file.readline())
        finally:
            for file in open_files.values():
                file.close()

    def _parts(self) -> list[str]:
        try:
            found = self.fs.ls(self.path(JOURNAL), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(path for path in found if path.endswith(".jsonl"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises StoreError if another run on this machine is writing into the folder."""
        if not self.local or os.name == "nt":
            yield
            return
        import fcntl

        with open(self.path(".pairs/lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreError(f"another run is writing into {self.address}") from None
            yield


def image_names(name: str) -> tuple[str, str, str]:
    """A try's source, target and mask."""
    stem = f"images/{name[:2]}/{name}"
    return f"{stem}_0.png", f"{stem}_1.png", f"{stem}_mask.png"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
