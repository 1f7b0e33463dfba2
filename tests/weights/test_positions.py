"""Resized position embeddings against Pillow's bicubic filter."""

import numpy as np
import pytest
from PIL import Image

from tljax.errors import UserError
from tljax.weights import positions, resizing

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("old", "new", "prefix"), [(14, 24, 1), (24, 14, 0), (5, 2, 4), (3, 3, 1), (37, 16, 5)])
def test_as_pillow_resizes_each_channel(old, new, prefix):
    position = RNG.normal(size=(prefix + old**2, 3)).astype(np.float32)
    got = positions.resize(position, prefix + new**2, prefix)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[:prefix], position[:prefix])
    for channel in range(3):
        grid = Image.fromarray(position[prefix:, channel].reshape(old, old).copy())
        expected = np.asarray(grid.resize((new, new), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[prefix:, channel].reshape(new, new), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "length", "patches"), [(16, 17, 15), (17, 20, 19), (1, 17, 0), (17, 1, 0)])
def test_what_is_no_square_grid(rows, length, patches):
    with pytest.raises(UserError, match=f"position embeddings of {patches} patches are no square grid"):
        positions.resize(np.zeros((rows, 2)), length, 1)


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((4, 7), (9, 3)), ((3, 3), (1, 1))]
)
def test_zoom_is_scipy_s(old, new):
    """As vision_transformer and big_vision resize positions: ndimage.zoom, order 1, from corner to corner."""
    ndimage = pytest.importorskip("scipy.ndimage")
    position = RNG.normal(size=(1 + old[0] * old[1], 3)).astype(np.float32)
    grid = position[1:].reshape(*old, 3)
    expected = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    got = positions.resize(position, 1 + new[0] * new[1], 1, "zoom", old, new)
    np.testing.assert_array_equal(got[:1], position[:1])
    np.testing.assert_allclose(got[1:].reshape(*new, 3), expected, rtol=0, atol=1e-5)


def test_a_resized_patch_answers_as_the_patch_did():
    """FlexiViT: the larger kernel gives for an enlarged patch what the kernel gave for the patch."""
    kernel, patch = RNG.normal(size=(8, 6, 3, 4)), RNG.normal(size=(8, 6, 3))
    down, across = positions.bicubic(8, 13), positions.bicubic(6, 12)
    enlarged = np.einsum("ia,jb,abc->ijc", down, across, patch)
    before = np.einsum("hwc,hwco->o", patch, kernel)
    after = np.einsum("hwc,hwco->o", enlarged, positions.resize_patch(kernel, 13, 12).astype(np.float64))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("embed/position:bicubc", "unknown method of resizing 'bicubc'; nearest: bicubic"),
        ("embed/position:zoom:14", "expected the grids of the file and the network, as 14x28-16x32"),
        ("norm:zoom", "resize=norm: of vit_mini only embed/position, embed/patch/kernel has a way to be resized"),
    ],
)
def test_entries_of_resize_that_mean_nothing(spec, text):
    with pytest.raises(UserError, match=text):
        resizing.check((spec,), "vit_mini")


def test_grids_in_an_entry_of_resize():
    position = RNG.normal(size=(1 + 2 * 8, 3)).astype(np.float32)
    way = resizing.ways("vit_mini", ("embed/position:zoom:2x8-4x5",))["params/embed/position"]
    np.testing.assert_array_equal(
        way.make(position, (21, 3)), positions.resize(position, 21, 1, "zoom", (2, 8), (4, 5))
    )
    with pytest.raises(UserError, match="position embeddings of 16 patches are no grid of 3x8"):
        resizing.ways("vit_mini", ("embed:bicubic:3x8",))["params/embed/position"].make(position, (17, 3))
