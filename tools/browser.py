"""ComfyUI's own page in a headless Chromium: open a workflow, queue it, hear what came of it.

with running_server() as server, open_editor(server) as editor:
    editor.load(workflow)
    entry = editor.run()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from playwright.sync_api import ConsoleMessage, Page, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from .env import find_browser
from .server import PACK, Server, ServerError, failure

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGE_TIMEOUT = 120.0  # seconds until the page has its nodes; a busy CI machine is slow

READY = """() => Boolean(window.app?.vueAppReady && window.app.graph && window.app.api?.clientId
  && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length)"""

# The page hears from the server how far each node is; this keeps it where `run` can read it.
FOLLOW = """() => {
  if (window.p2pProgress) return;
  window.p2pProgress = {};
  window.app.api.addEventListener('progress_state', (event) => {
    for (const [id, node] of Object.entries(event.detail.nodes))
      window.p2pProgress[id] = node.state === 'finished' ? 1 : node.max ? node.value / node.max : 0;
  });
}"""

UNKNOWN_NODES = """(types) => types.filter((type) => !(type in window.LiteGraph.registered_node_types))"""


@dataclass
class Editor:
    page: Page
    server: Server
    console: list[str] = field(default_factory=list)  # errors that this pack's own files caused

    def open(self, query: str = "") -> None:
        """Opens (or reloads) the page and waits until it is usable."""
        self.page.goto(f"{self.server.url}/{query}")
        self.await_ready()

    def await_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=PAGE_TIMEOUT * 1000)

    def load(self, workflow: dict[str, Any], name: str = "workflow") -> None:
        """Shows a UI-format workflow, as the template browser and File > Open do."""
        types = sorted({node["type"] for node in workflow["nodes"]})
        unknown = self.page.evaluate(UNKNOWN_NODES, types)
        if unknown:
            raise ServerError(f"workflow {name}: this ComfyUI has no node called {', '.join(unknown)}")
        self.page.evaluate(
            "([graph, name]) => window.app.loadGraphData(graph, true, true, name)", [workflow, name]
        )

    def workflow(self) -> dict[str, Any]:
        """The graph on the page in UI format, as File > Save writes it."""
        return self.page.evaluate(
            "async () => JSON.parse(JSON.stringify((await window.app.graphToPrompt()).workflow))"
        )

    def run(
        self, progress: Callable[[float], None] = lambda done: None, timeout: float = 300.0
    ) -> dict[str, Any]:
        """Queues the graph on the page and waits; returns its history entry.

        `progress` is called with the part done, 0 to 1. Raises ServerError with the node's message if
        the server rejects the graph or a node fails.
        """
        self.page.evaluate(FOLLOW)
        with self.page.expect_response(
            lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST", timeout=60_000
        ) as answer:
            self.page.evaluate("() => { window.p2pProgress = {}; window.app.queuePrompt(0); }")
        reply = answer.value.json()
        if "prompt_id" not in reply or reply.get("node_errors"):
            raise ServerError(f"the server did not accept the graph: {rejection(reply)}")
        total = len((answer.value.request.post_data_json or {}).get("prompt", [None]))

        def look() -> None:
            self.page.wait_for_timeout(200)
            progress(min(1.0, sum(self.page.evaluate("() => Object.values(window.p2pProgress)")) / total))

        entry = self.server.wait(reply["prompt_id"], timeout, look)
        if error := failure(entry):
            raise ServerError(error)
        return entry


def rejection(reply: dict[str, Any]) -> str:
    """One line for each thing that the server found wrong with a graph."""
    lines = (
        [f"{reply['error']['message']} {reply['error'].get('details', '')}".strip()]
        if "error" in reply
        else []
    )
    for node_id, found in reply.get("node_errors", {}).items():
        lines += [
            f"node {node_id} ({found['class_type']}): {error['message']}: {error['details']}"
            for error in found["errors"]
        ]
    return "\n  ".join(lines)


@contextmanager
def open_editor(server: Server) -> Iterator[Editor]:
    """The page of a running server in a headless Chromium, past its first-visit screens."""
    # The template browser covers the page on a first visit.
    requests.post(
        f"{server.url}/settings", json={"Comfy.TutorialCompleted": True}, timeout=30
    ).raise_for_status()
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        except PlaywrightError as error:
            raise ServerError(
                "no usable Chromium: install one (Debian: sudo apt-get install chromium) or set "
                f"CHROMIUM=/path/to/chrome. The launch said: {str(error).splitlines()[0]}"
            ) from error
        page = chromium.new_page(viewport={"width": 1600, "height": 1000}, locale="en-US")
        editor = Editor(page, server)

        def keep(message: ConsoleMessage) -> None:
            if message.type == "error" and PACK in f"{message.text} {message.location.get('url', '')}":
                editor.console.append(message.text)

        page.on("console", keep)
        page.on(
            "pageerror",
            lambda error: editor.console.append(str(error)) if PACK in (error.stack or "") else None,
        )
        try:
            editor.open()
            yield editor
        finally:
            chromium.close()
