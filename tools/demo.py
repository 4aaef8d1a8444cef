"""Renders the shared workflows with a real ComfyUI, its real page and the bundled model.

python -m tools.demo                 pictures and a page of them in output/demo/
python -m tools.demo --thumbnails    also replaces the thumbnails in workflows/
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from drawing.grid import contact_sheet

from .browser import Editor, open_editor
from .env import ROOT
from .server import ServerError, running_server

WORKFLOWS = ROOT / "workflows"
OUTPUT = ROOT / "output" / "demo"
THUMBNAIL_WIDTH = 512  # px

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prompt-to-Prompt: what the shared workflows draw</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
  section {{ margin: 3rem 0; }}
  img {{ width: 100%; display: block; border-radius: .4rem; }}
  dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }}
  dt {{ opacity: .6; }} dd {{ margin: 0; }}
</style>
<h1>Prompt-to-Prompt</h1>
<p>Each picture was rendered by a workflow from <code>workflows/</code>, queued on ComfyUI's own page.</p>
{sections}
</html>
"""


@dataclass(frozen=True)
class Rendered:
    name: str
    title: str
    prompts: list[tuple[str, str]]  # (source, target)
    pictures: list[Path]
    seconds: float


def describe(workflow: dict[str, Any], name: str) -> tuple[str, list[tuple[str, str]]]:
    """The heading of a workflow's note, and its pairs of prompts."""
    title = name.replace("_", " ")
    prompts = []
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote" and node["widgets_values"][0].startswith("#"):
            title = node["widgets_values"][0].splitlines()[0].lstrip("# ")
        if node["type"] == "P2PPromptPair":
            prompts.append((node["widgets_values"][0], node["widgets_values"][1]))
    return title, prompts


def joined(contents: list[bytes]) -> bytes:
    """Several images as one, in about as many rows as columns."""
    images = [Image.open(io.BytesIO(content)) for content in contents]
    content = io.BytesIO()
    contact_sheet(images, [], math.ceil(math.sqrt(len(images)))).save(content, "PNG")
    return content.getvalue()


def render(editor: Editor, path: Path, progress: Callable[[float], None]) -> Rendered:
    """Runs one workflow on the page and keeps what its Save Image nodes wrote."""
    started = time.monotonic()
    workflow = json.loads(path.read_text(encoding="utf-8"))
    editor.load(workflow, path.stem)
    entry = editor.run(progress)
    order = [str(node["id"]) for node in workflow["nodes"]]  # the thumbnail is the first one's
    images = sorted(editor.server.images(entry), key=lambda image: order.index(image[0]))
    if not images:
        raise ServerError("it ran, but no Save Image node wrote a picture")
    contents = [content for _, content in images]
    if len({node for node, _ in images}) == 1 < len(images):
        contents = [joined(contents)]
    pictures = []
    for number, content in enumerate(contents):
        picture = OUTPUT / (f"{path.stem}.png" if number == 0 else f"{path.stem}_{number + 1}.png")
        picture.write_bytes(content)
        pictures.append(picture)
    return Rendered(path.stem, *describe(workflow, path.stem), pictures, time.monotonic() - started)


def index_page(rendered: list[Rendered]) -> str:
    sections = []
    for item in rendered:
        terms = "".join(
            f"<dt>source</dt><dd>{html.escape(source)}</dd><dt>target</dt><dd>{html.escape(target)}</dd>"
            for source, target in item.prompts
        )
        pictures = "".join(
            f'<img src="{html.escape(picture.name)}" alt="{html.escape(item.title)}">'
            for picture in item.pictures
        )
        sections.append(
            f"<section><h2>{html.escape(item.title)}</h2><dl>{terms}<dt>workflow</dt>"
            f"<dd><code>workflows/{html.escape(item.name)}.json</code>, {item.seconds:.0f} s</dd></dl>"
            f"{pictures}</section>"
        )
    return PAGE.format(sections="\n".join(sections))


def write_thumbnail(picture: Path, thumbnail: Path) -> None:
    image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    height = round(image.height * THUMBNAIL_WIDTH / image.width)
    image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS).save(thumbnail, quality=88)


def _show(display: Progress, task: TaskID, done: float) -> None:
    display.update(task, completed=done)


def demo(paths: list[Path], thumbnails: bool) -> list[str]:
    """Renders all and returns one message for each workflow that failed."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for old in OUTPUT.glob("*.png"):
        old.unlink()
    rendered: list[Rendered] = []
    failed: list[str] = []
    bars = (
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
    )
    with Progress(*bars, TimeElapsedColumn(), console=Console(stderr=True)) as display:
        start = display.add_task("starting", total=None)
        with running_server() as server, open_editor(server) as editor:
            display.remove_task(start)
            for path in paths:
                task = display.add_task(path.stem, total=1.0)
                try:
                    rendered.append(render(editor, path, partial(_show, display, task)))
                except ServerError as error:
                    failed.append(f"workflow {path.stem}: {error}")
                display.update(task, completed=1.0)
                display.stop_task(task)
    (OUTPUT / "index.html").write_text(index_page(rendered), encoding="utf-8")
    if thumbnails:
        for item in rendered:
            write_thumbnail(item.pictures[0], WORKFLOWS / f"{item.name}.jpg")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the shared workflows in a real ComfyUI.")
    parser.add_argument("names", nargs="*", metavar="name", help="workflows to render (default: all)")
    parser.add_argument("--thumbnails", action="store_true", help="replace workflows/NAME.jpg as well")
    arguments = parser.parse_args()
    paths = [WORKFLOWS / f"{name}.json" for name in arguments.names] or sorted(WORKFLOWS.glob("*.json"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise SystemExit(f"[demo] no such workflow in {WORKFLOWS}: {', '.join(missing) or 'it is empty'}")
    try:
        failed = demo(paths, arguments.thumbnails)
    except ServerError as error:
        raise SystemExit(f"[demo] {error}") from None
    for message in failed:
        print(f"[demo] FAILED {message}", file=sys.stderr)
    done = len(paths) - len(failed)
    print(f"[demo] {done} of {len(paths)} workflows rendered; look at {OUTPUT / 'index.html'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
