"""Axes over several fields at once: each value sets them all, and labels name the values."""

import re

import pytest
from tiny import get_config

from tljax import config, grid
from tljax.errors import UserError


def sweep(values):
    made = get_config()
    made.sweep = grid.axes(values)
    return made


RECIPES = {
    "#recipe, strategy, optim.lr": (("probe", "frozen()", 1), ("all", "full()", 0.002)),
    "seed, data.fold_seed": ((0, 0), (7, 3)),
}


def test_an_axis_sets_all_of_its_fields():
    found = grid.members(sweep(RECIPES | {"optim.weight_decay": (0.0, 0.1)}))
    assert len(found) == 8
    told = {(m.config.strategy, m.config.optim.lr, m.config.seed, m.config.data.fold_seed) for m in found}
    assert told == {
        (*recipe, *seeds) for recipe in (("frozen()", 1.0), ("full()", 0.002)) for seeds in ((0, 0), (7, 3))
    }
    assert found[7].fields == {
        "recipe": "all", "strategy": "full()", "optim.lr": 0.002, "seed": 7, "data.fold_seed": 3,
        "optim.weight_decay": 0.1,
    }  # fmt: skip
    assert "recipe" not in found[0].config


def test_it_survives_its_file_and_tells_members_apart_by_labels():
    made = sweep(RECIPES)
    again = config.from_json(config.to_json(made))
    assert grid.members(again) == grid.members(made)
    assert sorted(grid.told(again.sweep)) == ["2 × recipe", "2 × seed & data.fold_seed"]


def test_labels_make_no_groups():
    """Two labels of one config are one group."""
    found = grid.members(sweep({"#kind, strategy": (("a", "frozen()"), ("b", "frozen()"))}))
    assert [len(part) for part in grid.grouped(found, ())] == [2]


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"strategy, optim.rl": (("frozen()", 1.0),)}, "unknown axis 'optim.rl'; nearest: optim.lr"),
        ({"strategy, seed": ()}, "axis strategy, seed = (): expected a tuple of values, as (('partial(last=1)', 0),)"),
        ({"strategy, seed": ("frozen()",)}, "axis strategy, seed: 'frozen()' is no tuple of 2 values"),
        ({"strategy, seed": (("frozen()", 1, 2),)}, "is no tuple of 2 values"),
        ({"strategy, seed": (("frozen()", 0), ("frozen()", 0))}, "axis strategy, seed has ('frozen()', 0) twice"),
        ({"strategy, seed": (("frozen()", "x"),)}, "config.sweep: config.seed = 'x': expected int"),
        ({"strategy, seed": (("frozen()", 0),), "seed": (0, 1)}, "config.sweep has two axes over seed"),
        ({"#seed, strategy": ((0, "frozen()"),)}, "the label '#seed' needs a name that is no field's"),
        ({"#a, #b": ((0, 1),)}, "axis #a, #b has labels alone: name the fields that it sets"),
        ({"#a": (0, 1)}, "axis #a has labels alone"),
    ],
)
def test_bad_joint_axes_are_told_in_one_line(axes, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        grid.members(sweep(axes))
    assert "\n" not in str(error.value)
