"""Does a server stay well?  Hundreds of mixed prompts on a real ComfyUI, written into docs/benchmarks.md.

python benchmarks/soak.py [--prompts 300] [--steps 4]

Two clients queue the shared workflows with new seeds and listen to previews, as pages do. In between come
bad prompts and interrupts at random times. Expected: every good prompt that nobody interrupted succeeds, an
interrupted one succeeds when it is queued again, every bad one is refused or fails with a reason, memory
stays flat after the warm-up, and the workflows' pictures of the end have the bytes of those of the start.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import machine, write_section
from pack import ROOT, load_pack

PAGE = ROOT / "docs" / "benchmarks.md"
WARM_UP = 0.25
"""The part of the prompts after which memory is to be flat."""
BAD, INTERRUPTED = 0.1, 0.1
"""Shares of bad prompts, and of good ones during which an interrupt is sent."""
AHEAD = 2
"""Prompts that a client has in the queue at a time."""
TO_API = "async () => JSON.parse(JSON.stringify((await window.app.graphToPrompt()).output))"


def api_graphs(server: Any) -> dict[str, dict]:
    """The shared workflows in API form, as ComfyUI's page converts them."""
    from p2p.tools.browser import open_editor

    graphs = {}
    with open_editor(server) as editor:
        for path in sorted((ROOT / "workflows").glob("*.json")):
            editor.load(json.loads(path.read_text(encoding="utf-8")), path.stem)
            graphs[path.stem] = editor.page.evaluate(TO_API)
    return graphs


def with_inputs(graph: dict, steps: int, seed: int | None = None) -> dict:
    """The graph with another number of steps and, if one is given, another seed."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        inputs = node["inputs"]
        if isinstance(inputs.get("steps"), int):
            inputs["steps"] = steps
        for name in ("seed", "noise_seed"):
            if seed is not None and isinstance(inputs.get(name), int):
                inputs[name] = seed
    return graph


def spoiled(graph: dict, r: random.Random) -> dict | None:
    """The graph with one input that cannot work; None if it has none of those that could be spoiled."""
    bad: dict[str, list[tuple[str, Any]]] = {
        "P2PPromptPair": [("target", " "), ("mode", "blend")],
        "P2PTokenReweight": [("words", "zeppelin"), ("scale", 99.0)],
        "P2PTauScheduler": [("cross_start", 1.0), ("words", "zeppelin: 0.5"), ("self_end", -1.0)],
        "P2PLocalBlend": [("words", "zeppelin")],
        "P2PSampler": [("sampler_name", "magic"), ("steps", 0), ("edit", None)],
        "P2PAttentionController": [("edit", None)],
    }
    graph = copy.deepcopy(graph)
    found = [
        (node, name, value)
        for node in graph.values()
        for name, value in bad.get(node["class_type"], [])
        if name in node["inputs"]
    ]
    if not found:
        return None
    node, name, value = r.choice(found)
    if value is None:
        del node["inputs"][name]
    else:
        node["inputs"][name] = value
    return graph


@dataclass
class Tally:
    """What happened. memory: (prompts done, MB) of the server's process."""

    good: int = 0
    failed: list[str] = field(default_factory=list)
    interrupted: int = 0
    repeated: int = 0
    bad: int = 0
    accepted: list[str] = field(default_factory=list)
    previews: int = 0
    memory: list[tuple[int, float]] = field(default_factory=list)


class Client:
    """One page: a socket that hears of its prompts, and prompts that it queues."""

    def __init__(self, session: Any, url: str, tally: Tally):
        self.session, self.url, self.tally = session, url, tally
        self.id = uuid.uuid4().hex

    async def listen(self) -> None:
        """Until cancelled."""
        import aiohttp

        socket = f"{self.url.replace('http', 'ws')}/ws?clientId={self.id}"
        async with self.session.ws_connect(socket, max_msg_size=0) as messages:
            async for message in messages:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self.tally.previews += 1

    async def run(self, graph: dict) -> tuple[str, str]:
        """Queue a graph and wait. Returns "success", "interrupted", "error" or "refused", and the reason."""
        body = {"prompt": graph, "client_id": self.id}
        async with self.session.post(f"{self.url}/prompt", json=body) as answer:
            reply = await answer.json()
        if "prompt_id" not in reply or reply.get("node_errors"):
            return "refused", json.dumps(reply)[:400]
        while True:
            await asyncio.sleep(0.1)
            async with self.session.get(f"{self.url}/history/{reply['prompt_id']}") as answer:
                entry = (await answer.json()).get(reply["prompt_id"])
            if entry and entry.get("status", {}).get("status_str"):
                return self._outcome(entry)

    @staticmethod
    def _outcome(entry: dict) -> tuple[str, str]:
        from p2p.tools.server import failure

        reason = failure(entry)
        if reason is None:
            return "success", ""
        return ("interrupted" if reason.startswith("interrupted") else "error"), reason


async def soak(server: Any, graphs: dict[str, dict], prompts: int, steps: int, seed: int) -> Tally:
    """Queue `prompts` prompts from two clients."""
    import aiohttp
    import psutil

    r, tally = random.Random(seed), Tally()
    process = psutil.Process(server.process.pid)
    names = sorted(graphs)
    waiting = iter(range(prompts))
    done = 0

    async def one(client: Client, number: int) -> None:
        nonlocal done
        graph = with_inputs(graphs[r.choice(names)], steps, 10_000 + number)
        bad = spoiled(graph, r) if r.random() < BAD else None
        if bad is not None:
            tally.bad += 1
            outcome, _ = await client.run(bad)
            if outcome == "success":
                tally.accepted.append(json.dumps(bad))
        else:
            tally.good += 1
            if r.random() < INTERRUPTED:
                asyncio.get_running_loop().call_later(r.uniform(0.0, 2.0), interrupt, client)
            outcome, reason = await client.run(graph)
            while outcome == "interrupted":
                tally.repeated += 1
                outcome, reason = await client.run(graph)
            if outcome != "success":
                tally.failed.append(reason)
        done += 1
        tally.memory.append((done, process.memory_info().rss / 2**20))
        if done % 10 == 0:
            print(f"{done} of {prompts}, {tally.memory[-1][1]:.0f} MB", flush=True)

    tasks: set[asyncio.Task] = set()

    def interrupt(client: Client) -> None:
        tally.interrupted += 1
        tasks.add(asyncio.ensure_future(client.session.post(f"{client.url}/interrupt")))

    async def queue(client: Client) -> None:
        for number in waiting:
            await one(client, number)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        clients = [Client(session, server.url, tally) for _ in range(2)]
        listeners = [asyncio.create_task(client.listen()) for client in clients]
        await asyncio.gather(*(queue(client) for client in clients for _ in range(AHEAD)))
        await asyncio.gather(*tasks)
        for listener in listeners:
            listener.cancel()
    return tally


def pictures(server: Any, graphs: dict[str, dict], steps: int) -> dict[str, list[bytes]]:
    """The bytes of the pictures that each workflow saves, computed anew."""
    import requests

    requests.post(f"{server.url}/free", json={"free_memory": True}, timeout=60).raise_for_status()
    time.sleep(1)  # the queue's thread empties its cache before it takes the next prompt
    found = {}
    for name, graph in graphs.items():
        entry = server.wait(server.queue(with_inputs(graph, steps)).json()["prompt_id"])
        found[name] = [content for _, content in server.images(entry)]
    return found


def slope(memory: list[tuple[int, float]]) -> float:
    """Least-squares growth in MB for each 100 prompts."""
    import numpy as np

    done, size = np.array(memory).T
    return 100 * float(np.polyfit(done, size, 1)[0])


def report(tally: Tally, same: int, total: int, options: argparse.Namespace, seconds: float) -> str:
    warm = [entry for entry in tally.memory if entry[0] > WARM_UP * options.prompts]
    return "\n".join(
        [
            f"{options.prompts} prompts of {total} workflows from two clients at {options.steps} steps, "
            f"{seconds / 60:.0f} minutes. {machine()}.",
            "",
            "| | |",
            "|---|---|",
            f"| good prompts | {tally.good} |",
            f"| of these failed | {len(tally.failed)} |",
            f"| interrupts sent | {tally.interrupted} |",
            f"| prompts that they ended, queued again and then well | {tally.repeated} |",
            f"| bad prompts | {tally.bad} |",
            f"| of these not refused | {len(tally.accepted)} |",
            f"| previews received | {tally.previews} |",
            f"| workflows whose pictures have the same bytes at start and end | {same} of {total} |",
            f"| memory after the warm-up of {WARM_UP:.0%} | {warm[0][1]:.0f} MB |",
            f"| memory at the end | {warm[-1][1]:.0f} MB |",
            f"| highest | {max(entry[1] for entry in tally.memory):.0f} MB |",
            f"| slope after the warm-up | {slope(warm):+.1f} MB for each 100 prompts |",
        ]
    )


def plot(memory: list[tuple[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 2.6), layout="constrained")
    axis.plot(*zip(*memory, strict=True), lw=1)
    axis.set(xlabel="prompts done", ylabel="server's memory, MB", ylim=(0, None))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--steps", type=int, default=4, help="of every sampler in the workflows")
    parser.add_argument("--seed", type=int, default=0, help="of what comes when")
    parser.add_argument("--no-page", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    load_pack()
    from p2p.tools.server import running_server

    started = time.monotonic()
    with running_server() as server:
        graphs = api_graphs(server)
        before = pictures(server, graphs, options.steps)
        tally = asyncio.run(soak(server, graphs, options.prompts, options.steps, options.seed))
        after = pictures(server, graphs, options.steps)
    same = sum(bool(before[name]) and before[name] == after[name] for name in graphs)
    text = report(tally, same, len(graphs), options, time.monotonic() - started)
    print(text)
    for reason in tally.failed:
        print(f"FAILED: {reason}")
    for graph in tally.accepted:
        print(f"ACCEPTED: {graph}")
    for name in graphs:
        if before[name] != after[name]:
            print(f"OTHER BYTES: {name}")
    if not options.no_page:
        folder = PAGE.parent / "benchmarks"
        folder.mkdir(exist_ok=True)
        plot(tally.memory, folder / "soak.png")
        write_section(PAGE, "soak", f"{text}\n\n![Memory over the prompts](benchmarks/soak.png)")
    if tally.failed or tally.accepted or same < len(graphs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
