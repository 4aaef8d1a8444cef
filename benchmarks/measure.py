"""What the benchmarks share: how pictures are compared, and how a page gets its figures."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any


def psnr(a: Any, b: Any, where: Any) -> float:
    """Over the pixels (height, width) that `where` marks, pictures (height, width, 3) in 0..1, dB."""
    import torch

    return float(-10 * torch.log10(((a - b) ** 2)[where].mean() + 1e-10))


def ssim(a: Any, b: Any, where: Any) -> float:
    """Mean over the marked pixels of the structural similarity in windows of 11 px, Wang et al. 2004."""
    from kornia.metrics import ssim as ssim_map

    maps = ssim_map(a.permute(2, 0, 1)[None], b.permute(2, 0, 1)[None], 11)[0]
    return float(maps.permute(1, 2, 0)[where].mean())


def write_section(page: Path, name: str, text: str) -> None:
    """Put text between the page's marks <!-- name --> and <!-- end of name -->; nothing without a page.

    Raises ValueError for a page that lacks them.
    """
    if not page.exists():
        return
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before = page.read_text(encoding="utf-8")
    after, count = re.subn(
        f"(?s){re.escape(first)}.*{re.escape(last)}", lambda _: f"{first}\n{text.strip()}\n{last}", before
    )
    if count != 1:
        raise ValueError(f"{page} lacks the marks {first} and {last}.")
    page.write_text(after, encoding="utf-8")


def machine() -> str:
    """Processor, cores, threads, GPU if there is one, and torch's version, in one line."""
    import psutil
    import torch

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*: (.*)", info.read_text())
        name = found[1] if found else name
    parts = [f"{name}, {psutil.cpu_count()} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    else:
        parts.append(f"no GPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    return ", ".join([*parts, f"torch {torch.__version__.split('+')[0]}"])
