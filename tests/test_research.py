"""The shipped research sweeps: their groups, what each point of them trains and loads, and that they run."""

import csv
import json
import re
from pathlib import Path

import pytest
import source_task

from tljax import command, experiment, grid, models, sweep
from tljax.errors import UserError
from tljax.patterns import matches

SWEEPS = Path(__file__).parent.parent / "configs" / "sweeps"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    source_task.write(file)
    return str(file)


def given(name: str, weights: str, arguments: str = ""):
    file = f"--config={SWEEPS / name}.py:model=resnet_tiny{arguments}"
    return command.from_command_line([file, f"--config.weights={weights}"], "").config


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("data_size", [15] * 4), ("cross_validation", [30] * 3), ("transferability", [3] * (1 + 4 * 2))],
)
def test_they_have_their_groups_and_say_their_command(name, sizes, weights):
    config = given(name, weights, ",every=3" if name == "transferability" else "")
    found = grid.grouped(grid.members(config), grid.NUMBERS + grid.STREAMS)
    assert [len(part) for part in found] == sizes
    for group in found:
        experiment.build(group[0].config, 3)
    text = (SWEEPS / f"{name}.py").read_text()
    assert f"python -m tljax.sweep --config=configs/sweeps/{name}.py --workdir=" in text


def test_a_seed_draws_other_photographs_of_every_size(weights):
    for member in grid.members(given("data_size", weights)):
        assert member.config.seed == member.config.data.fold_seed


def test_each_photograph_is_in_val_once_a_repeat(weights):
    found = {(m.config.data.val, m.config.data.fold_seed) for m in grid.members(given("cross_validation", weights))}
    assert found == {(f"fold:{i}/5", seed) for i in range(1, 6) for seed in range(2)}


def test_what_is_transferred_and_what_starts_anew(weights):
    """By the paper's definitions, leaf by leaf: (in the first n stages, trains, is loaded)."""
    truth = {  # of the first n stages, of those behind
        "scratch": (None, (True, False)),
        "frozen n, rest anew": ((False, True), (True, False)),
        "tuned n, rest anew": ((True, True), (True, False)),
        "random n, rest anew": ((False, False), (True, False)),
        "frozen n, rest loaded": ((False, True), (True, True)),
    }
    stages, seen = models.create("resnet_tiny", 1).stages, set()
    for member in grid.members(given("transferability", weights, ",every=2,seeds=1")):
        kind, n = member.fields["kind"], member.fields["first n stages"]
        exp = experiment.build(member.config, 3)
        for leaf in exp.plans[0][1].leaves:
            stage = leaf.path.split("/")[0]
            trains, loaded = truth[kind][stages.index(stage) >= n]
            assert bool(leaf.multiplier) == trains, (kind, n, leaf.path)
            is_new = any(matches(pattern, leaf.path) for pattern in member.config.reset)
            assert is_new == (not loaded or stage == "head"), (kind, n, leaf.path)
        seen.add((kind, n))
    assert seen == {("scratch", 0)} | {(kind, n) for kind in list(truth)[1:] for n in (2, len(stages) - 1)}


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("transferability", ",every=0", "argument every=0: expected a number of stages"),
        ("cross_validation", ",folds=0", "axis data.val = (): expected a tuple of values"),
        ("data_size", ",seeds=0", "axis seed, data.fold_seed = (): expected a tuple of values"),
        ("data_size", ",sizes=64", "unknown argument of the config file 'sizes'; nearest: size"),
    ],
)
def test_bad_arguments_are_told_in_one_line(name, arguments, line, weights):
    with pytest.raises(UserError, match=re.escape(line)):
        grid.members(given(name, weights, arguments))


def run(name, photos, weights, folder, *changes, arguments="") -> list[dict]:
    argv = [f"--config={SWEEPS / name}.py:model=resnet_tiny{arguments}", f"--workdir={folder}"]
    fields = {"weights": weights, "data.source": f"folder:{photos}", "batch_size": 8, "image_size": 32}
    argv += [f"--config.{field}={value}" for field, value in fields.items()] + [f"--config.{c}" for c in changes]
    assert sweep.main(argv) == 0
    assert (folder / "report.html").stat().st_size > 10**4
    assert "best.py" in (folder / "report.html").read_text()
    return list(csv.DictReader((folder / "sweep.csv").open()))


@pytest.mark.slow
def test_data_size_runs(photos, weights, tmp_path):
    rows = run("data_size", photos, weights, tmp_path / "w", "sweep.data.limit=(2, 4, 0)", arguments=",seeds=3,steps=4")
    assert len(rows) == 4 * 3 * 3
    assert {(row["data.limit"], row["n_train"]) for row in rows} == {("2", "6"), ("4", "12"), ("0", "24")}
    assert {row["steps"] for row in rows} == {"4"}
    assert (tmp_path / "w" / "learning_curves.png").exists()


@pytest.mark.slow
def test_cross_validation_runs(photos, weights, tmp_path):
    changes = ("train_for=4 steps", "sweep.optim.lr=(0.01,)", "optim.warmup=1 steps")
    rows = run("cross_validation", photos, weights, tmp_path / "w", *changes, arguments=",folds=3")
    assert len(rows) == 3 * 3 * 2
    assert {(row["n_train"], row["n_val"]) for row in rows} == {("22", "11")}
    assert "Nadeau" in (tmp_path / "w" / "report.html").read_text()


@pytest.mark.slow
def test_transferability_runs(photos, weights, tmp_path):
    rows = run("transferability", photos, weights, tmp_path / "w", arguments=",every=3,seeds=1,steps=4")
    assert len(rows) == 9
    assert all(row["status"] == "finished" for row in rows)
    found = json.loads((tmp_path / "w" / "config.json").read_text())
    assert found["sweep"]
    assert (tmp_path / "w" / "over_first_n_stages.pdf").exists()
