"""Keras files, written here with h5py as Keras 2 and 3 lay them out; nothing outside the file is ever read."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import script

from tljax import models, weights
from tljax.errors import UserError
from tljax.weights import hdf5, lazy

h5py = pytest.importorskip("h5py")

KERNEL = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def keras_2(path):
    """A whole model as `model.save("x.h5")` of Keras 2 writes it, with its optimizer."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.15.0"
        layer = file.create_group("model_weights/conv1_conv")
        layer.attrs["weight_names"] = [b"conv1_conv/kernel:0"]
        layer["conv1_conv/kernel:0"] = KERNEL
        file["model_weights/top_level_model_weights"] = np.zeros(0, np.float32)
        file["optimizer_weights/Adam/m:0"] = np.ones(3)
    return path


def keras_3(path):
    """As `model.save_weights("x.weights.h5")` of Keras 3 writes it."""
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = KERNEL
        file.create_dataset("layers/dense/vars/0", data=np.ones((50, 8)), compression="gzip", shuffle=True)
        file["layers/dense/vars/1"] = np.array([1, 2, 3], np.int64)
        file["layers/scalar/vars/0"] = np.float16(2)
        file["optimizer/vars/0"] = np.int64(5)
    return path


def error_of(path):
    with pytest.raises(UserError) as caught:
        dict(weights.read(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_model_of_keras_2(tmp_path):
    found = weights.read(keras_2(tmp_path / "x.h5"))
    assert list(found) == ["conv1_conv/conv1_conv/kernel:0", "top_level_model_weights"]
    assert np.array_equal(found["conv1_conv/conv1_conv/kernel:0"], KERNEL)


def test_weights_of_keras_3(tmp_path):
    found = weights.read(keras_3(tmp_path / "x.weights.h5"))
    assert lazy.shapes(found) == {
        "layers/conv2d/vars/0": (2, 3, 4),
        "layers/dense/vars/0": (50, 8),
        "layers/dense/vars/1": (3,),
        "layers/scalar/vars/0": (),
    }
    assert np.array_equal(found["layers/conv2d/vars/0"], KERNEL)
    assert found["layers/dense/vars/0"].sum() == 400
    assert found["layers/dense/vars/1"].dtype == np.int64
    assert found["layers/scalar/vars/0"].dtype == np.float16
    assert found["layers/scalar/vars/0"].shape == ()


def named(path, **layers):
    """As Keras 3.6 and newer write it: the group of a layer's variables has the layer's own name."""
    with h5py.File(path, "w") as file:
        for group, name in layers.items():
            file[f"layers/{group}/vars/0"] = KERNEL
            file[f"layers/{group}/vars"].attrs["name"] = name
        file["vars/0"] = KERNEL
        file["vars"].attrs["name"] = "model"
    return path


def test_layers_have_their_own_names_where_the_file_says_them(tmp_path):
    found = weights.read(named(tmp_path / "x.weights.h5", conv2d="conv1", conv2d_1="a/b", conv2d_2=""))
    assert set(found) == {"layers/conv1/0", "layers/conv2d_1/vars/0", "layers/conv2d_2/vars/0", "vars/0"}
    # Of two layers of one name, which Keras does not allow in one model, none is lost.
    found = weights.read(named(tmp_path / "y.weights.h5", conv2d="same", conv2d_1="same"))
    assert set(found) == {"layers/same/0", "layers/conv2d_1/vars/0", "vars/0"}


def test_a_file_that_names_no_layers_is_refused(tmp_path):
    """Order alone would pair layers of one shape wrongly, in silence."""
    path, model = keras_3(tmp_path / "x.weights.h5"), models.create("keras_resnet_tiny", 3)
    with pytest.raises(UserError) as caught:
        weights.load(str(path), "keras_resnet_tiny", models.shapes(model))
    assert str(caught.value) == (
        f"{path} does not say its layers' names, as Keras 3 before 3.6 wrote it: load it in Keras and save it again, "
        "with a newer one or as .h5"
    )


def test_told_by_content_whatever_the_suffix(tmp_path):
    assert len(weights.read(keras_3(tmp_path / "x.bin"))) == 4


def test_without_h5py(tmp_path, monkeypatch):
    path = keras_3(tmp_path / "x.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert error_of(path) == "a Keras file needs h5py: pip install -e '.[keras]'"


def test_links_are_not_followed(tmp_path):
    keras_3(tmp_path / "other.h5")
    path = tmp_path / "x.h5"
    for link in (h5py.ExternalLink("other.h5", "/layers"), h5py.SoftLink("/layers")):
        with h5py.File(path, "w") as file:
            file["layers/dense/vars/0"] = KERNEL
            file["more"] = link
        assert error_of(path) == "'more' is a link, which Keras does not write; not followed"
        with h5py.File(path, "w") as file:
            file["model_weights"] = link
        assert error_of(path) == "'model_weights' is a link, which Keras does not write; not followed"


def test_numbers_in_other_files_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(96))
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (24,), "f4", external=[(str(tmp_path / "secret"), 0, 96)])
    assert error_of(path) == "the numbers of 'a' lie in another file; not read"
    keras_3(tmp_path / "other.h5")
    layout = h5py.VirtualLayout((3,), "i8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "layers/dense/vars/1", (3,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("a", layout)
    assert error_of(path) == "the numbers of 'a' lie in another file; not read"


def test_a_group_within_itself(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["layers/a"] = KERNEL
        file["layers/self"] = file["layers"]
    assert "lies in itself" in error_of(path)


@pytest.mark.parametrize("chunks", [None, (1024, 1024)])
def test_a_shape_without_numbers_behind_it(tmp_path, chunks):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (1 << 20, 1 << 20), "f4", chunks=chunks)
    assert path.stat().st_size < 1 << 16
    assert f"claims {1 << 42} bytes but has 0" in error_of(path)


@pytest.mark.parametrize("value", ["text", np.zeros(2, "f4,i4"), np.zeros(2, complex)])
def test_other_types_are_named(tmp_path, value):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["a"] = value
    assert "'a' is of type" in error_of(path)


def test_no_arrays(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["optimizer/vars/0"] = KERNEL
    assert error_of(path).endswith("holds no arrays")


def test_truncations_are_one_line(tmp_path):
    whole = keras_3(tmp_path / "whole.h5").read_bytes()
    path = tmp_path / "x.h5"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "damaged, truncated" in error_of(path)


def test_something_else_under_this_suffix(tmp_path):
    path = tmp_path / "x.h5"
    path.write_text("<html>not found</html>")
    assert "no HDF5 file" in error_of(path)


def test_damaged_chunks_are_one_line(tmp_path):
    path = tmp_path / "x.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("a", data=rng.normal(size=1000), compression="gzip", chunks=(1000,))
        place = dataset.id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[place + 2 : place + 500] = bytes(498)
    path.write_bytes(data)
    assert lazy.shapes(hdf5.read(path)) == {"a": (1000,)}
    assert "damaged" in error_of(path)


def test_an_archive_of_keras_3_says_what_to_do(tmp_path):
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
        file.write(keras_3(tmp_path / "y.h5"), "model.weights.h5")
    assert error_of(path) == "a Keras archive: unpack it (unzip) and name the model.weights.h5 that is in it"


CLAIMS = """
import resource, sys
from tljax.errors import UserError
from tljax.weights import hdf5
hdf5.read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    hdf5.read(sys.argv[2])
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_header_that_claims_gigabytes_takes_none(tmp_path):
    """16 GB, of a file of 13 kB: libhdf5 reserves them, and does not touch them."""
    with h5py.File(tmp_path / "sound.h5", "w") as file:
        file["a"] = np.ones(3)
    claims = Path(__file__).parent.parent / "fuzz/corpus/hdf5/header_that_claims_gigabytes/w.h5"
    out, err = script(CLAIMS, str(tmp_path / "sound.h5"), str(claims)).communicate(timeout=120)
    kilobytes, _, line = out.partition(" ")
    assert "damaged, truncated or no HDF5 file" in line, err
    assert int(kilobytes) < 16 * 1024
