"""The pipeline on Ray Data: rows, tries, sampling, scores, and the journal of what is done.

    table -> orders: a few units of tries -> sampling actors -> scoring actors -> this process: journal

What travels are orders as JSON texts: ids and settings, never pixels. Ray schedules, retries and moves work
off lost machines; whatever it repeats changes nothing, because files are named by what they hold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import fields
from .select import Filter
from .store import METADATA, Done, Store, image_names
from .table import BadRow, Row
from .tries import Settings, expand, row_id

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("attention", "sampling", "demo", "pairs", "tools")
"""The folders that other machines get."""
PATIENCE = {"RAY_raylet_start_wait_time_s": "600", "RAY_worker_register_timeout_seconds": "600"}
"""Seconds that a Ray started here waits for its processes; by default it gives up on a busy machine."""
FLUSH = 5.0
"""Seconds from a finished row to its line."""


class RunError(RuntimeError):
    """The run cannot start, or cannot go on."""


@dataclass(frozen=True)
class Job:
    """What a run does.

    sampler, scorer: make the actors' objects, with `make(unit)` and `score(id, original, edited)`; scorer may
    be None. tries: of each row. drop: delete the images of tries that are not kept.
    workers: sampling actors, 0 for one per GPU; without_gpu: so many where there is none. order: units that
    go to an actor together, 0 to choose by their number.
    cluster: the address of a Ray cluster; None starts Ray here.
    """

    address: str
    settings: Settings
    tries: int
    filter: Filter
    sampler: Callable[[], Any]
    scorer: Callable[[], Any] | None
    workers: int = 0
    without_gpu: int = 1
    drop: bool = False
    order: int = 0
    cluster: str | None = None


@dataclass
class Counts:
    """Of a run: rows of the table by what became of them, tries by how they ended."""

    rows: int = 0
    done_before: int = 0
    repeated: int = 0
    bad: list[BadRow] = field(default_factory=list)
    to_do: int = 0
    made: int = 0
    failed: int = 0


class Stage:
    """An actor of Ray Data around an object of ours. What it raises travels in the order, not through Ray:
    Ray would try a broken checkpoint again and again."""

    def __init__(self, make: Callable[[], Any], step: Callable[[Any, dict[str, Any]], None]):
        self.step, self.failure = step, ""
        self.inner: Any = None
        try:
            self.inner = make()
        except Exception as error:
            self.failure = describe(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"order": [self._serve(text) for text in batch["order"]]}

    def _serve(self, text: str) -> str:
        units = json.loads(text)
        for unit in units:
            if self.failure:
                unit.setdefault("fatal", self.failure)
            elif "error" not in unit and "fatal" not in unit:
                try:
                    self.step(self.inner, unit)
                except ValueError as error:  # the row's own fault
                    unit["error"] = describe(error)
                except Exception as error:
                    unit["fatal"] = describe(error)
        return json.dumps(units)


def sample_step(sampler: Any, unit: dict[str, Any]) -> None:
    sampler.make(unit)


def score_step(scorer: Any, unit: dict[str, Any]) -> None:
    prompts = unit["original_prompt"], unit["edited_prompt"]
    unit["scores"] = [scorer.score(name, *prompts) for name in unit["ids"]]


def describe(error: BaseException) -> str:
    """One line for a person."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    name = getattr(error, "filename", None)
    return " ".join(f"{text}: {name}".split() if name else text.split())


def run(
    job: Job, table: Iterable[Row | BadRow], watch: Callable[[Counts, int], None] | None = None
) -> Counts:
    """Make what is missing of the set, and write metadata.jsonl. Also after Ctrl+C, which is raised again.

    watch: called with the counts and the number of tries that were just finished.
    Raises RunError, StoreError.
    """
    store, counts = Store(job.address), Counts()
    with store.locked():
        store.sweep()
        done = store.finished()
        orders = _orders(job, table, done, counts)
        try:
            _stream(job, store, orders, counts, watch or (lambda *_: None))
        finally:
            write_metadata(store, job.filter)
        store.sweep()
        if job.drop:
            _drop(store, job.filter, store.rows())
    return counts


def write_metadata(store: Store, chosen: Filter) -> int:
    """metadata.jsonl from the journal, in the order of the table; returns the number of its lines."""
    lines = [json.dumps(values, ensure_ascii=False) + "\n" for values in chosen.kept(store.rows())]
    store.commit(METADATA, "".join(lines).encode())
    return len(lines)


def _orders(
    job: Job, table: Iterable[Row | BadRow], done: dict[str, Done], counts: Counts
) -> Iterator[tuple[Row, str]]:
    """The rows that are to be done, with their ids."""
    seen: set[int] = set()
    for found in table:
        counts.rows += 1
        if isinstance(found, BadRow):
            counts.bad.append(found)
            continue
        name = row_id(found, job.settings)
        if int(name, 16) in seen:
            counts.repeated += 1
        elif name in done and done[name].tries >= job.tries:
            counts.done_before += 1
        else:
            yield found, name
        seen.add(int(name, 16))


def _stream(
    job: Job,
    store: Store,
    rows: Iterable[tuple[Row, str]],
    counts: Counts,
    watch: Callable[[Counts, int], None],
) -> None:
    groups = _chunks(rows, 100)
    first = next(groups, None)
    if first is None:
        return
    chunks = []
    with cluster(job) as ray:
        for chunk in itertools.chain([first], groups):
            counts.to_do += len(chunk) * job.tries
            texts = [json.dumps([vars(row) for row in chunk], default=str)]
            chunks.append(ray.put(_table(rows=texts)))
        watch(counts, 0)
        _collect(job, store, _pipeline(ray, job, chunks, counts.to_do), counts, watch)


def _table(**columns: list[str]) -> Any:
    import pyarrow

    return pyarrow.table(
        {name: pyarrow.array(texts, pyarrow.large_string()) for name, texts in columns.items()}
    )


def _chunks(items: Iterable[tuple[Row, str]], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row, _ in items:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _workers(ray: Any, job: Job) -> tuple[int, float]:
    """How many sampling actors, and the share of a GPU that each gets."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    workers = job.workers or int(gpus) or job.without_gpu
    return workers, min(1.0, gpus / workers)


def _pipeline(ray: Any, job: Job, chunks: list[Any], tries: int) -> Any:
    workers, gpus = _workers(ray, job)
    units = -(-tries // job.settings.batch)
    size = job.order or max(1, min(32, units // (16 * workers)))
    settings, count = job.settings, job.tries

    def plan(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        units = [
            unit
            for text in batch["rows"]
            for row in json.loads(text)
            for unit in expand(Row(**row), settings, count)
        ]
        for at in range(0, len(units), size):
            yield {"order": [json.dumps(units[at : at + size])]}

    data = ray.data.from_arrow_refs(chunks).map_batches(
        plan, batch_size=None, num_cpus=0.1, compute=ray.data.TaskPoolStrategy(size=1)
    )
    stages: list[tuple[Callable[[], Any], Callable[[Any, dict[str, Any]], None], float]]
    stages = [(job.sampler, sample_step, 0.9)]
    if job.scorer is not None:
        stages.append((job.scorer, score_step, 0.1))
    for make, step, share in stages:
        data = data.map_batches(
            Stage,
            fn_constructor_args=(make, step),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=share,
            num_gpus=share * gpus or None,
        )
    return data


def _collect(job: Job, store: Store, data: Any, counts: Counts, watch: Callable[[Counts, int], None]) -> None:
    """Gather each row's units; when it has all, note its line; every few seconds write the lines."""
    gathered: dict[str, dict[int, dict[str, Any]]] = {}
    ready: list[dict[str, Any]] = []
    written = time.monotonic()
    wanted = -(-job.tries // job.settings.batch)

    def flush() -> None:
        if ready:
            store.append(ready)
            if job.drop:
                _drop(store, job.filter, ready)
            ready.clear()

    try:
        for batch in data.iter_batches(batch_size=None, batch_format="numpy"):
            for unit in (unit for text in batch["order"] for unit in json.loads(text)):
                if "fatal" in unit:
                    raise RunError(f"{unit['fatal']}. What is finished is kept; run the same command again")
                units = gathered.setdefault(unit["row"], {})
                units[unit["number"]] = unit
                if len(units) == wanted:
                    ready.append(_journal_line(gathered.pop(unit["row"]), job.tries))
                finished = len(unit["ids"])
                counts.made += finished
                counts.failed += finished * ("error" in unit)
                watch(counts, finished)
            if time.monotonic() - written > FLUSH:
                flush()
                written = time.monotonic()
    finally:
        flush()


def _journal_line(units: dict[int, dict[str, Any]], tries: int) -> dict[str, Any]:
    """A row of the journal: its id, its line in the table, its tries in their order."""
    first = units[0]
    found = [values for number in sorted(units) for values in _tries(units[number])][:tries]
    return {"row": first["row"], "line": first["line"], "count": tries, "tries": found}


def _tries(unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item, name in enumerate(unit["ids"]):
        values = {**unit, "id": name, "item": item}
        if "error" in unit:
            yield {**fields.line(values, unit["more"]), "error": unit["error"]}
            continue
        files = dict(zip(fields.IMAGES, image_names(name), strict=False))
        yield fields.line(
            {**values, **files, **unit.get("scores", [{}] * len(unit["ids"]))[item]}, unit["more"]
        )


def _drop(store: Store, chosen: Filter, rows: Iterable[dict[str, Any]]) -> None:
    """Delete the images of the tries that are not kept."""
    for row in rows:
        kept = {values["id"] for values in chosen.best(row["tries"])}
        for values in row["tries"]:
            if values["id"] not in kept:
                for name in image_names(values["id"]):
                    store.remove(name)


@contextlib.contextmanager
def cluster(job: Job) -> Iterator[Any]:
    """Ray, started here or reached at its address, with the pack on its machines under the name `p2p`."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    from ..tools.env import find_host

    with tempfile.TemporaryDirectory(prefix="pairs-") as scratch:
        environment: dict[str, Any] = {"env_vars": {"COMFYUI_PATH": str(find_host())}}
        if job.cluster:
            environment["py_modules"] = [str(_packed(Path(scratch)))]
            where: dict[str, Any] = {"address": job.cluster}
        else:
            os.symlink(ROOT, Path(scratch, "p2p"))
            environment["env_vars"]["PYTHONPATH"] = scratch
            cores = 2 * (job.workers or os.cpu_count() or 1) + 1  # places, not processors
            where = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        try:
            ray.init(**where, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises bare ones too
            raise RunError(
                f"Ray at {job.cluster or 'this machine'} did not start: {describe(error)}"
            ) from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # an order is a block: it goes to whoever is free
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield ray
        finally:
            ray.shutdown()


def reach(address: str | None) -> None:
    """Raise RunError unless something listens at a cluster's address."""
    if not address or address in ("auto", "local"):
        return
    host, _, port = address.split("://")[-1].rpartition(":")
    if not host or not port.isdigit():
        raise RunError(f"the address of the Ray cluster is {address!r}; expected HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"no Ray cluster at {address}: {describe(error)}") from None


def _packed(folder: Path) -> Path:
    """A copy of the pack under an importable name, for Ray to send."""
    pack = folder / "p2p"
    pack.mkdir()
    shutil.copy(ROOT / "__init__.py", pack)
    for name in SHIPPED:
        shutil.copytree(
            ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__", ".work", "*.jpg")
        )
    return pack
