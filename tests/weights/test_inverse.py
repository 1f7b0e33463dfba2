"""Conversion tables read backwards: what patterns match, every model in every naming there and back, and constants."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import models
from tljax.errors import UserError
from tljax.weights import inverse, matcher, transforms

TINY = [
    name for name in models.names() if name.endswith(("_tiny", "_mini")) and name not in ("convnext_tiny", "swin_tiny")
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"a\.(\d+)\.b", [f"a.{i}.b" for i in range(4)]),
        (r"(?:vit\.|dino\.)?x", ["vit.x", "dino.x", "x"]),
        (r"norm\.??1", ["norm1", "norm.1"]),
        (r"m\.(?:0|fc)/([13])", ["m.0/1", "m.0/3", "m.fc/1", "m.fc/3"]),
        (r"l([2-4]|1\d)", ["l2", "l3", "l4", *(f"l1{i}" for i in range(10))]),
        (r"x(\w+)", ["xstem", "xconv"]),
        (r"(?:a(?:b|c)?|d)", ["ab", "ac", "a", "d"]),
        (r"(?:.+/)?k(?::0)?", ["k:0", "k"]),
    ],
)
def test_all_names_that_a_pattern_matches_its_first_choices_first(pattern, expected):
    found = list(inverse.matching(pattern, 3, ["stem", "conv"]))
    assert found == expected
    assert all(re.fullmatch(pattern, name) for name in found)


@pytest.mark.parametrize("pattern", ["a{2}", "a+", "(?P<x>a)", "a)", "^a"])
def test_patterns_that_are_not_read_backwards(pattern):
    with pytest.raises(ValueError, match="the pattern"):
        list(inverse.matching(pattern, 3))


def namings():
    return [
        (model, naming)
        for model in [*TINY, "resnet50", "densenet121", "swin_small", "resnetv2_101x1_bit"]
        for naming in models.conversion(model)
        if (model, naming) not in {("densenet121", "timm"), ("resnet50", "timm")}  # the same tables again
    ]


@pytest.mark.parametrize(("model", "naming"), namings())
def test_every_leaf_has_a_name_that_leads_back_to_it(model, naming):
    """All leaves, each once, and the written names are a file that the strict matcher takes."""
    leaves = {p: leaf.shape for p, leaf in matcher.flatten(models.shapes(models.create(model, 10))).items()}
    table = models.conversion(model)[naming]
    names = inverse.names(table, leaves, naming)
    zeros = {leaf: np.broadcast_to(np.float32(0), shape) for leaf, shape in leaves.items()}
    shapes = {name: inverse.made(parts, zeros).shape for name, parts in names.parts.items()}
    shapes |= dict.fromkeys(names.constants, ())
    result = matcher.fit(shapes, table, leaves)
    assert result.problems == 0
    assert set(result.ignored) == set(names.constants)


def test_a_block_is_counted_within_its_own_level():
    leaves = matcher.flatten(models.shapes(models.create("resnet50", 10)))
    found = inverse.names(models.conversion("resnet50")["torchvision"], leaves).parts
    # Blocks 1 to 16 of four levels of 3, 4, 6 and 3.
    levels = [(level, i) for level, depth in enumerate((3, 4, 6, 3), 1) for i in range(depth)]
    for block, (level, i) in enumerate(levels, 1):
        (part,) = found[f"layer{level}.{i}.conv2.weight"]
        assert part.leaf == f"params/block{block}/conv2/kernel"
    assert sum(name.endswith(".conv2.weight") for name in found) == 16


def test_constants_beside_what_they_follow_from():
    leaves = matcher.flatten(models.shapes(models.create("swin_mini", 10)))
    names = inverse.names(models.conversion("swin_mini")["torchvision"], leaves)
    assert len(names.constants) == 4
    (beside, of) = names.constants["features.1.0.attn.relative_position_index"]
    assert beside == "features.1.0.attn.relative_position_bias_table"
    window = 4
    index = of(np.zeros(((2 * window - 1) ** 2, 2), np.float32))
    # By hand: places in rows, the row of the table for the pair's distance down and across.
    places = list(itertools.product(range(window), range(window)))
    expected = [(a - c + 3) * 7 + (b - d + 3) for (a, b), (c, d) in itertools.product(places, places)]
    np.testing.assert_array_equal(index, expected)


def test_a_naming_without_a_name_for_a_leaf():
    leaves = matcher.flatten(models.shapes(models.create("vit_small_patch14_dinov2", 10)))
    with pytest.raises(UserError, match=r"the naming 'torchvision' has no name for block1/layer_scale1/gamma, "):
        inverse.names(models.conversion("vit_small_patch14_dinov2")["torchvision"], leaves, "torchvision")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_transforms_and_their_inverses(data):
    """Undoing gives back the file's array, bit for bit, and `shape` foretells what `apply` gives."""
    a, b, heads, n = (data.draw(st.integers(1, 4)) for _ in range(4))
    shapes = {
        "same": (a, b), "conv": (a, b, n, n), "linear": (a, b), "squeezed": (1, 1 + a, 1 + b), "pixel": (1, 1, a, b),
        f"flat:{n}": (a, b, n, n), "vector": (a, 1, 1), f"heads:{heads}": (heads, a),
        f"into_heads:{heads}": (a, heads, b), f"from_heads:{heads}": (heads, a, b),
    }  # fmt: skip
    for how, shape in shapes.items():
        array = np.random.default_rng(0).normal(size=shape)
        ours = transforms.apply(how, array)
        assert ours.shape == transforms.shape(how, shape)
        np.testing.assert_array_equal(transforms.undo(how, ours), array)
        assert ours.size == array.size
    assert transforms.shape(f"heads:{heads + 1}", (heads, a)) is None
    assert transforms.shape("pixel", (2, 1, a, b)) is None
