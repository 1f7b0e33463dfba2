"""Readers of weights: every format, models that are filled, adapters."""

import io
import json
import sys
from pathlib import Path

import lies
import mutations as m
import numpy as np
from target import Case, Target, only, saved


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(3, 2, 2, 2)).astype(np.float32),
        "bn.running_var": rng.uniform(size=3).astype(np.float32),
        "half": np.arange(4, dtype=np.float16),
        "count": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
    }


def _touch(found) -> None:
    """Looks at every number, as a model that is filled does."""
    for name, array in dict(found).items():
        assert isinstance(name, str), name
        np.asarray(array).tobytes()


def _pth() -> list[Case]:
    import pth_writer as writer

    class Stand:
        def setitem(self, where, name, value):
            before[name] = where.get(name)
            where[name] = value

    before: dict = {}
    writer.stand_ins(Stand())
    try:
        content = writer.state_dict(_arrays())
        module = b"\x80\x02c__torch__\nNet\n)\x81}(S'a'\nNS'b'\nc__torch__\nNet\n)\x81}bub."
        files = [
            writer.zip_bytes(content), writer.old_bytes(content), writer.zip_bytes(content, order="big", protocol=4),
            writer.zip_bytes({"state_dict": content, "epoch": 3, "lr": 0.1}),
            writer.old_bytes({"model": content}, protocol=3),
        ]  # fmt: skip
        broken = writer.zip_bytes(None, program=module)
    finally:
        for name, value in before.items():
            if value is None:
                del sys.modules[name]
            else:
                sys.modules[name] = value
    whole = [m.archived(m.members(file)) if file.startswith(b"PK") else file for file in [*files, broken]]
    return [{"w.pth": file} for file in whole]


def _weights(folder: Path) -> None:
    from tljax.weights import readers

    path = only(folder)
    readers.metadata(path)
    _touch(readers.read(path))


def _safetensors() -> list[Case]:
    import ml_dtypes
    from safetensors.numpy import save

    more = {"b": np.ones(3).astype(ml_dtypes.bfloat16), "flag": np.array([True, False])}
    return [{"w.safetensors": save(_arrays() | more, {"format": "pt"})}, {"w.safetensors": save({"a": np.zeros(2)})}]


def _npz() -> list[Case]:
    stored, deflated = io.BytesIO(), io.BytesIO()
    np.savez(stored, **_arrays())
    np.savez_compressed(deflated, **_arrays(), more=np.asfortranarray(np.ones((20, 9))))
    return [{"w.npz": stored.getvalue()}, {"w.npz": deflated.getvalue()}]


def _hdf5() -> list[Case]:
    import h5py

    def keras_2(path):
        with h5py.File(path, "w") as file:
            layer = file.create_group("model_weights/conv1")
            layer.attrs["weight_names"] = [b"conv1/kernel:0"]
            layer["conv1/kernel:0"] = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
            file["optimizer_weights/Adam/m:0"] = np.ones(3)

    def keras_3(path):
        with h5py.File(path, "w", libver="latest") as file:
            file["layers/conv2d/vars/0"] = np.ones((2, 3), np.float32)
            file["layers/conv2d/vars"].attrs["name"] = "conv1"
            file.create_dataset("layers/dense/vars/0", data=np.ones((50, 8)), compression="gzip", shuffle=True)
            file["layers/dense/vars/1"] = np.array([1, 2, 3], np.int64)

    return [{"w.h5": saved(keras_2)}, {"w.h5": saved(keras_3)}]


def _tfjs() -> list[Case]:
    arrays = {"conv/kernel": np.ones((2, 3), np.float32), "flag": np.array([True]), "none": np.zeros((0, 2), np.int32)}
    whole = b"".join(array.tobytes() for array in arrays.values())
    listed = [{"name": n, "shape": list(a.shape), "dtype": a.dtype.name} for n, a in arrays.items()]
    groups = [
        {"paths": ["s1", "s2"], "weights": listed},
        {"paths": ["s3"], "weights": [{"name": "head", "shape": [2], "dtype": "int32"}]},
    ]
    content = {"format": "layers-model", "modelTopology": {}, "weightsManifest": groups}
    return [{"model.json": json.dumps(content).encode(), "s1": whole[:7], "s2": whole[7:], "s3": bytes(8)}]


def _index() -> list[Case]:
    from safetensors.numpy import save

    places = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    content = {"metadata": {"total_size": 32}, "weight_map": places}
    shards = {"1.safetensors": save({"a": np.zeros(2)}), "2.safetensors": save({"b": np.ones(1), "c": np.ones(1)})}
    return [{"model.safetensors.index.json": json.dumps(content).encode(), **shards}]


def _parts(folder: Path) -> None:
    from tljax.weights import readers

    path = next(folder.glob("*.json"))
    readers.files(path)
    _touch(readers.read(path))


def _model() -> list[Case]:
    """The tiny network's leaves with a card in the header, and the same in the names of torchvision."""
    from safetensors.numpy import save

    from tljax import models, weights
    from tljax.weights import cards

    shapes = models.shapes(models.create("resnet_tiny", 3))
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in weights.matcher.flatten(shapes).items()}
    known = cards.assumed("w", "resnet_tiny", "", 32)
    return [{"w.safetensors": save(leaves, cards.to_header(known))}, {"w.safetensors": save(leaves)}]


def _load(folder: Path) -> None:
    from tljax import models, weights

    path = str(only(folder))
    shapes = models.shapes(models.create("resnet_tiny", 3))
    card = weights.card(path, "resnet_tiny")
    weights.load(card, "resnet_tiny", shapes)


def _adapters() -> list[Case]:
    from safetensors.numpy import save

    from tljax.adapters import files

    told = [{"kind": "Lora", "name": "lora", "targets": "**", "rank": 2, "alpha": 4.0, "dropout": 0.0}]
    values = {"params/block1/conv/lora/a": np.zeros((1, 2)), "params/head/kernel": np.zeros((2, 3))}
    return [{"a.safetensors": save(values, {files.KEY: json.dumps(told), "base": "0" * 64})}]


def _stored(folder: Path) -> None:
    from tljax.adapters import files

    found = files.read(only(folder))
    found.own()
    [adapter.chooses("block1/conv") for adapter in found.adapters]


def _shard_ways(name: str) -> tuple[m.Mutation, ...]:
    return (*m.JSON, m.deep) if name.endswith(".json") else (m.headed, m.flip, m.cut, m.insert)


def _member_ways(name: str) -> tuple[m.Mutation, ...]:
    return (m.npy, m.npy, *m.BYTES)


TARGETS = {
    "pth": Target(
        _pth, _weights, lambda name: (*m.BYTES, m.zipped(lambda n: m.BYTES), m.zipped(lambda n: m.BYTES)), lies=lies.pth
    ),
    "safetensors": Target(_safetensors, _weights, lambda name: (m.headed, m.headed, *m.BYTES), lies=lies.safetensors),
    "npz": Target(
        _npz, _weights, lambda name: (m.zipped(_member_ways), m.zipped(_member_ways), *m.BYTES), lies=lies.npz
    ),
    "hdf5": Target(_hdf5, _weights, lambda name: (*m.BYTES, m.near_ends), lies=lies.hdf5),
    "tfjs": Target(_tfjs, _parts, _shard_ways, lies=lies.tfjs),
    "index": Target(_index, _parts, _shard_ways),
    "model": Target(_model, _load, lambda name: (m.headed, m.headed, m.headed, m.flip), share=0.1),
    "adapters": Target(_adapters, _stored, lambda name: (m.headed, m.headed, m.flip)),
}
