"""Members over several devices: the same figures as on one, and nothing that passes between the devices."""

import re

import jax
import numpy as np
import pytest
import test_sweep

from tljax import grid, group, parallel, sweep
from tljax.errors import UserError
from tljax.report.console import Console

COLLECTIVES = re.compile("all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # each device batches fewer members
weights, longer = test_sweep.weights, test_sweep.base  # fixtures


@pytest.fixture
def base(longer):
    """`base(axes, field=value)`: as in test_sweep, with fewer steps."""
    return lambda axes, **fields: longer(axes, **{"train_for": "6 steps", "eval_every": "3 steps"} | fields)


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    """`sweeps(config, devices)` runs a sweep; returns (its rows, the text of every step that was compiled)."""
    texts, trained = [], group.Group.train

    def remember(self, *args, **more):
        found = trained(self, *args, **more)
        texts.append(self.compiled.as_text())
        for leaf in jax.tree.leaves(found[1]):
            assert len(leaf.sharding.device_set) == len(self.spread.devices)
        return found

    monkeypatch.setattr(group.Group, "train", remember)

    def run(made, devices, how="auto", limit=10**9):
        texts.clear()
        made.parallel.members = devices
        folder = sweep.Folder(tmp_path / f"on{devices}")
        assert sweep.Sweep(made, folder, Console(enabled=False), how, limit).run() == 0
        return folder.results(), tuple(texts)

    return run


def assert_same(rows, others) -> None:
    assert [row["number"] for row in rows] == [row["number"] for row in others]
    for row, other in zip(rows, others):
        assert (row["status"], row["steps"]) == (other["status"], other["steps"])
        assert [list(point) for point in row["curve"]] == [list(point) for point in other["curve"]]
        for a, b in [(row["test"], other["test"]), *zip(row["curve"], other["curve"])]:
            if a is not None:
                np.testing.assert_allclose(list(a.values()), list(b.values()), **CLOSE)


@pytest.mark.parametrize(
    ("axes", "fields", "how"),
    [
        # Six members on four devices: two places are filled up. One of them diverges.
        ({"optim.lr": (0.003, 1e30, 0.03), "seed": (0, 7)}, {"strategy": "frozen()", "drop_rate": 0.3}, "vmap"),
        pytest.param(
            {"optim.lr": (0.001, 0.003, 0.01, 0.03)}, {"cache_views": 0, "norm_stats": "batch", "ema": 0.5}, "map",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_four_devices_give_what_one_gives_and_exchange_nothing(base, sweeps, axes, fields, how):
    made = base(axes, **fields)
    one, (text,) = sweeps(made, 1, how)
    four, (spread,) = sweeps(made, 4, how)
    assert len(one) == np.prod([len(values) for values in axes.values()])
    assert_same(four, one)
    assert "num_partitions=4" in spread
    assert "num_partitions=4" not in text
    assert not COLLECTIVES.search(spread)


def test_a_collective_would_be_found():
    """The same search finds the exchange in a program that has one."""
    spread = parallel.Spread(4)
    program = spread.program(lambda x: x + jax.lax.psum(x, "members"), True)
    assert COLLECTIVES.search(program.lower(np.ones(8)).compile().as_text())


def test_each_device_needs_the_memory_of_its_own_members(base):
    made = base({"optim.lr": tuple(0.001 * i for i in range(1, 9))}, strategy="frozen()")
    groups = {}
    for devices in (1, 4):
        made.parallel.members = devices
        plan = sweep.Sweep(made, None, Console(enabled=False), "auto", 0)
        (groups[devices],) = plan.groups(list(grid.members(made)))
    assert groups[4].need(8) == groups[1].need(2) < groups[1].need(8)
    assert groups[4].need(5) == groups[1].need(2)


def test_devices_that_are_not_there_are_told(base):
    assert parallel.members_over(0, 100) == 8
    assert parallel.members_over(0, 3) == 3
    assert parallel.members_over(5, 100) == 5
    with pytest.raises(UserError, match=r"config.parallel.members = 9: there are 8 devices; 0 takes all"):
        parallel.members_over(9, 100)


def test_members_are_laid_as_they_are_counted():
    assert [parallel.Spread(4).each(count) for count in (1, 4, 5, 8)] == [1, 1, 2, 2]
