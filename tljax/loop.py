"""The loop around the step: batches in, rows of metrics, evaluations and checkpoints out, when they are due."""

import contextlib
import math
import time

import jax
import numpy as np

from tljax import STARTED, cache, feed, parallel
from tljax import config as configs
from tljax.errors import Diverged
from tljax.report import metrics, text
from tljax.step import State, evaluated, part, whole
from tljax.waiting import InputWait


def fit(run, state: State) -> tuple[State, bool]:
    """Runs the steps that are left of a `train.Run`'s phase; (state, whether a signal ended it, after a save)."""
    config, start = run.config, int(state.step)
    every = {
        name: max(1, configs.duration(config[f"{name}_every"], run.per_epoch, f"{name}_every"))
        for name in ("log", "eval", "checkpoint")
    }
    batches = feed.batches(run.exp, run.phase, run.dataset.train, run.cache, start)
    own, shared = part(state, run.plan)  # what is frozen goes into the steps and never comes out
    now = lambda: whole(own, shared, run.plan)
    pending = run.keeper.notes["pending"]  # metrics of the steps since the last row
    stopping = False
    bar, wait = run.console.progress(run.total, start, every["log"]), run.watch.steps(start)
    with bar as bar, wait, contextlib.closing(batches):
        begun, counted = run.clock.tick(), 0
        for step in range(start + 1, run.phase.stop + 1):
            if ended_early(run):
                break
            try:
                batch = placed(run, batches, wait)
            except cache.Interrupted:
                if step == start + 1:
                    raise
                stopping, pending[:] = True, fetched(run, pending, step - 1)
                save(run, now())
                break
            own, measured = run.watch.profile(step, run.train_step, own, shared, batch, run.numbers)
            wait.given(measured)
            pending.append(measured)
            counted += 1
            if step == start + 1:
                jax.block_until_ready(measured)
                if run.first_step is None:
                    run.first_step = round(time.perf_counter() - STARTED, 2)
                    run.console.print(f"first step {run.first_step:.1f} s after the command")
                run.clock.add("first step", run.clock.tick() - begun)
                begun, counted = run.clock.tick(), 0  # what follows is the steady pace
                wait.seconds = 0.0
            due = {name for name, n in every.items() if step % n == 0 or step == run.total}
            stopping = told_to_stop(run, step)
            if not (due or stopping):
                continue
            pending[:] = fetched(run, pending, step)
            spent = run.clock.tick() - begun
            run.clock.add("train", spent)
            speed = config.batch_size * counted / spent if counted else None
            if "log" in due:
                row = {k: float(np.mean([m[k] for m in pending])) for k in pending[0]}
                pending.clear()
                told = {f"train/{k}": v for k, v in row.items()} | {"lr": float(run.schedule(step - 1))}
                told |= {"images_per_second": round(speed, 1)} if speed else {}
                told |= {"compile_seconds": run.watch.compiles.told()["seconds"]}
                log(run, step, told | parallel.memory())
                run.watch.waited(run.waited + wait.seconds, bool(run.cache))
                bar.update(step, row, speed)
            better = "eval" in due and assess(run, step, now())
            if stopping or "checkpoint" in due or ended_early(run):
                save(run, now())
            elif better:
                with run.clock("checkpoints"):
                    run.keeper.hold(now(), run.plan)
            if stopping:
                break
            begun, counted = run.clock.tick(), 0
    run.waited += wait.seconds
    if run.cache:
        spent = text.duration(run.clock.seconds.get("features", 0.0))
        run.console.print(f"feature cache: {text.size(run.cache.nbytes)} used, {spent} to compute or read them")
    with run.clock("checkpoints"):
        run.keeper.checkpoints.wait()
    return now(), stopping


def told_to_stop(run, step: int) -> bool:
    """Whether a signal has come; several processes agree on the step."""
    if jax.process_count() > 1:
        return run.keeper.checkpoints.preempted(step)
    return bool(run.termination.received)


def placed(run, batches, wait: InputWait) -> dict:
    """The next batch, on the devices, which meanwhile compute the step before."""
    asked, free = time.perf_counter(), run.clock.tick()
    batch = run.layout.place_batch(next(batches))
    # What took no time by the clock are features, the device's own work.
    wait.arrived(asked, busy=time.perf_counter() - asked - (run.clock.tick() - free))
    return batch


def fetched(run, pending: list[dict], step: int) -> list[dict]:
    """The pending metrics as floats. Raises UserError at the first loss that is not finite."""
    pending = [{k: float(v) for k, v in m.items()} for m in jax.device_get(pending)]
    for at, m in enumerate(pending, step - len(pending) + 1):
        if not math.isfinite(m["loss"]):
            run.keeper.checkpoints.wait()
            last = run.keeper.checkpoints.latest()
            raise Diverged(
                f"the loss is {m['loss']} at step {at}; the last good checkpoint is "
                + (f"step {last} in {run.workdir.path}" if last is not None else "none")
                + f"; try a smaller config.optim.lr than {run.config.optim.lr:g}, a longer config.optim.warmup, "
                "or a config.optim.clip"
            )
    return pending


def assess(run, step: int, state: State) -> bool:
    """Evaluates on val. Returns whether it is the best so far."""
    if not len(run.dataset.val):
        return False
    with run.clock("eval"):
        split = run.dataset.val
        logits = run.evaluate(*evaluated(state, run.plan), split, run.cache)
        found = metrics.classification(logits, split.labels, run.dataset.classes, run.dataset.coarse)
    log(run, step, {f"val/{k}": v for k, v in found.items() if isinstance(v, float)})
    run.workdir.flush()
    value = found[run.config.metric.removeprefix("val/")]
    better = run.keeper.assess(run.config.metric, value, step, step / run.per_epoch)
    run.console.evaluation(step, {k: found[k] for k in ("accuracy", "nll")}, better)
    return better


def ended_early(run) -> bool:
    """Whether the evaluations have stopped improving for as long as the config bears."""
    return 0 < run.config.early_stop <= run.keeper.notes["since_best"]


def save(run, state: State) -> None:
    """Begins to save a checkpoint; a store has the rows before it by then."""
    with run.clock("checkpoints"):
        run.lock.check()
        run.workdir.flush()
        run.keeper.save(state, run.plan)


def log(run, step: int, row: dict) -> None:
    """A row of metrics."""
    run.workdir.log({"step": step, "epoch": round(step / run.per_epoch, 4)} | row)
