"""Writes .pth files of both formats without PyTorch: Python's pickler and stand-ins for torch's modules."""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def stand_ins(monkeypatch):
    """Puts modules `torch` and `torch._utils` in place, with the names that a state dict mentions."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in KINDS.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *a: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


class Storage:
    def __init__(self, numbers, key):
        self.numbers, self.key = np.ascontiguousarray(numbers).reshape(-1), key
        self.view = None

    @property
    def kind(self):
        return getattr(sys.modules["torch"], KINDS[str(self.numbers.dtype)])


class Tensor:
    """A view of a storage, pickled as PyTorch does it; offset and stride in elements."""

    def __init__(self, storage, offset, shape, stride, parameter=False):
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)
        self.parameter = parameter

    def __reduce_ex__(self, protocol):
        utils = sys.modules["torch._utils"]
        plain = (self.storage, self.offset, self.shape, self.stride, False, collections.OrderedDict())
        if self.parameter:
            inner = Tensor(self.storage, self.offset, self.shape, self.stride)
            return utils._rebuild_parameter, (inner, True, collections.OrderedDict())
        return utils._rebuild_tensor_v2, plain


def tensor(array, key, **more):
    """A tensor over a storage of its own."""
    array = np.asarray(array)
    strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    return Tensor(Storage(array, key), 0, array.shape, strides, **more)


def state_dict(arrays):
    """An OrderedDict of tensors with the `_metadata` attribute that modules' state dicts have."""
    result = collections.OrderedDict((name, tensor(a, str(i))) for i, (name, a) in enumerate(arrays.items()))
    result._metadata = collections.OrderedDict({"": {"version": 1}})
    return result


class _Pickler(pickle.Pickler):
    def __init__(self, stream, protocol, old):
        super().__init__(stream, protocol)
        self.old, self.found = old, {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.found[value.key] = value
        return (
            "storage",
            value.kind,
            value.key,
            "cpu",
            value.numbers.size,
            *([value.view] if self.old else []),
        )


def zip_bytes(content, order="little", protocol=2, program=None, compression=zipfile.ZIP_STORED, mark=True):
    """The zip format; `program` replaces the pickle of `content`."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol, old=False)
    if program is None:
        pickler.dump(content)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue() if program is None else program)
        if mark:
            archive.writestr("archive/byteorder", order)
        for key, storage in pickler.found.items():
            raw, width = storage.numbers.tobytes(), storage.numbers.itemsize
            if order == "big":
                raw = b"".join(raw[i : i + width][::-1] for i in range(0, len(raw), width))
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def old_bytes(content, protocol=2, program=None):
    """The format from before PyTorch 1.6; `program` replaces the pickle of `content`."""
    out = io.BytesIO()
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    for value in (MAGIC, 1001, system):
        pickle.dump(value, out, protocol)
    pickler = _Pickler(out, protocol, old=True)
    if program is None:
        pickler.dump(content)
    else:
        out.write(program)
    keys = sorted(pickler.found)
    pickle.dump(keys, out, protocol)
    for key in keys:
        numbers = pickler.found[key].numbers
        out.write(struct.pack("<q", numbers.size) + numbers.tobytes())
    return out.getvalue()


FORMATS = {"zip": zip_bytes, "old": old_bytes}


def pickled(content, protocol=2):
    out = io.BytesIO()
    _Pickler(out, protocol, old=True).dump(content)
    return out.getvalue()
