"""Files of a transformer: one array for query, key and value, position embeddings of another size; and training on."""

import json

import jax
import numpy as np
import pytest
from conftest import changed
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, train, weights
from tljax.errors import UserError
from tljax.weights import positions

RNG = np.random.default_rng(0)


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
    # A norm behind the pooling is another network, though its leaves are the same.
    behind = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: a for name, a in arrays.items()}
    with pytest.raises(UserError, match="2 missing: norm/bias, norm/scale; 2 unexpected: fc_norm"):
        load(tmp_path, behind)
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
    with pytest.raises(
        UserError, match="resize=block1: of vit_mini only embed/position, embed/patch/kernel has a way to be resized"
    ):
        load(tmp_path, arrays, resize=("block1",))


def test_an_image_that_patches_do_not_fill():
    model = models.create("vit_mini", 7)
    with pytest.raises(UserError, match="30 pixels are no whole number of patches of 8: nearest is 24 or 32"):
        models.shapes(model, 30)


def test_training_in_part_from_a_file_of_another_image_size(tiny, tmp_path, capsys):
    save_file({name: 0.2 * array for name, array in timm_names(48).items()}, tmp_path / "mini.safetensors")
    fields = {"model": "vit_mini", "weights": tmp_path / "mini.safetensors", "resize": "('embed/position',)"}
    more = {"strategy": "partial(last=2)", "drop_path_rate": 0.2, "train_for": "12 steps", "optim_lr": 0.003}
    assert train.main(changed(tiny, tmp_path / "run", **fields, **more)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # By hand: a block, the norm behind it, the head.
    assert summary["plan"]["trainable"] == (12 * 32**2 + 13 * 32) + 2 * 32 + (32 + 1) * 3
    assert summary["frozen"]["verified"]
    assert summary["frozen"]["values"] == summary["plan"]["parameters"] - summary["plan"]["trainable"]
    assert summary["test"]["accuracy"] > 0.5  # of three classes
    assert "1 resized: embed/position" in capsys.readouterr().out


def test_the_network_that_a_file_belongs_to_is_named(tmp_path):
    save_file(timm_names(), tmp_path / "mini.safetensors")
    shapes = models.shapes(models.create("vit_tiny_patch16", 7))
    with pytest.raises(UserError, match=r"look like those of vit_mini \(timm naming\), not vit_tiny_patch16"):
        weights.load(str(tmp_path / "mini.safetensors"), "vit_tiny_patch16", shapes)
