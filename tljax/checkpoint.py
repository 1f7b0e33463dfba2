"""Checkpoints: the state, and beside it what a run must know to go on as if it had never stopped.

The only file that imports orbax. The best checkpoint and the last two are kept; saving is asynchronous.

A checkpoint proves its content: beside the notes stand the shapes and checksums of the state's arrays, and a digest of
all this. They are one item of the checkpoint, which appears by one renaming: whenever a process is killed there is
either all or nothing of it. A digest of the files, written when they are whole, would come too late for that.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import types
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from tljax import checksums, cluster, stores
from tljax.agreement import first_said
from tljax.errors import UserError, listing
from tljax.plan import flat
from tljax.staging import Staging

Tree = Any
CENTURY = 100 * 365 * 24 * 3600  # seconds

# Orbax waits by the wall clock, and gives a save up where that is set forward meanwhile, as when a machine wakes up.
with contextlib.suppress(ImportError):
    from orbax.checkpoint._src.futures import signaling_client

    signaling_client.time = types.SimpleNamespace(time=time.monotonic)


class Damaged(UserError):
    """A checkpoint that is not, or not wholly, what was saved; `what` says it without naming the others there are."""

    def __init__(self, what: str, others: list[int]):
        self.what = what
        super().__init__(what + (f"; other checkpoints are of step {listing(others)}" if others else ""))


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
        self.staging, self.manager = None, None
        self.asked = 0  # the highest number with which `preempted` has asked
        place, self.failures = self.folder, (OSError, ValueError)
        if stores.is_remote(self.folder):
            self.failures = (Exception,)  # a store's library raises any kind
            stores.place(self.folder, "checkpoints")  # before orbax makes a file system of its own, with a cache
            if not self.folder.startswith("gs://"):  # the one that orbax and tensorstore write to
                self.staging = Staging(self.folder, create)
                place = self.staging.near
        else:
            place = os.path.abspath(self.folder)
        self.place = epath.Path(place)
        # Of several processes with a local folder each, process 0 alone writes, and says what there is.
        self.apart = bool(self.staging) and jax.process_count() > 1
        self.may_write = create
        if self.staging and not self.staging.writes:
            return
        alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="staging")
        of = {"multiprocessing_options": alone} if self.apart else {}
        # Of several processes one may hang: then the others end.
        patience = {} if jax.process_count() > 1 else {"timeout_secs": CENTURY}
        try:
            if create and not stores.is_remote(self.folder):
                os.makedirs(self.folder, exist_ok=True)
            self.manager = ocp.CheckpointManager(
                place,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self.policy,
                    create=create and not self.staging,
                    cleanup_tmp_directories=create,  # of saves that a kill has cut off
                    async_options=ocp.options.AsyncOptions(**patience),
                    **of,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(**of),
                    "notes": ocp.JsonCheckpointHandler(**of),
                },
            )
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.folder}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{self.folder} holds no checkpoints: {_short(error)}") from error

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending. All processes have to call it."""
        if self.apart and jax.process_index():
            return [int(step) for step in first_said("").split()]
        found = sorted(self.manager.all_steps() if self.manager else self.staging.steps())
        if self.apart:
            first_said(" ".join(map(str, found)))
        return found

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def preempted(self, step: int) -> bool:
        """Whether SIGTERM reached a process of several: they agree on the step at which all save."""
        # They agree on the number that follows the highest one that any of them has asked with: 1 where the signal
        # comes before the first step. JAX says yes to that number alone, so a run that goes on asks with each before.
        numbers = range(self.asked + 1, step + 1)
        self.asked = step
        return any(ocp.utils.reached_preemption(number) for number in numbers)

    def save(self, step: int, state: Tree, notes: dict, best: int | None = None) -> None:
        """Begins to save `state`, a tree of arrays, and `notes`, plain JSON; `best` is the best step so far."""
        if step in self.steps():
            return
        found = {"notes": notes, "shapes": _shapes(state), "checksums": checksums.of(_named(state))}
        found = json.loads(json.dumps(found))  # a copy: it is written later, when the run has gone on
        proven = found | {"digest": _digest(found)}
        if self.apart:
            state = _whole(state)
        self.policy.best = best
        with self._writing():  # its errors are also those of the save before this one
            if self.staging:
                self.staging.wait()
            if self.manager:
                args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(proven))
                self.manager.save(step, args=args)
            if self.staging and self.manager:
                self.manager.wait_until_finished()
                self.staging.push()

    def wait(self) -> None:
        """Returns when every save is on disk. All processes have to call it."""
        with self._writing():
            if self.manager:
                self.manager.wait_until_finished()
            if self.staging:
                self.staging.wait()

    @contextlib.contextmanager
    def _writing(self):
        """Makes what fails one line, of all processes where one writes for them: they wait for it."""
        line, cause = "", None
        try:
            yield
        except self.failures as error:
            line, cause = self._failed(error), error
        if self.apart and self.may_write:
            line = first_said(line)
        if line:
            raise UserError(line) from cause

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
        """The notes of a checkpoint. Raises Damaged."""
        return self._proven(step)["notes"]

    def restore(self, step: int, like: Tree) -> Tree:
        """Returns the state of a checkpoint, placed and shaped as `like` (shapes with shardings).

        Raises UserError that names the leaves where the checkpoint holds another model's state, and Damaged.
        """
        proven = self._proven(step)
        self._compare(step, proven["shapes"], _shapes(like))
        with self._reading(step):
            restored = ocp.StandardCheckpointHandler().restore(
                self._place(step, "state"), args=ocp.args.StandardRestore(like)
            )
        found = checksums.of(_named(restored))
        if wrong := [path for path, value in proven["checksums"].items() if found.get(path) != value]:
            raise self._damaged(step, f"not as saved: {listing(wrong, 3)}")
        return restored

    def set_aside(self, steps: list[int]) -> str:
        """Gets checkpoints out of the way; returns where they are now. What was there before goes."""
        folder, remote = self.place, stores.is_remote(self.folder)
        aside, line = folder.parent / f"{folder.name}-damaged", ""
        if jax.process_index() == 0:
            try:
                if aside.exists():
                    aside.rmtree()
                for step in steps:
                    if remote:  # where nothing can be renamed
                        (folder / str(step)).rmtree()
                    else:
                        aside.mkdir(exist_ok=True)
                        (folder / str(step)).rename(aside / str(step))
            except self.failures as error:
                line = f"cannot move damaged checkpoints to {aside}: {_short(error)}"
        if line := first_said(line):
            raise UserError(line)
        if self.manager:
            self.manager.reload()
        if self.staging:
            self.staging.forget(steps)
        return "deleted" if remote else f"moved to {aside}"

    def _place(self, step: int, item: str):
        # The handlers read without the manager, and so without its barriers, at which the other processes would wait
        # for one that meets damage.
        if self.staging:
            self.staging.fetch(step)
        return self.place / str(step) / item

    def _proven(self, step: int) -> dict:
        """What stands beside the state, as it was saved."""
        with self._reading(step):
            found = ocp.JsonCheckpointHandler().restore(self._place(step, "notes"))
            if found.pop("digest", "") != _digest(found):
                raise ValueError("the notes are not as saved")
        return found

    @contextlib.contextmanager
    def _reading(self, step: int):
        """Makes damage that one process meets an error of all."""
        line = ""
        try:
            yield
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax raises any kind, Exception itself among them
            if stores.failed(error):  # nothing is known of the checkpoint
                raise UserError(f"cannot read {os.path.join(self.folder, str(step))}: {_short(error)}") from error
            line = _short(error.__cause__ or error)
            if isinstance(error, LookupError | TypeError | AttributeError):  # which say little by themselves
                line = f"{type(error).__name__}: {line}"
        if line := first_said(line):
            raise self._damaged(step, line)

    def _damaged(self, step: int, line: str) -> Damaged:
        others = [other for other in self.steps() if other != step]
        return Damaged(f"{os.path.join(self.folder, str(step))} is damaged: {line}", others)

    def _compare(self, step: int, have: dict[str, str], want: dict[str, str]) -> None:
        """Orbax casts another dtype in silence and reports another structure in thousands of lines."""
        wrong = [f"{p} missing" for p in want if p not in have] + [f"{p} unexpected" for p in have if p not in want]
        wrong += [f"{p} is {have[p]}, expected {want[p]}" for p in want if p in have and have[p] != want[p]]
        wrong.sort(key=lambda line: not line.startswith("params/"))  # what tells most comes first
        if wrong:
            raise UserError(f"checkpoint {step} of {self.folder} is another model's or plan's: {listing(wrong, 5)}")

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        if self.manager:
            self.manager.close()
        if self.staging:
            self.staging.close()


def _short(error: Exception) -> str:
    """Of tensorstore's pages the cause in the system's words, where it says it, else the beginning."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    system = re.search(r"([^:]+) \[os_error_code", text)
    return system[1].strip() if system else text[:200]


def _whole(tree: Tree) -> Tree:
    """The arrays as numpy in process 0, and nothing in others: one after the other, as no device may hold them all."""
    from jax.experimental.multihost_utils import process_allgather

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = process_allgather(leaf, tiled=True)
        return np.asarray(leaf) if jax.process_index() == 0 else None

    cluster.meet()
    return jax.tree.map(whole, tree)


def _digest(value: Any) -> str:
    """SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shapes(tree: Tree) -> dict[str, str]:
    """{path: shape and type} of every array."""
    return {path: f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}" for path, leaf in flat(_named(tree)).items()}


def _named(tree: Tree) -> Tree:
    """Named tuples as dicts, as orbax writes them down."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return {k: _named(v) for k, v in tree._asdict().items()}
    if isinstance(tree, dict):
        return {k: _named(v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return [_named(v) for v in tree]
    return tree
