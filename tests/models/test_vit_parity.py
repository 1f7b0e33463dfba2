"""The Vision Transformer against timm, transformers and torchvision: each stage, each variant, each naming."""

import dataclasses

import jax
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.models import vit
from tljax.weights import positions

CLASSES = 10
MINI = vit.VARIANTS["vit_mini"]


def variables(source):
    """What a state dict of timm's converts to."""
    return traverse_util.unflatten_dict(reference.converted(reference.table("vit_mini"), source), sep="/")


def stages_of(net, x):
    """{stage: the reference's output of it} of timm's Vision Transformer; of the norm what the head sees."""
    found, x = {}, net.norm_pre(net._pos_embed(net.patch_embed(x)))
    found["embed"] = x
    for i, block in enumerate(net.blocks, 1):
        x = found[f"block{i}"] = block(x)
    found["norm"] = net.forward_head(net.norm(x), pre_logits=True)
    found["head"] = net.forward_head(net.norm(x))
    return {stage: value.detach().numpy() for stage, value in found.items()}


def assert_stages(net, model, state, x):
    reference.assert_stages(stages_of(net, reference.torch_order(x)), model, state, x)


@pytest.mark.parametrize(("name", "size"), [("vit_mini", 32), ("vit_tiny_patch16", 224)])
def test_the_output_of_every_stage(name, size):
    net = reference.model(name, CLASSES, size)
    state = variables(reference.state_dict(net, size))
    assert_stages(net, models.create(name, CLASSES), state, reference.images(2, size))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"registers": 3}, {"reg_tokens": 3}),
        ({"registers": 2, "all_positions": False, "layer_scale": 0.3},
         {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3}),
        ({"mean_pool": True, "class_token": False, "qkv_bias": False},
         {"global_pool": "avg", "class_token": False, "qkv_bias": False, "fc_norm": False}),
        ({"mean_pool": True, "fc_norm": True, "registers": 2}, {"global_pool": "avg", "reg_tokens": 2}),
        ({"mean_pool": True}, {"global_pool": "avg", "fc_norm": False}),
    ],
    ids=lambda fields: "-".join(fields),
)  # fmt: skip
def test_variants(ours, theirs):
    net = reference.model("vit_mini", CLASSES, 32, **theirs)
    variant = dataclasses.replace(MINI, **ours)
    flat = reference.converted(vit.tables(variant)["timm"], reference.state_dict(net, 32))
    model = vit.ViT(variant=variant, num_classes=CLASSES, size=32)
    shapes = traverse_util.flatten_dict(models.shapes(model), sep="/")
    assert {path: value.shape for path, value in flat.items()} == {path: s.shape for path, s in shapes.items()}
    assert_stages(net, model, traverse_util.unflatten_dict(flat, sep="/"), reference.images(2, 32))


def assert_loads(path, net_logits, x):
    """The file fits vit_mini strictly, and its logits are the reference's."""
    model = models.create("vit_mini", CLASSES)
    loaded = weights.load(str(path), "vit_mini", models.shapes(model))
    got = jax.jit(model.apply)({"params": loaded.params}, x)
    reference.assert_close(got, net_logits)
    return loaded.report


def test_files_of_timm(tmp_path):
    net = reference.model("vit_mini", CLASSES, 32)
    x, tensors = reference.images(2, 32), reference.state_dict(net, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    report = assert_loads(tmp_path / "model.safetensors", net(reference.torch_order(x)).detach().numpy(), x)
    assert report.naming == "timm"
    assert len(report.loaded) == len(tensors) + 6 * 2 * 2  # query, key and value, their kernels and biases


def test_files_of_torchvision(tmp_path):
    torchvision = reference.import_torchvision()
    net = torchvision.models.VisionTransformer(32, 8, 6, 2, 32, 128, num_classes=CLASSES).eval()
    x = reference.images(2, 32)
    save_file(reference.state_dict(net, 32), tmp_path / "model.safetensors")
    report = assert_loads(tmp_path / "model.safetensors", net(reference.torch_order(x)).detach().numpy(), x)
    assert report.naming == "torchvision"


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "Dinov2Model", "ViTModel"])
def test_files_of_transformers(kind, tmp_path):
    """Written by the library itself, in the names of the published files."""
    reference.import_torchvision()
    transformers = pytest.importorskip("transformers", reason=reference.EXTRA)
    config = transformers.Dinov2Config if kind.startswith("Dino") else transformers.ViTConfig
    fields = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    mlp = {"mlp_ratio": 4} if kind.startswith("Dino") else {"intermediate_size": 128}
    net = getattr(transformers, kind)(config(**fields, **mlp, layer_norm_eps=1e-6, num_labels=CLASSES)).eval()
    reference.fill(net)
    net.save_pretrained(tmp_path)
    x = reference.images(2, 32)
    outputs = net(reference.torch_order(x))
    path = tmp_path / "model.safetensors"
    if kind == "ViTForImageClassification":
        report = assert_loads(path, outputs.logits.detach().numpy(), x)
        assert report.ignored == ()
    else:
        model = models.create("vit_mini", CLASSES)
        if kind == "Dinov2Model":
            model = model.clone(variant=dataclasses.replace(MINI, layer_scale=1.0))
        shapes = models.shapes(model)
        loaded = weights.load(str(path), "vit_mini", shapes, reset=("head",))
        head = {"kernel": np.zeros((32, CLASSES)), "bias": np.zeros(CLASSES)}
        got = jax.jit(model.apply, static_argnames="stop")({"params": loaded.params | {"head": head}}, x, stop="head")
        reference.assert_close(got, outputs.last_hidden_state[:, 0].detach().numpy())
        report = loaded.report
        assert all("pooler" in name or "mask_token" in name for name in report.ignored)
    assert report.naming == "transformers"


@pytest.mark.parametrize(("old", "new", "prefix"), [(14, 24, 1), (24, 14, 1), (37, 16, 0), (7, 14, 5)])
def test_positions_are_resized_as_timm_does(old, new, prefix):
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    reference.import_torchvision()
    timm = pytest.importorskip("timm", reason=reference.EXTRA)
    position = reference.draw("position", (1, prefix + old**2, 8))
    expected = timm.layers.resample_abs_pos_embed(
        torch.from_numpy(position), [new, new], num_prefix_tokens=prefix
    )[0].numpy()  # fmt: skip
    reference.assert_close(positions.resize(position[0], prefix + new**2, prefix), expected, 1e-5)
