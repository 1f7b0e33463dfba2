"""Files that a config names: on disk, or inside an installed package, which is found without being imported."""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tljax.errors import UserError


def locate(source: str, what: str, install: str = "") -> Path:
    """The file or folder of "package:<package>/<path within>", "file:<path>" or a path; of "gs://…" a local copy.

    That of "npm:<package>@<version>/<path within>" is fetched. Raises UserError, which begins with `what`, where
    there is none; `install` is what to give to `pip install` for the package, by default its name.
    """
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        if not package.isidentifier() or not inside or ".." in Path(inside).parts or Path(inside).is_absolute():
            raise UserError(f"{what}: {source!r} is not package:<package>/<file within the package>")
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            found = None
        if found is None or not found.submodule_search_locations:
            raise UserError(f"{what}: the package {package} is not installed: pip install {install or package}")
        path = Path(next(iter(found.submodule_search_locations)), inside)
        if not path.exists():
            raise UserError(f"{what}: the package {package} is installed but holds no {inside}")
        return path
    if source.startswith("npm:"):
        from tljax import npm

        return npm.locate(source, what)
    if "://" in source and not source.startswith("file:"):
        from tljax import remote

        return remote.copied(source, what)
    path = Path(source.removeprefix("file:")).expanduser()
    if not path.exists():
        raise UserError(f"{what}: {path} does not exist")
    return path


def parsed(text: str | bytes) -> Any:
    """What JSON text says. Raises ValueError for anything else, also for what no program has nested so deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def cached(*parts: str) -> Path:
    """A place under $XDG_CACHE_HOME/tljax, by default ~/.cache/tljax, where copies lie that can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "tljax", *parts)


def digest(*paths: Path) -> str:
    """The SHA-256, in hex, of the contents of files one after another; UserError where one cannot be read."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    whole.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return whole.hexdigest()


def check(expected: str, *paths: Path) -> None:
    """Raises UserError unless the files' SHA-256 is the expected one; nothing of them has been used by then."""
    found = digest(*paths)
    if found != expected.lower():
        raise UserError(f"{paths[0]}: SHA-256 is {found}, expected {expected}; not read")
