"""Resized position embeddings against Pillow's bicubic filter, and by the strict way of the matcher."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.errors import UserError
from tljax.weights import matcher, positions

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


def timm_names(size=32):
    """The arrays of a file of vit_mini at an image size, written out as timm names them."""
    arrays = {
        "cls_token": (1, 1, 32),
        "pos_embed": (1, 1 + (size // 8) ** 2, 32),
        "patch_embed.proj.weight": (32, 3, 8, 8),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "head.weight": (7, 32),
        "head.bias": (7,),
    }
    for i in range(6):
        for layer, out, inputs in (
            ("attn.qkv", 96, 32),
            ("attn.proj", 32, 32),
            ("mlp.fc1", 128, 32),
            ("mlp.fc2", 32, 128),
        ):
            arrays |= {f"blocks.{i}.{layer}.weight": (out, inputs), f"blocks.{i}.{layer}.bias": (out,)}
        for layer in ("norm1", "norm2"):
            arrays |= {f"blocks.{i}.{layer}.weight": (32,), f"blocks.{i}.{layer}.bias": (32,)}
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}


def load(tmp_path, arrays, size=32, **more):
    save_file(arrays, tmp_path / "mini.safetensors")
    shapes = models.shapes(models.create("vit_mini", 7), size)
    return weights.load(str(tmp_path / "mini.safetensors"), "vit_mini", shapes, **more)


def test_one_array_fills_query_key_and_value(tmp_path):
    arrays = timm_names()
    loaded = load(tmp_path, arrays)
    for i in range(6):
        for j, name in enumerate(("query", "key", "value")):
            found, rows = loaded.params[f"block{i + 1}"]["attn"][name], slice(32 * j, 32 * (j + 1))
            np.testing.assert_array_equal(found["kernel"], arrays[f"blocks.{i}.attn.qkv.weight"][rows].T)
            np.testing.assert_array_equal(found["bias"], arrays[f"blocks.{i}.attn.qkv.bias"][rows])
    assert loaded.report.numbers == sum(array.size for array in arrays.values())
    assert loaded.report.resized == loaded.report.ignored == ()
    ours = traverse_util.flatten_dict(models.shapes(models.create("vit_mini", 7))["params"], sep="/")
    assert sorted(loaded.report.loaded) == sorted(ours)


def test_a_divided_array_is_accounted_for_like_any_other(tmp_path):
    arrays = timm_names()
    short = {name: a for name, a in arrays.items() if name != "blocks.2.attn.qkv.weight"}
    text = "3 missing: block3/attn/key/kernel, block3/attn/query/kernel, block3/attn/value/kernel"
    with pytest.raises(UserError, match=text):
        load(tmp_path, short)
    with pytest.raises(UserError, match="misshaped: block1/attn/query/kernel") as error:
        load(tmp_path, arrays | {"blocks.0.attn.qkv.weight": np.zeros((95, 32), np.float32)})
    assert "95×32, expected 32×32" in str(error.value)
    with pytest.raises(
        UserError, match=r"filled twice: norm/bias by norm.bias and fc_norm.bias|by fc_norm.bias and norm"
    ):
        load(tmp_path, arrays | {"fc_norm.bias": np.zeros(32, np.float32)})
    loaded = load(tmp_path, arrays, reset=("block1/attn/query",))  # the rest of the array is used
    assert isinstance(loaded.params["block1"]["attn"]["query"]["kernel"], jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(
        loaded.params["block1"]["attn"]["key"]["kernel"], arrays["blocks.0.attn.qkv.weight"][32:64].T
    )
    assert loaded.report.ignored == ()
    assert load(tmp_path, arrays, reset=("**/attn",)).report.ignored.count("blocks.0.attn.qkv.weight") == 1


def test_positions_are_resized_only_where_the_config_says_so(tmp_path):
    arrays = timm_names(size=48)
    with pytest.raises(UserError, match=r"misshaped: embed/position \(37×32, expected 17×32\)") as error:
        load(tmp_path, arrays)
    assert str(error.value).endswith("to resize it: resize='embed/position'")
    loaded = load(tmp_path, arrays, resize=("embed/position",))
    assert loaded.report.resized == ("embed/position",)
    assert loaded.report.line().endswith("1 resized: embed/position")
    expected = positions.resize(arrays["pos_embed"][0], 17, prefix=1)
    np.testing.assert_array_equal(loaded.params["embed"]["position"], expected)
    # Of the right size nothing is done, and what cannot be resized is no less wrong than before.
    assert load(tmp_path, arrays, size=48, resize="embed").report.resized == ()
    with pytest.raises(UserError, match="misshaped: embed/position"):
        load(tmp_path, arrays | {"pos_embed": np.zeros((1, 37, 16), np.float32)}, resize=("embed/position",))
    with pytest.raises(UserError, match="position embeddings of 37 patches are no square grid"):
        load(tmp_path, arrays | {"pos_embed": np.zeros((1, 38, 32), np.float32)}, resize=("embed/position",))
    with pytest.raises(UserError, match="resize=block1: of vit_mini only embed/position has a way to be resized"):
        load(tmp_path, arrays, resize=("block1",))


def test_a_squeezed_array_loses_its_leading_ones():
    for shape, expected in (((1, 1, 5), (5,)), ((1, 4, 5), (4, 5)), ((3, 1), (3, 1))):
        assert matcher.transform("squeezed", np.zeros(shape)).shape == expected


def test_an_image_that_patches_do_not_fill():
    model = models.create("vit_mini", 7)
    with pytest.raises(UserError, match="30 pixels are no whole number of patches of 8: nearest is 24 or 32"):
        models.shapes(model, 30)
