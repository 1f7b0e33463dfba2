"""The stock `fashion_mnist`: built offline from raw files that the test makes, read without TensorFlow."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import changed

from tljax import data, train
from tljax.data import prepare
from tljax.errors import UserError

pytest.importorskip("tensorflow_datasets")

TRAIN, TEST = 300, 60

# The stock builder knows the size and the checksum of the original files. The small ones of this test get in
# by telling it theirs; all else is the builder's own code. In a process of its own, TensorFlow stays out of
# the other tests.
BUILD = f"""
import sys
from etils import epath
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import mnist
from tljax.data import prepare

raw, built = sys.argv[1:]
mnist._TRAIN_EXAMPLES, mnist._TEST_EXAMPLES = {TRAIN}, {TEST}
mnist.FashionMNIST.url_infos = {{
    mnist.FashionMNIST.URL + file.name: checksums.compute_url_info(file) for file in epath.Path(raw).iterdir()
}}
sys.exit(prepare.main(["fashion_mnist", f"--manual_dir={{raw}}", f"--data_dir={{built}}"]))
"""


def idx(array: np.ndarray) -> bytes:
    """The IDX format: magic (0, 0, type, rank), big-endian sizes, the values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def raw_split(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("tensorflow_datasets")
    raw, built = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("built")
    for prefix, seed, n in (("train", 0, TRAIN), ("t10k", 1, TEST)):
        images, labels = raw_split(seed, n)
        (raw / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (raw / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(raw), str(built)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "tensorflow is not installed" in done.stderr:
        pytest.skip("building needs TensorFlow: the extra prepare")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prepared:" in done.stdout
    return built


def config(built, **kw):
    return data.defaults() | {"source": "tfds:fashion_mnist", "data_dir": str(built)} | kw


def test_every_example_arrives_with_its_label(built):
    found = data.load(config(built, val="none"))
    assert found.classes[:2] == ("T-shirt/top", "Trouser")
    assert len(found.classes) == 10
    assert (len(found.train), len(found.val), len(found.test)) == (TRAIN, 0, TEST)
    for split, (images, labels) in ((found.train, raw_split(0, TRAIN)), (found.test, raw_split(1, TEST))):
        truth = {image.tobytes(): label for image, label in zip(images, labels)}
        batches = list(data.eval_batches(split, batch_size=32, size=28, crop=1.0))
        real = np.concatenate([b["mask"] for b in batches]) == 1
        pixels = np.concatenate([b["image"] for b in batches])[real]
        assert (pixels == pixels[..., :1]).all()  # grey, in three channels
        seen = {p[..., 0].tobytes(): label for p, label in zip(pixels, split.labels)}
        assert seen == truth


def test_training_batches_and_the_drawn_val(built):
    found = data.load(config(built))
    assert (len(found.train), len(found.val)) == (TRAIN * 9 // 10, TRAIN // 10)
    assert np.bincount(found.val.labels).tolist() == [3] * 10
    batch = next(data.train_batches(found.train, batch_size=16, seed=0, stop_step=1, size=32))
    assert batch["image"].shape == (16, 32, 32, 3)
    assert "tensorflow" not in sys.modules


def test_what_is_not_prepared_is_not_downloaded(built):
    with pytest.raises(
        UserError, match=r"nearest: fashion_mnist; prepare it: python -m tljax.data.prepare fashion_mnst"
    ):
        data.load(config(built, source="tfds:fashion_mnst"))
    with pytest.raises(UserError, match=r"fashion_mnist:1\.0\.0 is not prepared in"):
        data.load(config(built, source="tfds:fashion_mnist:1.0.0"))
    with pytest.raises(UserError, match="unknown feature of fashion_mnist 'lable'; nearest: label"):
        data.load(config(built, label_column="lable"))


def test_without_tfds_the_extra_is_named(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"tensorflow_datasets is not installed: pip install -e '\.\[prepare\]'"):
        data.load(config(built))


def test_preparing_looks_for_the_raw_files_first(built, tmp_path):
    with pytest.raises(UserError, match=r"lacks t10k-images-idx3-ubyte.gz, t10k-labels"):
        prepare.main(["fashion_mnist", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="no such directory"):
        prepare.main(["fashion_mnist", f"--manual_dir={tmp_path / 'no'}", f"--data_dir={tmp_path}"])


def test_a_few_steps_of_training(built, tiny, tmp_path):
    argv = changed(
        tiny, tmp_path, data_source="tfds:fashion_mnist", data_data_dir=built, train_for="4 steps", data_limit=4
    )
    assert train.main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["data"]["classes"] == 10
    assert summary["data"]["test"] == TEST == np.sum(summary["test"]["confusion"])
