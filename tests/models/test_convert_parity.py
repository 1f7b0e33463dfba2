"""Files that tljax.convert writes, read strictly by the libraries whose names they are in; the logits are the same."""

import jax
import numpy as np
import pytest
import torch_reference as reference
from safetensors.numpy import load_file, save_file

from tljax import convert, models, weights

CLASSES = 10
# One small network of each family, in each library's names, where the library has the network.
FAST = [
    ("resnext_tiny", "torchvision"),
    ("resnetv2_tiny", "timm"),
    ("vgg_bn_tiny", "torchvision"),
    ("vgg_bn_tiny", "timm"),
    ("mobilenet_v2_tiny", "torchvision"),
    ("mobilenet_v3_tiny", "torchvision"),
    ("efficientnetv2_tiny", "torchvision"),
    ("convnext_mini", "timm"),
    ("densenet_mini", "torchvision"),
    ("swin_mini", "timm"),
    ("vit_mini", "timm"),
]
SLOW = [
    ("resnet18", "torchvision"),
    ("inception_tiny", "torchvision"),
    ("mobilenet_v2", "timm"),
    ("mobilenetv3_small_100", "timm"),
    ("tf_efficientnet_b0", "timm"),
    ("efficientnet_b0", "efficientnet_pytorch"),
    ("efficientnet_lite0", "efficientnet_pytorch"),
]


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def assert_returns(source, naming, folder, model):
    """`source` as tljax's own and back: the same file bit for bit, but for the counts of batches. Returns its path."""
    own, back = folder / "own.safetensors", folder / "back.safetensors"
    convert.convert(str(source), own, model=model)
    done = convert.convert(str(own), back, naming)
    before, after = weights.read(source), load_file(back)
    assert done.model == model  # the file says it
    assert sorted(before) == sorted(after)
    for name, array in before.items():
        if name in done.constants and name.endswith("num_batches_tracked"):
            assert bits(after[name]) == bits(np.zeros((), np.int64))
        else:
            assert bits(after[name]) == bits(array)
    return back


def ours(path, name, x):
    model = models.create(name, CLASSES)
    loaded = weights.load(str(path), name, models.shapes(model, x.shape[1]))
    return jax.jit(model.apply)({"params": loaded.params, "batch_stats": loaded.batch_stats}, x)


@pytest.mark.parametrize(("name", "naming"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_library_reads_what_was_written(name, naming, tmp_path):
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    size = 107 if name.startswith("inception") else 64 if name in {case for case, _ in SLOW} else 32
    size = 28 if (name, naming) == ("vgg_bn_tiny", "timm") else size  # larger ones timm's VGG takes otherwise
    net, x = reference.model(name, CLASSES, size, naming), reference.images(2, size)
    save_file(reference.state_dict(net, size), tmp_path / "source.safetensors")
    expected = net(reference.torch_order(x)).detach().numpy()
    back = assert_returns(tmp_path / "source.safetensors", naming, tmp_path, name)
    reference.assert_close(ours(tmp_path / "own.safetensors", name, x), expected)

    again = reference.model(name, CLASSES, size, naming)
    again.load_state_dict({key: torch.from_numpy(value) for key, value in load_file(back).items()}, strict=True)
    np.testing.assert_array_equal(again(reference.torch_order(x)).detach().numpy(), expected)


def torchvision_networks():
    vision = reference.import_torchvision().models
    vit = vision.VisionTransformer(32, 8, 6, 2, 32, 128, num_classes=CLASSES)
    swin = vision.swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )
    setting = vision.convnext.CNBlockConfig
    levels = models.convnext.VARIANTS["convnext_mini"]
    ends = (*levels.widths[1:], None)
    convnext = vision.ConvNeXt(
        [setting(*level) for level in zip(levels.widths, ends, levels.depths)],
        stochastic_depth_prob=0.0, num_classes=CLASSES,
    )  # fmt: skip
    return {"vit_mini": vit, "swin_mini": swin, "convnext_mini": convnext}


@pytest.mark.parametrize("name", ["vit_mini", "swin_mini", "convnext_mini"])
def test_names_of_torchvision(name, tmp_path):
    """With the index of relative positions, which its Swin holds as a tensor and asks for."""
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    net, x = torchvision_networks()[name].eval(), reference.images(2, 32)
    save_file(reference.state_dict(net, 32), tmp_path / "source.safetensors")
    expected = net(reference.torch_order(x)).detach().numpy()
    back = assert_returns(tmp_path / "source.safetensors", "torchvision", tmp_path, name)
    again = torchvision_networks()[name].eval()
    again.load_state_dict({key: torch.from_numpy(value) for key, value in load_file(back).items()}, strict=True)
    np.testing.assert_array_equal(again(reference.torch_order(x)).detach().numpy(), expected)


def test_names_of_transformers(tmp_path):
    """Read by the library's own `from_pretrained`, which says what it misses and what it does not know."""
    reference.import_torchvision()
    transformers = pytest.importorskip("transformers", reason=reference.EXTRA)
    vit, swin = models.vit.VARIANTS["vit_mini"], models.swin.VARIANTS["swin_mini"]
    levels = models.convnext.VARIANTS["convnext_mini"]
    configs = {
        "vit_mini": transformers.ViTConfig(
            hidden_size=vit.width, num_hidden_layers=vit.depth, num_attention_heads=vit.heads, image_size=32,
            patch_size=vit.patch, intermediate_size=4 * vit.width, layer_norm_eps=1e-6, num_labels=CLASSES,
        ),
        "swin_mini": transformers.SwinConfig(
            image_size=32, embed_dim=swin.width, depths=swin.depths, num_heads=swin.heads, window_size=swin.window,
            num_labels=CLASSES,
        ),
        "convnext_mini": transformers.ConvNextConfig(
            hidden_sizes=levels.widths, depths=levels.depths, num_labels=CLASSES
        ),
    }  # fmt: skip
    for name, config in configs.items():
        folder = tmp_path / name
        folder.mkdir()
        kind = {"vit": "ViT", "swin": "Swin", "convnext": "ConvNext"}[name.split("_")[0]] + "ForImageClassification"
        net, x = getattr(transformers, kind)(config).eval(), reference.images(2, 32)
        reference.fill(net)
        net.save_pretrained(folder)
        expected = net(reference.torch_order(x)).logits.detach().numpy()
        back = assert_returns(folder / "model.safetensors", "transformers", folder, name)
        back.replace(folder / "model.safetensors")
        again, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        np.testing.assert_array_equal(again.eval()(reference.torch_order(x)).logits.detach().numpy(), expected)
