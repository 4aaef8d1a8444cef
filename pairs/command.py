"""The command line: make, filter, report."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.schedule import SELF_MODES
from . import engine, samplers
from .scores import BUNDLED_CLIP, DEMO, Scorer, check_clip
from .select import BUNDLED, PUBLISHED, Filter
from .store import RUN, Store, StoreError
from .table import RANGES, BadRow, Row, TableError, read_range, read_table
from .tries import INSTRUCTPIX2PIX, PUBLISHED_TRIES, Settings

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_CLIP = "openai/clip-vit-large-patch14"
DEMO_SETTINGS = {"cfg": (4.0, 4.0), "steps": 20, "width": 128, "height": 128}
SHOWN = 10
"""Bad rows that are printed one by one."""

SAMPLED, KEPT, WHERE = "What is sampled", "Which pairs are kept", "Where it runs"
"""Panels of the help."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Training sets of edited pairs, made with Prompt-to-Prompt from a table of prompts.",
)


class Format(str, Enum):
    folder = "folder"
    webdataset = "webdataset"


class Recipe(str, Enum):
    instructpix2pix = "instructpix2pix"


TableArgument = Annotated[
    str,
    typer.Argument(
        help="JSON lines, CSV or Parquet with original_prompt, edited_prompt and, if you like, edit_prompt "
        "(the instruction). The columns cross_end, self_end, cfg, steps, seed, blend_words and "
        "blend_source_words set a row's own; all others are kept."
    ),
]
OutOption = Annotated[str, typer.Option(help="The set's folder, or an address such as s3://bucket/pairs.")]
DirArgument = Annotated[str, typer.Argument(help="The folder of a set.")]
KeepOption = Annotated[
    int,
    typer.Option(
        min=1, help="Of each row at most so many pairs, the best by direction.", rich_help_panel=KEPT
    ),
]
ImageOption = Annotated[
    float | None,
    typer.Option(
        help="Least CLIP similarity of both images.",
        show_default="0.7; of the bundled CLIP 0",
        rich_help_panel=KEPT,
    ),
]
TextOption = Annotated[
    float | None,
    typer.Option(
        help="Least CLIP similarity of each image and its prompt.",
        show_default="0.2; of the bundled CLIP 0.7",
        rich_help_panel=KEPT,
    ),
]
DirectionOption = Annotated[
    float | None,
    typer.Option(
        help="Least CLIP similarity of the images' change and the prompts' change.",
        show_default="0.2; of the bundled CLIP 0.5",
        rich_help_panel=KEPT,
    ),
]
OutsideOption = Annotated[
    float | None,
    typer.Option(
        help="Least SSIM outside of the blend's mask, for rows with blend words.", rich_help_panel=KEPT
    ),
]
BackgroundOption = Annotated[
    float | None,
    typer.Option(help="Largest distance outside of the blend's mask, 0 to 1.", rich_help_panel=KEPT),
]
FormatOption = Annotated[Format, typer.Option(help="webdataset also writes shards, into DIR/webdataset.")]


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of the user's making end in one line."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (engine.RunError, StoreError, TableError, ValueError) as error:
            sys.exit(f"pairs: {engine.describe(error)}")
        except OSError as error:
            sys.exit(
                f"pairs: {engine.describe(error)}. What is finished is kept; run the same command again."
            )
        except KeyboardInterrupt:
            print(
                "pairs: stopped. What is finished is kept; run the same command again to go on.",
                file=sys.stderr,
            )
            sys.exit(130)

    return wrapped


@app.command()
@in_one_line
def make(
    table: TableArgument,
    out: OutOption,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint with model, CLIP and VAE, as ComfyUI loads it.", rich_help_panel=SAMPLED
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="The bundled model: 128 px, guidance 4, 20 steps.", rich_help_panel=SAMPLED
        ),
    ] = False,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            help="Settings as published: self-attention alone, in both halves of guidance, and with it cfg, "
            "steps, sampler and tries. Other options change single ones of them.",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    tries: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs that are sampled of each row.",
            show_default="4; with --recipe 100",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    keep: KeepOption = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="Of everything that is drawn.", rich_help_panel=SAMPLED)
    ] = 0,
    cross_end: Annotated[
        str | None,
        typer.Option(
            help="End of cross-attention's window: 0.8, or 0.4:0.9 to draw.",
            show_default="0.8; with --recipe 0",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    self_end: Annotated[
        str | None,
        typer.Option(
            help="End of self-attention's window, likewise; with --recipe its p, for steps i of n with "
            "i / (n - 1) below p.",
            show_default="0.4; with --recipe 0.1:0.9",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    self_resolution: Annotated[
        float | None,
        typer.Option(
            help="As in tau Scheduler; 1 for all layers.",
            show_default="0.5; with --recipe 1",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    self_mode: Annotated[
        str | None,
        typer.Option(
            help=f"As in tau Scheduler: {', '.join(SELF_MODES)}.",
            show_default="map; with --recipe map in both halves",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(
            help="Guidance: 7.5, or 7.5:15 to draw.",
            show_default="7.5; with --recipe 7.5:15",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(show_default="50; with --recipe 100", rich_help_panel=SAMPLED)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Any of ComfyUI's.",
            show_default="euler; with --recipe euler_ancestral",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Any of ComfyUI's.", show_default="normal", rich_help_panel=SAMPLED)
    ] = None,
    width: Annotated[int | None, typer.Option(help="px", show_default="512", rich_help_panel=SAMPLED)] = None,
    height: Annotated[
        int | None, typer.Option(help="px", show_default="512", rich_help_panel=SAMPLED)
    ] = None,
    negative: Annotated[
        str, typer.Option(help="Negative prompt of source and target.", rich_help_panel=SAMPLED)
    ] = "",
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tries of a row that are sampled together; they share what is drawn.",
            rich_help_panel=SAMPLED,
        ),
    ] = 1,
    clip: Annotated[
        str | None,
        typer.Option(
            help="The CLIP or SigLIP that scores: a folder or a name on the hub; none for no such scores.",
            show_default=f"{PUBLISHED_CLIP}; with --demo the bundled one",
            rich_help_panel=KEPT,
        ),
    ] = None,
    min_image: ImageOption = None,
    min_text: TextOption = None,
    min_direction: DirectionOption = None,
    min_ssim_outside: OutsideOption = None,
    max_distance_outside: BackgroundOption = None,
    drop_rejected: Annotated[
        bool,
        typer.Option(
            "--drop-rejected", help="Delete the images of tries that are not kept.", rich_help_panel=KEPT
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Sampling processes; 0: one per GPU, or one without, with --demo one per core.",
            rich_help_panel=WHERE,
        ),
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processor threads per worker; 0: all, with --demo 1. Another number may change low bits.",
            rich_help_panel=WHERE,
        ),
    ] = 0,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster; without it Ray starts here.", rich_help_panel=WHERE),
    ] = None,
    format: FormatOption = Format.folder,
    stand_in: Annotated[
        float | None,
        typer.Option(
            help="Sample nothing: draw flat images that take so many seconds, to try a table or a cluster.",
            rich_help_panel=SAMPLED,
        ),
    ] = None,
) -> None:
    """Sample tries of every row of TABLE, score them, keep the best.

    Run the same command again after whatever stopped it: what is finished is not made twice.
    """
    sampling = [checkpoint is not None, demo, stand_in is not None]
    if sum(sampling) != 1:
        raise ValueError("name one of --checkpoint FILE, --demo and --stand-in SECONDS")
    settings = chosen_settings(
        demo,
        recipe,
        cross_end=cross_end,
        self_end=self_end,
        self_resolution=self_resolution,
        self_mode=self_mode,
        cfg=cfg,
        steps=steps,
        sampler=sampler,
        scheduler=scheduler,
        width=width,
        height=height,
        negative=negative,
        batch=batch,
        seed=seed,
    )
    tries = tries or (PUBLISHED_TRIES if recipe else 4)
    file = samplers.DEMO if demo else str(checkpoint.resolve()) if checkpoint else ""
    settings = replace(settings, **_model(file))  # type: ignore[arg-type]
    scores = _clip(clip, demo, stand_in)
    filter = _filter(keep, scores, min_image, min_text, min_direction, min_ssim_outside, max_distance_outside)
    rows = _checked(table)
    engine.reach(address)
    out = out if "://" in out else str(Path(out).resolve())
    store = Store(out)
    store.prepare()
    _same_settings(store, settings, filter, scores)
    cores = os.cpu_count() or 1
    job = engine.Job(
        address=out,
        settings=settings,
        tries=tries,
        filter=filter,
        sampler=(
            functools.partial(samplers.StandIn, out, stand_in)
            if stand_in is not None
            else functools.partial(samplers.ComfySampler, out, file, threads or (1 if demo else cores))
        ),
        scorer=functools.partial(Scorer, out, scores),
        workers=workers,
        without_gpu=cores if file == samplers.DEMO and not address else 1,
        drop=drop_rejected,
        cluster=address,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _progress() as watch:
        counts = engine.run(job, rows, watch)
    _tell(counts, tries, store)
    if format is Format.webdataset:
        _shards(store)


def chosen_settings(demo: bool, recipe: Recipe | None, **given: Any) -> Settings:
    """Settings from the options that were given, the recipe's, those of the bundled model and the usual ones.

    given: None for an option that was not; ranges as texts. The first of these that has a value sets it.
    """
    values = {name: value for name, value in given.items() if value is not None}
    values |= {name: read_range(values[name], name) for name in RANGES if name in values}
    return Settings(**{**(DEMO_SETTINGS if demo else {}), **(INSTRUCTPIX2PIX if recipe else {}), **values})


@app.command()
@in_one_line
def filter(
    folder: DirArgument,
    keep: KeepOption = 4,
    min_image: ImageOption = None,
    min_text: TextOption = None,
    min_direction: DirectionOption = None,
    min_ssim_outside: OutsideOption = None,
    max_distance_outside: BackgroundOption = None,
    format: FormatOption = Format.folder,
) -> None:
    """Choose the kept pairs again, by the scores of all tries. Samples nothing."""
    store, run = _opened(folder)
    chosen = _filter(
        keep, run["clip"], min_image, min_text, min_direction, min_ssim_outside, max_distance_outside
    )
    with store.locked():
        engine.write_metadata(store, chosen)
        store.commit(RUN, json.dumps({**run, "filter": asdict(chosen)}, indent=1).encode())
    lost = sum(not store.exists(values["edited_image_file_name"]) for values in chosen.kept(store.rows()))
    if lost:
        print(f"pairs: {lost} kept pairs have no images: --drop-rejected deleted them.", file=sys.stderr)
    print(_kept(store))
    if format is Format.webdataset:
        _shards(store)


@app.command()
@in_one_line
def report(folder: DirArgument) -> None:
    """Write DIR/report.html: counts, acceptance, histograms, and the best, middle and worst pairs."""
    from .report import page

    store, run = _opened(folder)
    store.commit("report.html", page(store, Filter(**run["filter"])).encode())
    print(f"{folder.rstrip('/')}/report.html")


def _opened(folder: str) -> tuple[Store, dict[str, Any]]:
    store = Store(folder if "://" in folder else str(Path(folder).resolve()))
    if not store.exists(RUN):
        raise StoreError(f"{folder} holds no set of pairs; `python pairs make` writes one")
    return store, json.loads(store.read(RUN))


def _filter(
    keep: int,
    clip: str | None,
    image: float | None,
    text: float | None,
    direction: float | None,
    ssim_outside: float | None,
    distance_outside: float | None,
) -> Filter:
    """The limits that were given, and those of the CLIP that scores."""
    given = {"clip_sim_image": image, "clip_sim_0": text, "clip_sim_1": text, "clip_sim_dir": direction}
    known = {name: limit for name, limit in given.items() if limit is not None}
    if known and not clip:
        raise ValueError("--min-image, --min-text and --min-direction need a CLIP that scores: see --clip")
    usual = {} if not clip else BUNDLED if clip == DEMO else PUBLISHED
    least = {**usual, **known}
    if ssim_outside is not None:
        least["ssim_outside"] = ssim_outside
    return Filter(keep, least, {} if distance_outside is None else {"distance_outside": distance_outside})


def _clip(name: str | None, demo: bool, stand_in: float | None) -> str | None:
    """Folder or name of the CLIP that scores, or DEMO. Raises ValueError if there is none."""
    if name == "none" or (name is None and stand_in is not None):
        return None
    name = name or (str(BUNDLED_CLIP) if demo else PUBLISHED_CLIP)
    name = str(Path(name).resolve()) if Path(name).exists() else name
    if name == str(BUNDLED_CLIP):
        return DEMO
    check_clip(name)
    return name


def _model(file: str) -> dict[str, str]:
    """Name and hash of the checkpoint. Raises ValueError for a file that is not there or cannot be read."""
    if not file:
        return {"model": "stand-in", "model_sha256": ""}
    path = ROOT / "demo" / "model.safetensors" if file == samplers.DEMO else Path(file)
    try:
        with path.open("rb") as opened:
            found = (
                hashlib.file_digest(opened, "sha256") if hasattr(hashlib, "file_digest") else _sha256(opened)
            )
    except OSError as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error.strerror}") from None
    return {
        "model": path.name if file != samplers.DEMO else "demo/model.safetensors",
        "model_sha256": found.hexdigest(),
    }


def _sha256(file: Any) -> Any:
    """For Python 3.10."""
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found


def _checked(table: str) -> Iterator[Row | BadRow]:
    """The table's rows, after all of them were read once: a table without a good row starts nothing."""
    bad: list[BadRow] = []
    good = 0
    for row in read_table(table):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            good += 1
    for row in bad[:SHOWN]:
        print(f"pairs: {table}, line {row.line}: {row.reason}; left out", file=sys.stderr)
    if len(bad) > SHOWN:
        print(f"pairs: {table}: {len(bad) - SHOWN} more rows left out", file=sys.stderr)
    if not good:
        raise TableError(f"the table {table} has no row that can be used")
    return read_table(table)


def _same_settings(store: Store, settings: Settings, chosen: Filter, clip: str | None) -> None:
    """Note the run; raise StoreError if the folder holds pairs that were made with other settings."""
    now = {"settings": asdict(settings), "clip": clip, "filter": asdict(chosen)}
    now = json.loads(json.dumps(now))
    if store.exists(RUN) and store.exists("images"):
        before = json.loads(store.read(RUN))
        other = [f"clip is {before['clip']}, not {clip}"] * (before["clip"] != clip) + [
            f"{name} is {before['settings'].get(name)}, not {value}"
            for name, value in now["settings"].items()
            if before["settings"].get(name) != value
        ]
        if other:
            raise StoreError(
                f"{store.address} holds pairs of other settings ({'; '.join(other)}): choose another folder"
            )
    store.commit(RUN, json.dumps(now, indent=1).encode())


class _progress:
    """A bar with rate and time left, alone on the terminal: what Ray's own code writes there is left out."""

    STREAMS = (1, 2)

    def __enter__(self) -> Callable[[engine.Counts, int], None]:
        from tqdm import tqdm

        often = 0.5 if sys.stderr.isatty() else 15.0
        sys.stdout.flush()
        self.kept = [os.dup(stream) for stream in self.STREAMS]
        self.stderr = os.fdopen(os.dup(2), "w")
        with open(os.devnull, "w") as nowhere:
            for stream in self.STREAMS:
                os.dup2(nowhere.fileno(), stream)
        self.bar = tqdm(total=0, unit=" pairs", mininterval=often, dynamic_ncols=True, file=self.stderr)
        return self.watch

    def watch(self, counts: engine.Counts, finished: int) -> None:
        if not self.bar.total:
            self.bar.reset(counts.to_do)
        self.bar.update(finished)

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.stderr.close()
        sys.stdout.flush()
        for stream, kept in zip(self.STREAMS, self.kept, strict=True):
            os.dup2(kept, stream)
            os.close(kept)


def _tell(counts: engine.Counts, tries: int, store: Store) -> None:
    print(
        f"{counts.rows} rows: {counts.to_do // tries} made, {counts.done_before} were done, "
        f"{counts.repeated} repeated, {len(counts.bad)} left out. "
        f"{counts.made} tries, {counts.failed} failed. "
        f"{_kept(store)}"
    )


def _kept(store: Store) -> str:
    kept = store.read("metadata.jsonl").count(b"\n")
    return f"{kept} pairs in {store.address}/metadata.jsonl"


def _shards(store: Store) -> None:
    from .shards import write_shards

    print(f"{write_shards(store)} shards in {store.address}/webdataset")


def main() -> None:
    app(prog_name="python pairs")
