"""One member's course through a sweep: what is fixed before it begins, what is known of it, and what is told."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tljax.config import flatten
from tljax.data import Dataset
from tljax.grid import Member
from tljax.step import Numbers

# What a reader of the table asks for of every run, an axis or not.
TOLD = (
    "model", "weights", "strategy", "optim.lr", "optim.weight_decay", "label_smoothing", "batch_size", "train_for",
    "data.limit", "data.val", "data.fold_seed", "seed",
)  # fmt: skip


@dataclasses.dataclass
class Course:
    """A member, its data and its schedule, and how far it has come."""

    member: Member
    dataset: Dataset
    total: int  # steps
    per_epoch: float
    rates: np.ndarray  # float32 [total]: the learning rate of each step
    numbers: Numbers  # the others; their lr is the peak
    every: dict[str, int]  # steps from one log, and one eval, to the next
    step: int = 0  # updates done
    diverged: int = 0  # the step whose loss was not finite; 0: none was
    best: dict | None = None
    since_best: int = 0
    eliminated: bool = False  # stopped for being worse than others
    evaluations: dict[int, dict] = dataclasses.field(default_factory=dict)

    def anew(self) -> "Course":
        """The same before its first step."""
        return Course(
            self.member, self.dataset, self.total, self.per_epoch, self.rates, self.numbers, self.every
        )  # fmt: skip

    @property
    def over(self) -> bool:
        """Whether it trains no more."""
        early = self.member.config.early_stop
        return bool(self.diverged) or self.eliminated or self.step >= self.total or 0 < early <= self.since_best


def fetched(courses: Sequence[Course], pending: list[tuple[np.ndarray, dict]]) -> list[dict]:
    """The metrics of steps as arrays [members]; tells each course of its first loss that is not finite."""
    gone, found = zip(*jax.device_get(pending)) if pending else ((), ())
    for k, course in enumerate(courses):
        steps = [t for t, go in enumerate(gone) if go[k]]
        bad = [i for i, t in enumerate(steps) if not np.isfinite(found[t]["loss"][k])]
        if bad and not course.diverged:
            course.diverged = course.step - len(steps) + bad[0] + 1
            course.step = course.diverged - 1
    return list(found)


def row(course: Course, steps: dict[str, np.ndarray], figures: dict[str, dict | None]) -> dict:
    """What is told of a member; `steps` are the metrics of all steps, {name: [steps]}."""
    status = "finished" if course.step == course.total else "stopped early"
    if course.eliminated:
        status = f"eliminated at step {course.step}"
    curve, start = [], 0
    for step in range(1, course.step + 1):
        place = {"step": step, "epoch": round(step / course.per_epoch, 4)}
        if step % course.every["log"] == 0 or step == course.total:
            means = {f"train/{name}": float(of[start:step].mean()) for name, of in steps.items()}
            curve.append(place | means | {"lr": float(course.rates[step - 1])})
            start = step
        if step in course.evaluations:
            curve.append(place | {f"val/{name}": value for name, value in course.evaluations[step].items()})
    given, dataset = flatten(course.member.config), course.dataset
    return {
        "number": course.member.number, "fields": course.member.fields, "config": {name: given[name] for name in TOLD},
        **{f"n_{name}": len(getattr(dataset, name)) for name in ("train", "val", "test")},
        "status": f"diverged at step {course.diverged}" if course.diverged else status,
        "steps": course.step, "epochs": round(course.step / course.per_epoch, 3), "best": course.best,
        **figures, "curve": curve,
    }  # fmt: skip
