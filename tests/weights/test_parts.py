"""TensorFlow.js manifests and indexes of shards: every array comes back, whatever does not agree is one line."""

import json

import ml_dtypes
import numpy as np
import pth_writer as writer
import pytest
from safetensors.numpy import save, save_file

from tljax import models, weights
from tljax.errors import UserError
from tljax.weights import lazy, parts

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv1/kernel": RNG.normal(size=(3, 3, 2, 4)).astype(np.float32),
    "flag": np.array([True, False, True]),
    "conv1/bias": RNG.normal(size=4).astype(np.float32),  # not at a multiple of its size
    "scalar": np.array(7, np.int32),
    "none": np.zeros((0, 4), np.float32),
    "half": np.arange(5).astype(np.float16),
}


def manifest(arrays):
    return [{"name": n, "shape": list(a.shape), "dtype": a.dtype.name} for n, a in arrays.items()]


def tfjs(folder, size=100, change=lambda content: None):
    """Two groups: ARRAYS in shards of `size` bytes, and one array in a shard of its own."""
    folder.mkdir(exist_ok=True)
    whole = b"".join(array.tobytes() for array in ARRAYS.values())
    names = []
    for i in range(0, len(whole), size):
        names.append(f"group1-shard{i // size + 1}")
        (folder / names[-1]).write_bytes(whole[i : i + size])
    (folder / "head").write_bytes(np.full((2, 2), 3, "<i4").tobytes())
    groups = [
        {"paths": names, "weights": manifest(ARRAYS)},
        {"paths": ["head"], "weights": [{"name": "head", "shape": [2, 2], "dtype": "int32"}]},
    ]
    content = {"format": "layers-model", "modelTopology": {}, "weightsManifest": groups}
    change(content)
    (folder / "model.json").write_text(json.dumps(content))
    return folder / "model.json"


def index(folder, suffix="safetensors"):
    """Two shards and their index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    names = list(ARRAYS)
    shards = {f"model-0000{i}-of-00002.{suffix}": names[i - 1 :: 2] for i in (1, 2)}
    for shard, held in shards.items():
        save_file({name: ARRAYS[name] for name in held}, folder / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def same(found):
    assert set(found) == set(ARRAYS)
    assert lazy.shapes(found) == {name: array.shape for name, array in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def error_of(path):
    with pytest.raises(UserError) as caught:
        dict(weights.read(path))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("size", [1, 3, 100, 10_000])
def test_tfjs_shards_of_any_size(tmp_path, size):
    found = dict(weights.read(tfjs(tmp_path, size)))
    assert np.array_equal(found.pop("head"), np.full((2, 2), 3))
    same(lazy.Arrays(lazy.entries(found)))


def test_an_index_of_safetensors(tmp_path):
    same(weights.read(index(tmp_path)))


def test_an_index_of_pth(tmp_path, monkeypatch):
    writer.stand_ins(monkeypatch)
    path = index(tmp_path, "bin")
    for i, names in enumerate((list(ARRAYS)[::2], list(ARRAYS)[1::2]), start=1):
        content = writer.zip_bytes(writer.state_dict({name: ARRAYS[name] for name in names}))
        (tmp_path / f"model-0000{i}-of-00002.bin").write_bytes(content)
    same(weights.read(path))


def changed(field, value):
    def change(content):
        content["weightsManifest"][0]["weights"][2][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed("quantization", {"dtype": "uint8", "min": 0, "scale": 1}), "the weight 'conv1/bias' is quantised"),
        (changed("dtype", "string"), "the weight 'conv1/bias' is of type string, which is not read"),
        (changed("dtype", ["float32"]), "the weight 'conv1/bias' is of type ['float32'], which is not read"),
        (changed("shape", [5]), "its weights take 325 bytes, but group1-shard1, group1-shard2, group1-shard3 and 1 "),
        (changed("shape", [1 << 60]), "its weights take "),
        (changed("shape", [-4]), "the weight 'conv1/bias' has the shape [-4]"),
        (changed("shape", [4.0]), "the weight 'conv1/bias' has the shape [4.0]"),
        (changed("shape", "4"), "the weight 'conv1/bias' has the shape 4"),
        (changed("name", 3), "a weight in the manifest has no name"),
        (changed("name", "flag"), "the weight 'flag' is there twice"),
        (lambda c: c["weightsManifest"][1].update(weights=3), "a group of the manifest lists no weights"),
        (lambda c: c["weightsManifest"][1].update(paths=["../head"]), "names the file '../head', which does not lie"),
        (lambda c: c["weightsManifest"][1].update(paths=["/etc/passwd"]), "which does not lie beside it"),
        (lambda c: c["weightsManifest"][1].update(paths=[".."]), "which does not lie beside it"),
        (lambda c: c["weightsManifest"][1].update(paths=["c:\\x"]), "which does not lie beside it"),
        (
            lambda c: c["weightsManifest"][1].update(paths=["heads"]),
            "of the 5 files that it names 1 are missing: heads",
        ),
        (lambda c: c.update(weightsManifest=3), "neither an index of shards (weight_map) nor the model.json of a"),
        (lambda c: c.update(weightsManifest=[]), "names no files"),
        (lambda c: c.pop("weightsManifest"), "neither an index of shards (weight_map) nor the model.json of a"),
        (lambda c: c.update(format="graph-model"), "a TensorFlow.js graph-model, expected a layers-model"),
    ],
)
def test_manifests_that_do_not_agree(tmp_path, change, text):
    assert text in error_of(tfjs(tmp_path, change=change))


def test_short_long_and_missing_shards(tmp_path):
    path = tfjs(tmp_path)
    shard = tmp_path / "group1-shard2"
    whole = shard.read_bytes()
    for content in (b"", whole[:-1], whole + b" "):
        shard.write_bytes(content)
        assert "bytes, but group1-shard1, group1-shard2, group1-shard3" in error_of(path)
    shard.unlink()
    assert error_of(path) == "of the 5 files that it names 1 are missing: group1-shard2"


def test_an_index_that_does_not_agree(tmp_path):
    path = index(tmp_path)
    content = json.loads(path.read_text())

    def error_with(**places):
        path.write_text(json.dumps(content | {"weight_map": content["weight_map"] | places}))
        return error_of(path)

    first = "model-00001-of-00002.safetensors"
    assert error_with(**{"conv1/bais": first}) == (
        f"1 arrays are not where it says, as 'conv1/bais' in {first}; nearest: conv1/bias, conv1/kernel"
    )
    assert "which does not lie beside it" in error_with(x="../x.safetensors")
    assert "neither an index" in error_with(x=["a"])
    assert "neither an index" in error_with(x=3)
    (tmp_path / "x.json").write_text("{}")
    assert "an index names it as a file of arrays, and it is JSON" in error_with(x="x.json")
    save_file({"flag": np.zeros(3)}, tmp_path / "more.safetensors")
    assert "flag in " in error_with(x="more.safetensors")
    (tmp_path / first).unlink()
    assert error_with() == f"of the 2 files that it names 1 are missing: {first}"


def test_half_an_index(tmp_path):
    path = index(tmp_path)
    path.write_text(path.read_text()[:-9])
    assert error_of(path).startswith("damaged or truncated JSON (")


def test_bfloat16_in_shards(tmp_path):
    array = (np.arange(5) / 3).astype(ml_dtypes.bfloat16)
    (tmp_path / "a.safetensors").write_bytes(save({"a": array}))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    assert weights.read(tmp_path / "model.safetensors.index.json")["a"].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def tiny_arrays():
    """Of the tiny ResNet, by path, so that the names are our own."""
    shapes = models.shapes(models.create("resnet_tiny", 3))
    return shapes, {k: np.full(v.shape, 0.5, np.float32) for k, v in weights.matcher.flatten(shapes).items()}


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.json", "w.npz"])
def test_a_model_is_filled(tmp_path, tiny_arrays, name):
    shapes, arrays = tiny_arrays
    names, path = sorted(arrays), tmp_path / "x" / name
    path.parent.mkdir()
    if name == "w.npz":
        np.savez(path, **arrays)
    elif name == "model.json":
        groups = [{"paths": ["shard"], "weights": manifest(arrays)}]
        path.write_text(json.dumps({"weightsManifest": groups}))
        (path.parent / "shard").write_bytes(b"".join(array.tobytes() for array in arrays.values()))
    else:
        for i in (0, 1):
            save_file({n: arrays[n] for n in names[i::2]}, path.parent / f"{i}.safetensors")
        path.write_text(json.dumps({"weight_map": {n: f"{i % 2}.safetensors" for i, n in enumerate(names)}}))
    # The folder stands for what is in it; a single file of any other name has to be named.
    spec = str(path if name == "w.npz" else path.parent)
    loaded = weights.load(spec, "resnet_tiny", shapes)
    assert loaded.report.naming == "tljax"
    assert len(loaded.report.loaded) == len(arrays)
    assert all((a == 0.5).all() for tree in (loaded.params, loaded.batch_stats) for a in leaves(tree))
    assert weights.num_classes(loaded.card, "resnet_tiny") == 3
    # The digest is of all the files.
    before = weights.card(spec).sha256
    last = sorted(path.parent.iterdir())[-1 if name == "model.json" else 0]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert weights.card(spec).sha256 != before


def leaves(tree):
    return weights.matcher.flatten(tree).values()


def test_folders(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is a directory, not a file, and holds none of model\.safetensors, "):
        weights.card(str(tmp_path))
    for name in ("a.index.json", "b.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds several sets of weights, name one: a\.index\.json, b\.index\.json"):
        weights.card(str(tmp_path))


def test_names_in_order(tmp_path):
    assert parts.names(tfjs(tmp_path)) == [*(f"group1-shard{i}" for i in (1, 2, 3, 4)), "head"]
