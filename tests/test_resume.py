"""Exact resume: real processes, killed at random moments and started again with the same command."""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import command, rows, script
from test_delta import weights_file

from tljax import evaluate, plan, train
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.workdir import Workdir

STEPS = 150
KILLS = 2
MORE = (
    f"--config.train_for={STEPS} steps", "--config.checkpoint_every=7 steps", "--config.eval_every=50 steps",
    "--config.log_every=10 steps", "--config.augment.randaugment=(2,5)", "--config.augment.color_jitter=0.2",
    "--config.augment.mixup=0.2", "--config.ema=0.9", "--config.drop_rate=0.3", "--config.optim.name=adamw",
    "--config.early_stop=100",
)  # fmt: skip


def end(path):
    """What a run ended with: every leaf of the last state as bytes, the rows, the final figures."""
    exp, layout, *_ = evaluate.restore(Workdir(path), "last")
    checkpoints = Checkpoints(path / "checkpoints")
    _, state = exp.restore(checkpoints, checkpoints.latest(), layout, 24)
    leaves = {p: np.asarray(x).tobytes() for p, x in zip(plan.paths(state), jax.tree.leaves(state))}
    summary = json.loads((path / "summary.json").read_text())
    return leaves, rows(path), {k: summary[k] for k in ("best", "val", "test", "frozen", "steps")}, checkpoints.steps()


def newest(path) -> int:
    """The step of the newest complete checkpoint of a run, -1 where there is none."""
    return max((int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()), default=-1)


def test_a_run_killed_again_and_again_ends_as_one_never_stopped(tiny, tmp_path):
    argv = [*tiny, *MORE]
    whole = command("tljax.train", *argv, f"--workdir={tmp_path / 'whole'}")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err

    killed, rng, resumed = tmp_path / "killed", random.Random(), []
    for i in range(100):
        process = command("tljax.train", *argv, f"--workdir={killed}")
        if i < KILLS:
            # Half of the kills at any moment of a process's life, half in the middle of training and saving: those
            # come after a checkpoint of the process's own, so that the next process has one to resume from.
            begun, before = time.time(), newest(killed)
            while i % 2 and newest(killed) <= before and process.poll() is None and time.time() < begun + 120:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.6) if i % 2 else rng.uniform(0, 6))
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        resumed += [line for line in out.splitlines() if line.startswith("resumed from step")]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
    assert i >= KILLS, "the run ended before it was killed often enough"
    assert len(resumed) >= KILLS // 2

    (leaves, metrics, figures, steps), expected = end(killed), end(tmp_path / "whole")
    assert metrics == expected[1]
    assert figures == expected[2]
    assert steps == expected[3]
    assert leaves == expected[0]


# The training script, in a process that kills itself: before a checkpoint is begun, with it half written, with it
# whole, or between the last step of a phase and the first of the next.
KILLED = """
import os, signal, sys
from tljax import phases, train
from tljax.checkpoint import Checkpoints
moment, step, *argv = sys.argv[1:]
save, change = Checkpoints.save, phases.change

def killing_save(self, at, *args):
    reached = at == int(step) and moment != "between"
    if reached and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, at, *args)
    if reached:
        if moment == "after":
            self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

def killing_change(state, *args):
    if moment == "between" and int(state.step) == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return change(state, *args)

Checkpoints.save, phases.change = killing_save, killing_change
sys.exit(train.main(argv))
"""
BOUNDARIES = (3, 6)
IN_PHASES = (
    "--config.phases=phases(('3 steps', frozen()), ('3 steps', partial(last=1)), ('rest', surgical('block1')))",
    "--config.train_for=9 steps", "--config.checkpoint_every=1 steps", "--config.eval_every=4 steps",
    "--config.log_every=2 steps", "--config.augment.mixup=0.2", "--config.ema=0.9", "--config.drop_rate=0.3",
    "--config.optim.restart=true", "--config.optim.warmup=40 %",
)  # fmt: skip
MOMENTS = (
    ("after", -1), ("before", 0), ("during", 0), ("after", 0), ("between", 0), ("before", 1), ("during", 1),
    ("after", 1),
)  # fmt: skip
AROUND = [(moment, boundary + apart) for boundary in BOUNDARIES for moment, apart in MOMENTS]


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        ([("during", 3), ("between", 6)], ["--config.checkpoint.delta=true"]),
        pytest.param(AROUND, [], marks=pytest.mark.slow),
        pytest.param(AROUND, ["--config.checkpoint.delta=true"], marks=pytest.mark.slow),
    ],
    ids=["some", "all", "all, with deltas"],
)
def test_a_run_killed_around_the_boundaries_of_its_phases_ends_as_one_never_stopped(tiny, tmp_path, kills, more):
    """Each kill strikes the process that goes on from the one before; with deltas too it ends as the whole run."""
    argv = [*tiny, *IN_PHASES, f"--config.weights={weights_file(tmp_path / 'tiny.safetensors')}"]
    whole = command("tljax.train", *argv, f"--workdir={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    argv += [*more, f"--workdir={killed}"]
    for moment, step in kills:
        process = script(KILLED, moment, str(step), *argv)
        _, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, err
        left = {int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit()}
        assert max(left, default=0) in {"before": {step - 1}, "during": {step - 1, step}}.get(moment, {step})
    process = command("tljax.train", *argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resumed from step" in out
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert end(killed) == end(tmp_path / "whole")


# The training script, in a process that kills itself a little after a moment has come for the n-th time, and on the
# first way over each boundary of phases.
STRUCK = """
import os, pathlib, random, signal, sys, threading
from tljax import cache, evaluate, loop, phases, train
from tljax.checkpoint import Checkpoints
moment, count, delay, boundaries, *argv = sys.argv[1:]
MOMENTS = {
    "compile": (train.Run, "compile"), "training": (loop, "placed"), "saving": (Checkpoints, "save"),
    "evaluation": (evaluate.Evaluator, "__call__"), "cache": (cache.FeatureCache, "_computed"),
}
left = int(count)

def strike(after):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()

def striking(called):
    def call(*args, **more):
        global left
        left -= 1
        if not left:
            strike(float(delay))
        return called(*args, **more)
    return call

def striking_change(state, *args):
    marker = pathlib.Path(boundaries, str(int(state.step)))
    if not marker.exists():
        marker.touch()
        strike(random.uniform(0, 0.3))
    return change(state, *args)

if moment in MOMENTS:
    setattr(*MOMENTS[moment], striking(getattr(*MOMENTS[moment])))
elif moment == "any":
    strike(float(delay))
change, phases.change = phases.change, striking_change
sys.exit(train.main(argv))
"""
AT_RANDOM = ("any", "compile", "training", "saving", "saving", "evaluation", "cache")
LONG = 3000
IN_ALL = (
    f"--config.phases=phases(('{LONG // 3} steps', frozen()), ('{LONG // 3} steps', partial(last=1)), "
    "('rest', surgical('block1')))",
    f"--config.train_for={LONG} steps", "--config.checkpoint_every=9 steps", "--config.eval_every=20 steps",
    "--config.log_every=10 steps", "--config.augment.mixup=0.2", "--config.augment.mix_at=features",
    "--config.ema=0.9", "--config.drop_rate=0.3", "--config.cache=disk", "--config.cache_views=2",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_fifty_times_at_random_moments_ends_as_one_never_stopped(tiny, tmp_path):
    """Each time it goes on from the newest complete checkpoint, and what it leaves behind does not grow."""
    rng = random.Random()
    started = lambda name: [*tiny, *IN_ALL, f"--config.cache_folder={tmp_path / name}-features",
                            f"--workdir={tmp_path / name}"]  # fmt: skip
    whole = command("tljax.train", *started("whole"))
    out, err = whole.communicate(timeout=3000)
    assert whole.returncode == 0, err

    killed, boundaries, features = tmp_path / "killed", tmp_path / "boundaries", tmp_path / "killed-features"
    boundaries.mkdir()
    kills, remains = dict.fromkeys(AT_RANDOM, 0), 0
    for i in range(1000):
        moment = "none" if sum(kills.values()) >= 50 else AT_RANDOM[i % len(AT_RANDOM)]
        before = newest(killed)
        if moment == "cache":
            shutil.rmtree(features, ignore_errors=True)
        times = rng.randint(1, {"training": 60, "saving": 4, "evaluation": 3, "cache": 3}.get(moment, 1))
        delay = rng.uniform(0, {"any": 15, "compile": 1}.get(moment, 0.1))
        how = (moment, str(times), str(delay), str(boundaries))
        process = script(STRUCK, *how, *started("killed"), PYTHONUNBUFFERED="1")
        out, err = process.communicate(timeout=3000)
        resumed = [line for line in out.splitlines() if line.startswith("resumed from step")]
        assert not resumed or f"resumed from step {before};" in resumed[0]
        assert "damaged" not in out
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills[moment] = kills.get(moment, 0) + 1
        left = [p for p in killed.rglob("*") if p.suffix == ".tmp" or "orbax-checkpoint-tmp" in p.name]
        left = [p for p in left if "orbax-checkpoint-tmp" not in p.parent.name]
        partial = list(features.rglob("*.tmp"))
        remains = max(remains, len(left) + len(partial))
        assert len(list((killed / "checkpoints").glob("[0-9]*"))) <= 6
    assert sum(kills.values()) >= 50, kills
    assert len(list(boundaries.iterdir())) == 2
    assert remains <= 3, "what kills leave has to be cleared away by the next start"
    assert not list(features.rglob("*.tmp"))
    assert all(p.name.isdigit() for p in (killed / "checkpoints").iterdir())
    assert end(killed) == end(tmp_path / "whole")


@pytest.fixture
def interrupted(tiny, trained, tmp_path):
    """A copy of a run whose end has not been written: the next start resumes from its last checkpoint."""
    path = tmp_path / "copy"
    shutil.copytree(trained, path)
    (path / "summary.json").unlink()
    return path


def test_a_run_that_is_complete_but_for_its_end_writes_it(tiny, trained, interrupted):
    assert train.main([*tiny, f"--workdir={interrupted}"]) == 0
    old, new = (json.loads((p / "summary.json").read_text()) for p in (trained, interrupted))
    assert new["test"] == old["test"]
    assert new["first_step_seconds"] is None


def test_changed_data_are_noticed_on_resume(tiny, photos, interrupted, tmp_path):
    changed = tmp_path / "photos"
    shutil.copytree(photos, changed)
    next((changed / "train" / "red").iterdir()).unlink()
    argv = [a.replace(str(photos), str(changed)) for a in tiny]
    config = interrupted / "config.json"
    config.write_text(config.read_text().replace(str(photos), str(changed)))
    with pytest.raises(UserError, match="the data are not those that"):
        train.main([*argv, f"--workdir={interrupted}"])


def test_a_frozen_value_that_changed_is_named(tiny, interrupted, monkeypatch):
    """The digest is of the loaded weights, so a checkpoint with another frozen value does not pass for this run's."""
    original = Checkpoints.restore

    def tampered(self, step, like):
        state = original(self, step, like)
        stem = state.params["stem"] = jax.tree.map(lambda x: x + 1e-7 * (x.ndim == 4), state.params["stem"])
        assert stem
        return state

    monkeypatch.setattr(Checkpoints, "restore", tampered)
    with pytest.raises(UserError, match=r"frozen values have changed by step 24: params/stem/.*kernel"):
        train.main([*tiny, f"--workdir={interrupted}"])
