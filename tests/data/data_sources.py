"""What the tests of the data sources share."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tljax import data


def photo(seed: int, kind: str = "JPEG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def fields(source, **kw):
    """As `config.data` comes: every field there, most of them empty."""
    return data.defaults() | {"source": source} | kw


def load(source, **kw):
    return data.load(fields(source, **kw))


def names(dataset):
    return {split: set(getattr(dataset, split).names) for split in ("train", "val", "test")}


def put(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(i, "PNG" if name.lower().endswith("png") else "JPEG"))
    return root
