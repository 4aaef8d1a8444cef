"""A real ComfyUI server with this pack in it, and nothing of the user's within its reach.

Its output, input, temp and user folders and its database lie in a folder of its own; of its custom nodes only
this checkout is loaded. The models of the host in use can be read.

    python -m tools.server [--port 8188]      runs until interrupted (`make serve`)

FRONT_END_ROOT names another page than the host's: the folder `static` of a comfyui-frontend-package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from .env import PYTHON, ROOT, find_host, is_host

PACK = "prompt-to-prompt"  # the pack's folder name under custom_nodes
START_TIMEOUT = 300.0  # seconds; a first start compiles every module of the host
TAIL = 40  # lines of the log that an error shows


class ServerError(RuntimeError):
    """The server did not start, or a workflow failed on it."""


@dataclass
class Server:
    url: str
    folder: Path  # its base directory: input, temp, user
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # its log

    def log_tail(self) -> str:
        return "".join(self.lines[-TAIL:])

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def queue(self, prompt: dict[str, Any]) -> requests.Response:
        """Posts a graph in API format, as the page does; the answer holds `prompt_id`, or what is wrong."""
        return requests.post(self.url + "/prompt", json={"prompt": prompt}, timeout=60)

    def wait(
        self,
        prompt_id: str,
        timeout: float = 300.0,
        meanwhile: Callable[[], None] = lambda: time.sleep(0.1),
    ) -> dict[str, Any]:
        """The history entry of a queued graph, once it has ended well or badly.

        meanwhile: what is done between two looks; it should take a moment. Raises ServerError if the server
        ends, or after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").json().get(prompt_id)
            if entry and entry.get("status", {}).get("status_str"):
                return entry
            if self.process.poll() is not None:
                raise ServerError(
                    f"the server ended while it ran a graph; its log ends with:\n{self.log_tail()}"
                )
            meanwhile()
        raise ServerError(
            f"the graph did not end within {timeout:.0f} s; the log ends with:\n{self.log_tail()}"
        )

    def images(self, entry: dict[str, Any]) -> list[tuple[str, bytes]]:
        """(node id, file content) of every picture that a history entry's save nodes wrote."""
        found = []
        for node_id, output in entry.get("outputs", {}).items():
            for image in output.get("images", []):
                if image.get("type") == "output":
                    answer = requests.get(self.url + "/view", params=image, timeout=60)
                    answer.raise_for_status()
                    found.append((node_id, answer.content))
        return found


def failure(entry: dict[str, Any]) -> str | None:
    """What a history entry says went wrong: node, type and message; None if nothing did."""
    for kind, detail in entry.get("status", {}).get("messages", []):
        if kind == "execution_error":
            return (
                f"node {detail['node_id']} ({detail['node_type']}) failed: "
                f"{detail['exception_type'].rsplit('.', 1)[-1]}: {detail['exception_message'].strip()}"
            )
        if kind == "execution_interrupted":
            return f"interrupted at node {detail['node_id']} ({detail['node_type']})"
    return None


def has_accelerator() -> bool:
    import torch

    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def free_port(preferred: int = 0) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
            except OSError:
                continue
    raise ServerError("no free TCP port on 127.0.0.1")


# PASSIVE: where other programs keep the cores busy, OpenMP threads that spin while they wait cost a factor of
# seven on a small model.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"}


def prepare(folder: Path, host: Path, packs: dict[str, Path]) -> list[str]:
    """Lays out a base directory and returns the arguments that keep the server inside it."""
    for name in ("custom_nodes", "input", "temp", "user/default", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, source in packs.items():
        link = folder / "custom_nodes" / name
        link.unlink(missing_ok=True)
        link.symlink_to(source, target_is_directory=True)
    arguments = [
        f"--base-directory={folder}",
        f"--user-directory={folder / 'user'}",
        f"--database-url=sqlite:///{folder / 'user' / 'comfyui.db'}",
        "--preview-method=auto",
        "--disable-api-nodes",
        "--disable-auto-launch",
        "--disable-all-custom-nodes",
        "--whitelist-custom-nodes",
        *packs,
    ]
    if page := os.environ.get("FRONT_END_ROOT"):
        arguments += ["--front-end-root", page]
    models = sorted(path.name for path in (host / "models").glob("*/"))
    if models:
        # JSON is YAML; the host reads its own models folder through this file.
        paths = {"host": {"base_path": str(host / "models"), **{name: name for name in models}}}
        config = folder / "extra_model_paths.yaml"
        config.write_text(json.dumps(paths, indent=1))
        arguments += ["--extra-model-paths-config", str(config)]
    return arguments


@contextmanager
def running_server(
    *,
    port: int = 0,
    folder: Path | None = None,
    output: Path | None = None,
    cpu: bool | None = None,
    echo: bool = False,
    more_packs: dict[str, Path] | None = None,
) -> Iterator[Server]:
    """Starts the server, yields it when it answers, stops it.

    `folder` keeps its files between runs (a temporary one by default), `output` takes the saved pictures,
    `cpu=None` means: only without a GPU; `more_packs` (name: folder) are loaded beside this one. Raises
    ServerError with the log's end if it does not start, or if it starts without this pack.
    """
    host = find_host()
    if not is_host(host):
        raise ServerError(f"no ComfyUI in {host}: run `make env` first")
    with tempfile.TemporaryDirectory(prefix="p2p-server-") as scratch:
        folder = (folder or Path(scratch)).resolve()
        arguments = prepare(folder, host, {PACK: ROOT, **(more_packs or {})})
        output = (output or folder / "output").resolve()
        output.mkdir(parents=True, exist_ok=True)
        number = free_port(port)
        arguments += ["--port", str(number), "--output-directory", str(output)]
        if cpu or (cpu is None and not has_accelerator()):
            arguments.append("--cpu")
        process = subprocess.Popen(
            [str(PYTHON if PYTHON.is_file() else sys.executable), str(host / "main.py"), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
        )
        server = Server(f"http://127.0.0.1:{number}", folder, process)
        reader = threading.Thread(target=_read_log, args=(server, echo), daemon=True)
        reader.start()
        try:
            _await_ready(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(5)


def _read_log(server: Server, echo: bool) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line)
        if echo:
            sys.stderr.write(line)


def _await_ready(server: Server) -> None:
    end = time.monotonic() + START_TIMEOUT
    while True:
        if server.process.poll() is not None:
            raise ServerError(
                f"the server ended with code {server.process.returncode} while starting; its log "
                f"ends with:\n{server.log_tail()}"
            )
        try:
            server.get("/system_stats").raise_for_status()
            break
        except requests.RequestException:
            pass
        if time.monotonic() > end:
            raise ServerError(
                f"the server did not answer within {START_TIMEOUT:.0f} s; its log ends with:\n"
                f"{server.log_tail()}"
            )
        time.sleep(0.2)
    if any(re.search(rf"\(IMPORT FAILED\).*{PACK}\s*$", line) for line in server.lines):
        raise ServerError(f"ComfyUI started but could not load this pack; its log:\n{''.join(server.lines)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run ComfyUI with this pack until interrupted.")
    parser.add_argument("--port", type=int, default=8188)
    port = parser.parse_args().port
    try:
        with running_server(
            port=port, folder=ROOT / ".cache" / "serve", output=ROOT / "output" / "serve", echo=True
        ) as server:
            print(
                f"\nOpen {server.url} and pick a workflow under Templates > {PACK}, then press Run."
                f"\nPictures land in {ROOT / 'output' / 'serve'}. Ctrl+C stops the server.\n",
                flush=True,
            )
            server.process.wait()
    except KeyboardInterrupt:
        print("\nstopped")
    except ServerError as error:
        raise SystemExit(f"[serve] {error}") from None


if __name__ == "__main__":
    main()
