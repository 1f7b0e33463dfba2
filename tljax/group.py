"""One group of a sweep: members that one compiled step trains, from their first step to their final figures."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tljax import cache, data, experiment, fisher, memory, strategies
from tljax import config as configs
from tljax.course import Course, fetched, row
from tljax.data import Dataset, Split
from tljax.data.pipeline import stream
from tljax.errors import UserError
from tljax.grid import Member
from tljax.members import Members, choose
from tljax.parallel import Layout, Spread, members_over
from tljax.report import metrics, text
from tljax.step import State, numbers_of

Tree = Any
TELL = 20.0  # seconds from one line about how far a group is to the next
BEGIN = 2.5e7  # operations in the time that it takes to begin a step: half a millisecond of a CPU
PLAIN = configs.ConfigDict({"mode": "jit", "fsdp": 1})
SHOWN = ("accuracy", "macro_f1", "nll", "ece", "coarse_accuracy")


class Group:
    """Members, with the data set of each, that one compiled step trains.

    They differ in `grid.NUMBERS`, in strategies whose plans are of one kind and, on kept features, in `grid.STREAMS`.
    """

    def __init__(self, members: Sequence[Member], datasets: Sequence[Dataset], how: str = "auto", kept: str = ""):
        self.members, self.datasets = tuple(members), tuple(datasets)
        # Decay is left out of the optimizer where it is 0: one that has it serves all.
        config = max((member.config for member in members), key=lambda config: config.optim.weight_decay)
        self.layout = Layout(PLAIN, config.batch_size, config.optim.accumulate, devices=1)
        self.exp = experiment.build(config, self.datasets[0].classes, self.layout)
        rates = {self._drop_rate(member.config) for member in members}
        self.drops = len(rates) > 1  # else the model's own will do
        self.plan_of = functools.cache(lambda strategy: self.exp.plan_of(strategies.parse(strategy)))
        self.courses = [self._course(m, d) for m, d in zip(self.members, self.datasets)]
        longest = max(self.courses, key=lambda course: course.total)
        self.phase = self.exp.in_time(len(longest.dataset.train))[0]._replace(stop=longest.total)
        self.kept = kept
        streams = {(course.member.config.seed, course.dataset.digest) for course in self.courses}
        self.how = choose(how, self.phase.plan, bool(kept))
        alone = self.how == "sequence"  # a step is of one member
        self.spread = Spread(1 if alone else members_over(config.parallel.members, len(self.members)))
        one_step, varied = "vmap" if alone else self.how, len(streams) > 1 and not alone
        self.programs = Members(self.exp, self.layout, self.phase, one_step, bool(kept), varied, self.spread)
        self.compiled, self.features, self.slots = None, None, 0
        self.peaks: dict[str, int] = {}  # bytes that a step takes, by its arguments; groups of one step may share it
        self.on_device: dict[str, Any] = {}
        self.pools = pools(datasets)
        used = max(-(-course.total * config.batch_size // len(course.dataset.train)) for course in self.courses)
        self.views = min(cache.views(config) or 1, used)

    def adopt(self, other: "Group | None") -> None:
        """Goes on with what another group, whose members differ in numbers and streams alone, has compiled and kept."""
        if other is None or self._shared() != other._shared():
            return
        self.features, self.on_device = other.features, other.on_device
        self.programs, self.compiled, self.slots = other.programs, other.compiled, other.slots

    def _shared(self) -> tuple:
        """What of its members a group's program and features depend on."""
        return *self.facts(), [(name, split.rows.tobytes()) for name, split in self.pools.items()]

    def facts(self) -> tuple:
        """What of its members, beside the fields of the config that they have in common, its step depends on."""
        drops = self.drops or self.exp.config.drop_rate
        decays = self.exp.config.optim.weight_decay > 0
        way = (self.kept, self.views, self.programs.varied, self.how, len(self.spread.devices))
        return *way, drops, decays, self.phase.plan.kind, getattr(self.exp.model, "adapters", ())

    def _course(self, member: Member, dataset: Dataset) -> Course:
        config, n = member.config, len(dataset.train)
        if not len(dataset.val) and (config.select == "best" or config.early_stop):
            raise UserError(f"select = 'best' and early_stop need a val split, config.data.val = {config.data.val!r}")
        total, per_epoch = experiment.total_steps(config, n)
        own = dataclasses.replace(self.exp, config=config)
        rates = np.asarray(own.optimizer(own.in_time(n)[0], n)[1](np.arange(total)), np.float32)
        every = {
            name: max(1, configs.duration(config[f"{name}_every"], per_epoch, f"{name}_every"))
            for name in ("log", "eval")
        }
        multipliers = np.array([leaf.multiplier for leaf in self.plan_of(config.strategy).trainable], np.float32)
        drop_rate = np.float32(self._drop_rate(config)) if self.drops else None
        numbers = numbers_of(config)._replace(multipliers=multipliers, drop_rate=drop_rate)
        return Course(member, dataset, total, per_epoch, np.broadcast_to(rates, total), numbers, every)

    def _drop_rate(self, config: configs.ConfigDict) -> float:
        return dataclasses.replace(self.exp, config=config).plain_model(self.exp.model.num_classes).drop_rate

    # ---- what it needs

    def _arguments(self, count: int) -> tuple:
        """The shapes of what a step of so many members takes on one device."""
        own, shared = self.programs.shapes(count)
        shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
        batch, size = self.layout.batch_size, self.exp.preprocessing.size
        flags = shaped(np.bool_, count)
        numbers = jax.tree.map(lambda x: shaped(x.dtype, count, *x.shape), self.courses[0].numbers)
        if self.kept:
            like, pool = self.exp.features(self.phase.plan), len(self.pools["train"])
            inputs = {"features": shaped(like.dtype, self.views, pool, *like.shape), "label": shaped(np.int32, pool)}
            places = shaped(np.int32, *((count, batch) if self.programs.varied else (batch,)))
            index = (places, places)
        else:
            inputs = {"image": shaped(np.uint8, batch, size, size, 3), "label": shaped(np.int32, batch)}
            index = None
        return own, flags, shared, shaped(np.int32), flags, numbers, inputs, index

    def need(self, count: int) -> int:
        """Bytes of one device that so many members take at once, at most: state, features, and the step's own."""
        arguments, held = self._arguments(self.spread.each(count)), 0
        if self.kept:
            like = self.exp.features(self.phase.plan)
            held = sum(len(self.pools[name]) for name in ("val", "test")) * memory.nbytes(like)
        best = memory.nbytes(arguments[0]) if self.exp.config.select == "best" else 0
        shapes = str(arguments)
        if shapes not in self.peaks:
            self.peaks[shapes] = memory.peak(self.programs._step, *arguments)
        return self.peaks[shapes] + best + held

    @functools.cached_property
    def beside(self) -> float:
        """What a step costs beside its members, in members, by its floating-point operations."""
        cost = lambda count: self.programs.step.lower(*self._arguments(count)).cost_analysis()["flops"]
        one, two = cost(1), cost(2)
        return (2 * one - two + BEGIN) / max(two - one, 1)

    # ---- the run

    def train(self, courses: Sequence[Course], size: int, say: Callable = print):
        """Trains some members, filled up to `size`, and to a multiple of the devices. Returns (rows, own, shared).

        A row is {"number", "fields", "config": {field: value} of what readers ask for, "n_train" and others: numbers of
        photographs, "status", "steps", "epochs", "best": {"step", "epoch", "value"} or None, "val" and "test": figures
        or None, "seconds": its share, "group": the group's first member, "how", "kept", "curve": rows as those of
        metrics.jsonl}.
        """
        begun = time.perf_counter()
        filled = self.filled(courses, size)
        own, shared = self.begin(filled, say)
        steps, own, best = self.fit(courses, filled, own, shared, say=say)
        own = own if best is None else best
        found = {name: self.figures(courses, filled, own, shared, name) for name in ("val", "test")}
        seconds = (time.perf_counter() - begun) / len(courses)
        rows = [
            row(course, {name: of[:, k] for name, of in steps.items()}, {name: found[name][k] for name in found})
            for k, course in enumerate(courses)
        ]
        return [told | {"seconds": round(seconds, 3)} | self.ways for told in rows], own, shared

    @property
    def ways(self) -> dict:
        """What a row tells of its group."""
        return {"group": self.members[0].number, "how": self.how, "kept": self.kept}

    def filled(self, courses: Sequence[Course], size: int) -> list[Course]:
        """Members of a compiled step with so many slots; the last one again in those that are left."""
        self.slots, size = size, self.whole(size)
        return [*courses, *[courses[-1]] * (size - len(courses))]

    def whole(self, size: int) -> int:
        """So many slots, filled up to a multiple of the devices."""
        return self.spread.each(size) * len(self.spread.devices)

    def begin(self, filled: Sequence[Course], say: Callable) -> tuple[State, State]:
        """The state of some members before the first step: (own [members, …], shared)."""
        load = functools.cache(lambda seed: self._loaded(filled, seed))
        information = None
        if self.exp.penalty and self.exp.penalty.regulariser.fisher:
            information, said = fisher.of_source(self.exp)
            say(said)
        variables = [load(course.member.config.seed) for course in filled]
        own, shared = self.programs.begin(variables, information)
        if self.kept and self.features is None:
            self.features = cache.FeatureCache(self.exp, self._all(), self.phase, *variables[0], self.kept, say)
        return own, shared

    def _all(self) -> Layout:
        """Over all devices of the members, each of which takes its part of a batch of photographs."""
        count = len(self.spread.devices)
        batch = self.spread.each(self.layout.batch_size) * count
        return Layout(PLAIN, batch, devices=count)

    def _loaded(self, courses: Sequence[Course], seed: int) -> tuple[Tree, Tree]:
        config = next(course.member.config for course in courses if course.member.config.seed == seed)
        return dataclasses.replace(self.exp, config=config).load()[:2]

    def fit(
        self, courses: Sequence[Course], filled: Sequence[Course], own: State, shared: State, best: State | None = None,
        start: int = 0, stop: int | None = None, say: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        """Trains from step `start`, at which all are, to `stop`, by default the end; says now and then how far it is.

        Returns (metrics of these steps, {name: [steps, members]}, the own parts, those of the best so far where
        config.select = "best", else None).
        """
        inputs, index = self._inputs(filled)
        total = max(course.total for course in courses)
        stop = total if stop is None else min(stop, total)
        rates = np.zeros((total, len(filled)), np.float32)
        for k, course in enumerate(courses):
            rates[: course.total, k] = course.rates
        numbers = jax.tree.map(lambda *each: np.stack(each), *(course.numbers for course in filled))
        alive, go = np.ones(len(filled), bool), np.zeros(len(filled), bool)
        done, pending = [], []
        if self.exp.config.select == "best" and best is None:
            best = jax.tree.map(lambda leaf: leaf.copy(), own)
        batches = None if self.kept else self._batches(start, stop)
        for step in range(start, stop):
            go = np.array([not course.over for course in courses] + [False] * (len(filled) - len(courses)))
            if not go.any():
                break
            batch = inputs if self.kept else next(batches)
            arguments = (
                own, alive, shared, np.int32(step), go, numbers._replace(lr=rates[step]), batch, index(step)
            )  # fmt: skip
            if self.compiled is None:
                self.compiled = self.programs.step.lower(*arguments).compile()
            own, alive, measured = self.compiled(*arguments)
            if step == start:
                begun = told = time.perf_counter()  # compiled
            pending.append((go, measured))
            going = [course for course, goes in zip(courses, go) if goes]
            for course in going:
                course.step += 1
            due = np.zeros(len(filled), bool)
            for k, course in enumerate(courses):
                last = course.step == course.total
                due[k] = go[k] and (last or course.step % course.every["eval"] == 0)
            if not due.any():
                continue
            done += fetched(courses, pending)
            pending = []
            if step + 1 < stop and time.perf_counter() > told + TELL:
                told = time.perf_counter()
                left = text.duration((told - begun) / (step - start) * (stop - step - 1))
                going = text.counted(sum(not course.over for course in courses), "member")
                say(f"step {step + 1} of {stop}, {going}: about {left} left")
            if len(self.pools["val"]):
                better = self._assess(courses, filled, own, shared, due)
                if self.exp.config.select == "best":
                    best = self.programs.pick(better, own, best)
        if batches is not None:
            batches.close()
        done += fetched(courses, pending)
        steps = {name: np.stack([found[name] for found in done]) for name in ("loss", "accuracy")}
        return steps, own, best

    def _inputs(self, filled: Sequence[Course]):
        """Returns (kept features of the pool of training photographs, step -> index of the step's batch)."""
        if not self.kept:
            return None, lambda step: None
        pool, batch, looks = self.pools["train"], self.layout.batch_size, cache.views(self.exp.config)
        if "train" not in self.on_device:
            features = np.stack([self.features(pool, view) for view in range(self.views)])
            self.on_device["train"] = jax.device_put({"features": features, "label": pool.labels}, self.spread.shared)

        @functools.cache
        def course_of(seed: int, train: Split, total: int) -> tuple[np.ndarray, np.ndarray]:
            epochs, places = stream(len(train), seed, total * batch)
            return (epochs % looks).reshape(total, batch), pool.places(train)[places].reshape(total, batch)

        own = [course_of(c.member.config.seed, c.dataset.train, c.total) for c in filled]
        if not self.programs.varied:
            own = [max(own, key=lambda found: len(found[0]))]

        def index(step: int) -> tuple[np.ndarray, np.ndarray]:
            # Who is done goes on with his last batch, in vain.
            found = (np.stack([of[i][min(step, len(of[i]) - 1)] for of in own]).astype(np.int32) for i in (0, 1))
            return tuple(x if self.programs.varied else x[0] for x in found)

        return self.on_device["train"], index

    def _batches(self, start: int, stop: int):
        config, p, train = self.exp.config, self.exp.preprocessing, self.datasets[0].train
        return data.train_batches(
            train, batch_size=config.batch_size, seed=config.seed, start_step=start, stop_step=stop,
            size=p.size, augment=config.augment, interpolation=p.interpolation, crop=p.crop, views=config.cache_views,
            threads=config.data.threads,
        )  # fmt: skip

    def _assess(self, courses, filled, own: State, shared: State, due: np.ndarray) -> np.ndarray:
        """Evaluates those that are due on val. Returns who is the best so far, bool [members]."""
        better = np.zeros(len(filled), bool)
        due = [k for k, course in enumerate(courses) if due[k] and not course.diverged]
        if not due:
            return better
        logits = self.logits(filled, own, shared, "val")
        for k in due:
            course, metric = courses[k], self.exp.config.metric.removeprefix("val/")
            found = self._measured(course, logits[k], "val")
            if found is None:
                continue
            course.evaluations[course.step] = found
            if metrics.better(metric, found[metric], course.best):
                epoch = round(course.step / course.per_epoch, 3)
                course.best = {"step": course.step, "epoch": epoch, "value": found[metric]}
                course.since_best, better[k] = 0, True
            else:
                course.since_best += 1
        return better

    def figures(self, courses, filled, own: State, shared: State, name: str) -> list[dict | None]:
        """The figures of members' own splits; None where one has none, or has diverged."""
        if not len(self.pools[name]) or all(course.diverged for course in courses):
            return [None] * len(courses)
        logits = self.logits(filled, own, shared, name)
        return [None if c.diverged else self._measured(c, logits[k], name) for k, c in enumerate(courses)]

    def _measured(self, course: Course, logits: np.ndarray, name: str) -> dict | None:
        """The figures of a member's split; None where it has none, or has diverged since its last step."""
        split, dataset = getattr(course.dataset, name), course.dataset
        if not len(split):
            return None
        if not np.isfinite(logits).all():
            course.diverged = course.step
            return None
        found = metrics.classification(logits, split.labels, dataset.classes, dataset.coarse)
        return {key: found[key] for key in SHOWN if key in found}

    def logits(self, filled: Sequence[Course], own: State, shared: State, name: str) -> list[np.ndarray]:
        """Each member's logits [photographs, classes] of its own split."""
        run, batch, pool = self.programs.logits, self.layout.batch_size, self.pools[name]
        splits = [getattr(course.dataset, name) for course in filled]
        if not self.kept:
            p, config = self.exp.preprocessing, self.exp.config
            batches = data.eval_batches(
                pool, batch_size=batch, size=p.size, crop=p.crop, interpolation=p.interpolation,
                threads=config.data.threads,
            )  # fmt: skip
            found = [np.asarray(run(own, shared, seen["image"])) for seen in batches]
            return list(np.concatenate(found, 1)[:, : len(pool)])
        places = [pool.places(split) for split in splits]
        varied = len({split.rows.tobytes() for split in splits}) > 1
        length = -(-max(map(len, places)) // batch) * batch
        table = np.stack([np.pad(p, (0, length - len(p))) for p in (places if varied else places[:1])]).astype(np.int32)
        if name not in self.on_device:
            self.on_device[name] = jax.device_put(np.asarray(self.features(pool)), self.spread.shared)
        features = self.on_device[name]
        found = [
            np.asarray(run(own, shared, features, at if varied else at[0], varied=varied))
            for at in np.split(table, length // batch, 1)
        ]
        return [each[: len(p)] for each, p in zip(np.concatenate(found, 1), places)]


def pools(datasets: Sequence[Dataset]) -> dict[str, Split]:
    """{split's name: the photographs that it has in any of several data sets of one source}."""
    found = {}
    for name in ("train", "val", "test"):
        first, *others = dict.fromkeys(getattr(dataset, name) for dataset in datasets)
        found[name] = first.join(*others) if others else first
    return found
