"""A tiny network that has "learned" a source task: random weights in a file, a head of seven classes, photographs."""

from pathlib import Path

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tljax import models
from tljax.plan import paths

CLASSES = 7
NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def variables(seed: int = 3) -> dict:
    """resnet_tiny's variables as numpy; the statistics are not the trivial ones."""
    found = models.initialise(models.create("resnet_tiny", CLASSES), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    off = lambda x: (x + rng.normal(0, 0.1, x.shape)).astype(np.float32)
    found["batch_stats"] = jax.tree.map(off, found["batch_stats"])
    return jax.tree.map(np.asarray, found)


def torch_name(path: str) -> str:
    """torchvision's name of a leaf of resnet_tiny: a layer has one block."""
    *inside, leaf = path.split("/")[1:]
    stage, inside = inside[0], inside[1:]
    module = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
    keys = [module.get(key, key) for key in inside]
    if stage == "head":
        keys = ["fc"]
    elif stage != "stem":
        keys = [f"layer{stage.removeprefix('block')}.0", *keys]
    return ".".join([*keys, NAMES[leaf]])


def write(file: Path, seed: int = 3) -> dict:
    """Writes the weights as torchvision would; returns what was written, as variables."""
    found, arrays = variables(seed), {}
    for path, value in zip(paths(found), jax.tree.leaves(found)):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        arrays[torch_name(path)] = np.ascontiguousarray(value)
    save_file(arrays, file)
    return found


def photographs(root: Path, per_class: int = 3) -> Path:
    """A folder a class, named by its number: noisy colours."""
    rng = np.random.default_rng(5)
    for label in range(CLASSES):
        folder = root / str(label)
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.normal(rng.uniform(40, 220, 3), 50, (36, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
