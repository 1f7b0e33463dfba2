"""Checkpoints: the state, and beside it what a run must know to go on as if it had never stopped.

The only file that imports orbax. The best checkpoint and the last two are kept; saving is asynchronous.
"""

import contextlib
import json
import os
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from tljax import stores
from tljax.errors import UserError, listing
from tljax.plan import paths
from tljax.staging import Staging

Tree = Any


class _BestAndLastTwo(policies.PreservationPolicy):
    """Orbax's own BestN forgets the scores when the process ends: the run knows its best, and says it."""

    best: int | None = None

    def should_preserve(self, checkpoints, *, context):
        last_two = sorted(c.step for c in checkpoints)[-2:]
        return [c.step in last_two or c.step == self.best for c in checkpoints]


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: str | os.PathLike, create: bool = True):
        self.policy = _BestAndLastTwo()
        self.folder = os.fspath(folder)
        self.staging = None
        place, self.failures = self.folder, (OSError, ValueError)
        if stores.is_remote(self.folder):
            self.failures = (Exception,)  # a store's library raises any kind
            if not self.folder.startswith("gs://"):  # the one that orbax and tensorstore write to
                self.staging = Staging(self.folder, create)
                place = self.staging.near
        else:
            place = os.path.abspath(self.folder)
        try:
            if create and not stores.is_remote(self.folder):
                os.makedirs(self.folder, exist_ok=True)
            self.manager = ocp.CheckpointManager(
                place,
                options=ocp.CheckpointManagerOptions(preservation_policy=self.policy, create=create),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "notes": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.folder}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{self.folder} holds no checkpoints: {_short(error)}") from error

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self.manager.latest_step()

    def preempted(self, step: int) -> bool:
        """Whether SIGTERM reached a process of several: they agree on the step at which all save."""
        return self.manager.reached_preemption(step)

    def save(self, step: int, state: Tree, notes: dict, best: int | None = None) -> None:
        """Begins to save `state`, a tree of arrays, and `notes`, plain JSON; `best` is the best step so far."""
        if step in self.steps():
            return
        notes = json.loads(json.dumps(notes))  # a copy: it is written later, when the run has gone on
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        self.policy.best = best
        try:
            if self.staging:
                self.staging.wait()
            self.manager.save(step, args=args)
            if self.staging:
                self.manager.wait_until_finished()
                self.staging.push()
        except self.failures as error:  # also those of the save before this one
            raise UserError(self._failed(error)) from error

    def wait(self) -> None:
        """Returns when every save is on disk."""
        try:
            self.manager.wait_until_finished()
            if self.staging:
                self.staging.wait()
        except self.failures as error:
            raise UserError(self._failed(error)) from error

    def _failed(self, error: Exception) -> str:
        # From the disk: orbax counts the one that failed as well.
        whole: list[int] = []
        if self.staging:
            with contextlib.suppress(Exception):  # the store that has just failed
                whole = self.staging.steps()
        elif not stores.is_remote(self.folder) and os.path.isdir(self.folder):
            whole = sorted(int(name) for name in os.listdir(self.folder) if name.isdigit())
        left = f"; the last whole one is of step {whole[-1]}" if whole else ""
        return f"cannot write a checkpoint to {self.folder}: {_short(error)}{left}"

    def notes(self, step: int) -> dict:
        """The notes of a checkpoint."""
        with self._reading(step):
            return self.manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]

    def restore(self, step: int, like: Tree) -> Tree:
        """Returns the state of a checkpoint, placed and shaped as `like` (shapes with shardings).

        Raises UserError that names the leaves where the checkpoint holds another model's state.
        """
        with self._reading(step):
            saved = self.manager.item_metadata(step)["state"]
            self._compare(step, getattr(saved, "tree", saved), like)
            return self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]

    @contextlib.contextmanager
    def _reading(self, step: int):
        try:
            yield
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax raises any kind, Exception itself among them
            whole = f"{os.path.join(self.folder, str(step))} is damaged: {_short(error.__cause__ or error)}"
            others = listing(str(s) for s in self.steps() if s != step)
            raise UserError(whole + (f"; delete it to go on from step {others}" if others else "")) from error

    def _compare(self, step: int, saved: Tree, like: Tree) -> None:
        """Orbax casts another dtype in silence and reports another structure in thousands of lines."""
        describe = lambda tree: {
            path: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"
            for path, leaf in zip(paths(tree), jax.tree.leaves(tree))
            if hasattr(leaf, "shape")
        }
        have, want = describe(saved), describe(_named(like))
        wrong = [f"{p} missing" for p in want if p not in have] + [f"{p} unexpected" for p in have if p not in want]
        wrong += [f"{p} is {have[p]}, expected {want[p]}" for p in want if p in have and have[p] != want[p]]
        wrong.sort(key=lambda line: not line.startswith("params/"))  # what tells most comes first
        if wrong:
            raise UserError(f"checkpoint {step} of {self.folder} is another model's or plan's: {listing(wrong, 5)}")

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        self.manager.close()
        if self.staging:
            self.staging.close()


def _short(error: Exception) -> str:
    """Of tensorstore's pages the cause in the system's words, where it says it, else the beginning."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    system = re.search(r"([^:]+) \[os_error_code", text)
    return system[1].strip() if system else text[:200]


def _named(tree: Tree) -> Tree:
    """Named tuples as dicts, as orbax writes them down."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return {k: _named(v) for k, v in tree._asdict().items()}
    if isinstance(tree, dict):
        return {k: _named(v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return [_named(v) for v in tree]
    return tree
