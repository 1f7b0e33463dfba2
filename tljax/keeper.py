"""What a run keeps: notes of what it knows, checkpoints, and the proof that what is frozen has stayed as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import delta
from tljax.agreement import first_said
from tljax.checkpoint import Checkpoints, Damaged
from tljax.errors import UserError, listing
from tljax.parallel import Layout
from tljax.plan import Plan, combined
from tljax.report import metrics
from tljax.step import State, part, whole


class Keeper:
    """The checkpoints below a run's folder, and the notes beside them.

    `notes` are plain JSON: "step", "best" ({"step", "epoch", "metric", "value"} or None), "since_best" (evaluations
    since then), "pending" (metrics of the steps since the last row), "frozen" (digests of the frozen values, each from
    the step at which it froze) and what tells one run from another. `absent` is what checkpoints leave out
    (`Experiment.left_out`).
    """

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.notes: dict = {}
        self.absent: dict[str, int] = {}
        self.held = None  # the best checkpoint, as long as it is not written

    def newest(self, read: Callable[[int], Any], say: Callable[[str], None]) -> Any:
        """What `read(step)` returns of the newest checkpoint that is whole; None where there is none at all.

        Those that are damaged are named and moved out of the way, as the run will save these steps again. Raises
        UserError, and leaves all as it is, where none is whole.
        """
        damaged: dict[int, str] = {}
        # Another machine may see a shared folder as it was a moment ago.
        steps = first_said(" ".join(map(str, self.checkpoints.steps()))).split()
        for step in reversed([int(step) for step in steps]):
            try:
                found = read(step)
            except Damaged as error:
                damaged[step] = error.what
                continue
            if damaged:
                aside = self.checkpoints.set_aside(list(damaged))
                say(f"{'; '.join(damaged.values())}; {aside}, the run goes on from step {step}")
            return found
        if damaged:
            raise UserError(f"no checkpoint is whole, and nothing was deleted: {'; '.join(damaged.values())}")
        return None

    def base_digest(self) -> str:
        """One digest over all that checkpoints leave out, as it was at the start."""
        return combined({path: self.notes["frozen"][path] for path in self.absent})

    def verify(self, state: State, plan: Plan) -> None:
        """Raises UserError that names the leaves if a frozen value is not, bit for bit, what it was at the start."""
        now = self.digests(state, plan)
        moved = sorted(path for path, digest in self.notes["frozen"].items() if now.get(path) != digest)
        if moved:
            raise UserError(f"frozen values have changed by step {int(state.step)}: {listing(moved)}")

    def digests(self, state: State, plan: Plan) -> dict[str, str]:
        """The digest of each value that is frozen."""
        return plan.frozen_digests(*self.layout.to_host((state.params, state.stats)))

    def change(self, state: State, old: Plan, new: Plan) -> None:
        """Goes over to another plan: what stays frozen is held to its first day, what freezes now to what it is now."""
        self.verify(state, old)
        now = self.digests(state, new)
        self.notes["frozen"] = {path: self.notes["frozen"].get(path, digest) for path, digest in now.items()}

    def assess(self, metric: str, value: float, step: int, epoch: float) -> bool:
        """Notes a figure of val. Returns whether it is the best so far."""
        better = metrics.better(metric, value, self.notes["best"])
        if better:
            self.notes |= {"best": {"step": step, "epoch": round(epoch, 3), "metric": metric, "value": value}}
        self.notes["since_best"] = 0 if better else self.notes["since_best"] + 1
        return better

    def hold(self, state: State, plan: Plan) -> None:
        """Holds the best state so far on the host: it is written before the next checkpoint that is due.

        Saving takes longer than an epoch on kept features. Who is killed in between finds the same one again. Several
        processes write it at once: what lies on one host is none of their common arrays.
        """
        if jax.process_count() > 1:
            return self.save(state, plan)
        own, shared = part(state, plan)
        own = jax.tree.map(np.array, self.layout.to_host(own))  # a copy: the buffers are donated
        self.held = self._checkpoint(whole(own, shared, plan), plan)

    def save(self, state: State, plan: Plan) -> None:
        """Begins to save a checkpoint, and before it the best one, where it is held."""
        for found in filter(None, (self.held, self._checkpoint(state, plan))):
            self.checkpoints.save(*found)
        self.held = None

    def _checkpoint(self, state: State, plan: Plan) -> tuple[int, State, dict, int | None]:
        """What `Checkpoints.save` takes, after proving that what is frozen has stayed."""
        self.verify(state, plan)
        self.notes |= {"step": int(state.step), "base": self.base_digest()}
        best = self.notes["best"]
        return int(state.step), delta.cut(state, self.absent), copy.deepcopy(self.notes), best["step"] if best else None
