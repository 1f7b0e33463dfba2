"""Files behind a scheme: a store kept in a local folder and registered with epath, counted and broken at will."""

import hashlib
import io
import json
import sys
import uuid
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from etils import epath
from etils.epath import stat_utils
from safetensors.numpy import save

from tljax import files, weights
from tljax.errors import UserError

SCHEME = f"store{uuid.uuid4().hex[:6]}"


class Store:
    """The far side: content by address, and how often each was opened."""

    content: dict[str, bytes]
    opened: list[str]
    down = False
    short = 0


STORE = Store()


@epath.register_path_cls(f"{SCHEME}://")
class Far(PurePosixPath):
    """Only what a copy takes of epath's interface."""

    def __str__(self):
        return super().__str__().replace(":/", "://", 1)

    def stat(self):
        if STORE.down:
            raise RuntimeError("no\nroute")
        if any(name.startswith(f"{self}/") for name in STORE.content):
            return stat_utils.StatResult(is_directory=True, length=0, mtime=0)
        if str(self) not in STORE.content:
            raise FileNotFoundError(str(self))
        held = STORE.content[str(self)]
        return stat_utils.StatResult(is_directory=False, length=len(held), mtime=int(held[-1]))

    def open(self, mode):
        assert mode == "rb"
        STORE.opened.append(str(self))
        held = STORE.content[str(self)]
        return io.BytesIO(held[: len(held) - STORE.short])


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    STORE.content, STORE.opened, STORE.down, STORE.short = {}, [], False, 0
    return STORE


def put(path, content):
    STORE.content[f"{SCHEME}://{path}"] = content
    return f"{SCHEME}://{path}"


def error_of(source):
    with pytest.raises(UserError) as caught:
        files.locate(source, "weights")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_copied_once_with_its_digest(tmp_path):
    source = put("bucket/a/w.bin", b"content")
    path = files.locate(source, "weights")
    assert path.name == "w.bin"
    assert path.is_relative_to(tmp_path / "cache" / "tljax")
    assert path.read_bytes() == b"content"
    record = json.loads(path.with_name(".w.bin.json").read_text())
    assert record["sha256"] == hashlib.sha256(b"content").hexdigest()
    assert files.locate(source, "weights") == path
    assert STORE.opened == [source]
    assert sorted(p.name for p in path.parent.iterdir()) == [".w.bin.json", "w.bin"]


def test_what_changed_is_copied_again():
    source = put("bucket/w.bin", b"content")
    files.locate(source, "weights")
    put("bucket/w.bin", b"changed")
    assert files.locate(source, "weights").read_bytes() == b"changed"
    assert len(STORE.opened) == 2


def test_a_damaged_copy_is_made_again():
    source = put("bucket/w.bin", b"content")
    files.locate(source, "weights").write_bytes(b"kontent")
    assert files.locate(source, "weights").read_bytes() == b"content"
    path = files.locate(source, "weights")
    path.with_name(".w.bin.json").write_text("{")
    assert files.locate(source, "weights").read_bytes() == b"content"
    assert len(STORE.opened) == 3


def test_the_copy_serves_when_the_store_does_not():
    source = put("bucket/w.bin", b"content")
    path = files.locate(source, "weights")
    STORE.down = True
    assert files.locate(source, "weights") == path
    assert error_of(f"{SCHEME}://bucket/other.bin") == (
        f"weights: {SCHEME}://bucket/other.bin cannot be read (RuntimeError: no route)"
    )


def test_half_a_copy_is_none(tmp_path):
    source = put("bucket/w.bin", b"content")
    STORE.short = 1
    assert error_of(source) == f"weights: {source} cannot be read (OSError: 6 bytes came, expected 7)"
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    STORE.short = 0
    files.locate(source, "weights")
    put("bucket/w.bin", b"changed!")
    STORE.short = 1
    assert "7 bytes came, expected 8" in error_of(source)  # what was there before is no longer what is asked for


def test_sources_that_are_not_there():
    put("bucket/a/w.bin", b"content")
    assert error_of(f"{SCHEME}://bucket/b.bin") == f"weights: {SCHEME}://bucket/b.bin does not exist"
    assert error_of(f"{SCHEME}://bucket/a").startswith(f"weights: {SCHEME}://bucket/a cannot be read (ValueError: Pro")
    assert error_of(f"{SCHEME}://") == (f"weights: '{SCHEME}://' names no bucket, as {SCHEME}://bucket/folder does")
    assert error_of("strange://bucket/w.bin") == (
        "weights: strange:// is no scheme that etils.epath knows, as gs:// and s3:// are"
    )
    assert error_of("hf://org/name") == "weights: 'hf://org/name' is written hf:<organisation>/<name>"


def test_gs_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert error_of("gs://bucket/w.bin") == "weights: gs:// needs gcsfs: pip install -e '.[gcs]'"


def test_shards_come_with_their_index():
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    source = put("bucket/m/model.safetensors.index.json", json.dumps(index).encode())
    for i, name in enumerate("ab", start=1):
        put(f"bucket/m/{i}.safetensors", save({name: np.full(2, i, np.float32)}))
    card = weights.card(source, "resnet_tiny")
    assert len(STORE.opened) == 3
    path = Path(files.locate(source, "weights"))
    assert {name: a[0] for name, a in weights.read(path).items()} == {"a": 1, "b": 2}
    assert card.sha256 == files.digest(*(path.with_name(n) for n in (path.name, "1.safetensors", "2.safetensors")))
    del STORE.content[f"{SCHEME}://bucket/m/2.safetensors"]
    with pytest.raises(UserError, match=r"bucket/m/2\.safetensors does not exist"):
        weights.card(source, "resnet_tiny")
