"""Checkpoints for a store that orbax does not write to, as s3://: it writes to a local folder, which is copied there.

A checkpoint counts as whole where its `whole.json` is there, the last of its files, with the digests of the others.
"""

import contextlib
import json
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from tljax import files, stores

WHOLE = "whole.json"  # {file: SHA-256}


class Staging:
    """The local folder `near`, and its copy at an address. The store is right where they differ.

    Of several processes process 0 writes. The others, and who only reads, copy the checkpoints that they ask for.
    """

    def __init__(self, address: str, writes: bool):
        self.far = stores.place(address, "checkpoints")
        self.writes = writes and jax.process_index() == 0
        # Who only reads must not meet what a run on this machine is about to copy.
        self._own = None if self.writes else tempfile.TemporaryDirectory(prefix="tljax-")
        self.near = Path(self._own.name) if self._own else stores.near(address)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future | None = None
        self._kept: set[int] = set()  # the steps that the store has as they are here
        if self.writes:
            with stores.reported("read", self.far):
                self._pull()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that the store has whole, ascending."""
        return sorted(step for step in self._there() if (self.far / str(step) / WHOLE).exists())

    def _there(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(entry.name) for entry in self.far.iterdir() if entry.name.isdigit()]
        return []

    def _pull(self) -> None:
        """Makes the local folder what the store has."""
        self.near.mkdir(parents=True, exist_ok=True)
        whole = {str(step): self._listed(step) for step in self.steps()}
        for entry in self.near.iterdir():
            if entry.name not in whole or _digests(entry) != whole[entry.name]:
                shutil.rmtree(entry)
        for step in whole:
            self.fetch(int(step))
        self._kept = set(map(int, whole))

    def fetch(self, step: int) -> None:
        """Copies a checkpoint to the local folder, where it is not there. Raises what the store's library raises."""
        if not (self.near / str(step)).exists():
            self._download(str(step), self._listed(str(step)))

    def _listed(self, step: int) -> dict[str, str]:
        """The files of a checkpoint that the store has; none where their list is damaged."""
        try:
            return dict(files.parsed((self.far / str(step) / WHOLE).read_text()))
        except ValueError:
            return {}

    def _download(self, step: str, digests: dict[str, str]) -> None:
        partial = self.near / f".{step}.partial"
        partial.mkdir(exist_ok=True)
        for name in digests:
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            # What is damaged or gone there, who reads the checkpoint will notice.
            with contextlib.suppress(FileNotFoundError):
                stores.download(self.far / step / name, file)
        partial.rename(self.near / step)

    def push(self) -> None:
        """Begins to copy what is new to the store, and to remove there what is gone here."""
        self.wait()
        self._upload = self._pool.submit(self._push)

    def forget(self, steps: list[int]) -> None:
        """Checkpoints that were removed here: what the store has under these numbers is no longer right."""
        self._kept -= set(steps)

    def _push(self) -> None:
        there, here = self._there(), sorted(int(entry.name) for entry in self.near.iterdir() if entry.name.isdigit())
        for step in here:
            if step not in self._kept:
                if step in there:  # half of it, or a damaged one
                    self._remove(step)
                folder = self.near / str(step)
                digests = _digests(folder)
                for name in digests:
                    stores.upload(folder / name, self.far / str(step) / name)
                (self.far / str(step) / WHOLE).write_text(json.dumps(digests))
                self._kept.add(step)
        for step in set(there) - set(here):
            self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint from the store."""
        self._kept.discard(step)
        (self.far / str(step) / WHOLE).unlink(missing_ok=True)  # first: what is left is no checkpoint
        with contextlib.suppress(FileNotFoundError):  # nothing is left
            (self.far / str(step)).rmtree()

    def wait(self) -> None:
        """Returns when the store has what was pushed. Raises what its library raised."""
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.result()

    def close(self) -> None:
        """Waits, and removes the local folder: the store has it all."""
        self.wait()
        self._pool.shutdown()
        shutil.rmtree(self.near, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of the files below a folder."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): files.digest(file) for file in found}
