"""Images of one channel: what the network sees of a photograph, and a run from weights for three."""

import json

import jax
import numpy as np
import pytest
from conftest import changed
from PIL import Image
from safetensors.numpy import load_file, save_file

from tljax import convert, experiment, models, predict, train
from tljax.config import base
from tljax.data.images import decode
from tljax.errors import UserError
from tljax.step import normalise
from tljax.weights import inverse, matcher, resizing

# One of each architecture.
TINY = [
    "resnext_tiny", "resnetv2_tiny", "vgg_tiny", "mobilenet_v3_tiny", "efficientnet_tiny", "convnext_mini",
    "densenet_mini", "swin_mini", "vit_mini", pytest.param("inception_tiny", marks=pytest.mark.slow),
]  # fmt: skip


def test_grey_is_pillow_s_to_a_rounding():
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 7, 3), np.uint8)
    got = np.asarray(normalise(image, (0.25,), (0.5,)))
    assert got.shape == (1, 9, 7, 1)
    grey = np.asarray(Image.fromarray(image[0]).convert("L"), np.float32)[..., None]
    assert np.abs((got[0] * 0.5 + 0.25) * 255 - grey).max() <= 0.51
    # What the reader makes of a grey file, three equal channels, is that file's grey again; 16 bits keep their high 8.
    file = np.arange(0, 252, 4, np.uint8).reshape(9, 7)
    for pixels in (file, file.astype(np.uint16) << 8):
        from io import BytesIO

        stored = BytesIO()
        Image.fromarray(pixels).save(stored, "PNG")
        seen = np.asarray(normalise(decode(stored.getvalue())[None], (0.0,), (1.0,)))
        np.testing.assert_allclose(seen[0, ..., 0] * 255, file, atol=1e-3)
    # With three means nothing is mixed.
    np.testing.assert_allclose(normalise(image, (0.0,) * 3, (1 / 255,) * 3), image, rtol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_every_network_is_made_for_any_number_of_channels(name):
    """One kernel, in the first stage, has the channels of the image as its inputs; nothing else changes."""
    three, five = (matcher.flatten(models.shapes(models.create(name, 4, channels=n))) for n in (3, 5))
    (leaf,) = (path for path in three if three[path].shape != five[path].shape)
    assert leaf == models.stem(name)
    assert leaf.split("/")[1] == models.create(name, 4).stages[0]
    assert (three[leaf].shape[2], five[leaf].shape[2]) == (3, 5)


def test_what_is_made_of_three_channels_by_hand():
    kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    red, green, blue = np.moveaxis(kernel, 2, 0)
    np.testing.assert_allclose(resizing.adapted(kernel, 1)[:, :, 0], red + green + blue, rtol=1e-5, atol=1e-6)
    five = np.moveaxis(resizing.adapted(kernel, 5), 2, 0)
    np.testing.assert_allclose(five, 0.6 * np.stack([red, green, blue, red, green]), rtol=1e-6)


def test_a_run_on_grey_images(tiny, photos, tmp_path, capsys):
    shapes = matcher.flatten(models.shapes(models.create("resnet_tiny", 3)))
    leaves = {leaf: np.full(s.shape, 0.1 + (leaf.endswith("var")), np.float32) for leaf, s in shapes.items()}
    names = inverse.names(models.conversion("resnet_tiny")["torchvision"], leaves)
    save_file({n: inverse.made(parts, leaves) for n, parts in names.parts.items()}, tmp_path / "w.safetensors")
    fields = {"weights": tmp_path / "w.safetensors", "channels": 1, "train_for": "3 steps"}
    workdir = tmp_path / "run"
    assert train.main([*changed(tiny, workdir, **fields), "--config.checkpoint.delta=True"]) == 0
    assert "1 adapted: stem/conv1/kernel: 3 → 1 channels by sum" in " ".join(capsys.readouterr().out.split())
    assert json.loads((workdir / "config.json").read_text())["channels"] == 1
    image = next(photos.glob("test/*/*.png"))
    assert predict.main([f"--workdir={workdir}", str(image)]) == 0
    convert.convert(str(workdir), tmp_path / "out.safetensors")
    kernel = load_file(tmp_path / "out.safetensors")["params/stem/conv1/kernel"]  # frozen
    np.testing.assert_allclose(kernel, np.full((7, 7, 1, 8), 0.3), rtol=1e-6)


def test_the_mean_of_a_card_for_three_channels():
    config = base("resnet_tiny")
    config.weights, config.channels = "", 1
    seen = experiment.build(config, 3).preprocessing
    assert seen.mean == pytest.approx((np.mean([0.485, 0.456, 0.406]),))
    assert seen.std == pytest.approx((np.mean([0.229, 0.224, 0.225]),))


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_that_photographs_do_not_have(channels):
    config = base("resnet_tiny")
    config.weights, config.channels = "", channels
    with pytest.raises(UserError, match=rf"config.channels = {channels}: expected one of 1, 3"):
        experiment.build(config, 3)


def test_shapes_of_images_that_are_not_square():
    shapes = models.shapes(models.create("vit_mini", 4), (32, 16))["params"]
    assert shapes["embed"]["position"].shape == (1 + 4 * 2, 32)
    assert jax.tree.structure(shapes) == jax.tree.structure(models.shapes(models.create("vit_mini", 4))["params"])
