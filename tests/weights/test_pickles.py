"""Pickles with code in them: refused by name, and nothing in them has run (a marker file would show)."""

import collections
import io
import os
import pickle
import sys
import tracemalloc

import numpy as np
import pth_writer as writer
import pytest

from tljax.errors import UserError
from tljax.weights import pickles, pth


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Slots:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return (collections.OrderedDict, (), self.state)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def programs(marker):
    """name → (pickle that would leave a marker file, what the refusal must name)."""
    command = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w')"
    system = f"{os.system.__module__}.system"
    found = {}
    for protocol in (0, 2, 4):
        for name, evil, shown in (
            ("system", Evil(os.system, command), system),
            ("eval", Evil(eval, write), "builtins.eval"),
            ("exec", Evil(exec, write), "builtins.exec"),
            ("mkdir", Evil(os.mkdir, str(marker)), f"{os.mkdir.__module__}.mkdir"),
            ("getattr", Evil(getattr, 1, "real"), "builtins.getattr"),
        ):
            found[f"{name}-{protocol}"] = (pickle.dumps(evil, protocol), shown)
            inside = collections.OrderedDict(weight=[{"deep": (1, evil)}])
            found[f"nested-{name}-{protocol}"] = (pickle.dumps(inside, protocol), shown)
            state = Slots({"_metadata": evil})
            found[f"metadata-{name}-{protocol}"] = (pickle.dumps(state, protocol), shown)
    rebuild, float_storage = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"
    ordered = b"ccollections\nOrderedDict\n"
    argument = f"S'{command}'\n".encode()
    found |= {
        "global": (b"cos\nsystem\n(" + argument + b"tR.", "os.system"),
        "import alone": (b"cthis\ns\n.", "this.s"),
        "inst": (b"(" + argument + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\n" + argument + b"o.", "os.system"),
        "obj admitted": (b"(" + ordered + b"o.", "instruction OBJ"),
        "newobj": (b"\x80\x02" + ordered + b")\x81.", "a new object of `collections.OrderedDict`"),
        "scripted, with arguments": (b"c__torch__\nNet\nK\x01\x85\x81.", "a new object of `__torch__.Net`"),
        "newobj of data": (b"S'os'\n)\x81.", "a new object of a str"),
        "call of a scripted class": (b"c__torch__\nNet\n)R.", "call of `__torch__.Net`"),
        "state of a scripted class": (b"c__torch__\nNet\n}b.", "state of `__torch__.Net`"),
        "state of a module that is no dict": (b"c__torch__\nNet\n)\x81K\x01b.", "state of a Module"),
        "newobj_ex": (b"\x80\x04" + ordered + b")}\x92.", "instruction NEWOBJ_EX"),
        "stack global": (
            b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R.",
            "os.system",
        ),
        "global from data": (b"\x80\x04K\x01K\x02\x93.", "not named by two strings"),
        "dotted": (
            b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
            "torch._utils._rebuild_tensor_v2.__globals__",
        ),
        "other split": (b"\x80\x04" + text("torch") + text("_utils.sys") + b"\x93.", "torch._utils.sys"),
        "build on function": (
            rebuild + b"}S'__code__'\nI1\nsb.",
            "state of `torch._utils._rebuild_tensor_v2`",
        ),
        "build slots": (rebuild + b"(N}S'__class__'\n" + ordered + b"stb.", "state of `torch"),
        "build on tuple": (b")}b.", "state of a tuple"),
        "call of a type": (float_storage + b"(I10\ntR.", "call of `torch.FloatStorage`"),
        "call of data": (b"S'os'\n)R.", "call of a str"),
        "call of a result": (ordered + b")R)R.", "call of a dict"),
        "extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
        "text persistent id": (b"Pos.system\n.", "instruction PERSID"),
        "persistent id": (b"\x80\x02" + text("os.system") + b"Q.", "a persistent id that is a str"),
        "storage of a function": (
            b"\x80\x02(" + text("storage") + rebuild + text("0") + text("cpu") + b"K\x01tQ.",
            "storage of `torch._utils._rebuild_tensor_v2`",
        ),
        "tensor of no storage": (rebuild + b"(K\x01K\x00))tR.", "no storage"),
        "parameter of no tensor": (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89NtR.", "no tensor"),
        "set": (b"\x80\x04\x8f.", "instruction EMPTY_SET"),
        "items of a global": (ordered + b"K\x01K\x02s.", "no dict"),
        "append to a global": (ordered + b"K\x01a.", "no list"),
        "tuple as key": (b"}K\x01\x85K\x02s.", "dict key"),
        "ordered dict of a tuple": (ordered + b"K\x01\x85\x85R.", "no list"),
    }
    return found


NAMES = list(programs("marker"))


@pytest.mark.parametrize("name", NAMES)
def test_code_is_refused_and_does_not_run(tmp_path, monkeypatch, name):
    writer.stand_ins(monkeypatch)
    marker = tmp_path / "marker"
    program, shown = programs(marker)[name]
    path = tmp_path / "model.pth"
    for content in (
        program,
        writer.zip_bytes(None, program=program),
        writer.old_bytes(None, program=program),
        pickle.dumps(writer.MAGIC, 2) + pickle.dumps(1001, 2) + program,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            pth.read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: refused ")
        assert message.endswith("only tensors are read; nothing in the file was run")
        assert shown in message
        assert "\n" not in message
        assert not marker.exists()
    assert "this" not in sys.modules


def test_the_programs_are_dangerous(tmp_path):
    # Otherwise the test above would prove nothing: Python's unpickler does leave the marker.
    marker = tmp_path / "marker"
    for name in ("system-2", "nested-eval-4", "metadata-exec-2", "inst", "stack global"):
        pickle.loads(programs(marker)[name][0])
        assert marker.exists(), name
        marker.unlink()


def allocated(program):
    tracemalloc.start()
    try:
        pickles.run(io.BytesIO(program))
    except (*pickles.DAMAGED, pickles.Refused) as error:
        return type(error), tracemalloc.get_traced_memory()[1]
    else:
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (b"Nr\xff\xff\xff\x7f.", None),  # LONG_BINPUT: 16 GB in Python's unpickler
        (b"\x8d" + (2**40).to_bytes(8, "little") + b"short.", ValueError),
        (b"\x8e" + (2**62).to_bytes(8, "little") + b"short.", ValueError),
        (b"X\xff\xff\xff\xffshort.", ValueError),
        (b"\x8b\xff\xff\xff\x7fshort.", ValueError),
        (b"\x96" + (2**40).to_bytes(8, "little") + b"short.", ValueError),
        (b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.", None),
        (b")" + b"\x85" * 200_000 + b"0N.", None),  # nested deeper than the C stack
        (b"}(" + b")" + b"\x85" * 200_000 + b"Nu.", pickles.Refused),  # and hashed
        (b"]" * 100_000 + b"a" * 99_999 + b".", None),
        (b"(" * 1000 + b"t.", None),
        (b"t.", IndexError),
        (b"0.", IndexError),
        (b"\x85.", IndexError),
        (b"h\x05.", KeyError),
        (b"}K\x01u.", IndexError),
        (b"}(K\x01u.", ValueError),
    ],
)
def test_memory_follows_the_length_of_the_program(program, error):
    found, peak = allocated(program)
    assert found is error
    assert peak < 400 * len(program) + 1_000_000


def test_a_remembered_list_of_pairs_is_not_multiplied():
    # The list of n pairs, remembered, then m calls of OrderedDict with it: would be n × m entries.
    pairs = b"](" + b"".join(b"K%cK\x00\x86" % i for i in range(250)) + b"eq\x000"
    program = pairs + b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 200 + b"t."
    result = pickles.run(io.BytesIO(program))
    assert [len(item) for item in result] == [250] + [0] * 199


MODULE = b"c__torch__\nNet\n)\x81"


@pytest.mark.parametrize(
    "program",
    [
        # Thirty levels, each with the one below it under two names, would be 2^30 names.
        MODULE + b"".join(b"q%c0" % i + MODULE + b"}(S'a'\nh%cS'b'\nh%cub" % (i, i) for i in range(30)) + b".",
        MODULE + b"q\x00}S'self'\nh\x00sb.",  # in itself
        b"}q\x00(S'a'\n" + MODULE + b"h\x00bS'b'\n" + MODULE + b"h\x00bu0" + MODULE + b"h\x00b.",  # one state for all
    ],
)
def test_scripted_modules_under_several_names_are_refused(tmp_path, program):
    path = tmp_path / "w.pt"
    path.write_bytes(writer.zip_bytes(None, program=program))
    with pytest.raises(UserError, match="refused one module under several names"):
        pth.read(path)


def test_scripted_modules_of_long_names_are_refused(tmp_path):
    deep = b"".join(b"q%c0" % i + MODULE + b"}S'%s'\nh%csb" % (b"n" * 200, i) for i in range(5))
    path = tmp_path / "w.pt"
    path.write_bytes(writer.zip_bytes(None, program=MODULE + deep + b"."))
    with pytest.raises(UserError, match="very long ones"):
        pth.read(path)


def test_one_dict_under_many_names_is_converted_once(tmp_path, monkeypatch):
    writer.stand_ins(monkeypatch)
    inner = {f"k{i}": writer.tensor(np.ones(1, np.float32), "0") for i in range(1000)}
    content = {f"n{i}": inner for i in range(1000)}
    path = tmp_path / "w.pth"
    path.write_bytes(writer.zip_bytes(content))
    tracemalloc.start()
    with pytest.raises(UserError, match="1000 entries are no tensors"):
        pth.read(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
