"""Claims as objects of a store: what `tljax.claims` asks of a folder, in gs:// and s3://.

An object is written on condition that there is none of its name (GCS: ifGenerationMatch=0, S3: If-None-Match), and the
store refuses it to all but one. Nothing can be touched there: a heartbeat is another content.
"""

import contextlib
import inspect
import json
import os

from tljax import stores
from tljax.errors import UserError


class Objects:
    """The objects below an address. All methods raise what the store's library raises."""

    beat = 1 / 4  # of the time after which a holder counts as dead: every heartbeat is a request, and is paid for

    def __init__(self, address: str | os.PathLike):
        import fsspec

        stores.place(address, "--workdir")
        self._fs, self._root = fsspec.core.url_to_fs(os.fspath(address))
        self._beats = 0

    def names(self) -> list[str]:
        """What there is."""
        try:
            return [path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False, refresh=True)]
        except FileNotFoundError:
            return []

    def create(self, name: str, text: str) -> bool:
        """Writes an object, unless there is one; returns whether it is this one."""
        # Libraries repeat a request whose answer was lost: it is refused where it had succeeded.
        return self._put(name, text) or self.read(name)[0] == text

    def refuses(self, name: str, text: str) -> bool:
        """Whether the store, which has such an object, does not take it once more. Not all that speak S3 know how."""
        return not self._put(name, text)

    def _put(self, name: str, text: str) -> bool:
        try:
            self._fs.pipe_file(self._path(name), text.encode(), mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:  # else it would seem that another process has just tidied up
            raise UserError(f"cannot write to {self._root}: {stores.explained(error, f'://{self._root}')}") from error
        except OSError as error:
            # 412 of a store that does not say which condition it was, 409 where two were at it at once.
            answer = getattr(error.__cause__, "response", None) or {}
            if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                return False
            raise
        return True

    def read(self, name: str) -> tuple[str, str]:
        """The content, and what another heartbeat changes: itself."""
        text = self._fs.cat_file(self._path(name)).decode(errors="replace")
        return text, text

    def touch(self, name: str, text: str) -> None:
        """A heartbeat; `text` is the content that was created."""
        self._beats += 1
        self._fs.pipe_file(self._path(name), json.dumps(json.loads(text) | {"beat": self._beats}).encode())

    def age(self, name: str, _) -> float:
        """Seconds since the last heartbeat, by the store's clock; 0 where the object is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.pipe_file(self._path("now"), b"")
            now, then = (self._fs.modified(self._path(of)) for of in ("now", name))
            return abs((now - then).total_seconds())
        return 0.0

    def leave(self, name: str) -> None:
        """Marks what was left."""
        self._fs.pipe_file(self._path(f"{name}.left"), b"")

    def remove(self, name: str) -> None:
        """Removes an object, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def lacking(address: str | os.PathLike) -> str:
    """Why nothing can be claimed at an address; "" where it can."""
    import fsspec

    scheme, _, _ = os.fspath(address).partition("://")
    if scheme not in stores.LIBRARIES:
        return f"nothing is known of a write to {scheme}:// that fails where an object is already there"
    if "mode" not in inspect.signature(fsspec.core.url_to_fs(os.fspath(address))[0]._pipe_file).parameters:
        return f"this {stores.LIBRARIES[scheme][0]} has no write that fails where an object is already there: update it"
    return ""
