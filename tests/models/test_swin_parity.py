"""Swin: each stage against timm, images that windows do not fill against torchvision, and the files of four sources."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, plan, weights
from tljax.errors import UserError
from tljax.models import swin

CLASSES = 10
MINI = swin.VARIANTS["swin_mini"]


def variables(naming, arrays, name="swin_mini"):
    table = models.conversion(name)[naming]
    return traverse_util.unflatten_dict(reference.converted(table, arrays), sep="/")


def torchvision_mini():
    reference.import_torchvision()
    from torchvision.models import swin_transformer

    return swin_transformer.SwinTransformer(
        [4, 4], MINI.width, list(MINI.depths), list(MINI.heads), [MINI.window] * 2, stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [("swin_mini", 32), pytest.param("swin_tiny", 224, marks=pytest.mark.slow)])
def test_the_output_of_every_stage(name, size):
    net, model, x = reference.model(name, CLASSES, size), models.create(name, CLASSES), reference.images(2, size)
    state = variables("timm", reference.state_dict(net, size), name)
    depths = model.variant.depths
    blocks = [f"layers.{level}.blocks.{i}" for level, depth in enumerate(depths) for i in range(depth)]
    names = {"embed": "patch_embed", **{f"block{i}": block for i, block in enumerate(blocks, 1)}}
    expected = reference.stages_of(net, names | {"norm": "norm", "head": ""}, x)
    expected["norm"] = expected["norm"].mean((1, 2))  # what the head sees
    reference.assert_stages(expected, model, state, x)


@pytest.mark.parametrize("size", [(32, 32), (54, 54), (40, 70), (11, 90)])
def test_images_that_windows_do_not_fill(size):
    """Padded in both levels, in one, along one side; windows larger than the image, which shift along no side."""
    net = torchvision_mini()
    state = variables("torchvision", reference.state_dict(net, 54))
    x = reference.images(2, 90)[:, : size[0], : size[1]]
    expected = net(reference.torch_order(x)).detach().numpy()
    reference.assert_close(jax.jit(models.create("swin_mini", CLASSES).apply)(state, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 256])
def test_a_published_network_at_other_sizes(size):
    net = reference.import_torchvision().models.swin_t(num_classes=CLASSES).eval()
    state = variables("torchvision", reference.state_dict(net, size), "swin_tiny")
    x = reference.images(2, size)
    got = jax.jit(models.create("swin_tiny", CLASSES).apply)(state, x)
    reference.assert_close(got, net(reference.torch_order(x)).detach().numpy())


def test_a_token_attends_to_its_window_alone():
    """Without a shift to its neighbours in the window; with one, to those that were neighbours before, not behind."""
    common = functools.partial(swin.layers.Common, norm="layer")
    x = jax.random.normal(jax.random.key(0), (1, 12, 12, 8))
    for shifted in (False, True):
        attention = swin.WindowAttention(common(), 2, True, window=4, shifted=shifted)
        params = attention.init(jax.random.key(1), x)
        sensitivity = jax.jacrev(lambda x, a=attention, p=params: a.apply(p, x)[0, ..., 0])(x)
        reaches = np.abs(sensitivity[:, :, 0]).sum(-1) > 1e-12  # [row, column, of row, of column]
        part = (np.arange(12) + 2 * shifted) // 4  # 0 0 1 1 1 1 2 …: the edge is cut off
        one = part[:, None] == part
        np.testing.assert_array_equal(reaches, one[:, None, :, None] & one[None, :, None, :])


def test_tables_of_positions_do_not_decay():
    shapes = models.shapes(models.create("swin_mini", CLASSES))["params"]
    table = next(leaf for leaf in plan.build([("**", 1)], shapes).leaves if leaf.path == "block1/attn/position_bias")
    assert table.shape == (7**2, 2)
    assert not table.decay


@pytest.mark.parametrize("window", [2, 6])
def test_tables_of_positions_are_resized_for_other_windows(window, tmp_path):
    """As TinyViT does, whose function timm has; timm's other two, for Swin, interpolate otherwise."""
    net = reference.model("swin_mini", CLASSES, 32)
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit
    from torch import from_numpy

    arrays = reference.state_dict(net, 32)
    save_file(arrays, tmp_path / "model.safetensors")
    model = models.create("swin_mini", CLASSES)
    shapes = models.shapes(model.clone(variant=dataclasses.replace(MINI, window=window)))
    with pytest.raises(UserError, match=r"misshaped: block1/attn/position_bias \(49×2.*resize='\*\*/position_bias'$"):
        weights.load(str(tmp_path / "model.safetensors"), "swin_mini", shapes)
    loaded = weights.load(str(tmp_path / "model.safetensors"), "swin_mini", shapes, resize=("**/position_bias",))
    assert len(loaded.report.resized) == 4
    table = from_numpy(arrays["layers.1.blocks.0.attn.relative_position_bias_table"])
    expected = resize_rel_pos_bias_table_levit(table, ((2 * window - 1) ** 2, 4)).numpy()
    reference.assert_close(loaded.params["block3"]["attn"]["position_bias"], expected, 1e-5)


def assert_loads(arrays, naming, path, expected, x):
    """The file fits swin_mini strictly, its naming is found out, and its logits are the reference's."""
    save_file(arrays, path)
    model = models.create("swin_mini", CLASSES)
    loaded = weights.load(str(path), "swin_mini", models.shapes(model))
    assert loaded.report.naming == naming
    reference.assert_close(jax.jit(model.apply)({"params": loaded.params}, x), expected.detach().numpy())
    return loaded.report.ignored


def test_files_of_torchvision(tmp_path):
    net, x = torchvision_mini(), reference.images(2, 32)
    arrays = reference.state_dict(net, 32)
    ignored = assert_loads(arrays, "torchvision", tmp_path / "model.safetensors", net(reference.torch_order(x)), x)
    assert len(ignored) == 4
    assert all(name.endswith("relative_position_index") for name in ignored)


def test_files_of_transformers(tmp_path):
    """Written by the library itself, in the names of the published files."""
    reference.import_torchvision()
    transformers = pytest.importorskip("transformers", reason=reference.EXTRA)
    config = transformers.SwinConfig(
        image_size=32, embed_dim=MINI.width, depths=MINI.depths, num_heads=MINI.heads, window_size=MINI.window,
        num_labels=CLASSES,
    )  # fmt: skip
    net, x = transformers.SwinForImageClassification(config).eval(), reference.images(2, 32)
    reference.fill(net)
    net.save_pretrained(tmp_path)
    arrays = weights.read(tmp_path / "model.safetensors")
    assert any(".attention.self.query." in name for name in arrays)
    logits = net(reference.torch_order(x)).logits
    assert assert_loads(arrays, "transformers", tmp_path / "again.safetensors", logits, x) == ()


def test_files_of_timm_and_of_the_authors(tmp_path):
    """The authors' as timm's own conversion understands them: their merging of patches ends the level before."""
    net, x = reference.model("swin_mini", CLASSES, 32), reference.images(2, 32)
    from timm.models.swin_transformer import checkpoint_filter_fn

    arrays, logits = reference.state_dict(net, 32), net(reference.torch_order(x))
    assert assert_loads(arrays, "timm", tmp_path / "timm.safetensors", logits, x) == ()
    theirs = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): array
        for name, array in arrays.items()
    }
    theirs["layers.0.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    assert sorted(checkpoint_filter_fn(theirs, net)) == sorted(arrays)
    ignored = assert_loads(theirs, "microsoft", tmp_path / "microsoft.safetensors", logits, x)
    assert ignored == ("layers.0.blocks.1.attn_mask",)
