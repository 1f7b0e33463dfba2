"""Resized position embeddings against Pillow's bicubic filter."""

import numpy as np
import pytest
from PIL import Image

from tljax.errors import UserError
from tljax.weights import positions

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
