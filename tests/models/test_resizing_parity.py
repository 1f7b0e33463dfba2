"""Patches, positions and image channels against timm and scipy; Google's npz names against timm's own loaders."""

import jax
import numpy as np
import pytest
import torch_reference as reference
import torch_zoo
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.errors import UserError
from tljax.weights import positions, resizing

CLASSES = 10
RNG = np.random.default_rng(3)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("old", "new"), [((8, 8), (16, 16)), ((16, 16), (8, 8)), ((14, 10), (16, 12)), ((8, 8), (8, 8))]
)
def test_patches_are_resized_as_timm_does(old, new, method):
    torch, timm = pytest.importorskip("torch", reason=reference.EXTRA), torch_zoo.import_timm()
    kernel = RNG.normal(size=(*old, 3, 5)).astype(np.float32)
    theirs = timm.layers.resample_patch_embed(
        torch.from_numpy(kernel.transpose(3, 2, 0, 1)), list(new), interpolation=method, antialias=method == "bicubic"
    )  # fmt: skip
    got = positions.resize_patch(kernel, *new, method)
    assert got.dtype == np.float32
    reference.assert_close(got, theirs.numpy().transpose(2, 3, 1, 0), 1e-4)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (14, 14)), ((4, 9), (6, 3)), ((5, 5), (2, 2))])
def test_bilinear_positions_are_those_of_timm_for_google_s_files(old, new):
    torch, timm = pytest.importorskip("torch", reason=reference.EXTRA), torch_zoo.import_timm()
    position = RNG.normal(size=(1, 2 + old[0] * old[1], 6)).astype(np.float32)
    expected = timm.layers.resample_abs_pos_embed(
        torch.from_numpy(position), list(new), list(old), num_prefix_tokens=2, interpolation="bilinear", antialias=False
    )[0].numpy()  # fmt: skip
    got = positions.resize(position[0], 2 + new[0] * new[1], 2, "bilinear", old, new)
    reference.assert_close(got, expected, 1e-5)
    expected = timm.layers.resample_abs_pos_embed(
        torch.from_numpy(position), list(new), list(old), num_prefix_tokens=2
    )[0].numpy()  # fmt: skip
    reference.assert_close(positions.resize(position[0], 2 + new[0] * new[1], 2, "bicubic", old, new), expected, 1e-5)


def convolutional(name, size):
    return reference.model(name, CLASSES, size), reference.images(2, size)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["resnet18", "vit_mini"])
def test_images_of_other_channels_as_timm_takes_them(name, channels, tmp_path):
    """Its `adapt_input_conv` of the file's first kernel, in a network made for so many channels."""
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    timm = torch_zoo.import_timm()
    net = reference.model(name, CLASSES, 32)
    arrays = reference.state_dict(net, 32)
    save_file(arrays, tmp_path / "model.safetensors")
    first = "conv1" if name == "resnet18" else "patch_embed.proj"
    adapted = timm.models._manipulate.adapt_input_conv(channels, torch.from_numpy(arrays[f"{first}.weight"]))
    old = net.get_submodule(first)
    new = torch.nn.Conv2d(
        channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
    )
    new.weight.data, new.bias = adapted, old.bias
    net.set_submodule(first, new)
    x = RNG.normal(size=(2, 32, 32, channels)).astype(np.float32)
    expected = net(reference.torch_order(x)).detach().numpy()

    model = models.create(name, CLASSES, channels=channels)
    shapes, path = models.shapes(model, 32), str(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"3×64, expected .*×{channels}×" if name == "resnet18" else "misshaped: embed"):
        weights.load(path, name, shapes)
    loaded = weights.load(path, name, shapes, channels=channels)
    got = jax.jit(model.apply)({"params": loaded.params, "batch_stats": loaded.batch_stats}, x)
    reference.assert_close(got, expected)
    how = "sum" if channels == 1 else f"repetition, times 3/{channels}"
    leaf = models.stem(name).removeprefix("params/")
    assert loaded.report.adapted == (f"{leaf}: 3 → {channels} channels by {how}",)
    assert loaded.report.resized == ()
    assert loaded.report.line().endswith(f"1 adapted: {loaded.report.adapted[0]}")


def google_names(variant, newer=False, root=""):
    """{name: shape} of an .npz of vision_transformer, or of big_vision, written out by hand."""
    width, heads = variant.width, variant.heads
    attention, norm2, mlp = (0, 1, 0) if newer else (1, 2, 3)
    names = {
        "cls": (1, 1, width),
        "embedding/kernel": (variant.patch, variant.patch, 3, width),
        "embedding/bias": (width,),
        ("" if newer else "Transformer/posembed_input/") + "pos_embedding": (1, 17, width),
        "head/kernel": (width, CLASSES),
        "head/bias": (CLASSES,),
    }
    norms = ["Transformer/encoder_norm"]
    for i in range(variant.depth):
        block = f"Transformer/encoderblock_{i}"
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_{norm2}"]
        at = f"{block}/MultiHeadDotProductAttention_{attention}"
        for name in ("query", "key", "value"):
            names |= {
                f"{at}/{name}/kernel": (width, heads, width // heads),
                f"{at}/{name}/bias": (heads, width // heads),
            }
        names |= {f"{at}/out/kernel": (heads, width // heads, width), f"{at}/out/bias": (width,)}
        for n, (inputs, out) in enumerate(((width, 4 * width), (4 * width, width))):
            dense = f"{block}/MlpBlock_{mlp}/Dense_{n}"
            names |= {f"{dense}/kernel": (inputs, out), f"{dense}/bias": (out,)}
    names |= {f"{norm}/{part}": (width,) for norm in norms for part in ("scale", "bias")}
    return {root + name: shape for name, shape in names.items()}


@pytest.mark.parametrize(
    ("newer", "root"), [(False, ""), (False, "opt/target/"), (True, "params/"), (True, "params/img/")]
)
def test_google_s_files_as_timm_s_own_loader_reads_them(newer, root, tmp_path):
    net, name = reference.model("vit_mini", CLASSES, 32), "vit_mini"
    arrays = {
        key: reference.draw(key.replace("scale", "weight"), shape)
        for key, shape in google_names(models.vit.VARIANTS[name], newer, root).items()
    }
    path = tmp_path / "vit.npz"
    np.savez(path, **arrays)
    net.load_pretrained(str(path))
    model, x = models.create(name, CLASSES), reference.images(2, 32)
    loaded = weights.load(str(path), name, models.shapes(model))
    assert (loaded.report.naming, loaded.report.ignored) == ("google", ())
    got = jax.jit(model.apply)({"params": loaded.params}, x)
    reference.assert_close(got, net(reference.torch_order(x)).detach().numpy())

    # The layer between in the oldest files belongs to their head.
    between = {f"{root}pre_logits/kernel": np.zeros((32, 32)), f"{root}pre_logits/bias": np.zeros(32)}
    np.savez(path, **arrays, **between)
    with pytest.raises(UserError, match=r"2 unexpected: .*pre_logits/kernel \(head/pre_logits/kernel\)"):
        weights.load(str(path), name, models.shapes(model))
    assert set(weights.load(str(path), name, models.shapes(model), reset="head").report.ignored) > set(between)
    # Another number of heads in arrays of the same size is another network.
    key = next(key for key in arrays if key.endswith("query/kernel"))
    np.savez(path, **arrays | {key: arrays[key].reshape(32, 4, 8)})
    with pytest.raises(UserError, match=r"misshaped: block1/attn/query/kernel \(32×4×8, expected 32×32\)"):
        weights.load(str(path), name, models.shapes(model))
    # An attention pool, as in SigLIP, is no network here.
    np.savez(path, **arrays, **{f"{root}MAPHead_0/probe": np.zeros((1, 1, 32))})
    with pytest.raises(UserError, match=r"1 unexpected: .*MAPHead_0/probe"):
        weights.load(str(path), name, models.shapes(model))


def test_weights_for_patches_of_another_size(tmp_path):
    """A file with patches of 8 pixels in a network with patches of 16: as timm's conversion of the same file."""
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    import dataclasses

    from timm.models.vision_transformer import checkpoint_filter_fn

    net = reference.model("vit_mini", CLASSES, 32)
    arrays = reference.state_dict(net, 32)
    save_file(arrays, tmp_path / "model.safetensors")
    other = reference.model("vit_mini", CLASSES, 48, patch_size=16)
    other.load_state_dict(checkpoint_filter_fn({k: torch.from_numpy(v) for k, v in arrays.items()}, other))
    variant = dataclasses.replace(models.vit.VARIANTS["vit_mini"], patch=16)
    model, x = models.create("vit_mini", CLASSES).clone(variant=variant), reference.images(2, 48)
    shapes, path = models.shapes(model, 48), str(tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        weights.load(path, "vit_mini", shapes)
    assert str(error.value).endswith("to resize them: resize=('embed/patch/kernel', 'embed/position')")
    loaded = weights.load(path, "vit_mini", shapes, resize=("embed/patch/kernel", "embed/position"))
    assert sorted(loaded.report.resized) == ["embed/patch/kernel", "embed/position"]
    got = jax.jit(model.apply)({"params": loaded.params}, x)
    reference.assert_close(got, other(reference.torch_order(x)).detach().numpy())
    # Both at once, one channel and other patches.
    model = model.clone(channels=1)
    loaded = weights.load(path, "vit_mini", models.shapes(model, 48), resize=("embed",), channels=1)
    whole = positions.resize_patch(resizing.adapted(arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0), 1), 16, 16)
    reference.assert_close(loaded.params["embed"]["patch"]["kernel"], whole, 1e-5)
    assert len(loaded.report.adapted) == 1
