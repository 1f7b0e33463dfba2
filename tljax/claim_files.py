"""Claims as files of a folder, with what that takes: files that appear whole, and the clock of the file system."""

import errno
import os
import tempfile
import uuid
from pathlib import Path

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Files:
    """The files of a folder, as claims use them (`claim_objects.Objects`: those of a store). Methods raise OSError."""

    beat = 1 / 10  # of the time after which a holder counts as dead

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """What there is."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def create(self, name: str, text: str) -> bool:
        """Writes a file whole, unless there is one; returns whether it is this one."""
        return publish(self.folder / name, text)

    def refuses(self, *_) -> bool:
        """A file system does not create what is there."""
        return True

    def read(self, name: str) -> tuple[str, float]:
        """The content, and when it was touched (opened, so that NFS looks it up anew)."""
        with (self.folder / name).open(errors="replace") as file:
            touched = os.fstat(file.fileno()).st_mtime
            return file.read(), touched

    def touch(self, name: str, _) -> None:
        """A heartbeat."""
        os.utime(self.folder / name)

    def age(self, _, touched: float) -> float:
        """Seconds since then, by the clock of the file system; what is to come has been long ago."""
        return abs(now(self.folder) - touched)

    def leave(self, name: str) -> None:
        """Marks what was left."""
        (self.folder / f"{name}.left").touch()

    def remove(self, name: str) -> None:
        """Removes a file, where there is one."""
        (self.folder / name).unlink(missing_ok=True)


def publish(path: Path, text: str) -> bool:
    """Writes a file whole, unless there is one; returns whether it is this one. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # NFS may repeat a request that had succeeded
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _created(path, text)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: Path, text: str) -> bool:
    """As `publish`, where there are no hard links: exclusive, but for a moment not whole."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def now(folder: Path) -> float:
    """The time of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as file:
        return os.fstat(file.fileno()).st_mtime
