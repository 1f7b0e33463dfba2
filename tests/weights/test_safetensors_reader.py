"""The safetensors reader against the library's own writer."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tljax import weights
from tljax.errors import UserError
from tljax.weights import safetensors

ARRAYS = {
    "stem.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "brain": (np.arange(5) / 3).astype(ml_dtypes.bfloat16),
    "half": np.arange(3).astype(np.float16),
    "count": np.array(7, np.int64),
    "flag": np.array([True, False]),
    "none": np.zeros((0, 4), np.float32),
}


def back(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    return safetensors.read(path)


def test_every_array_comes_back(tmp_path):
    found = back(tmp_path, save(ARRAYS, metadata={"format": "pt"}))
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_told_by_content_whatever_the_suffix(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(save(ARRAYS))
    assert set(weights.read(path)) == set(ARRAYS)


def test_every_truncation_is_one_line(tmp_path):
    content = save(ARRAYS)
    for length in range(len(content)):
        with pytest.raises(UserError, match=r"w\.safetensors") as caught:
            back(tmp_path, content[:length])
        assert "\n" not in str(caught.value)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_give_arrays_or_one_line(tmp_path, flips):
    content = bytearray(save(ARRAYS))
    for place, change in flips:
        content[place % len(content)] ^= change
    text, found = outcome(tmp_path, bytes(content))
    assert found or ("\n" not in text and "w.safetensors" in text)
    assert sum(array.nbytes for array in found.values()) <= len(content)


def outcome(tmp_path, content):
    try:
        return "", back(tmp_path, content)
    except UserError as error:
        return str(error), {}


def test_a_type_without_an_array_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    with pytest.raises(UserError, match="'a' is of type F8_E4M3"):
        back(tmp_path, len(header).to_bytes(8, "little") + header + b"\0\0")


def test_a_pickle_under_this_suffix(tmp_path):
    with pytest.raises(UserError, match="no safetensors file"):
        back(tmp_path, b"\x80\x02cos\nsystem\n.")
