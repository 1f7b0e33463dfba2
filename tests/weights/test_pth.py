"""Both .pth formats, written here byte by byte, come back as the arrays that went in, or one clear line."""

import collections
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pth_writer as writer
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tljax.errors import UserError
from tljax.weights import pth

MODEST = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
FORMATS = pytest.mark.parametrize("form", ["zip", "old"])


@pytest.fixture(autouse=True)
def _torch(monkeypatch):
    writer.stand_ins(monkeypatch)


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(3, 2, 2, 2)).astype(np.float32),
        "bn.running_var": rng.uniform(size=3).astype(np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
    }


def back(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    return pth.read(path)


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name].astype(np.float64), array.astype(np.float64), equal_nan=True)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_with_metadata(tmp_path, form, protocol):
    arrays = some_arrays()
    same(back(tmp_path, writer.FORMATS[form](writer.state_dict(arrays), protocol=protocol)), arrays)


@FORMATS
@pytest.mark.parametrize("name", writer.KINDS)
def test_every_type(tmp_path, form, name):
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
    arrays = {"a": np.arange(6).astype(dtype).reshape(2, 3), "b": np.array(1).astype(dtype)}
    same(back(tmp_path, writer.FORMATS[form](writer.state_dict(arrays))), arrays)


@pytest.mark.parametrize("name", writer.KINDS)
def test_big_endian_zip(tmp_path, name):
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
    array = np.arange(6).astype(dtype)
    found = back(tmp_path, writer.zip_bytes(writer.state_dict({"a": array}), order="big"))["a"]
    assert np.array_equal(found.astype(np.float64), array.astype(np.float64))


def test_zip_without_byte_order_is_little_endian(tmp_path):
    arrays = some_arrays()
    same(back(tmp_path, writer.zip_bytes(writer.state_dict(arrays), mark=False)), arrays)


@FORMATS
def test_views_share_one_storage(tmp_path, form):
    numbers = np.arange(24, dtype=np.float32)
    storage = writer.Storage(numbers, "0")
    content = {
        "whole": writer.Tensor(storage, 0, (4, 6), (6, 1)),
        "transposed": writer.Tensor(storage, 0, (6, 4), (1, 6)),
        "every_second": writer.Tensor(storage, 1, (3,), (2,)),
        "parameter": writer.Tensor(storage, 4, (2, 2), (2, 1), parameter=True),
        "empty": writer.Tensor(storage, 24, (0, 5), (5, 1)),
    }
    table = numbers.reshape(4, 6)
    expected = {
        "whole": table,
        "transposed": table.T,
        "every_second": numbers[[1, 3, 5]],
        "parameter": numbers[4:8].reshape(2, 2),
        "empty": np.zeros((0, 5), np.float32),
    }
    same(back(tmp_path, writer.FORMATS[form](content)), expected)


def test_old_format_view_of_a_storage(tmp_path):
    storage = writer.Storage(np.arange(10, dtype=np.float32), "0")
    storage.view = ("1", 4, 3)
    content = writer.old_bytes({"a": writer.Tensor(storage, 0, (3,), (1,))})
    assert back(tmp_path, content)["a"].tolist() == [4, 5, 6]
    content = writer.old_bytes({"a": writer.Tensor(storage, 1, (3,), (1,))})
    with pytest.raises(UserError, match="reaches behind the end"):
        back(tmp_path, content)


@FORMATS
@MODEST
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
        hnp.array_shapes(min_dims=0, max_side=4),
    ),
    data=st.data(),
)
def test_any_array_in_any_layout(tmp_path, form, array, data):
    order = data.draw(st.permutations(range(array.ndim)))
    stored = array.transpose(order)
    steps = [0] * array.ndim
    for place, axis in enumerate(order):
        steps[axis] = int(np.prod(stored.shape[place + 1 :]))
    content = {"a": writer.Tensor(writer.Storage(stored, "0"), 0, array.shape, steps)}
    same(back(tmp_path, writer.FORMATS[form](content)), {"a": array})


@FORMATS
@pytest.mark.parametrize("wrapper", pth.WRAPPERS)
def test_training_checkpoint_is_unwrapped(tmp_path, form, wrapper):
    arrays = some_arrays()
    content = {
        "epoch": 3,
        "best": 0.5,
        wrapper: writer.state_dict(arrays),
        "optimizer": {"state": {}, "lr": [1.0]},
    }
    same(back(tmp_path, writer.FORMATS[form](content)), arrays)


def test_data_parallel_prefix_is_dropped(tmp_path):
    arrays = some_arrays()
    content = writer.state_dict({f"module.{name}": array for name, array in arrays.items()})
    same(back(tmp_path, writer.zip_bytes(content)), arrays)


def test_ordered_dict_as_python_2pickled_it(tmp_path):
    program = (
        b"\x80\x02ccollections\nOrderedDict\n](](U\x01actorch._utils\n_rebuild_tensor_v2\n"
        b"((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02NtQK\x00K\x02\x85K\x01\x85\x89NtRee\x85R."
    )
    content = writer.old_bytes({"a": writer.tensor(np.array([1, 2], np.float32), "0")})
    own = writer.pickled({"a": writer.tensor(np.array([1, 2], np.float32), "0")})
    assert back(tmp_path, content.replace(own, program))["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            lambda: {
                "state_dict": writer.state_dict(some_arrays()),
                "model": writer.state_dict(some_arrays()),
            },
            "several",
        ),
        (lambda: {}, "holds nothing"),
        (lambda: [1, 2], "holds a list"),
        (lambda: writer.tensor(np.ones(2), "0"), "one tensor"),
        (
            lambda: {"a": writer.tensor(np.ones(2), "0"), "epoch": 3},
            r"1 entries are no tensors: 'epoch' \(a int\)",
        ),
        (lambda: {3: writer.tensor(np.ones(2), "0")}, "a int as key"),
    ],
)
@FORMATS
def test_not_a_state_dict(tmp_path, form, content, text):
    with pytest.raises(UserError, match=text) as caught:
        back(tmp_path, writer.FORMATS[form](content()))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds(tmp_path):
    for content in (
        b"",
        b"\x80",
        b"<!DOCTYPE html><html>\n</html>",
        b"PK\x03\x04",
        bytes(2000),
        b"\xff" * 100,
    ):
        with pytest.raises(UserError, match=r"w\.pth: "):
            back(tmp_path, content)
    archive = tmp_path / "other.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("readme.txt", "no weights")
    with pytest.raises(UserError, match=r"one data\.pkl"):
        pth.read(archive)


def test_compressed_member_is_not_inflated(tmp_path):
    content = writer.zip_bytes(
        writer.state_dict({"a": np.zeros(100_000, np.float32)}), compression=zipfile.ZIP_DEFLATED
    )
    assert len(content) < 10_000
    with pytest.raises(UserError, match="compressed"):
        back(tmp_path, content)


def test_flipped_bit_in_a_zip_is_noticed(tmp_path):
    content = writer.zip_bytes(writer.state_dict({"a": np.full(50, 3, np.uint8)}))
    at = content.index(b"\x03" * 50) + 20
    with pytest.raises(UserError, match="checksum"):
        back(tmp_path, content[:at] + b"\x02" + content[at + 1 :])


@FORMATS
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (6,), (1,)),  # one too far
        (0, (2**40,), (1,)),
        (0, (2**40,), (0,)),  # expanded: tiny storage, any size
        (0, (2, 3), (4, 1)),
        (0, (2**31, 2**31, 2**31), (1, 1, 1)),
        (2**61, (1,), (1,)),
        (0, (3,), (1, 1)),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
    ],
)
def test_tensor_beyond_its_storage(tmp_path, form, offset, shape, stride):
    content = {"a": writer.Tensor(writer.Storage(np.zeros(6, np.float32), "0"), offset, shape, stride)}
    content = writer.FORMATS[form](content)
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged"):
        back(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def small_file(form):
    return writer.FORMATS[form](writer.state_dict(some_arrays()))


@FORMATS
def test_every_truncation_is_one_line(tmp_path, form):
    content = small_file(form)
    for length in range(len(content)):
        with pytest.raises(UserError) as caught:
            back(tmp_path, content[:length])
        assert "\n" not in str(caught.value)


@FORMATS
@settings(MODEST, max_examples=600)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=3))
@example(flips=[(0, 1)])
def test_flipped_bytes_give_arrays_or_one_line(tmp_path, form, flips):
    content = bytearray(small_file(form))
    for place, change in flips:
        content[place % len(content)] ^= change
    tracemalloc.start()
    text, found = outcome(tmp_path, bytes(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
    assert found or ("\n" not in text and "w.pth" in text)
    # Whatever a damaged name or offset became, a tensor cannot hold more than the file.
    assert all(array.nbytes <= len(content) for array in found.values())


def outcome(tmp_path, content):
    try:
        return "", back(tmp_path, content)
    except UserError as error:
        return str(error), {}


@pytest.mark.parametrize("compressed", [True, False])
def test_real_torch(tmp_path, monkeypatch, compressed):
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    states = collections.OrderedDict(net.state_dict())
    states["half"], states["brain"] = torch.randn(3).half(), torch.randn(3).bfloat16()
    states["view"] = torch.arange(12.0).reshape(3, 4).t()[1:]
    states["parameter"] = torch.nn.Parameter(torch.randn(2))
    states["flag"] = torch.tensor([True, False])
    torch.save(states, tmp_path / "w.pth", _use_new_zipfile_serialization=compressed)
    found = pth.read(tmp_path / "w.pth")
    assert list(found) == list(states)
    for name, value in states.items():
        assert str(found[name].dtype) == str(value.dtype).removeprefix("torch.")
        assert np.array_equal(found[name].astype(np.float64), value.detach().double().numpy())


def test_real_torch_without_checksums(tmp_path, monkeypatch):
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert pth.read(tmp_path / "w.pth")["a"].tolist() == [0, 1, 2]
