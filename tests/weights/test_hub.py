"""hf: sources from a cache folder laid out as the hub's library does it; no network is ever asked."""

import hashlib
import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from tljax import models, weights
from tljax.errors import UserError
from tljax.weights import hub

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, name, content, commit=COMMIT, branch="main", repo="org/name"):
    """A file in the cache: its content among the blobs, a link to it in a snapshot, the commit of a branch."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link, ref = folder / "snapshots" / commit / name, folder / "refs" / branch
    for path in (blob, link, ref):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    ref.write_text(commit)
    return link


def tensors(number=0.0):
    return save({"a": np.full(3, number, np.float32)})


def located(spec):
    return hub.locate(spec, "weights")


def error_of(spec):
    with pytest.raises(UserError) as caught:
        located(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("weights: ")


def test_a_file_in_the_cache(cache):
    plain = put(cache, "model.safetensors", tensors())
    put(cache, "pytorch_model.bin", b"")
    more = put(cache, "sub/w.npz", b"")
    assert located("hf:org/name") == located("hf:org/name@main") == located(f"hf:org/name@{COMMIT}") == plain
    assert located("hf:org/name/sub/w.npz") == located("hf:org/name@main/sub/w.npz") == more
    assert weights.read(located("hf:org/name"))["a"].shape == (3,)


def test_revisions(cache):
    put(cache, "model.safetensors", tensors(1))
    new = put(cache, "model.safetensors", tensors(2), OTHER, "refs/pr/7")
    tagged = put(cache, "model.safetensors", tensors(3), "c" * 40, "v1.0")
    assert located("hf:org/name@refs/pr/7") == located("hf:org/name@refs/pr/7/model.safetensors") == new
    assert located("hf:org/name@v1.0") == tagged
    assert "hf download org/name model.safetensors --revision v2`" in error_of("hf:org/name@v2")


def test_what_the_cache_has_comes_first(cache):
    old = put(cache, "pytorch_model.bin", b"")
    assert located("hf:org/name") == old
    new = put(cache, "model.safetensors", tensors())
    assert located("hf:org/name") == new
    inner = put(cache, "sub/pytorch_model.bin", b"")
    assert located("hf:org/name/sub") == located("hf:org/name/sub/") == inner


def with_index(cache, held=(1, 2), folder=""):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i in held:
        put(cache, folder + shards[i - 1], save({f"a{i}": np.full(2, i, np.float32)}))
    places = {f"a{i}": shards[i - 1] for i in (1, 2)}
    return put(cache, f"{folder}model.safetensors.index.json", json.dumps({"weight_map": places}).encode())


@pytest.mark.parametrize("folder", ["", "sub/"])
def test_shards(cache, folder):
    path = with_index(cache, folder=folder)
    spec = f"hf:org/name/{folder}".rstrip("/")
    assert located(spec) == path
    assert {name: a[0] for name, a in weights.read(located(spec)).items()} == {"a1": 1, "a2": 2}


def test_shards_are_of_the_index_s_commit(cache):
    path = with_index(cache)
    asked = []
    for shard in path.parent.glob("*.safetensors"):
        shard.unlink()

    def download(repo, name, revision, cache_dir):
        asked.append((repo, name, revision))
        return str(put(cache, name, tensors()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hub, "_resolves", lambda endpoint: True)
        patch.setattr(huggingface_hub, "hf_hub_download", download)
        assert located("hf:org/name") == path
    assert asked == [("org/name", f"model-0000{i}-of-00002.safetensors", COMMIT) for i in (1, 2)]


def test_offline_says_what_would_be_fetched_and_where_to_put_it(cache):
    assert error_of("hf:org/name") == (
        "one of model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json of "
        "org/name is not in the cache, and HF_HUB_OFFLINE is set: `hf download org/name model.safetensors` on a "
        f"machine with a network, copy what it makes to {cache}/models--org--name, or give the file itself as file:PATH"
    )
    assert error_of("hf:org/name/w.npz").startswith("w.npz of org/name is not in the cache, and HF_HUB_OFFLINE is set")
    with_index(cache, held=(1,))
    text = error_of("hf:org/name")
    assert text.startswith("model-00002-of-00002.safetensors of org/name is not in the cache, and HF_HUB_OFFLINE")
    assert f"`hf download org/name model-00002-of-00002.safetensors --revision {COMMIT}`" in text


def test_without_a_network(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert "is not in the cache, and there is no network to fetch it: `hf download" in error_of("hf:org/name")


def failure(kind):
    error = getattr(errors, kind)
    made = error.__new__(error)  # their own constructors want a response of the network
    made.args = ("some\ntext",)
    return made


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("LocalEntryNotFoundError", "is not in the cache, and the hub cannot be reached: `hf download"),
        ("EntryNotFoundError", "org/name at revision main has none of model.safetensors, "),
        ("RevisionNotFoundError", "org/name has no revision 'main'"),
        ("RepositoryNotFoundError", "the hub has no org/name, or shows it to some only: `hf auth login` makes"),
        ("HfHubHTTPError", "model.safetensors of org/name could not be fetched ("),
    ],
)
def test_what_the_hub_says(cache, monkeypatch, kind, text):
    def download(*arguments, **more):
        raise failure(kind)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_resolves", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert text in error_of("hf:org/name")
    assert "org/name" in error_of("hf:org/name/w.npz")


def test_the_next_candidate_is_fetched(cache, monkeypatch):
    def download(repo, name, revision, cache_dir):
        if name != "pytorch_model.bin":
            raise failure("EntryNotFoundError")
        return str(put(cache, name, b"content"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_resolves", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert located("hf:org/name").read_bytes() == b"content"


@pytest.mark.parametrize("spec", ["hf:name", "hf:", "hf:org/name@", "hf:org/name/../x", "hf:org/na me", "hf:a/b@c@d"])
def test_specs_that_are_none(cache, spec):
    assert error_of(spec) == f"{spec!r} is not hf:<organisation>/<name>[@<revision>][/<file>]"


def test_names_that_the_hub_does_not_have(cache):
    assert error_of("hf:org/name--")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as caught:
        weights.card("hf:org/name")
    assert str(caught.value) == "weights 'hf:org/name': the hub needs huggingface_hub: pip install -e '.[hf]'"


def test_a_model_is_filled_from_the_cache(cache):
    shapes = models.shapes(models.create("resnet_tiny", 3))
    arrays = {k: np.full(v.shape, 0.5, np.float32) for k, v in weights.matcher.flatten(shapes).items()}
    content = save(arrays)
    put(cache, "model.safetensors", content)
    loaded = weights.load("hf:org/name", "resnet_tiny", shapes)
    assert len(loaded.report.loaded) == len(arrays)
    assert loaded.card.source == loaded.card.name == "hf:org/name"
    assert loaded.card.sha256 == hashlib.sha256(content).hexdigest()


def test_a_name_of_the_catalogue(cache):
    """From the cache by its name; without a network the one line says what to fetch, and where to."""
    text = "weights 'resnet18.tv_in1k': one of model.safetensors, "
    with pytest.raises(UserError, match=text) as caught:
        weights.load("resnet18.tv_in1k", "resnet18", {})
    assert "hf download timm/resnet18.tv_in1k model.safetensors" in str(caught.value)
    assert str(cache / "models--timm--resnet18.tv_in1k") in str(caught.value)
    put(cache, "model.safetensors", tensors(), repo="timm/resnet18.tv_in1k")
    shapes = models.shapes(models.create("resnet18", 1000))
    with pytest.raises(UserError, match=r"does not fit resnet18 \(timm naming\): 102 missing"):
        weights.load("resnet18.tv_in1k", "resnet18", shapes)
    assert weights.card("hf:timm/resnet18.tv_in1k") is weights.CARDS["resnet18.tv_in1k"]
    with pytest.raises(UserError, match=r"unknown weights 'resnet18.tv_in21k'; nearest: resnet18.tv_in1k"):
        weights.card("resnet18.tv_in21k")
