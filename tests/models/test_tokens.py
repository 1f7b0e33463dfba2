"""CLIP's tokens: by hand, against transformers on a small vocabulary, against open_clip on the real one."""

import gzip
import importlib.util
import json
import shutil

import clip_files
import numpy as np
import pytest
import torch_reference as reference

from tljax import tokens
from tljax.errors import UserError

pytest.importorskip("tokenizers", reason="pip install -e '.[clip]'")

TEXTS = [
    "a photo of the red green blue.",
    "It's ÜBER-cool & we'll see:  3D-models, don't\tyou?",
    "photophoto redgreen 1234 l'été Straße ﬁ … 日本語 😀!?",
    "cafe\u0301 \u00a0 no-break <|startoftext|> <|endoftext|> 's",
    "",
]


@pytest.fixture
def folder(tmp_path):
    clip_files.write_vocabulary(tmp_path / "vocabulary")
    return tmp_path / "vocabulary"


def merge_list(path):
    """OpenAI's form: one line about the file, then the merges."""
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(" ".join(pair) for pair in clip_files.merges())]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def test_by_hand(folder):
    """Words that the merges know are one token each; others fall into letters, the last one marked."""
    number = clip_files.vocabulary()
    tokenizer = tokens.load(str(folder))
    assert tokenizer.size == len(number)
    assert tokenizer.end == number["<|endoftext|>"]
    words = ["photo</w>", "of</w>", "the</w>", "re", "d", "s</w>", ".</w>"]
    expected = [number[word] for word in ["<|startoftext|>", *words, "<|endoftext|>", "<|endoftext|>"]]
    np.testing.assert_array_equal(tokenizer(["Photo  OF the reds."], 10), [expected])


def test_the_three_forms_are_one(folder, tmp_path):
    """vocab.json with merges.txt, OpenAI's list, and a tokenizer.json."""
    from tokenizers import Tokenizer

    first = tokens.load(str(folder))
    (tmp_path / "json").mkdir()
    first._backend.save(str(tmp_path / "json/tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "json/tokenizer.json")).get_vocab() == clip_files.vocabulary()
    forms = [tmp_path / "json", folder / "vocab.json", merge_list(tmp_path / "merges.txt.gz")]
    for form in forms:
        other = tokens.load(str(form))
        assert (other.size, other.end) == (first.size, first.end)
        np.testing.assert_array_equal(other(TEXTS, 80), first(TEXTS, 80))
    whole = tokens.load("", str(tmp_path / "json"))
    assert whole.source == str(tmp_path / "json/tokenizer.json")


def test_against_transformers(folder):
    reference.import_torchvision()
    transformers = pytest.importorskip("transformers", reason=reference.EXTRA)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = tokens.load(str(folder))(TEXTS, 96)
    expected = theirs(TEXTS, padding="max_length", max_length=96)["input_ids"]
    np.testing.assert_array_equal(ours, expected)
    theirs.save_pretrained(folder / "saved")
    assert (folder / "saved/tokenizer.json").is_file()
    np.testing.assert_array_equal(tokens.load(str(folder / "saved"))(TEXTS, 96), expected)


def has_real():
    return importlib.util.find_spec("open_clip") is not None


@pytest.mark.skipif(not has_real(), reason="pip install --no-deps open_clip_torch")
def test_the_real_vocabulary():
    """The numbers that are known from OpenAI's examples; found in the package without being told."""
    tokenizer = tokens.load("")
    assert (tokenizer.size, tokenizer.end) == (49408, 49407)
    (row,) = tokenizer(["a photo of a cat."], 10)
    assert row.tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407, 49407, 49407]
    named = tokens.load("package:open_clip/bpe_simple_vocab_16e6.txt.gz")
    np.testing.assert_array_equal(named(TEXTS, 77), tokenizer(TEXTS, 77))


@pytest.mark.skipif(not has_real(), reason="pip install --no-deps open_clip_torch")
def test_the_real_vocabulary_against_open_clip():
    """Its own tokenizer mends texts before (ftfy), ours does not: of those that need it not."""
    reference.import_torchvision()
    open_clip = pytest.importorskip("open_clip")
    texts = [text for text in TEXTS if "ﬁ" not in text and "<|" not in text]
    expected = open_clip.tokenizer.SimpleTokenizer()(texts).numpy()
    ours = tokens.load("")(texts, 77)
    ended = np.cumsum(expected == 49407, axis=1) - (expected == 49407) > 0
    np.testing.assert_array_equal(np.where(ended, 0, ours), np.where(ended, 0, expected))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("vocab.json", "{", "cannot be used: Expecting property name"),
        ("vocab.json", json.dumps({"a": 0}), "cannot be used: "),
        ("merges.txt", None, "merges.txt does not exist"),
        ("tokenizer.json", json.dumps({"model": 3}), "cannot be used: "),
        ("bpe_simple_vocab_16e6.txt.gz", "no gzip", "Not a gzipped file"),
    ],
)
def test_damaged_files(folder, name, content, line):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    given = folder / name if name.endswith(".gz") else folder
    with pytest.raises(UserError) as error:
        tokens.load(str(given))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_tokenizer_of_clip(folder, tmp_path):
    words = {word: i for i, word in enumerate(w for w in clip_files.vocabulary() if "<|" not in w)}
    (folder / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"it has no <\|startoftext\|> or no <\|endoftext\|>"):
        tokens.load(str(folder))
    for given, line in (
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(tmp_path), "the folder holds none of tokenizer.json, vocab.json"),
        ("package:nothing/x.gz", "the package nothing is not installed"),
    ):
        with pytest.raises(UserError, match=line):
            tokens.load(given)


def test_beside_weights_of_the_hub(folder, tmp_path, monkeypatch):
    """In the snapshot of the cache that the weights are of; no network is asked."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install -e '.[hf]'")
    from huggingface_hub import constants

    assert huggingface_hub
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tokens, "PACKAGES", ())
    repository = tmp_path / "hub/models--org--name"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40) / "sub")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    found = tokens.load("", "hf:org/name/sub/model.safetensors")
    assert found.size == tokens.load("hf:org/name/sub").size == len(clip_files.vocabulary())
    with pytest.raises(UserError, match="neither its cache nor the hub gives a "):
        tokens.load("hf:org/name")
    with pytest.raises(UserError, match="no tokenizer is beside the weights hf:org/other"):
        tokens.load("", "hf:org/other")
