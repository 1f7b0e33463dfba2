"""Transfers a pre-trained network to a new task: `python -m tljax.train --config=configs/partial.py`.

Reads top to bottom: config, data, model and plan by shapes, weights, optimizer, state, one compiled step, the loop,
and the final figures (`tljax.ending`).
"""

from tljax import cluster, command, pages

USAGE = {
    "description": __doc__,
    "workdir": "the run's folder (default: runs/NAME-DIGEST); an interrupted run goes on there",
    **cluster.FLAGS,
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)
    pages.restart()

import signal
import time

import jax
from ml_collections import ConfigDict

from tljax import (
    STARTED,
    cache,
    data,
    delta,
    ending,
    experiment,
    fisher,
    hosts,
    loop,
    optim,
    parallel,
    phases,
    source,
    writers,
)
from tljax import config as configs
from tljax.agreement import first_said
from tljax.clock import Clock
from tljax.errors import UserError
from tljax.evaluate import Evaluator
from tljax.keeper import Keeper
from tljax.leaks import lint
from tljax.lock import Lock
from tljax.report import text
from tljax.report.console import Console, quiet_libraries
from tljax.step import State, init_state, numbers_of, part, whole
from tljax.termination import Termination
from tljax.watch import Watch
from tljax.workdir import Workdir


def main(argv: list[str]) -> int:
    """Trains an experiment and leaves its figures, pictures and checkpoints in a workdir."""
    flags = command.from_command_line(argv, **USAGE)
    quiet_libraries()
    configs.check(flags.config)
    cluster.join(flags, flags.config, "tljax.train")
    first = jax.process_index() == 0
    path = flags.workdir or f"runs/{flags.config.name}-{configs.digest(flags.config)}"
    run = Run(flags.config, Workdir(path, writes=first), Console(enabled=first))
    return run.train()


class Run:
    """One training run, in the order in which things happen."""

    def __init__(self, config: ConfigDict, workdir: Workdir, console: Console):
        self.config, self.workdir, self.console = config, workdir, console
        self.lock = Lock(workdir.path)
        self.clock = Clock(start=time.perf_counter() - STARTED)
        self.watch = Watch(config, workdir, self.clock, console)
        self.cache = None  # the features of the frozen prefix, where they are kept
        self.looked, self.leaks = False, {}  # whether the lint has looked at a step, and what it has found, in order
        self.waited = 0.0  # seconds for which the device had no batch, of those that training took
        self.first_step = None  # seconds from the command to the end of the first step; None where none was left to do

    def train(self) -> int:
        """Returns the exit code: 0, or 143 and 130 where SIGTERM and Ctrl-C stopped the run."""
        with self.lock:
            return self.watch.over(self.work)

    def work(self) -> int:
        """What `train` does; from the moment at which it writes no other run may be in the workdir."""
        config = self.config
        self.layout = parallel.Layout(config.parallel, config.batch_size, config.optim.accumulate)
        # A run that goes on is seen to live while its data are read. A new one first looks whether it can begin: a
        # mistake in its config leaves no folder that the right one would find taken.
        goes_on = bool(first_said("goes on" if self.workdir.begun else ""))
        if goes_on and not self.hold():
            return 0
        with self.clock("data"):
            self.dataset = data.load(config.data)
            cluster.meet(photographs=lambda: self.dataset.digest[:16])
        if not len(self.dataset.val) and (config.select == "best" or config.early_stop):
            field = "select = 'best'" if config.select == "best" else f"early_stop = {config.early_stop}"
            raise UserError(f"config.{field} needs a val split, config.data.val = {config.data.val!r} leaves none")
        with self.clock("model"):
            self.exp = experiment.build(config, self.dataset.classes, self.layout)
        examples = len(self.dataset.train)
        penalty = self.exp.penalty
        if penalty and not (penalty.held or penalty.new):
            raise UserError(f"config.regulariser = {config.regulariser!r} holds nothing: no loaded parameter trains")
        if penalty and penalty.regulariser.fisher and not (penalty.regulariser.source or config.source.data):
            raise UserError(source.UNNAMED)
        with self.clock("data"):  # what is missing is told before a step is made, not behind the last one
            wanted = config.source.data
            self.source = source.photographs(config.source, source.num_classes(self.exp)) if wanted else None
        self.total, self.per_epoch = experiment.total_steps(config, examples)
        self.phases = self.exp.in_time(examples)
        for phase in self.phases:  # schedules that do not fit are told before there is a folder
            self.exp.optimizer(phase, examples)
        if not goes_on and not self.hold():
            return 0
        self.watch.expect(self.total)
        with self.clock("model"):
            table = experiment.plan_table(self.exp)
        self.workdir.write("plan.txt", f"{table}\n")
        self.header()
        self.console.plan(table)

        self.keeper = Keeper(self.workdir.path, self.layout)
        with self.clock("weights"):
            state = self.keeper.newest(self.resume, self.console.print)
            state = self.begin() if state is None else state
        first = phases.index(self.phases, int(state.step))
        self.workdir.rewind(int(state.step))
        self.workdir.writers = writers.begin(config, self.workdir, self.console.print)
        self.evaluate = Evaluator(self.exp, self.layout, self.watch.alive)
        with Termination() as self.termination:
            for i in range(first, len(self.phases)):
                try:
                    state, stopped = loop.fit(self, self.enter(i, state))
                except cache.Interrupted:
                    by = self.termination.received
                    self.console.print(f"stopped by {by.name} while features were computed; the same command goes on")
                    return 128 + by
                if stopped:
                    by = self.termination.received or signal.SIGTERM
                    at = f"by {by.name} at step {int(state.step)}"
                    self.console.print(f"stopped {at}, saved; the same command goes on from there")
                    return 128 + by
                if loop.ended_early(self):
                    break
        ending.conclude(self, state)
        return 0

    def hold(self) -> bool:
        """Makes the workdir this run's alone and begins its heartbeat. Returns whether anything is left to do."""
        self.workdir.claim(self.config)
        finished = self.workdir.summary()
        if finished:
            ending.page(self.workdir)  # a kill may have come between the summary and the page
            self.console.final(finished)
            self.console.print(f"this run is complete; its figures and pictures are in {self.workdir.path}")
            return False
        self.lock.take(self.console.print)
        self.workdir.check = self.lock.check
        self.workdir.claim(self.config)  # again: two may have come at once
        self.watch.begin()
        return True

    def header(self) -> None:
        """Says what the run stands on."""
        card, dataset, devices = self.exp.card, self.dataset, jax.devices()
        weights = [f"{card.name}: {card.trained_on}, licence {card.licence}", card.note] if card else ["none: random"]
        self.console.header(
            {
                "devices": f"{len(devices)} × {devices[0].device_kind} ({self.layout})",
                "versions": ", ".join(f"{k} {v}" for k, v in experiment.versions().items()),
                "weights": list(filter(None, weights)),
                "data": [f"{dataset.name}: {dataset.origin}, licence {dataset.licence}", *dataset.report],
                "source task": self.source and [f"{self.source.name}: {self.source.origin}", *self.source.report],
                "regulariser": self.exp.penalty and self.exp.penalty.said(self.exp.shapes["params"]),
                "workdir": str(self.workdir.path),
            }
        )

    # ---- the state

    def begin(self) -> State:
        """The state before the first step: loaded weights, a fresh head."""
        params, stats, report = self.exp.load()
        if report is not None:
            self.console.print(report.line())
            cluster.meet(loaded_weights=lambda: hosts.digest((params, stats), report.loaded))
        if self.config.head:
            self.console.print(f"the head begins as the zero-shot classifier, prompts: {self.config.templates}")
        phase, examples = self.phases[0], len(self.dataset.train)
        self.keeper.notes = {
            "step": 0, "best": None, "since_best": 0, "pending": [],
            "classes": list(self.dataset.classes), "examples": examples,
            "data": self.dataset.digest, "frozen": phase.plan.frozen_digests(params, stats),
        }  # fmt: skip
        tx, _ = self.exp.optimizer(phase, examples)
        anchor = self.exp.penalty and self.exp.penalty.anchor(params, self.fisher())
        begin = jax.jit(init_state, static_argnums=(0, 1, 4))
        return self.layout.place(begin(phase.plan, tx, params, stats, self.config.ema, anchor))

    def fisher(self):
        """The Fisher information of the source task, where the regulariser weighs by it."""
        if not self.exp.penalty.regulariser.fisher:
            return None
        found, said = fisher.of_source(self.exp)
        self.console.print(said)
        return found

    def resume(self, step: int) -> State:
        """The state of a checkpoint, and what the run knew then. Raises UserError where something has changed."""
        keeper = self.keeper
        keeper.notes = keeper.checkpoints.notes(step)
        if keeper.notes["data"] != self.dataset.digest:
            raise UserError(f"the data are not those that {self.workdir.path} was begun with")
        plan, state = self.exp.restore(keeper.checkpoints, step, self.layout, len(self.dataset.train))
        keeper.verify(state, plan)
        self.console.print(f"resumed from step {step}; the frozen values are those of the start")
        return state

    def enter(self, i: int, state: State) -> State:
        """Begins, or goes on with, a phase: its plan, its optimizer, its one compiled step."""
        self.phase, self.plan = self.phases[i], self.phases[i].plan
        tx, self.schedule = self.exp.optimizer(self.phase, len(self.dataset.train))
        _, self.optimizer_bytes = optim.state_bytes(tx, self.plan)
        self.never_trained = phases.never_trained(self.phases[: i + 1])
        if i and int(state.step) == self.phase.start:
            self.keeper.change(state, self.phases[i - 1].plan, self.plan)
            state = self.layout.place(phases.change(state, self.plan, tx))
        if len(self.phases) > 1:
            steps = f"{self.phase.start}–{self.phase.stop}"
            live = experiment.live_spans(self.plan)
            self.console.print(f"phase {i + 1} of {len(self.phases)}, steps {steps}: {live}")
        like = self.exp.state_shapes(self.plan, tx)
        self.keeper.absent = self.exp.left_out(self.phases[: i + 1])
        held, whole = (delta.nbytes(tree) for tree in (delta.cut(like, self.keeper.absent), like))
        self.checkpoint_bytes = {"bytes": held, "whole_bytes": whole}
        if self.config.checkpoint.delta:
            share = f"a checkpoint holds {text.size(held)} of {text.size(whole)} ({100 * held / whole:.0f} %)"
            self.console.print(f"{share}, the rest is the base's: {self.keeper.base_digest()[:16]}")
        cluster.meet(step=lambda: int(state.step))
        self.keep_features(state)
        with self.clock("compile"):
            self.compile(self.layout.abstract(like))
        cluster.meet()
        return state

    def keep_features(self, state: State) -> None:
        """Decides whether the phase runs on kept features, and computes those that it will use."""
        examples = {name: len(getattr(self.dataset, name)) for name in ("train", "val", "test")}
        where, said = cache.choose(self.exp, self.phase, examples)
        self.console.print(f"feature cache: {said}")
        self.cache = None if not where else cache.FeatureCache(
            self.exp, self.layout, self.phase, state.params, state.stats, where,
            say=self.console.print, stopped=lambda: self.termination.received,
            clock=lambda split: self.clock({None: "compile", self.dataset.test: "test"}.get(split, "features")),
        )  # fmt: skip

    def compile(self, like: State) -> None:
        """Compiles the one train step, after a look for gradients of frozen leaves in it."""
        config, exp, phase = self.config, self.exp, self.phase
        start = self.cache.cut if self.cache else None
        mix_at = self.plan.cut if config.augment.mix_at == "features" else None

        def step(own, shared, batch, numbers):  # whose program serves other rates and seeds from the compilation cache
            tx, _ = exp.optimizer(phase, len(self.dataset.train), numbers)
            update = exp.train_step(phase.plan, tx, self.layout, numbers, start=start, mix_at=mix_at)
            state, metrics = update(whole(own, shared, phase.plan), batch)
            return part(state, phase.plan)[0], metrics

        features = self.cache.like if self.cache else None
        batch = self.layout.abstract_batch(config.batch_size, exp.preprocessing.size, features)
        self.numbers = numbers_of(config)
        states = part(like, self.plan)
        program = self.layout.program(step, *states, more=1)
        arguments = (*states, batch, self.numbers)
        leaks = lint(program, self.plan, *arguments)  # before compiling, which takes over what was traced
        # A leak is a mistake in the step or the model, not in what the user asked for, and costs time and memory alone
        # (the frozen values are verified all the same): it is told, here and in the summary, and stops nothing.
        for line in leaks or (() if self.looked else ("no gradient of a frozen leaf is formed",)):
            self.console.print(f"lint: {line}")
        self.looked = True
        self.leaks |= dict.fromkeys(map(str, leaks))
        self.train_step = program.lower(*arguments).compile()


if __name__ == "__main__":
    command.run(main)
