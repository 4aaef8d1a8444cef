"""What the page asks and is told: the alignment of two prompts as plain data, and the route that answers."""

from __future__ import annotations

import asyncio
import json
import sys
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from aiohttp import web

from ..attention.alignment import Alignment
from ..attention.prompt import Prompt
from ..attention.tags import is_comma
from ..sampling.encode import EncodedPrompt
from ..sampling.preview import preview

ROUTE = "/prompt-to-prompt/alignment"
CHARACTERS = 4000
"""Longest prompt that is aligned while it is written."""
BODY = 64 * 1024
"""Longest request, bytes."""
FIELDS = {"source": None, "target": None, "mode": "auto", "encoder": ""}
"""What a request holds, with the defaults."""

_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt-to-prompt")


def alignment_data(source: EncodedPrompt, target: EncodedPrompt, alignment: Alignment) -> dict[str, Any]:
    """An alignment for the page.

    source, target: text, and words with their number of tokens and whether they only separate tags.
    pairings: words by index that share a map, swapped or not. new, removed: words by index. edits: as `edits`
    gives them. description: the same for people, a line per word, per textual inversion without a file, and
    for weights that the text encoder takes as text.
    """

    def words(prompt: Prompt) -> dict[str, Any]:
        return {
            "text": prompt.text,
            "words": [
                {"text": word.text, "tokens": len(word.tokens), "comma": is_comma(word.text)}
                for word in prompt.words
            ],
        }

    missing = dict.fromkeys(source.missing + target.missing)
    lines = [alignment.describe(source, target), *(f"! {name} (no such file, left out)" for name in missing)]
    if source.plain or target.plain:
        lines.append("! weights in parentheses are plain text for this text encoder")
    return {
        "source": words(source),
        "target": words(target),
        "pairings": [asdict(pairing) for pairing in alignment.pairings],
        "new": alignment.new,
        "removed": alignment.removed,
        "edits": edits(alignment),
        "description": "\n".join(lines),
    }


def edits(alignment: Alignment) -> list[dict[str, Any]]:
    """What leads from one prompt to the other, and the runs of shared words between, in the target's order.

    Each has its kind (shared, swapped, new, removed) and its words by index in source and target. Tags that
    moved stand where the target has them; removed words stand after what became of the word before them.
    """
    places = [
        (float(p.target[0]), "swapped" if p.swapped else "shared", p.source, p.target)
        for p in alignment.pairings
    ]
    places += [(float(word), "new", (), (word,)) for word in alignment.new]
    became = {i: pairing.target[-1] for pairing in alignment.pairings for i in pairing.source}
    kept = sorted(became)
    for word in alignment.removed:
        before = bisect(kept, word)
        places.append((became[kept[before - 1]] + 0.5 if before else -0.5, "removed", (word,), ()))
    merged: list[dict[str, Any]] = []
    for _, kind, source, target in sorted(places, key=itemgetter(0)):
        last = merged[-1] if merged else None
        if last and last["kind"] == kind and (kind != "swapped" or last["source"][-1] + 1 == source[0]):
            last["source"] += source
            last["target"] += target
        else:
            merged.append({"kind": kind, "source": source, "target": target})
    return merged


def answer(body: bytes) -> dict[str, Any]:
    """The alignment that a request asks for.

    body: JSON with the fields source and target, and optionally mode and encoder (as a run named it). Raises
    ValueError, with the reason, for anything else.
    """
    if len(body) > BODY:
        raise ValueError(f"The request is longer than {BODY} bytes.")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("The request is not JSON.") from None
    if not isinstance(given, dict) or not set(given) <= set(FIELDS):
        raise ValueError(f"The request should be an object with the fields {', '.join(FIELDS)}.")
    fields = {**FIELDS, **given}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} should be text.")
        if len(value) > CHARACTERS:
            raise ValueError(f"{name} has {len(value)} characters; at most {CHARACTERS} are aligned here.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half of a character.") from None
    return alignment_data(*preview(**fields))


async def alignment(request: web.Request) -> web.Response:
    """POST: the alignment of two prompts; 400 and `{"error": reason}` for what cannot be answered."""
    body = b""
    async for piece in request.content.iter_chunked(BODY):
        body += piece
        if len(body) > BODY:
            break
    try:
        return web.json_response(await asyncio.get_running_loop().run_in_executor(_worker, answer, body))
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)


def register() -> None:
    """Add the route to ComfyUI's server if this process runs one.

    The server's module is never imported: scripts that only use nodes may lack what it needs.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.routes.post(ROUTE)(alignment)
