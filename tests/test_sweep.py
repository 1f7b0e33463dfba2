"""Vectorised sweeps: a member is its own solo run, alone in its failures, and each group is compiled once."""

import csv
import functools
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import source_task
from tiny import get_config

from tljax import (
    cache,
    command,
    config,
    ending,
    experiment,
    grid,
    group,
    loop,
    members,
    memory,
    parallel,
    plan,
    strategies,
    sweep,
    train,
)  # fmt: skip
from tljax.errors import UserError
from tljax.report.console import Console
from tljax.step import evaluated
from tljax.workdir import Workdir

# The same operations, batched over members; Adam divides by small numbers, and so makes more of a rounding.
LOSSES = {"rtol": 1e-4, "atol": 1e-5}
PARAMETERS = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights, so that seeds differ in the head alone."""
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    source_task.write(file)
    return str(file)


@pytest.fixture
def base(photos, weights):
    """`base(axes, field=value)`: the tiny experiment on loaded weights and two kept views, as a sweep."""

    def make(axes, **fields):
        made = get_config()
        made.data.source, made.weights, made.cache_views = f"folder:{photos}", weights, 2
        made.train_for, made.log_every, made.checkpoint_every = "10 steps", "2 steps", "1000 steps"
        made.eval_every = "4 steps"
        made.update_from_flattened_dict(fields)
        made.sweep = grid.axes(axes)
        return made

    return make


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    """`sweeps(config)` runs a sweep; returns {member: (row, curve, (params, stats))}."""
    found, trained = {}, group.Group.train

    def remember(self, courses, size, **more):
        rows, own, shared = trained(self, courses, size, **more)
        for k, course in enumerate(courses):
            found[course.member.number] = jax.device_get(self.programs.variables(own, shared, k))
        return rows, own, shared

    monkeypatch.setattr(group.Group, "train", remember)
    monkeypatch.setattr(sweep.sweep_page.Page, "write", lambda *_, **__: None)  # pictures take a second a sweep

    def run(made, limit=10**9, how="auto", name="sweep"):
        folder = sweep.Folder(tmp_path / name)
        assert sweep.Sweep(made, folder, Console(enabled=False), how, limit).run() == 0
        return {row["number"]: (row, row["curve"], found.get(row["number"])) for row in folder.results()}

    return run


@pytest.fixture
def solo(tmp_path, monkeypatch):
    """`solo(config)` is the ordinary run on one device; returns (its summary, its rows, (params, stats))."""
    states, conclude = [], ending.conclude
    monkeypatch.setattr(parallel, "Layout", functools.partial(parallel.Layout, devices=1))
    for name in ("curves", "confusion", "mistakes"):
        monkeypatch.setattr(ending.pictures, name, lambda *_, **__: None)
    monkeypatch.setattr(ending, "page", lambda workdir: None)
    monkeypatch.setattr(train, "lint", lambda *_: ())
    save = loop.save
    monkeypatch.setattr(loop, "save", lambda run, state: run.config.select == "best" and save(run, state))

    def remember(run, state):
        states.append(jax.device_get(evaluated(state, run.plan)))
        conclude(run, state)

    monkeypatch.setattr(ending, "conclude", remember)

    def run(made):
        workdir = Workdir(tmp_path / f"solo{len(states)}")
        assert train.Run(made, workdir, Console(enabled=False)).train() == 0
        return workdir.summary(), workdir.rows(), states[-1]

    return run


def assert_same(member, alone, parameters=True) -> None:
    """A member's losses, evaluations, final figures and parameters are those of its solo run."""
    (row, curve, mine), (summary, rows, theirs) = member, alone
    assert row["steps"] == summary["steps"]
    for split in ("val", "test"):
        for name, value in row[split].items():
            np.testing.assert_allclose(value, summary[split][name], **LOSSES, err_msg=f"{split}/{name}")
    assert row["best"]["step"] == summary["best"]["step"]
    assert [point["step"] for point in curve] == [point["step"] for point in rows]
    for a, b in zip(curve, rows):
        assert len(a) > 3
        np.testing.assert_allclose(list(a.values()), [b[name] for name in a], **LOSSES)
    for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True) if parameters else ():
        np.testing.assert_allclose(a, b, **PARAMETERS)


def check(found, made, solo, numbers, **more) -> None:
    for member in grid.members(made):
        if member.number in numbers:
            assert_same(found[member.number], solo(member.config), **more)


def test_heads_are_their_solo_runs(base, sweeps, solo):
    axes = {"optim.lr": (0.003, 0.03), "optim.weight_decay": (0.0, 0.3), "label_smoothing": (0.0, 0.2), "seed": (0, 7)}
    made = base(axes, strategy="frozen()", drop_rate=0.3)
    found = sweeps(made)
    assert len(found) == 16
    check(found, made, solo, (6,))


def test_stages_with_moving_statistics_and_averages_and_schedules_of_their_own(base, sweeps, solo):
    axes = {"optim.schedule": ("linear", "cosine"), "train_for": ("6 steps", "5 steps")}
    made = base(axes, strategy="partial(last=1, body=0.3)", ema=0.5)
    found = sweeps(made)
    assert [row["steps"] for row, *_ in found.values()] == [6, 5] * 2
    check(found, made, solo, (1, 2))


def test_the_best_of_each_is_chosen_and_who_gets_no_better_ends(base, sweeps, solo):
    fields = {"strategy": "frozen()", "select": "best", "early_stop": 2}
    made = base({"optim.lr": (0.0, 0.03)}, eval_every="2 steps", log_every="1 steps", **fields)
    found = sweeps(made)
    assert [row["status"] for row, *_ in found.values()] == ["stopped early", "finished"]
    check(found, made, solo, (0, 1), parameters=False)


def test_adapters_are_their_solo_runs(base, sweeps, solo):
    fields = {"strategy": "lora(rank=2, targets='block3/conv2')", "train_for": "4 steps"}
    made = base({"optim.lr": (0.01, 0.03), "seed": (0, 3)}, **fields)
    check(sweeps(made), made, solo, (3,))


def test_members_on_narrow_frozen_leaves_are_those_on_wide_ones(base, sweeps):
    """Losses and what trains to the last bit."""
    fields = {"dtype": "bfloat16", "strategy": "partial(last=1)", "train_for": "4 steps"}
    wide, narrow = (
        sweeps(base({"optim.lr": (0.01, 0.03)}, **fields, **{"parallel.frozen_dtype": dtype}), name=dtype or "wide")
        for dtype in ("", "bfloat16")
    )
    for number, (row, curve, variables) in wide.items():
        same, others, narrowed = narrow[number]
        assert curve == others
        assert row["test"] == same["test"]
        for path, value in plan.flat(variables[0]).items():
            other = plan.flat(narrowed[0])[path]
            assert str(other.dtype) == ("float32" if value.dtype == other.dtype else "bfloat16")
            np.testing.assert_array_equal(value.astype(other.dtype), other)
        assert {str(leaf.dtype) for leaf in plan.flat(narrowed[0]).values()} == {"float32", "bfloat16"}


def test_layer_decay_and_dropout_are_numbers(base, sweeps, solo, caplog):
    """Plans that differ in their multipliers alone are of one kind: one group, one compiled step."""
    decays = ("layerwise_decay(rate=0.5)", "layerwise_decay(rate=0.9)")
    made = base({"strategy": (*decays, "frozen()"), "drop_rate": (0.0, 0.4)}, train_for="4 steps")
    groups = sweep.Sweep(made, None, Console(enabled=False), "auto", 0).groups(list(grid.members(made)))
    assert [[member.number for member in found.members] for found in groups] == [[0, 1, 3, 4], [2, 5]]
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        found = sweeps(made)
    assert compiled(caplog) == 2
    check(found, made, solo, (1, 3, 5))
    assert found[1][0]["test"]["nll"] != found[4][0]["test"]["nll"]


def test_folds_and_sizes_of_the_training_set_are_their_solo_runs(base, sweeps, solo):
    axes = {"data.val": ("fold:1/3", "fold:3/3"), "data.limit": (3, 6), "seed": (0, 1)}
    made = base(axes, strategy="frozen()", train_for="3 epochs", eval_every="1 epochs")
    found = sweeps(made)
    assert len({row["steps"] for row, *_ in found.values()}) == 2
    check(found, made, solo, (7,))


@pytest.mark.parametrize(
    ("model", "strategy", "kept", "how"),
    [
        ("efficientnet_lite0", "frozen()", True, "vmap"),
        ("efficientnet_lite0", "partial(last=2)", True, "map"),  # depthwise and pointwise kernels
        ("efficientnet_lite0", "biases_only()", False, "vmap"),  # the stem is a dense convolution, and runs
        ("vit_small_patch16", "partial(last=2)", True, "map"),
        ("resnet18", "frozen()", True, "vmap"),
        ("resnet18", "partial(last=1)", True, "sequence"),
        ("resnet18", "partial(last=1)", False, "vmap"),  # the frozen forward runs once for all
        ("resnet18", "full()", False, "sequence"),
    ],
)
def test_what_trains_says_how_members_do_on_a_cpu(model, strategy, kept, how):
    made = config.base(model)
    made.weights = ""
    exp = experiment.build(made, ("a", "b"), parallel.Layout.for_evaluation(16))
    assert members.choose("auto", exp.plan_of(strategies.parse(strategy)), kept) == how


def test_a_step_is_traced_once_for_the_memory_of_all_its_groups(base, monkeypatch):
    """Without kept features each seed sees a stream, and so is a group, of its own."""
    found, peak = [], memory.peak
    monkeypatch.setattr(memory, "peak", lambda *arguments: found.append(peak(*arguments)) or found[-1])
    made = base({"seed": (0, 1, 2), "optim.lr": (0.003, 0.03)}, strategy="full()", cache_views=0)
    planned = sweep.Sweep(made, None, Console(enabled=False), "auto", 10**9)
    groups = planned.groups(list(grid.members(made)))
    assert len(groups) == 3
    assert len({planned.need(group, 1) for group in groups}) == len(found) == 1
    assert planned.need(groups[0], 2) > planned.need(groups[1], 1)
    assert len(found) == 2


def test_dense_kernels_train_in_sequence_on_a_cpu(base, sweeps, solo, caplog):
    """One compiled step of one member, whatever the seed: each sees its own stream."""
    made = base({"seed": (0, 3), "optim.lr": (0.003, 0.03)}, strategy="partial(last=2)", train_for="4 steps")
    (group,) = sweep.Sweep(made, None, Console(enabled=False), "auto", 10**9).groups(list(grid.members(made)))
    assert group.how == "sequence"
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        found = sweeps(made)
    assert compiled(caplog) == 1
    check(found, made, solo, (3,))


@pytest.mark.parametrize("how", ["vmap", "map"])
def test_without_a_cache_members_share_one_stream(base, sweeps, solo, how):
    fields = {"cache_views": 0, "strategy": "frozen()" if how == "vmap" else "partial(last=1)"}
    fields["augment.mixup"] = 0.3 if how == "vmap" else 0.0
    made = base({"optim.lr": (0.003, 0.03)}, train_for="4 steps", **fields)
    check(sweeps(made, how=how), made, solo, (1,))


def test_who_diverges_is_alone(base, sweeps, solo):
    fields = {"strategy": "frozen()", "seed": 2}
    rates = lambda middle: base({"optim.lr": (0.003, middle, 0.03)}, **fields)
    good, bad = sweeps(rates(0.01), name="good"), sweeps(rates(1e30), name="bad")
    with pytest.raises(UserError, match=r"the loss is \S+ at step (\d+)") as error:
        solo(grid.members(rates(1e30))[1].config)
    step = int(re.search(r"at step (\d+)", str(error.value))[1])
    assert bad[1][0]["status"] == f"diverged at step {step}"
    assert bad[1][0]["steps"] == step - 1
    assert bad[1][0]["test"] is None
    for i in (0, 2):
        for a, b in zip(*map(jax.tree.leaves, (good[i][2], bad[i][2])), strict=True):
            assert a.tobytes() == b.tobytes()
        assert good[i][1] == bad[i][1]


def compiled(caplog) -> int:
    """How often a training step of members was compiled."""
    return sum("Finished XLA compilation of jit(_step)" in record.getMessage() for record in caplog.records)


def test_a_group_is_compiled_once_whatever_its_parts(base, sweeps, caplog):
    """Two strategies, two groups; five members in parts of two."""
    axes = {
        "strategy": ("frozen()", "rules(('head/bias', 1), ('**', 0))"),
        "optim.lr": (0.001, 0.002, 0.003, 0.004, 0.005),
    }
    made = base(axes, train_for="4 steps")
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        whole = sweeps(made, name="whole")
        assert compiled(caplog) == 2
        planned = sweep.Sweep(made, None, Console(enabled=False), "auto", 0).groups(list(grid.members(made)))
        assert [len(found.members) for found in planned] == [5, 5]
        caplog.clear()
        limit = planned[0].need(2)
        assert sweep.Sweep(made, None, Console(enabled=False), "auto", limit).part(planned[0], 5) == 2
        parts = sweeps(made, limit=limit, name="parts")
        assert compiled(caplog) == 2
    assert sorted(whole) == sorted(parts) == list(range(10))
    for number in whole:
        for a, b in zip(*map(jax.tree.leaves, (whole[number][2], parts[number][2])), strict=True):
            np.testing.assert_allclose(a, b, **PARAMETERS)


def test_a_killed_sweep_goes_on_at_the_first_group_that_has_not_ended(base, sweeps, tmp_path, monkeypatch):
    axes = {"norm_stats": ("plan", "frozen"), "optim.lr": (0.003, 0.03), "seed": (0, 1)}
    made = base(axes, strategy="frozen()", train_for="4 steps")
    whole = sweeps(made, name="whole")
    keep, counts = sweep.Folder.keep, []

    def killed(self, unit, rows):
        if len(self.finished()) == 1 and not counts:
            counts.append(unit)
            raise KeyboardInterrupt
        return keep(self, unit, rows)

    monkeypatch.setattr(sweep.Folder, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        sweeps(made, name="cut")
    file = tmp_path / "cut" / "sweep.csv"
    assert len(list(csv.DictReader(file.open()))) == 4
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("units/*/result.json")}
    cut = sweeps(made, name="cut")
    assert len(kept) == 1
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert {n: row[1] for n, row in cut.items()} == {n: row[1] for n, row in whole.items()}
    rows = list(csv.DictReader(file.open()))
    assert [int(row["member"]) for row in rows] == list(range(8))
    table = pq.read_table(tmp_path / "cut" / "sweep.parquet").to_pylist()
    for row, other, (told, *_) in zip(rows, table, cut.values()):
        assert float(row["test/nll"]) == other["test/nll"] == told["test"]["nll"]
        assert (float(row["optim.lr"]), row["norm_stats"]) == (other["optim.lr"], other["norm_stats"])
    curves = [json.loads(line) for line in (tmp_path / "cut" / "curves.jsonl").open()]
    assert {point["member"] for point in curves} == set(range(8))
    # The best is the best on val, over the mean of seeds, and a config that trains.
    means = {}
    for row in rows:
        means.setdefault((row["optim.lr"], row["norm_stats"]), []).append(float(row["val/nll"]))
    lr, stats = min(means, key=lambda key: sum(means[key]))
    best = command.from_command_line([f"--config={tmp_path / 'cut' / 'best.py'}"], "").config
    config.check(best)
    assert (best.optim.lr, best.norm_stats, best.seed) == (float(lr), stats, 0)


def test_who_shares_what():
    """Seeds share a group where nothing frozen is drawn from them, and see photographs of their own on features."""
    made = get_config()
    made.sweep = grid.axes({"seed": range(3), "optim.lr": (0.1, 0.2), "drop_path_rate": (0.0, 0.1)})
    found = grid.members(made)
    assert len({json.dumps(config.to_json(member.config)) for member in found}) == 12
    sizes = lambda free: [len(part) for part in grid.grouped(found, free)]
    assert sizes(grid.NUMBERS) == [2] * 6
    assert sizes(grid.NUMBERS + grid.STREAMS) == [6, 6]


@pytest.mark.parametrize(("name", "sizes"), [("lr_by_depth", [24] * 4), ("seeds", [10])])
def test_shipped_sweeps_have_their_groups_and_say_their_command(name, sizes):
    file = Path(__file__).parent.parent / "configs" / "sweeps" / f"{name}.py"
    found = grid.members(command.from_command_line([f"--config={file}"], "").config)
    assert [len(part) for part in grid.grouped(found, grid.NUMBERS + grid.STREAMS)] == sizes
    for member in found[:: len(found) // len(sizes)]:
        assert not cache.obstacle(member.config)
        experiment.build(member.config, 14)
    assert f"python -m tljax.sweep --config=configs/sweeps/{name}.py" in file.read_text()


def test_memory_of_a_program_is_what_lives_at_once():
    """By hand: x (4 kB) and a sum that is kept; of the chain only two arrays live at a time."""
    x = jax.ShapeDtypeStruct((1000,), np.float32)

    def chain(x):
        for _ in range(5):
            x = jax.numpy.sin(x)
        return x.sum()

    assert memory.peak(chain, x) == 4000 + 2 * 4000
    each = lambda x: jax.lax.map(lambda row: chain(row * 2.0), x.reshape(10, 100))
    assert memory.peak(each, x) < 4000 * 3
    assert memory.free() > 10**7


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({}, "config.sweep is empty: give it an axis"),
        ({"optim.learning_rate": (0.1,)}, "unknown axis 'optim.learning_rate'; nearest: optim"),
        ({"optim.lr": ("high",)}, "config.sweep: config.optim.lr = 'high': expected float"),
        ({"seed": (0.5,)}, "config.sweep: config.seed = 0.5: expected int"),
        ({"optim.lr": ()}, "axis optim.lr = (): expected a tuple of values"),
        ({"optim.lr": 0.1}, "axis optim.lr = 0.1: expected a tuple of values"),
        ({"seed": (0, 1, 0)}, "axis seed has 0 twice"),
        ({"strategy": ("frozn()",)}, "unknown strategy 'frozn'"),
        ({"data.val": ("fold:4/3",)}, "fold:4/3"),
        ({"phases": ("lp_ft()",)}, "a sweep has one phase"),
        ({"optim.warmup": ("90 steps",)}, "config.optim.warmup = '90 steps' is 90 steps, the run has 10"),
    ],
)
def test_bad_axes_are_told_in_one_line(base, sweeps, tmp_path, axes, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        sweeps(base(axes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_the_command_says_its_plan_and_refuses_what_cannot_be(base, tmp_path, capsys, monkeypatch):
    made = base({"optim.lr": (0.01, 0.02)}, strategy="frozen()", train_for="4 steps", eval_every="2 steps")
    monkeypatch.setattr(group, "TELL", -1.0)
    file, folder = tmp_path / "config.py", tmp_path / "sweep"
    text = config.to_json(made)
    file.write_text(f"from tljax.config import from_json\ndef get_config():\n    return from_json('''{text}''')\n")
    argv = [f"--config={file}", f"--workdir={folder}"]
    small = "needs .* more than the 3.91 KiB of --memory"
    with pytest.raises(UserError, match=f"one member of the group tiny {small}"):
        sweep.main([*argv, "--memory=4 KB"])
    assert sweep.main(argv) == 0
    said = capsys.readouterr().out
    assert "2 members: 2 × optim.lr" in said
    assert "group 1 of 1: tiny: 2 members, 1 compiled step (vmap: at once), at most " in said
    assert "\nstep 2 of 4, 2 members: about " in said
    assert "the best by val/nll, " in said
    with pytest.raises(UserError, match=r"holds a run with another config: sweep.optim.lr: .* → \(0.5,\)"):
        sweep.main([*argv, "--config.sweep.optim.lr=(0.5,)"])
    with pytest.raises(UserError, match="unknown --how 'pmap'"):
        sweep.main([*argv, "--how=pmap"])
    with pytest.raises(UserError, match="the config has no sweep"):
        sweep.Sweep(get_config(), None, Console(enabled=False), "auto", 0)
    for name in ("sweep.csv", "sweep.parquet", "report.html", "learning_rates.png", "learning_rates.pdf"):
        assert (folder / name).exists()
