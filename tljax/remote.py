"""Files behind gs:// and other schemes, through etils.epath: copied once, with their digest, and used from there."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tljax import files, remote_folder, stores
from tljax.errors import UserError


def copied(source: str, what: str) -> Path:
    """A local copy of the file at `source`, made anew where the length or time there, or the copy, has changed.

    Copies of a folder's files lie in one folder, under $XDG_CACHE_HOME/tljax/files. Of a folder all files are copied
    (`remote_folder`). Where `source` cannot be reached the copy serves. Raises UserError, which begins with `what`.
    """
    scheme, _, place = source.partition("://")
    if scheme == "hf":
        raise UserError(f"{what}: {source!r} is written hf:<organisation>/<name>")
    far = stores.place(source, what)
    folder, _, name = place.rstrip("/").rpartition("/")
    near = files.cached("files", hashlib.sha256(f"{scheme}://{folder}".encode()).hexdigest()[:16], name or "bucket")
    record = _record(near)
    try:
        stat = far.stat()
    except FileNotFoundError:
        raise UserError(f"{what}: {source} does not exist") from None
    except Exception as error:  # every store's library has errors of its own
        if record.get("source") == source:
            return near
        if (kept := remote_folder.kept(source)) is not None:
            return kept
        raise _unreadable(source, what, error) from None
    if stat.is_directory:
        try:
            return remote_folder.copied(source, what)
        except UserError:
            raise
        except Exception as error:
            raise _unreadable(source, what, error) from None
    state = {"source": source, "length": stat.length, "mtime": stat.mtime}
    if not record.items() >= state.items():
        try:
            _copy(far, near, state)
        except Exception as error:
            raise _unreadable(source, what, error) from None
    return near


def _unreadable(source: str, what: str, error: Exception) -> UserError:
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{what}: {source} cannot be read ({detail})")


def _beside(near: Path) -> Path:
    return near.with_name(f".{near.name}.json")


def _record(near: Path) -> dict[str, Any]:
    """What is known of a copy; nothing, unless its content still has the digest that it had."""
    try:
        record = files.parsed(_beside(near).read_text())
        return record if record["sha256"] == files.digest(near) else {}
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return {}


def _copy(far: Any, near: Path, state: dict[str, Any]) -> None:
    """Copies whole or not at all. Raises OSError where the lengths differ, and what the store raises."""
    near.parent.mkdir(parents=True, exist_ok=True)
    whole, length = hashlib.sha256(), 0
    handle, temporary = tempfile.mkstemp(dir=near.parent, prefix=".partial-")
    try:
        with open(handle, "wb") as kept, far.open("rb") as file:
            while block := file.read(1 << 20):
                kept.write(block)
                whole.update(block)
                length += len(block)
        if length != state["length"]:
            raise OSError(f"{length} bytes came, expected {state['length']}")
        os.replace(temporary, near)
    except BaseException:
        os.unlink(temporary)
        raise
    _beside(near).write_text(json.dumps(state | {"sha256": whole.hexdigest()}))
