"""Laws of the strict matcher, on trees and tables made here."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax.errors import UserError
from tljax.weights import matcher, transforms


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the matcher needs to know of a leaf; it imports neither jax nor flax."""

    shape: tuple
    dtype: type = np.float32


STAGES = ("stem", "block1", "block2", "head")
SHAPES = {
    "params": {
        "stem": {"conv": {"kernel": Shape((3, 3, 2, 4))}, "bn": {"scale": Shape((4,)), "bias": Shape((4,))}},
        "block1": {"conv": {"kernel": Shape((1, 1, 4, 4))}},
        "block2": {"conv": {"kernel": Shape((3, 3, 1, 4))}},
        "head": {"kernel": Shape((4, 5)), "bias": Shape((5,))},
    },
    "batch_stats": {"stem": {"bn": {"mean": Shape((4,)), "var": Shape((4,))}}},
}
TABLE = (
    (r"conv1\.weight", "params/stem/conv/kernel", "conv"),
    (r"bn1\.weight", "params/stem/bn/scale", "same"),
    (r"bn1\.bias", "params/stem/bn/bias", "same"),
    (r"bn1\.running_(mean|var)", r"batch_stats/stem/bn/\1", "same"),
    (r".*\.num_batches_tracked", None, "same"),
    # Numbered from 0 there, from 1 here.
    (r"layers\.(\d+)\.weight", lambda m: f"params/block{int(m[1]) + 1}/conv/kernel", "conv"),
    (r"fc\.weight", "params/head/kernel", "linear"),
    (r"fc\.bias", "params/head/bias", "same"),
)
LEAVES = {path: leaf.shape for path, leaf in matcher.flatten(SHAPES).items()}


def source():
    rng = np.random.default_rng(0)
    shapes = {
        "conv1.weight": (4, 2, 3, 3),
        "bn1.weight": (4,),
        "bn1.bias": (4,),
        "bn1.running_mean": (4,),
        "bn1.running_var": (4,),
        "bn1.num_batches_tracked": (),
        "layers.0.weight": (4, 4, 1, 1),
        "layers.1.weight": (4, 1, 3, 3),
        "fc.weight": (5, 4),
        "fc.bias": (5,),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def fit(arrays, table=TABLE, reset=()):
    return matcher.fit({name: a.shape for name, a in arrays.items()}, table, LEAVES, reset)


def test_a_full_match_by_hand():
    arrays = source()
    result = fit(arrays)
    assert result.problems == 0
    filled = matcher.fill(arrays, result, SHAPES)
    kernel = filled["params"]["stem"]["conv"]["kernel"]
    for out, into, row, column in np.ndindex(4, 2, 3, 3):
        assert kernel[row, column, into, out] == np.float32(arrays["conv1.weight"][out, into, row, column])
    depthwise = filled["params"]["block2"]["conv"]["kernel"]
    assert depthwise[2, 1, 0, 3] == np.float32(arrays["layers.1.weight"][3, 0, 2, 1])
    assert filled["params"]["head"]["kernel"][3, 4] == np.float32(arrays["fc.weight"][4, 3])
    assert filled["batch_stats"]["stem"]["bn"]["var"].tolist() == arrays["bn1.running_var"].astype("f4").tolist()
    report = matcher.report(result, SHAPES, "mine")
    assert report.ignored == ("bn1.num_batches_tracked",)
    assert report.numbers == 3 * 3 * 2 * 4 + 4 + 4 + 16 + 36 + 20 + 5
    assert report.line() == f"9 leaves loaded ({report.numbers} parameters)"


def test_filled_arrays_are_copies_of_the_leaf_s_type():
    arrays = source()
    filled = matcher.fill(arrays, fit(arrays), SHAPES)
    for path, leaf in matcher.flatten(filled).items():
        assert leaf.dtype == np.float32
        assert leaf.shape == LEAVES[path]
        assert leaf.flags.c_contiguous
        assert not any(np.shares_memory(leaf, array) for array in arrays.values())


@given(order=st.permutations(sorted(source())))
def test_order_in_the_file_does_not_matter(order):
    arrays = source()
    shuffled = {name: arrays[name] for name in order}
    one = matcher.flatten(matcher.fill(arrays, fit(arrays), SHAPES))
    other = matcher.flatten(matcher.fill(shuffled, fit(shuffled), SHAPES))
    assert list(one) == list(other)
    assert all(np.array_equal(one[path], other[path]) for path in one)


@given(dropped=st.sets(st.sampled_from(sorted(set(source()) - {"bn1.num_batches_tracked"})), min_size=1))
def test_every_dropped_name_is_one_missing_leaf(dropped):
    arrays = {name: array for name, array in source().items() if name not in dropped}
    result = fit(arrays)
    assert result.problems == len(result.missing) == len(dropped)
    message = str(matcher.mismatch(result, "f.pth", "net", "mine", TABLE))
    assert f"{len(dropped)} missing: " in message
    assert "\n" not in message


@given(names=st.sets(st.text("abz.01", min_size=1, max_size=12), min_size=1, max_size=20))
def test_every_added_name_is_unexpected(names):
    names -= set(source())
    arrays = {**source(), **{name: np.zeros(1) for name in names}}
    result = fit(arrays)
    assert set(result.unmatched) == {n for n in names if not re.fullmatch(r"layers\.\d+\.weight", n)}
    assert result.problems == len(names)


@settings(max_examples=30)
@given(name=st.sampled_from(sorted(set(source()) - {"bn1.num_batches_tracked"})), data=st.data())
def test_a_wrong_shape_is_misshaped(name, data):
    arrays = source()
    right = arrays[name].shape
    shape = data.draw(st.lists(st.integers(1, 6), max_size=5).map(tuple).filter(lambda s: s != right))
    arrays[name] = np.zeros(shape)
    result = fit(arrays)
    assert result.problems == len(result.misshaped) == 1
    assert "1 misshaped" in str(matcher.mismatch(result, "f.pth", "net", "mine", TABLE))


@given(stages=st.sets(st.sampled_from(STAGES)), present=st.booleans())
def test_reset_leaves_are_left_alone_whatever_the_file_holds(stages, present):
    arrays = source()
    full = fit(arrays)
    for path, (name, _) in full.pairs.items():
        if path.split("/")[1] in stages:
            arrays[name] = np.zeros((9, 9))  # of a wrong shape, or gone
            if not present:
                del arrays[name]
    result = fit(arrays, reset=tuple(stages))
    assert result.problems == 0
    for path, leaf in matcher.flatten(matcher.fill(arrays, result, SHAPES)).items():
        assert isinstance(leaf, Shape) == (path.split("/")[1] in stages)
    report = matcher.report(result, SHAPES, "mine")
    assert set(report.reset) | set(report.loaded) == {matcher.path_of(path) for path in LEAVES}
    assert not set(report.reset) & set(report.loaded)


def test_reset_by_prefix_ends_at_a_slash():
    assert matcher.covers(("block1",), "block1/conv/kernel")
    assert matcher.covers(("stem/bn",), "stem/bn/mean")
    assert matcher.covers(("stem/bn/mean",), "stem/bn/mean")
    assert not matcher.covers(("block1",), "block10/conv/kernel")
    assert not matcher.covers(("stem/b",), "stem/bn/mean")
    assert not matcher.covers(("bn",), "stem/bn/mean")


@pytest.mark.parametrize(
    ("pattern", "hint"), [("haed", "nearest: head"), ("params/head", ""), ("qqq", "there are: stem")]
)
def test_reset_that_matches_nothing(pattern, hint):
    with pytest.raises(UserError, match=f"reset='{pattern}' matches no leaf") as caught:
        matcher.check_reset((pattern,), LEAVES)
    assert hint in str(caught.value)


def test_first_row_wins_and_rows_match_whole_names():
    table = ((r"a\.b", "params/x", "same"), (r"a\..*", "params/y", "same"), (r"c", "params/z", "same"))
    found = matcher.targets(["a.b", "a.c", "aXb", "cc", "c"], table)
    assert found == {
        "a.b": (("params/x", "same", 0, 1),),
        "a.c": (("params/y", "same", 0, 1),),
        "aXb": None,
        "cc": None,
        "c": (("params/z", "same", 0, 1),),
    }


def test_a_tuple_of_targets_divides_the_array():
    shapes = {"params": {name: Shape((3, 2)) for name in "abc"}}
    leaves = {f"params/{name}": (3, 2) for name in "abc"}
    table = (
        (r"all(\w)", ("params/a", lambda match: f"params/{match[1]}", None), "linear"),
        (r"one", "params/c", "linear"),
    )
    arrays = {"allb": np.arange(18.0).reshape(6, 3), "one": np.ones((2, 3))}
    of = lambda arrays: {name: array.shape for name, array in arrays.items()}
    result = matcher.fit(of(arrays), table, leaves)
    assert result.problems == 0
    filled = matcher.fill(arrays, result, shapes)["params"]
    assert filled["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert filled["b"].tolist() == [[6, 9], [7, 10], [8, 11]]
    assert filled["c"].tolist() == [[1, 1]] * 3
    # Each part is used once, and the whole must divide.
    again = matcher.fit(of({**arrays, "allc": arrays["allb"]}), table, leaves)
    assert again.twice == {"params/a": ("allb", "allc"), "params/c": ("one", "allc")}
    assert set(matcher.fit({"allb": (7, 3), "one": (2, 3)}, table, leaves).misshaped) == {"params/a", "params/b"}
    assert set(matcher.fit({"allb": (), "one": (2, 3)}, table, leaves).misshaped) == {"params/a", "params/b"}
    assert matcher.fit(of(arrays), table, leaves, reset=("a",)).ignored == []
    assert matcher.fit(of(arrays), table, leaves, reset=("a", "b")).ignored == ["allb"]


def test_a_squeezed_array_loses_its_leading_ones():
    for shape, expected in (((1, 1, 5), (5,)), ((1, 4, 5), (4, 5)), ((3, 1), (3, 1))):
        assert transforms.apply("squeezed", np.zeros(shape)).shape == expected


def test_a_flat_array_counts_channels_before_pixels():
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = transforms.apply("flat", array)
    assert found.shape == (60, 2)
    for out, channel, row, column in np.ndindex(array.shape):
        assert found[(channel * 4 + row) * 5 + column, out] == array[out, channel, row, column]
    table = ((r"fc\.weight", "params/fc/kernel", "flat"),)
    assert matcher.fit({"fc.weight": array.shape}, table, {"params/fc/kernel": (60, 2)}).problems == 0
    result = matcher.fit({"fc.weight": (2, 60)}, table, {"params/fc/kernel": (60, 2)})
    assert set(result.misshaped) == {"params/fc/kernel"}


def test_a_leaf_filled_twice():
    arrays = {**source(), "classifier.bias": np.zeros(5)}
    result = fit(arrays, (*TABLE, (r"classifier\.bias", "params/head/bias", "same")))
    assert result.problems == 1
    message = str(matcher.mismatch(result, "f.pth", "net", "mine", TABLE))
    assert "1 filled twice: head/bias by fc.bias and classifier.bias" in message


def test_the_message_names_ten_and_counts_the_rest():
    arrays = {**source(), **{f"layers.{i}.weight": np.zeros(1) for i in range(10, 35)}}
    message = str(matcher.mismatch(fit(arrays), "f.pth", "net", "mine", TABLE))
    assert message.startswith("f.pth does not fit net (mine naming): 25 unexpected: layers.10.weight (block11/")
    assert "and 15 more" in message
    assert "layers.20.weight" not in message


def test_the_message_names_the_nearest_and_the_stage_to_reset():
    arrays = source()
    arrays["bn1.wieght"] = arrays.pop("bn1.weight")
    message = str(matcher.mismatch(fit(arrays), "f.pth", "net", "mine", TABLE))
    assert "1 missing: stem/bn/scale; 1 unexpected: bn1.wieght (nearest: bn1.wieght → bn1.weight)" in message
    arrays = {**source(), "fc.weight": np.zeros((1000, 4)), "fc.bias": np.zeros(1000)}
    message = str(matcher.mismatch(fit(arrays), "f.pth", "net", "mine", TABLE))
    assert message.endswith(
        "2 misshaped: head/kernel (4×1000, expected 4×5), head/bias (1000, expected 5); "
        "to start it afresh: reset='head'"
    )


def test_transforms_of_keras_by_hand():
    rng = np.random.default_rng(0)
    # A depthwise kernel has its multiplier last, ours its one input channel of each group.
    kernel = rng.normal(size=(3, 5, 4, 1))
    assert np.array_equal(transforms.apply("depthwise", kernel)[2, 4, 0], kernel[2, 4, :, 0])
    # An image with its channels turned round, convolved with a kernel for that order.
    image, kernel = rng.normal(size=(2, 2, 3)), rng.normal(size=(2, 2, 3, 4))
    got = np.einsum("hwi,hwio->o", image, transforms.apply("bgr", kernel))
    assert np.allclose(got, np.einsum("hwi,hwio->o", image[..., ::-1], kernel))
    # A map of a flattened image, pixel after pixel there, channel after channel here.
    image, kernel = rng.normal(size=(7, 7, 3)), rng.normal(size=(7 * 7 * 3, 4))
    got = image.transpose(2, 0, 1).ravel() @ transforms.apply("rows_first:49", kernel)
    assert np.allclose(got, image.ravel() @ kernel)


@pytest.mark.parametrize(
    ("how", "shape"),
    [("depthwise", (3, 4, 1)), ("bgr", (3, 4)), ("rows_first:49", (48, 5)), ("rows_first:49", (7, 7, 3))],
)
def test_transforms_of_keras_do_not_fit_other_shapes(how, shape):
    assert matcher.Part("x", how).shape(shape) is None
