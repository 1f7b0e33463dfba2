"""Photographs in folders: what comes out, and every mistake with its message."""

import pytest
from data_sources import load, names, photo, put

from tljax import data
from tljax.errors import UserError


def test_five_hundred_photographs_in_class_folders(tmp_path):
    root = put(tmp_path, *(f"{kind}/{i}.jpg" for kind in ("pear", "apple") for i in range(20)))
    put(root / "pear" / "more", "deep.PNG")
    (root / "pear" / "notes.txt").write_text("not a photograph")
    (root / "pear" / ".hidden.jpg").write_text("not a photograph")
    (root / ".cache").mkdir()
    found = load(f"folder:{root}")
    assert found.classes == ("apple", "pear")
    # deep.PNG repeats pear/0.jpg's noise as another file: other bytes, another photograph.
    assert (len(found.train), len(found.val), len(found.test)) == (29, 4, 8)
    assert "files of other endings ignored: 1 (.txt)" in found.report
    assert names(found) == names(load(f"folder:{root}"))
    for split in (found.train, found.val, found.test):
        for i, name in enumerate(split.names):
            image, label = split[i]
            assert image == (root / name).read_bytes()
            assert name.startswith(found.classes[label] + "/")
    batches = list(data.eval_batches(found.test, batch_size=8, size=6))
    assert batches[0]["mask"].tolist() == [1] * 8


def test_folders_with_splits(tmp_path):
    put(
        tmp_path,
        "train/a/1.jpg",
        "train/a/2.jpg",
        "train/b/3.jpg",
        "train/b/4.jpg",
        "validation/a/5.jpg",
        "test/b/6.jpg",
    )
    found = load(f"folder:{tmp_path}")
    assert names(found) == {
        "train": {"train/a/1.jpg", "train/a/2.jpg", "train/b/3.jpg", "train/b/4.jpg"},
        "val": {"validation/a/5.jpg"},
        "test": {"test/b/6.jpg"},
    }


def test_copies_in_folders_are_used_once(tmp_path):
    put(
        tmp_path,
        *(f"train/{kind}/{i}.jpg" for kind in "ab" for i in range(3)),
        "test/a/6.jpg",
        "test/b/7.jpg",
    )
    (tmp_path / "train/a/copy.jpg").write_bytes((tmp_path / "train/a/0.jpg").read_bytes())
    (tmp_path / "train/b/leak.jpg").write_bytes((tmp_path / "test/b/7.jpg").read_bytes())
    found = load(f"folder:{tmp_path}", val="none")
    assert (len(found.train), len(found.test)) == (6, 2)
    assert "train/b/leak.jpg" not in found.train.names
    (tmp_path / "train/b/wrong.jpg").write_bytes((tmp_path / "train/a/1.jpg").read_bytes())
    with pytest.raises(UserError, match=r"different labels: 1 \(train/a/1.jpg = train/b/wrong.jpg\)"):
        load(f"folder:{tmp_path}", val="none")


def test_a_broken_file_in_a_folder(tmp_path):
    root = put(tmp_path, *(f"{kind}/{i}.jpg" for kind in "ab" for i in range(6)))
    (root / "a" / "cut.jpg").write_bytes(photo(99)[:-200])
    (root / "b" / "text.jpg").write_text("no image")
    found = load(f"folder:{root}", on_bad="skip", val="none", test="fraction:0.2")
    assert len(found.train) + len(found.test) == 12
    assert any(line == "unreadable files skipped: 2 (a/cut.jpg, b/text.jpg)" for line in found.report)
    found = load(f"folder:{root}", val="none")
    with pytest.raises(UserError, match=r"^(a/cut|b/text).jpg: "):
        [list(data.eval_batches(split, batch_size=2, size=8)) for split in (found.train, found.test)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class folders"),
        (["a/1.jpg", "a/2.jpg", "a/3.jpg"], r"one class only \(a\)"),
        (["a/1.jpg", "b/readme.txt"], r"class folder .*b holds no images \(1 other files\)"),
        (["train/a/1.jpg", "train/b/2.jpg", "test/c/3.jpg"], "test has classes that train lacks: c"),
        (["train/a/1.jpg", "train/b/2.jpg", "tset/a/3.jpg"], "also tset: expected train, val and test only"),
        (
            ["train/a/1.jpg", "train/b/2.jpg", "test/3.jpg"],
            r"test holds no class folders; expected test/<class>",
        ),
    ],
)
def test_wrong_folders(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        load(f"folder:{tmp_path}", val="none")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist"):
        load(f"folder:{tmp_path / 'nothing'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a directory"):
        load(f"folder:{tmp_path / 'file'}")
