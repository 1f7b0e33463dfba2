"""Successive halving: who goes on is who numpy says, and is his solo run; the program is the same throughout."""

import csv
import logging
import math
import re

import conftest
import jax
import numpy as np
import pytest
import test_sweep

from tljax import config, grid, group, halving, search, sweep
from tljax.errors import UserError
from tljax.halving import Halving
from tljax.report.console import Console

base, weights, solo = test_sweep.base, test_sweep.weights, test_sweep.solo  # fixtures


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    """`sweeps(config, size)`, with so many slots, returns ({member: row}, what was said, {member: variables})."""
    variables = {}
    advance = halving.Competition.advance

    def remember(self, part, start, stop):
        advance(self, part, start, stop)
        for k, course in enumerate(part.courses):
            if course.step == course.total:
                found = jax.device_get(self.group.programs.variables(part.own, self.shared, k))
                variables[course.member.number] = found

    monkeypatch.setattr(halving.Competition, "advance", remember)

    def run(made, size=None, name="sweep"):
        if size:
            monkeypatch.setattr(halving, "slots", lambda group, halved, most: size)
        folder, said = sweep.Folder(tmp_path / name), []
        console = Console(enabled=False)
        monkeypatch.setattr(console, "print", said.append)
        assert sweep.Sweep(made, folder, console, "auto", 10**9).run() == 0
        return {row["number"]: row for row in folder.results()}, said, variables

    return run


def means(rows, step, metric="nll"):
    """{rate: the mean over seeds of a figure on val after a step}, of rows of a sweep that evaluates there."""
    found = {}
    for row in rows.values():
        at = next(point for point in row["curve"] if point["step"] == step and f"val/{metric}" in point)
        found.setdefault(row["fields"]["optim.lr"], []).append(at[f"val/{metric}"])
    return {rate: np.mean(values) for rate, values in found.items()}


RATES = (1e-5, 0.003, 0.03, 0.001)


def test_who_goes_on_is_the_better_half_and_is_his_solo_run(base, sweeps, solo, caplog):
    """Four rates from two seeds in parts of three: 8, 4 and 2 members are 3, 2 and 1 parts, the last ones padded."""
    made = base({"optim.lr": RATES, "seed": (0, 7)}, strategy="frozen()", train_for="8 steps", eval_every="2 steps")
    whole, *_ = sweeps(made, name="whole")
    made.halving = "halving(rungs=2)"
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        found, said, variables = sweeps(made, size=3, name="halved")
    assert test_sweep.compiled(caplog) == 1
    first, second = means(whole, 2), means(whole, 4)
    going = sorted(RATES, key=first.get)[:2]
    last = min(going, key=second.get)
    ends = {rate: 8 if rate == last else 4 if rate in going else 2 for rate in RATES}
    for number, row in found.items():
        rate = row["fields"]["optim.lr"]
        assert row["steps"] == ends[rate]
        assert row["status"] == ("finished" if rate == last else f"eliminated at step {ends[rate]}")
        expected = [point for point in whole[number]["curve"] if point["step"] <= ends[rate]]
        for a, b in zip(row["curve"], expected, strict=True):
            np.testing.assert_allclose(list(a.values()), [b[name] for name in a], **test_sweep.LOSSES)
        at = next(p for p in whole[number]["curve"] if p["step"] == ends[rate] and "val/nll" in p)
        np.testing.assert_allclose(row["val"]["nll"], at["val/nll"], **test_sweep.LOSSES)
        assert row["test"]
    steps = sum(row["steps"] for row in found.values())
    line = f"rungs after 2, 4 steps: 4 → 2 → 1 settings, about {steps} steps of members instead of 64"
    assert sum(line in told for told in said) == 1
    survivor = next(member for member in grid.members(made) if member.config.optim.lr == last)
    row = found[survivor.number]
    test_sweep.assert_same((row, row["curve"], variables[survivor.number]), solo(survivor.config))
    # The best is one that has ended, however good the others were.
    assert f"optim.lr = {last!r}" in said[-1]


def test_who_is_better_at_once_and_eliminated_is_not_the_best(tmp_path):
    from tljax.report import sweep_table
    from tljax.workdir import Workdir

    row = lambda number, rate, status, nll: {
        "number": number, "fields": {"optim.lr": rate, "seed": number % 2}, "status": status, "val": {"nll": nll},
        "test": None,
    }  # fmt: skip
    rows = [row(0, 0.1, "finished", 1.0), row(1, 0.1, "finished", 1.2), row(2, 0.2, "eliminated at step 3", 0.1)]
    rows.append(row(3, 0.2, "finished", 0.2))
    line = sweep_table.best(Workdir(tmp_path), rows, "val/nll", lambda row: test_sweep.get_config())
    assert "1.1, mean of 2: optim.lr = 0.1" in line


@pytest.mark.slow
def test_on_a_shared_stream_the_best_state_goes_on_and_who_diverges_is_last(base, sweeps, solo):
    """No features are kept: the stream of images goes on at the rung."""
    fields = {"cache_views": 0, "strategy": "partial(last=1)", "train_for": "6 steps", "eval_every": "2 steps"}
    made = base({"optim.lr": (1e30, 0.01, 1e-6)}, **fields, select="best", metric="val/accuracy", ema=0.5)
    made.halving = "halving(rungs=1, keep=0.4)"  # at 2 steps, two of three
    found, _, variables = sweeps(made, size=2)
    assert re.match(r"diverged at step [12]$", found[0]["status"])
    assert [row["status"] for row in found.values()][1:] == ["finished"] * 2
    assert found[0]["val"] is None
    alone = solo(grid.members(made)[1].config)
    test_sweep.assert_same((found[1], found[1]["curve"], variables[1]), alone)


def test_a_random_search_is_halved_and_a_repeated_command_finds_it_done(base, sweeps):
    made = base({"optim.lr": "loguniform(1e-6, 1e-1)", "seed": (0, 7)}, strategy="frozen()", train_for="4 steps")
    made.search, made.halving = "random(3, seed=1)", "halving(rungs=1)"
    found, said, _ = sweeps(made)
    assert said[0].startswith("random(3, seed=1), 6 members: optim.lr from loguniform(1e-6, 1e-1), 2 × seed")
    assert sorted(row["steps"] for row in found.values()) == [2, 2, 4, 4, 4, 4]
    again, said, _ = sweeps(made)
    assert again == found
    assert "6 are done" in said[0]


@pytest.mark.slow
def test_generations_of_a_study_share_a_compiled_step_and_features(base, sweeps, caplog, monkeypatch):
    pytest.importorskip("optuna")
    caches = []
    make = group.cache.FeatureCache
    monkeypatch.setattr(group.cache, "FeatureCache", lambda *given: caches.append(1) or make(*given))
    made = base({"optim.lr": "loguniform(1e-5, 1)", "seed": (0, 7)}, strategy="frozen()", train_for="4 steps")
    made.search, made.halving = "optuna(5, generation=2)", "halving(rungs=1)"
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        found, said, _ = sweeps(made)
    assert test_sweep.compiled(caplog) == len(caches) == 1
    assert sorted(found) == list(range(10))
    from tljax.study import Study

    trials = Study(search.of(made), made, sweep.Folder(said[-1].rpartition(" ")[2])).study.get_trials()
    assert [trial.state.name for trial in trials] == [
        "COMPLETE" if found[2 * i]["status"] == "finished" else "PRUNED" for i in range(5)
    ]
    for i, trial in enumerate(trials):
        told = trial.value if trial.state.name == "COMPLETE" else trial.intermediate_values[2]
        assert told == pytest.approx(np.mean([found[2 * i + k]["val"]["nll"] for k in (0, 1)]))
        assert trial.params["optim.lr"] == found[2 * i]["fields"]["optim.lr"]


@pytest.mark.slow
def test_a_killed_search_leaves_the_table_of_one_that_was_not(base, tmp_path):
    """A real process, killed in its second generation; the same command then goes on."""
    pytest.importorskip("optuna")
    made = base({"optim.lr": "loguniform(1e-5, 1)", "seed": (0, 7)}, strategy="frozen()", train_for="4 steps")
    made.search, made.halving = "optuna(6, generation=2)", "halving(rungs=1)"
    file = tmp_path / "config.py"
    text = config.to_json(made)
    file.write_text(f"from tljax.config import from_json\ndef get_config():\n    return from_json('''{text}''')\n")
    tables = {}
    for name in ("cut", "whole"):
        folder = tmp_path / name
        argv = [f"--config={file}", f"--workdir={folder}"]
        process = conftest.command("tljax.sweep", *argv)
        if name == "cut":
            for line in process.stdout:
                if "rung after" in line and (folder / "sweep.csv").exists():
                    break
            process.kill()
            process.communicate()
            assert len(sweep.Folder(folder).results()) in (4, 8)
            process = conftest.command("tljax.sweep", *argv)
        _, err = process.communicate()
        assert process.returncode == 0, err
        with (folder / "sweep.csv").open() as table:
            tables[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(table)]
    assert len(tables["whole"]) == 12
    assert tables["cut"] == tables["whole"]


# ---- the laws


def test_survivors_are_those_that_numpy_sorts_first():
    rng = np.random.default_rng(0)
    for sign in (1, -1):
        figures = rng.normal(size=(9, 3))
        figures[4, 1], figures[7] = math.nan, math.inf
        given = {str(i): list(row) for i, row in enumerate(figures)}
        means = np.where(np.isfinite(figures).all(1), figures.mean(1), -sign * np.inf)
        for count in (1, 4, 7):
            order = np.argsort(-sign * means)
            assert halving.survivors(given, count, sign) == {str(i) for i in order[:count]}
        assert halving.survivors(given, 9, sign) == {str(i) for i in range(9) if i not in (4, 7)}


def test_rungs_grow_as_settings_fall():
    """Each stretch between rungs costs the same but the first two: 16 · 10, 8 · 10, 4 · 20, 2 · 40."""
    halved = Halving(3, 0.5)
    assert halved.steps(80) == (10, 20, 40)
    assert halved.alive(16) == (16, 8, 4, 2)
    assert Halving(2, 1 / 3).steps(90) == (10, 30)
    assert Halving(2, 1 / 3).alive(9) == (9, 3, 1)
    assert Halving(1, 0.5).alive(1) == (1, 1)
    assert [Halving(1, 0.5).kept(n) for n in range(1, 6)] == [1, 1, 2, 2, 3]
    with pytest.raises(UserError, match=r"3 rungs of 3 steps are after \(0, 1, 2\): take fewer rungs"):
        halved.steps(3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("halving(rungs=0)", "halving(rungs=0): expected a whole number, at least 1"),
        ("halving(keep=1.0)", "halving(keep=1.0): expected a share above 0 and below 1"),
        ("halving(3, keep=0.5, metric='x')", "unexpected keyword argument 'metric'"),
        ("asha()", "unknown halving 'asha'; there are: halving"),
        ("halving(rungs=5)", "5 rungs of 10 steps are after (0, 1, 1, 2, 5): take fewer rungs"),
    ],
)
def test_bad_halving_is_told_in_one_line(base, tmp_path, text, line):
    made = base({"optim.lr": (0.1, 0.2)}, strategy="frozen()")
    made.halving = text
    with pytest.raises(UserError, match=re.escape(line)):
        sweep.Sweep(made, sweep.Folder(tmp_path / "sweep"), Console(enabled=False), "auto", 10**9).run()
    assert not (tmp_path / "sweep").exists()


def test_halving_without_val_is_told(base, sweeps):
    made = base({"optim.lr": (0.1, 0.2)}, strategy="frozen()", **{"data.val": "none"})
    made.halving = "halving(1)"
    with pytest.raises(UserError, match=r"config.halving needs a val split, config.data.val = 'none'"):
        sweeps(made)
