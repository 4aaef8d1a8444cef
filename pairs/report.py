"""One page about a set: how much was accepted, why the rest was not, and pairs to look at."""

from __future__ import annotations

import base64
import difflib
import html
import io
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from .fields import SCORES
from .select import Filter
from .store import Store

BINS, BARS, SHOWN, SIDE = 600, 24, 6, 160
"""Bins of a score from 0 to 1, bars of a histogram at most, pairs of a gallery, px of an image."""
RANKED = ("clip_sim_dir", "ssim")
"""The score that pairs are ranked by: the first that they have."""
NAMES = {
    "clip_sim_0": "source image and its prompt",
    "clip_sim_1": "target image and its prompt",
    "clip_sim_dir": "changes of images and prompts",
    "clip_sim_image": "both images",
    "ssim": "SSIM",
    "ssim_inside": "SSIM inside the mask",
    "ssim_outside": "SSIM outside the mask",
    "distance_inside": "distance inside the mask",
    "distance_outside": "distance outside the mask",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --kept: #2f7d4f; --rest: #9aa0a6 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid var(--line) }
th { text-align: left; font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem } figure { margin: 0; width: 330px }
figure img { width: 160px; height: auto; border-radius: 3px } figcaption { font-size: 13px }
.chart { width: 260px } .chart svg { width: 100% } small { opacity: .75 }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: var(--kept) } .key.rest::before { background: var(--rest) }
"""


class Tally:
    """What the page says of all tries, gathered in one pass.

    Of a try it keeps a score and two numbers: its row's in the journal and its own in the row.
    """

    def __init__(self, chosen: Filter):
        self.chosen = chosen
        self.rows = self.tries = self.kept = 0
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.bins: dict[str, dict[bool, Counter[int]]] = defaultdict(
            lambda: {True: Counter(), False: Counter()}
        )
        self.ranked, self.row_of, self.try_of = array("d"), array("L"), array("L")

    def add(self, number: int, row: dict[str, Any]) -> None:
        kept = {values["id"] for values in self.chosen.best(row["tries"])}
        first = row["tries"][0]
        kind = self.kinds[edit_kind(first["original_prompt"], first["edited_prompt"])]
        self.rows, self.tries, self.kept = (
            self.rows + 1,
            self.tries + len(row["tries"]),
            self.kept + len(kept),
        )
        kind["rows"] += 1
        kind["tries"] += len(row["tries"])
        kind["kept"] += len(kept)
        kind["rows with a pair"] += bool(kept)
        for n, values in enumerate(row["tries"]):
            self.reasons.update(self.chosen.reasons(values))
            if values.get("error"):
                self.errors[values["error"]] += 1
                continue
            for name in SCORES:
                if (value := values.get(name)) is not None and not math.isnan(value):
                    self.bins[name][values["id"] in kept][math.floor(value * BINS)] += 1
            score = next((values[name] for name in RANKED if values.get(name) is not None), None)
            if score is not None:
                self.ranked.append(score)
                self.row_of.append(number)
                self.try_of.append(n)


def edit_kind(source: str, target: str) -> str:
    """What an edit does to the prompt's words: replaces, adds or takes away some, or several of these."""
    words = source.lower().split(), target.lower().split()
    found = {op for op, *_ in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()}
    names = {"replace": "words replaced", "insert": "words added", "delete": "words removed"}
    return " and ".join(names[op] for op in names if op in found) or "same words"


def page(store: Store, chosen: Filter) -> str:
    """The report as one HTML page with nothing outside of it."""
    tally = Tally(chosen)
    for number, row in enumerate(store.rows()):
        tally.add(number, row)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Edited pairs</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><h1>Edited pairs</h1>",
        f"<p>{tally.rows:,} rows, {tally.tries:,} tries, <b>{tally.kept:,} pairs kept</b>: "
        f"{share(tally.kept, tally.tries)} of the tries; at most {chosen.keep} of a row.</p>",
        "<h2>By kind of edit</h2>",
        _kinds(tally),
        "<h2>Why tries were not taken</h2>",
        _reasons(tally),
        "<h2>Scores</h2><p><span class=key>kept</span> &nbsp; <span class='key rest'>not kept</span>. "
        "The line is the limit.</p><div class=row>",
        *(_chart(name, tally.bins[name], chosen) for name in SCORES if name in tally.bins),
        "</div>",
        *_galleries(store, tally),
        "</html>",
    ]
    return "\n".join(parts)


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cells(row: Iterable[Any]) -> str:
        return "".join(
            f"<td>{html.escape(cell)}</td>" if n == 0 else f"<td class=n>{cell}</td>"
            for n, cell in enumerate(row)
        )

    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{cells(row)}</tr>' for row in rows)}</table>"


def _kinds(tally: Tally) -> str:
    head = ("edit", "rows", "rows with a pair", "tries", "kept", "of tries")
    return _table(
        head,
        (
            (kind, *(f"{n[name]:,}" for name in head[1:5]), share(n["kept"], n["tries"]))
            for kind, n in sorted(tally.kinds.items())
        ),
    )


def _reasons(tally: Tally) -> str:
    if not tally.reasons and tally.kept == tally.tries:
        return "<p>All were taken.</p>"
    limits = {name: f"at least {limit:g}" for name, limit in tally.chosen.least.items()}
    limits |= {name: f"at most {limit:g}" for name, limit in tally.chosen.most.items()}
    rows = [
        (f"{NAMES.get(name, 'not sampled')}: {limits.get(name, 'an error')}", f"{count:,}")
        for name, count in tally.reasons.most_common()
    ]
    errors = [(f"error: {text}", f"{count:,}") for text, count in tally.errors.most_common(10)]
    return (
        _table(("limit", "tries"), [*rows, *errors])
        + "<p><small>A try can fail several limits. One that passes them all and is not kept was beaten by "
        "better ones of its row.</small></p>"
    )


def _chart(name: str, bins: dict[bool, Counter[int]], chosen: Filter) -> str:
    """A histogram as an SVG, kept on top of the rest."""
    low, high = min(min(c) for c in bins.values() if c), max(max(c) for c in bins.values() if c)
    limit = chosen.least.get(name, chosen.most.get(name))
    if limit is not None:
        low, high = min(low, math.floor(limit * BINS)), max(high, math.floor(limit * BINS))
    per = -(-(high - low + 1) // BARS)
    low = low // per * per  # bars begin at whole bins, and one of them at 0
    count = (high - low) // per + 1
    heights = {
        kept: [sum(found[n] for n in range(at, at + per)) for at in range(low, low + count * per, per)]
        for kept, found in bins.items()
    }
    top = max(map(sum, zip(*heights.values(), strict=True)))
    width = 240 / count
    bars = []
    for n in range(count):
        base = 80.0
        for kept, color in ((True, "var(--kept)"), (False, "var(--rest)")):
            tall = 76 * heights[kept][n] / top
            base -= tall
            if tall:
                bars.append(
                    f"<rect x={10 + n * width:.1f} y={base:.1f} width={min(width - 1, 12):.1f} "
                    f"height={tall:.1f} fill='{color}'/>"
                )
    if limit is not None:
        x = 10 + (limit * BINS - low) / per * width
        bars.append(f"<path d='M{x:.1f} 0V84' stroke='#d33' stroke-width=1.5 />")
    high = low + count * per
    ends = (
        f"<text x=10 y=94 font-size=9 fill=currentColor>{low / BINS:.2f}</text>"
        f"<text x=250 y=94 font-size=9 fill=currentColor text-anchor=end>{high / BINS:.2f}</text>"
    )
    return (
        f"<div class=chart><b>{name}</b><br><small>{NAMES[name]}</small>"
        f"<svg viewBox='0 0 260 98' role=img aria-label='histogram of {name}'>{''.join(bars)}{ends}</svg>"
        "</div>"
    )


def _galleries(store: Store, tally: Tally) -> list[str]:
    order = np.argsort(-np.array(tally.ranked), kind="stable")
    if not len(order):
        return []
    third = max(1, len(order) // 3)  # of a small set each pair once
    middle = (len(order) - min(SHOWN, third)) // 2
    parts = {"Best": order[:third], "Middle": order[middle:][:third], "Worst": order[::-1][:third]}
    groups = {title: _first(part, tally) for title, part in parts.items()}
    wanted = {place for group in groups.values() for place in group}
    rows = {number for number, _ in wanted}
    found: dict[tuple[int, int], str] = {}
    for number, row in enumerate(store.rows()):
        if number in rows:
            kept = {values["id"] for values in tally.chosen.best(row["tries"])}
            for n, values in enumerate(row["tries"]):
                if (number, n) in wanted:
                    found[number, n] = _figure(store, values, values["id"] in kept)
    return [
        f"<h2>{title}</h2><div class=row>{''.join(found[place] for place in group)}</div>"
        for title, group in groups.items()
    ]


def _first(order: Iterable[int], tally: Tally) -> list[tuple[int, int]]:
    """The first tries of different rows: each row's number and the try's in it."""
    found: dict[int, int] = {}
    for at in order:
        if len(found) < SHOWN:
            found.setdefault(tally.row_of[at], tally.try_of[at])
    return list(found.items())


def _figure(store: Store, values: dict[str, Any], kept: bool) -> str:
    images = "".join(
        _image(
            store, values[f"{role}_image_file_name"], values[f"{'original' if n == 0 else 'edited'}_prompt"]
        )
        for n, role in enumerate(("original", "edited"))
    )
    scores = ", ".join(f"{name} {values[name]:.3f}" for name in SCORES if values.get(name) is not None)
    text = "{original_prompt} \u2192 {edited_prompt}".format(**values)
    return (
        f"<figure>{images}<figcaption>{html.escape(text)}<br>"
        f"<small>{'kept' if kept else 'not kept'}; {scores}</small></figcaption></figure>"
    )


def _image(store: Store, name: str, text: str) -> str:
    """A small JPEG inside the page; a word where --drop-rejected deleted the file."""
    try:
        image = Image.open(io.BytesIO(store.read(name))).convert("RGB")
    except FileNotFoundError:
        return "<small>(deleted) </small>"
    image.thumbnail((2 * SIDE, 2 * SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    code = base64.b64encode(data.getvalue()).decode()
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/jpeg;base64,{code}'> "
