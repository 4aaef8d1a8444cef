"""The kept pairs as WebDataset shards."""

from __future__ import annotations

import json

from .store import METADATA, Store

PER_SHARD = 1_000


def write_shards(store: Store, per_shard: int = PER_SHARD) -> int:
    """Write DIR/webdataset/pairs-000000.tar ..., each a sample `ID.original.png`, `ID.edited.png`, `ID.json`.

    Returns their number. Shards are written whole; those of a larger set before are removed. The same set
    gives the same bytes.
    """
    import io

    from webdataset import TarWriter

    lines = store.read(METADATA).splitlines()
    shards = [lines[at : at + per_shard] for at in range(0, len(lines), per_shard)]
    for number, shard in enumerate(shards):
        data = io.BytesIO()
        with TarWriter(data, encoder=False, mtime=0) as tar:
            for text in shard:
                values = json.loads(text)
                images = (values[f"{role}_image_file_name"] for role in ("original", "edited"))
                source, target = (store.read(name) for name in images)
                tar.write(
                    {
                        "__key__": values["id"],
                        "original.png": source,
                        "edited.png": target,
                        "json": bytes(text),
                    }
                )
        store.commit(_name(number), data.getvalue())
    number = len(shards)
    while store.exists(_name(number)):
        store.remove(_name(number))
        number += 1
    return len(shards)


def _name(number: int) -> str:
    return f"webdataset/pairs-{number:06}.tar"
