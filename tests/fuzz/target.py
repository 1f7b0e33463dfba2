"""What a target of fuzzing is, and what those of all kinds use."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mutations import Mutation

Case = dict[str, bytes]  # {name: content} of the files of a folder
MB = 1 << 20


class Target(NamedTuple):
    """A reader. `seeds()`: sound cases; `read(folder)` raises UserError at most; `ways(name)`: a file's mutations."""

    seeds: Callable[[], list[Case]]
    read: Callable[[Path], None]
    ways: Callable[[str], tuple[Mutation, ...]]
    bound: int = 64 * MB  # what reading may allocate, beside what the files' sizes explain
    share: float = 1.0  # of the inputs, where all readers run by number
    lies: Callable[[], dict[str, Case]] = dict  # cases that claim more than they hold: each must be refused


def only(folder: Path) -> Path:
    """The one file in a folder."""
    (path,) = folder.iterdir()
    return path


def saved(write: Callable[[Path], None]) -> bytes:
    """What `write(path)` leaves in a file."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "file"))
        return Path(folder, "file").read_bytes()
