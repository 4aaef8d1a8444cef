"""Tables and runs for the tests of `pairs/`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "pairs")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve edits."""
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in edits(12)))
    return path


def edits(count: int) -> list[dict[str, Any]]:
    return [
        {
            "original_prompt": f"a cat beside {n} trees",
            "edit_prompt": "make it a dog",
            "edited_prompt": f"a dog beside {n} trees",
        }
        for n in range(count)
    ]


def make(table: Path, out: Path, *options: str) -> list[str]:
    """The command that makes a small set of flat images, two tries a row."""
    small = ["--width", "16", "--height", "16", "--tries", "2", "--workers", "1"]
    stand_in = [] if "--stand-in" in options or "--demo" in options else ["--stand-in", "0"]
    return [*COMMAND, "make", str(table), "--out", str(out), *small, *stand_in, *options]


def run(*command: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, which ends with the block."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below some shells
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def files(folder: Path) -> dict[str, bytes]:
    """What a set is: every file that is not the tool's own, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".pairs" not in path.parts
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
