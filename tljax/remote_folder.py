"""Folders in a store, photographs above all: copied file by file, and of what is there later only what has changed."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

from tljax import files, stores
from tljax.errors import UserError
from tljax.report.text import size as in_words

THREADS = 16
KEEP_EVERY = 10.0  # seconds between two notes of what has been copied: a kill loses no more
TOLD = 64 << 20  # bytes; more takes long enough to be told
TAGS = ("md5Hash", "ETag", "etag", "generation", "mtime", "updated", "LastModified")  # what changes with a file


def _near(source: str) -> Path:
    place = source.rstrip("/")
    return files.cached("folders", hashlib.sha256(place.encode()).hexdigest()[:16], place.rpartition("/")[2])


def kept(source: str) -> Path | None:
    """The copy of a folder where there is a whole one, whatever the store says now."""
    return _near(source) if _record(source).get("whole") else None


def copied(source: str, what: str) -> Path:
    """A local copy of the folder at `source`, under $XDG_CACHE_HOME/tljax/folders.

    Raises UserError where it does not fit on the disk, and what the store's library raises.
    """
    import fsspec

    far, root = fsspec.core.url_to_fs(source)
    there = _listed(far.find(root, detail=True), root, f"{what}: {source}")
    near, had = _near(source), _record(source).get("files", {})
    near.mkdir(parents=True, exist_ok=True)
    have = {
        name: state
        for name, state in there.items()
        if had.get(name) == state and (near / name).is_file() and (near / name).stat().st_size == state[0]
    }
    missing = [name for name in there if name not in have]
    _room(near, sum(there[name][0] for name in missing), len(missing), source, what)
    noted = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = {pool.submit(_fetch, far, f"{root}/{name}", near / name, there[name][0]): name for name in missing}
        try:
            for job in as_completed(jobs):
                job.result()
                have[jobs[job]] = there[jobs[job]]
                if time.monotonic() - noted > KEEP_EVERY:
                    _note(source, have, whole=False)
                    noted = time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            _note(source, have, whole=False)
            raise
    for file in [file for file in near.rglob("*") if file.is_file()]:
        if file.relative_to(near).as_posix() not in there:
            file.unlink()
    if missing or had != there:
        _note(source, have, whole=True)
    return near


def _listed(found: Mapping[str, dict], root: str, where: str) -> dict[str, list]:
    """{path within the folder: [bytes, what changes with the content]}; raises UserError where there is nothing."""
    listed = {}
    for path, info in sorted(found.items()):
        name = path.removeprefix(root.rstrip("/")).lstrip("/")
        if not name or name.endswith("/") or info.get("type") == "directory":
            continue  # what consoles make to show a folder
        if ".." in PurePosixPath(name).parts:
            raise UserError(f"{where} holds {name!r}, which lies in no folder")
        tag = next((str(info[key]) for key in TAGS if info.get(key)), "")
        listed[name] = [int(info["size"]), tag]
    if not listed:
        raise UserError(f"{where} is empty")
    return listed


def _room(near: Path, nbytes: int, count: int, source: str, what: str) -> None:
    free = shutil.disk_usage(near).free
    if nbytes > free:
        raise UserError(
            f"{what}: {source} takes {in_words(nbytes)} more, and {in_words(free)} are free at {near}; "
            "set XDG_CACHE_HOME to a larger disk"
        )
    if nbytes > TOLD:
        print(f"copying {count:,} files, {in_words(nbytes)}, of {source} to {near}", file=sys.stderr, flush=True)


def _fetch(far, path: str, near: Path, length: int) -> None:
    near.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=near.parent, prefix=".partial-")
    try:
        with open(handle, "wb") as kept, far.open(path, "rb") as file:
            shutil.copyfileobj(file, kept, stores.BLOCK)
            found = kept.tell()
        if found != length:
            raise OSError(f"{path}: {found} bytes came, expected {length}")
        os.replace(temporary, near)
    except BaseException:
        os.unlink(temporary)
        raise


def _record(source: str) -> dict:
    try:
        record = files.parsed((_near(source).parent / "record.json").read_text())
        return record if record["source"] == source.rstrip("/") else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _note(source: str, have: Mapping[str, list], whole: bool) -> None:
    file = _near(source).parent / "record.json"
    temporary = file.with_name(f".record-{os.getpid()}.json")
    temporary.write_text(json.dumps({"source": source.rstrip("/"), "whole": whole, "files": dict(have)}))
    temporary.replace(file)
