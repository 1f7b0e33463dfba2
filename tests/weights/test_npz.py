"""The npz reader against numpy's own writer; pickles, false sizes and damage are one line each."""

import io
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tljax import weights
from tljax.errors import UserError
from tljax.weights import lazy, npz

ARRAYS = {
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.arange(3).astype(np.float16),
    "big": np.arange(5).astype(">i4"),
    "count": np.array(7, np.int64),
    "flag": np.array([True, False]),
    "none": np.zeros((0, 4), np.float32),
}
SAVE = {"stored": np.savez, "compressed": np.savez_compressed}
FORMS = pytest.mark.parametrize("form", SAVE)


def content(form, arrays=ARRAYS):
    file = io.BytesIO()
    SAVE[form](file, **arrays)
    return file.getvalue()


def written(tmp_path, content):
    path = tmp_path / "w.npz"
    path.write_bytes(content)
    return path


def error_of(path):
    """What reading everything in `path` says."""
    with pytest.raises(UserError) as caught:
        dict(npz.read(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@FORMS
def test_every_array_comes_back(tmp_path, form):
    found = weights.read(written(tmp_path, content(form)))
    assert lazy.shapes(found) == {name: array.shape for name, array in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


@FORMS
def test_bfloat16_as_jax_saves_it(tmp_path, form):
    array = (np.arange(5) / 3).astype(ml_dtypes.bfloat16)
    found = npz.read(written(tmp_path, content(form, {"a": array})))["a"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_told_by_content_whatever_the_suffix(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(content("stored"))
    assert set(weights.read(path)) == set(ARRAYS)


@FORMS
def test_only_what_is_asked_for_is_read(tmp_path, form):
    large = {f"a{i}": np.full((1 << 20,), i, np.float32) for i in range(4)}
    path = written(tmp_path, content(form, large))
    tracemalloc.start()
    found = npz.read(path)
    assert lazy.shapes(found)["a3"] == (1 << 20,)
    before = tracemalloc.get_traced_memory()[1]
    assert found["a3"][-1] == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert before < 1 << 20
    assert peak < 3 * (4 << 20)  # not the 16 MB of the whole file


@FORMS
def test_python_objects_are_refused_and_never_loaded(tmp_path, form):
    class Run:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "w.npz"
    SAVE[form](path, good=np.zeros(3), bad=np.array([Run()], object))
    assert error_of(path) == f"{path}: 'bad' holds pickled Python objects, which are refused: only numbers are read"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("array", [np.array(["text"]), np.zeros(2, "f4,i4"), np.zeros(2, complex)])
def test_other_types_are_named(tmp_path, array):
    assert "'a' is of type" in error_of(written(tmp_path, content("stored", {"a": array})))


def member(header, data=b"", version=1):
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + data


def archive(tmp_path, members, compression=zipfile.ZIP_DEFLATED):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def header(shape, descr="<f4"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", ["(1 << 60,)", f"({1 << 60},)", f"({1 << 62}, 4)", "(-4,)", "(3,)", "(2.0,)"])
def test_false_shapes_allocate_nothing(tmp_path, shape, compression):
    path = archive(tmp_path, [("a.npy", member(header(shape), bytes(16)))], compression)
    tracemalloc.start()
    assert "damaged" in error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_header_that_unpacks_to_much_is_not_read(tmp_path):
    path = archive(tmp_path, [("a.npy", member(header("(1,)") + " " * (1 << 24), bytes(4), version=2))])
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    assert "damaged" in error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_size_that_deflate_cannot_reach(tmp_path):
    data = bytearray(content("compressed", {"a": np.zeros(64, np.float32)}))
    where = data.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    data[where : where + 4] = (1 << 30).to_bytes(4, "little")
    assert "claims 1073741824 bytes" in error_of(written(tmp_path, bytes(data)))


def test_a_changed_number_is_noticed(tmp_path):
    for form in SAVE:
        data = bytearray(content(form, {"a": np.arange(1000, dtype=np.float32)}))
        data[1000] ^= 1
        assert "damaged" in error_of(written(tmp_path, bytes(data)))


@FORMS
def test_every_truncation_is_one_line(tmp_path, form):
    whole = content(form)
    for length in range(0, len(whole), 7):
        with pytest.raises(UserError) as caught:
            dict(npz.read(written(tmp_path, whole[:length])))
        assert "\n" not in str(caught.value)


@FORMS
def test_flipped_bytes_give_arrays_or_one_line(tmp_path, form):
    whole, rng = content(form), np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(whole), 2):
            data[place] ^= int(rng.integers(1, 256))
        text, found = outcome(written(tmp_path, bytes(data)))
        assert found or "\n" not in text
        assert sum(array.nbytes for array in found.values()) <= len(whole) * lazy.DEFLATE


def outcome(path):
    try:
        return "", dict(npz.read(path))
    except UserError as error:
        return str(error), {}


def test_other_archives(tmp_path):
    assert "no array" in error_of(archive(tmp_path, [("a.txt", b"text")]))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(tmp_path, [("a.npy", member(header("(1,)"), bytes(4)))] * 2)
    assert "a is in the archive twice" in error_of(twice)
    assert error_of(archive(tmp_path, [])).endswith("holds no arrays")
    (tmp_path / "e.npz").touch()
    assert "damaged" in error_of(tmp_path / "e.npz")
