"""What the page asks and is told: the alignment of two prompts as plain data, and the route that answers."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ..attention.alignment import Alignment
from ..attention.prompt import Prompt
from ..sampling.preview import preview

ROUTE = "/prompt-to-prompt/alignment"
CHARACTERS = 4000
"""Longest prompt that is aligned while it is written."""
BODY = 64 * 1024
"""Longest request, bytes."""
FIELDS = {"source": None, "target": None, "mode": "auto", "family": "clip"}
"""What a request holds, with the defaults."""

_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt-to-prompt")


def alignment_data(source: Prompt, target: Prompt, alignment: Alignment) -> dict[str, Any]:
    """An alignment for the page.

    source, target: text, and words with their number of tokens. pairings: words by index that share a map,
    swapped or not. new, removed: words by index. description: the same for people, one line per word.
    """

    def words(prompt: Prompt) -> dict[str, Any]:
        return {
            "text": prompt.text,
            "words": [{"text": word.text, "tokens": len(word.tokens)} for word in prompt.words],
        }

    return {
        "source": words(source),
        "target": words(target),
        "pairings": [
            {"source": pairing.source, "target": pairing.target, "swapped": pairing.swapped}
            for pairing in alignment.pairings
        ],
        "new": alignment.new,
        "removed": alignment.removed,
        "description": alignment.describe(source, target),
    }


def answer(body: bytes) -> dict[str, Any]:
    """The alignment that a request asks for.

    body: JSON with the fields source and target, and optionally mode and family. Raises ValueError, with the
    reason, for anything else.
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
