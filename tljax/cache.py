"""The feature cache: what nothing trainable influences is a constant of the data, computed once and kept.

The frozen prefix (`plan.prefix`) turns every photograph into features once, for each of its `config.cache_views`
augmented views and for the evaluation crop. Steps and evaluations then begin at the cut, the first stage behind the
prefix. A phase that thaws deeper stages has another cut, and so other features.
"""

import contextlib
import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict

from tljax import claim_files, claims, data, files
from tljax import config as configs
from tljax.data import Augment, Split
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.phases import Phase
from tljax.plan import combined
from tljax.report import text
from tljax.step import make_predict_step

if TYPE_CHECKING:
    from tljax.experiment import Experiment

ABANDONED = 24 * 3600  # seconds, after which an unfinished file is nobody's
FORMAT = 1  # of what a digest stands for; another number, and no folder of older features is used


class Interrupted(Exception):
    """A signal came while features were computed."""


def views(config: ConfigDict) -> int:
    """The number of different looks that training takes at a photograph; 0: a new one each epoch."""
    return config.cache_views if Augment.of(config.augment).random else 1


def choose(exp: "Experiment", phase: Phase, examples: dict[str, int]) -> tuple[str, str]:
    """Returns (where the features of a phase are kept: "memory", "disk" or "" for nowhere, a line that says why).

    `examples` are the photographs of each split. Asked for by name, a cache is used wherever it is possible and within
    `config.cache_limit`; "auto" keeps it in memory where it also saves something.
    """
    config, cut = exp.config, phase.plan.cut
    if config.cache == "off":
        return "", "off (config.cache)"
    if cut is None:
        return "", "off: nothing is frozen from the input on"
    if why := obstacle(config):
        return "", f"off: {why}"
    used, looks = len(needed(config, phase, examples["train"])), (phase.stop - phase.start) * config.batch_size
    if config.cache == "auto" and used * examples["train"] >= looks:
        return "", f"off: {text.counted(used, 'view')} for {looks:,} looks, none would be used again"
    shape = exp.features(phase.plan)
    count = examples["train"] * used + sum(n for name, n in examples.items() if name != "train")
    need = count * shape.size * np.dtype(shape.dtype).itemsize
    what = f"{count:,} × {'×'.join(map(str, shape.shape))} {np.dtype(shape.dtype)} before {cut}, {text.size(need)}"
    if need > configs.nbytes(config.cache_limit, "cache_limit"):
        return "", f"off: {what}, is more than config.cache_limit = {config.cache_limit!r}"
    where = "memory" if config.cache == "auto" else config.cache
    place = where if where == "memory" else folder(config)
    return where, f"{what}, in {place}, {text.counted(used, 'view')} of each training photograph"


def needed(config: ConfigDict, phase: Phase, examples: int, start: int = 0) -> list[int]:
    """The views that a phase uses from a step on, each once, in the order in which it does."""
    first, stop = (step * config.batch_size for step in (max(start, phase.start), phase.stop))
    return list(dict.fromkeys(epoch % views(config) for epoch in range(first // examples, -(-stop // examples))))


def obstacle(config: ConfigDict) -> str:
    """What in a config makes training's inputs change for ever; "" where nothing does."""
    if not views(config):
        return "each epoch draws new augmented views (config.cache_views = 0)"
    augment = config.augment
    if (augment.mixup or augment.cutmix) and augment.mix_at == "images":
        return "mixup and CutMix mix images (config.augment.mix_at)"
    return ""


def check(config: ConfigDict) -> None:
    """Raises UserError where a cache is asked for by name, and cannot be."""
    why = obstacle(config)
    if config.cache in ("memory", "disk") and why:
        raise UserError(f"config.cache = {config.cache!r} is impossible: {why}")


def folder(config: ConfigDict) -> Path:
    """Where features are kept on disk."""
    return Path(config.cache_folder or files.cached("features"))


class FeatureCache:
    """The features that stand before a cut, each computed once.

    `params` and `stats` are those with which the phase begins; `where` is "memory" or "disk", `say` takes the lines
    that the user is to read, `stopped` tells whether a signal has come, and `clock(split)` measures computing,
    `clock(None)` compiling.
    """

    def __init__(
        self, exp: "Experiment", layout: Layout, phase: Phase, params, stats, where: str,
        say: Callable[[str], None] = print, stopped: Callable[[], object] = lambda: False,
        clock: Callable[[Split | None], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):  # fmt: skip
        self.exp, self.layout, self.cut = exp, layout, phase.plan.cut
        self.where, self.say, self.stopped, self.clock = where, say, stopped, clock
        # A copy: the state is donated to the step.
        own = lambda tree: {stage: tree[stage] for stage in phase.plan.prefix if stage in tree}
        self.variables = layout.place((own(params), own(stats)))
        self.like = exp.features(phase.plan)
        self.digest = digest(exp, phase, params, stats, layout) if where == "disk" else ""
        self.kept: dict[tuple[Split, int | None], np.ndarray | Growing] = {}
        p = exp.preprocessing
        self.program = layout.compile_predict(make_predict_step(exp.model, mean=p.mean, std=p.std, stop=self.cut))
        self.compiled = None

    def __call__(self, split: Split, view: int | None = None) -> np.ndarray:
        """The features of a split, [photographs, …]: of the evaluation crop, or of an augmented view.

        Raises UserError for a photograph that cannot be read or a folder that cannot be written, and Interrupted.
        """
        key = (split, view)
        with self.clock(split):
            if key not in self.kept:
                self.kept[key] = self._stored(split, view) if self.where == "disk" else self._computed(split, view)
            found = self.kept[key]
            return np.asarray(found) if isinstance(found, Growing) else found

    def growing(self, split: Split, view: int, order: np.ndarray) -> "np.ndarray | Growing":
        """As a call gives them, but in memory each is computed when it, or one behind it in the order, is asked for.

        So training need not wait for features that it does not see yet. With the same order they are, to the last bit,
        the same, whoever asks. In several processes only what is there already can be asked for.
        """
        key = (split, view)
        if key not in self.kept and self.where == "memory":
            out = np.empty((len(split), *self.like.shape), self.like.dtype)
            self.kept[key] = Growing(out, self._parts(split, view, order), functools.partial(self.clock, split))
        return self.kept[key] if key in self.kept else self(split, view)

    @property
    def nbytes(self) -> int:
        """The size of the features that there are so far."""
        return sum(found.nbytes for found in self.kept.values())

    def _batches(self, split: Split, view: int | None, order: np.ndarray | None):
        config, p = self.exp.config, self.exp.preprocessing
        common = {
            "batch_size": self.layout.batch_size, "size": p.size, "crop": p.crop, "interpolation": p.interpolation,
            "threads": config.data.threads, "process": (jax.process_index(), jax.process_count()),
        }  # fmt: skip
        if view is None:
            return data.eval_batches(split, **common)
        return data.view_batches(split, view, augment=config.augment, order=order, **common)

    def _computed(self, split: Split, view: int | None, out: np.ndarray | None = None) -> np.ndarray:
        """Computes the features of a split into `out`, by default new memory."""
        out = np.empty((len(split), *self.like.shape), self.like.dtype) if out is None else out
        for places, found in self._parts(split, view, np.arange(len(split))):
            out[places] = found
        return out

    def _parts(self, split: Split, view: int | None, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, their features), part by part, in the order."""
        done = 0
        with contextlib.closing(self._batches(split, view, order)) as batches:
            for batch in batches:
                if self.stopped():
                    raise Interrupted
                images = self.layout.place_batch({"image": batch["image"]})["image"]
                if not self.compiled:
                    with self.clock(None):
                        self.compiled = self.program.lower(*self.variables, images).compile()
                found = np.asarray(self.compiled(*self.variables, images))[: len(order) - done]
                yield order[done : done + len(found)], found
                done += len(found)

    # ---- on disk: one .npy file a split and view, under the digest of all that it depends on

    def _stored(self, split: Split, view: int | None) -> np.ndarray:
        """The features from a file whose name is the digest of its content; computed where there is none."""
        looks = "evaluation"
        if view is not None:  # which depends on the rows in which the photographs stand
            looks = f"{_short(f'{Augment.of(self.exp.config.augment)} {split.rows.tolist()}')}-view{view}"
        name, place = f"{content(split)[:16]}-{looks}", folder(self.exp.config) / self.digest[:32]
        try:
            whole = self._whole(place, name)
            if not whole:
                place.mkdir(parents=True, exist_ok=True)
                whole = self._written(split, view, place, name)
        except OSError as error:
            raise UserError(f"feature cache: {place} cannot be used ({error.strerror or error})") from error
        return np.load(whole, mmap_mode="r").view(self.like.dtype)

    def _whole(self, place: Path, name: str) -> Path | None:
        """The file of that name whose content is what its name says, if all processes have one."""
        found = None
        for file in sorted(place.glob(f"{name}-*.npy")):
            if file.stem.endswith(files.digest(file)):
                found = file
                break
            self.say(f"feature cache: {file} is damaged and computed anew")
            file.unlink(missing_ok=True)
        if jax.process_count() > 1:  # computing is done by all together
            from jax.experimental.multihost_utils import process_allgather

            return found if process_allgather(np.array(found is not None)).all() else None
        return found

    def _written(self, split: Split, view: int | None, place: Path, name: str) -> Path:
        """Computes a file under a name of this process's own, which nobody trusts, and renames it when it is whole."""
        self._tidy(place)
        temporary = place / f".{name}-{uuid.uuid4().hex}-{claims.mark()}.tmp"
        try:
            shape = (len(split), *self.like.shape)
            out = np.lib.format.open_memmap(temporary, "w+", self._on_disk, shape)
            # A mapped file takes its room only when it is written, and a full disk would then end the process.
            if hasattr(os, "posix_fallocate"):
                with temporary.open("r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, temporary.stat().st_size)
            self._computed(split, view, out.view(self.like.dtype))
            out.flush()
            return temporary.replace(place / f"{name}-{files.digest(temporary)}.npy")
        finally:
            temporary.unlink(missing_ok=True)

    def _tidy(self, place: Path) -> None:
        """Removes what processes have left that were killed: those of this machine, and of others after a day."""
        now = claim_files.now(place)
        for left in place.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # by who tidies up as well
                dead = claims.died(left.stem.rpartition("-")[2])
                if dead or (dead is None and now - left.stat().st_mtime > ABANDONED):
                    left.unlink()

    @property
    def _on_disk(self) -> np.dtype:
        """The type under which a file holds features: .npy knows no bfloat16."""
        dtype = np.dtype(self.like.dtype)
        return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


class Growing:
    """Features [photographs, …] that come in parts, (places, features), and are asked for one by one."""

    def __init__(self, out: np.ndarray, parts: Iterator, clock):
        self.out, self.parts, self.clock = out, parts, clock
        self.there = np.zeros(len(out), bool)

    def __getitem__(self, place: int) -> np.ndarray:
        if not self.there[place]:
            with self.clock():
                while not self.there[place]:
                    self._add(*next(self.parts))
        return self.out[place]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All of them."""
        for part in self.parts:
            self._add(*part)
        return self.out

    @property
    def nbytes(self) -> int:
        """The size of those that there are."""
        return int(self.there.sum()) * self.out[0].nbytes

    def _add(self, places: np.ndarray, found: np.ndarray) -> None:
        self.out[places], self.there[places] = found, True


def digest(exp: "Experiment", phase: Phase, params, stats, layout: Layout) -> str:
    """One digest over all that features depend on but the photographs and their augmentation."""
    found = phase.plan.frozen_digests(*layout.to_host((params, stats)))
    facts = {path: value for path, value in found.items() if path.split("/")[1] in phase.plan.prefix}
    config = exp.config
    facts |= {"format": FORMAT, "model": config.model, "cut": phase.plan.cut, "preprocessing": exp.preprocessing}
    facts |= {"dtype": config.dtype, "adapters": getattr(exp.model, "adapters", ())}
    return combined({name: str(value) for name, value in facts.items()})


@functools.lru_cache(maxsize=8)
def content(split: Split) -> str:
    """SHA-256 over the photographs of a split: their encoded bytes, or their pixels, in order."""
    whole = hashlib.sha256()
    for i in range(len(split)):
        image, _ = split[i]
        part = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def _short(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]
