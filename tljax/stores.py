"""Object stores behind addresses as gs://bucket/run: the library that reads each, and what its errors mean.

An object appears whole when it has been written. Nothing can be appended to one, and nothing renamed.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tljax import files
from tljax.errors import UserError

LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: (library, extra that installs it)
# Libraries that reach stores: their own errors.
REACHING = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google.api_core", "google.auth", "google.cloud", "requests")
# How tensorstore's errors begin where nothing is said of what is stored.
STATUS = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|RESOURCE_EXHAUSTED")
BLOCK = 1 << 20  # bytes that a copy holds at once


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is the address of something in a store."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith("file:")


def place(address: str | os.PathLike, what: str):
    """The `epath.Path` of an address, with its library ready. Raises UserError, which begins with `what`."""
    from etils import epath

    address = os.fspath(address)
    scheme, _, rest = address.partition("://")
    if not rest.partition("/")[0]:
        raise UserError(f"{what}: {address!r} names no bucket, as {scheme}://bucket/folder does")
    try:
        found = epath.Path(address)
    except KeyError:
        raise UserError(f"{what}: {scheme}:// is no scheme that etils.epath knows, as gs:// and s3:// are") from None
    if scheme in LIBRARIES:
        library, extra = LIBRARIES[scheme]
        if _missing(library):
            raise UserError(f"{what}: {scheme}:// needs {library}: pip install -e '.[{extra}]'")
        import fsspec

        # Other processes, and other libraries of this one, write there too: what was listed once is not what is there.
        fsspec.config.conf.setdefault(_protocol(scheme), {}).setdefault("use_listings_cache", False)
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)  # what it logs with a traceback, it raises as well
    return found


def _protocol(scheme: str) -> str:
    return "gcs" if scheme == "gs" else scheme  # as epath asks fsspec for it


def _missing(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is None
    except ValueError:  # of a module that is not to be imported
        return True


@contextlib.contextmanager
def reported(doing: str, address: object) -> Iterator[None]:
    """Makes whatever a store's library raises one line: "cannot write to gs://…: …"."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"cannot {doing} {address}: {explained(error, str(address))}") from error


def explained(error: Exception, address: str) -> str:
    """What an error of a store's library says, in short."""
    bucket = address.partition("://")[2].partition("/")[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket}, or it cannot be seen with these credentials"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def failed(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a store's that was not reached or refused, and no other's."""
    while error is not None:
        if type(error).__module__.startswith(REACHING):
            return True
        if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs'
            return True
        if isinstance(error, ValueError) and STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def near(address: str | os.PathLike, *inside: str) -> Path:
    """The local folder in which what is on its way to an address is kept."""
    return files.cached("workdirs", hashlib.sha256(os.fspath(address).encode()).hexdigest()[:16], *inside)


def upload(path: Path, far) -> None:
    """Copies a file to a place in a store, in the place of what is there."""
    with path.open("rb") as file, far.open("wb") as out:
        while block := file.read(BLOCK):
            out.write(block)


def download(far, path: Path) -> None:
    """Copies what is at a place in a store to a file."""
    with far.open("rb") as file, path.open("wb") as out:
        while block := file.read(BLOCK):
            out.write(block)
