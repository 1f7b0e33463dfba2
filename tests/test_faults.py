"""Damage, and what a run makes of it: checkpoints that are not as saved, clocks that jump, disks that are slow."""

import gc
import json
import os
import random
import re
import shutil
import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import changed, rows, script
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_launch import ended, launch

from tljax import checksums, evaluate, train
from tljax.checkpoint import Checkpoints, Damaged
from tljax.errors import UserError
from tljax.keeper import Keeper
from tljax.lock import Lock
from tljax.workdir import Workdir

RNG = np.random.default_rng(0)
STATE = {
    "step": jnp.int32(7),
    "params": {"stem": {"kernel": jnp.asarray(RNG.normal(size=(64, 48)), jnp.float32)}, "head": {"bias": jnp.ones(3)}},
    "moments": {"stem": None, "head": jnp.ones(3, jnp.bfloat16)},
}
LIKE = jax.eval_shape(lambda: STATE)
NOTES = {"loss": 0.1 + 0.2, "classes": ["ä", "b"], "best": None}


def flipped(file: Path, at: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1 << bit
    file.write_bytes(content)


def values_of(checkpoint: Path) -> Path:
    """The file that holds most of a checkpoint's values."""
    return max((f for f in (checkpoint / "state").rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)


# ---- checksums


def by_hand(values: np.ndarray) -> int:
    """The sum as it is defined, word by word, in Python's integers."""

    def weight(axis, index):
        z = (index + 1 + (axis << 40)) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    size = min(values.dtype.itemsize, 4)
    words = np.frombuffer(np.ascontiguousarray(values).tobytes(), f"u{size}")
    shape = values.shape or (1,)
    if values.dtype.itemsize > 4:
        shape = (*values.shape, values.dtype.itemsize // 4)
    total = 0
    for index, word in zip(np.ndindex(*shape), words):
        product = int(word)
        for axis, i in enumerate(index):
            product = product * weight(axis, i) % 2**64
        total += product
    return total % 2**64


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_, np.int8, np.float64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 3), (5, 1)])
def test_a_checksum_is_that_of_its_definition_and_of_its_parts(dtype, shape):
    x = np.asarray(RNG.normal(size=shape) * 10).astype(dtype)
    assert checksums.part(x) == by_hand(x)
    if len(shape) == 3:
        cut = [(i, j, k) for i in range(3) for j in (0, 2) for k in (0, 2)]
        parts = [checksums.part(x[i : i + 1, j : j + 2, k : k + 2 + k // 2], [i, j, k]) for i, j, k in cut]
        assert sum(parts) % 2**64 == checksums.part(x)
        assert checksums.part(np.asfortranarray(x)) == checksums.part(x)


def test_a_checksum_is_the_same_however_an_array_is_laid_over_devices():
    x = RNG.normal(size=(16, 24)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    laid = [("a", "b"), ("b", None), (None, ("a", "b")), ()]
    put = {str(i): jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for i, spec in enumerate(laid)}
    assert set(checksums.of(put | {"numpy": x}).values()) == {f"{by_hand(x):016x}"}


def test_any_flipped_bit_changes_a_checksum():
    x = RNG.normal(size=(5, 6)).astype(np.float32)
    bits = x.view(np.uint32).reshape(-1)
    found = {checksums.part(x)}
    for word in range(30):
        for bit in range(32):
            bits[word] ^= np.uint32(1 << bit)
            found.add(checksums.part(x))
            bits[word] ^= np.uint32(1 << bit)
    assert len(found) == 1 + 30 * 32


# ---- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints 1, 2 and 3."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(path)
    for step in (1, 2, 3):
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, NOTES | {"step": step}, best=1)
    checkpoints.close()
    return path


def assert_right(checkpoints: Checkpoints, step: int) -> None:
    """What comes back is what was saved."""
    assert checkpoints.notes(step) == NOTES | {"step": step}
    found = checkpoints.restore(step, LIKE)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(STATE | {"step": jnp.int32(step)}), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def damage(rng: random.Random, checkpoint: Path) -> str:
    """Flips a bit of, cuts off, empties or removes a random file; returns what it has done."""
    files = sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.stat().st_size)
    file, kind = rng.choice(files), rng.choice(["flipped", "flipped", "cut", "empty", "zeros", "gone"])
    size = file.stat().st_size
    at = rng.randrange(size)
    if kind == "flipped":
        flipped(file, at, rng.randrange(8))
    elif kind == "gone":
        file.unlink()
    elif kind == "zeros":
        file.write_bytes(file.read_bytes()[:at] + bytes(size - at))
    else:
        os.truncate(file, at if kind == "cut" else 0)
    return f"{file.relative_to(checkpoint)} {kind} at {at}"


def never_wrong(saved: Path, tmp_path: Path, times: int, seed: int) -> int:
    """Damages a copy so many times; returns how often that was noticed. Otherwise what comes back is right."""
    noticed = 0
    for i in range(times):
        path = shutil.copytree(saved, tmp_path / "damaged", dirs_exist_ok=False)
        line = f"{path / '3'} is damaged: or does no harm"
        done = damage(random.Random(f"{seed} {i}"), path / "3")
        try:
            assert_right(Checkpoints(path, create=False), 3)
        except Damaged as error:
            line, noticed = str(error), noticed + 1
        except AssertionError as error:
            raise AssertionError(done) from error
        assert re.match(rf"{path / '3'} is damaged: [^\n]+$", line), done
        shutil.rmtree(path)
    gc.collect()  # orbax's unfinished readers: Python 3.11 fails to parse where they are collected meanwhile
    return noticed


def test_a_damaged_checkpoint_is_noticed_or_does_no_harm(saved, tmp_path):
    """Some of orbax's files are not read again: whatever happens to them, what comes back is right."""
    assert never_wrong(saved, tmp_path, times=8, seed=0) >= 2


@pytest.mark.slow
def test_damaged_checkpoints_at_length(saved, tmp_path):
    assert never_wrong(saved, tmp_path, times=500, seed=random.randrange(10**9)) >= 100


def test_values_that_decompress_to_others_are_named(saved, tmp_path):
    """Orbax's own files have no checksum over values: zstd often decodes what is flipped to something else."""
    found = set()
    for at in range(20, 60):
        path = shutil.copytree(saved, tmp_path / str(at))
        flipped(values_of(path / "3"), at * 97)
        with pytest.raises(Damaged) as error:
            Checkpoints(path, create=False).restore(3, LIKE)
        found.add(error.value.what.partition(" is damaged: ")[2])
        if "not as saved: params/stem/kernel" in found:
            return
    raise AssertionError(found)


def keeper(path: Path) -> Keeper:
    """What keeps the checkpoints of a folder."""
    return Keeper(path.parent, layout=None)


def read(kept: Keeper):
    """A reader as a run has one: notes, and the state."""
    return lambda step: (kept.checkpoints.notes(step)["step"], kept.checkpoints.restore(step, LIKE))[0]


def test_the_newest_whole_checkpoint_is_used_and_damaged_ones_are_moved_away(saved, tmp_path):
    path, said = shutil.copytree(saved, tmp_path / "checkpoints"), []
    flipped(path / "3/notes/metadata", 100)
    values_of(path / "2").unlink()
    (path / "9.orbax-checkpoint-tmp-1").mkdir()  # a save that was cut off
    kept = keeper(path)
    assert kept.newest(read(kept), said.append) == 1
    (line,) = said
    aside = tmp_path / "checkpoints-damaged"
    assert f"{path / '3'} is damaged: " in line
    assert f"{path / '2'} is damaged: " in line
    assert line.endswith(f"moved to {aside}, the run goes on from step 1")
    assert sorted(os.listdir(aside)) == ["2", "3"]
    assert kept.checkpoints.steps() == [1]
    kept.checkpoints.save(2, STATE | {"step": jnp.int32(2)}, NOTES | {"step": 2}, best=1)  # the same step again
    kept.checkpoints.close()
    again = keeper(path)
    assert again.checkpoints.steps() == [1, 2]
    assert_right(again.checkpoints, 2)
    assert sorted(f for f in os.listdir(path) if not f.isdigit()) == []
    # Of several such days only the last one's remains are kept.
    flipped(values_of(path / "2"), 200)
    assert again.newest(read(again), said.append) == 1
    assert os.listdir(aside) == ["2"]


def test_where_no_checkpoint_is_whole_nothing_is_touched(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "checkpoints")
    for step in (1, 2, 3):
        flipped(path / f"{step}/state/manifest.ocdbt", 20)
    before = sorted(path.rglob("*"))
    kept = keeper(path)
    with pytest.raises(UserError, match=r"no checkpoint is whole, and nothing was deleted: .*/3 is damaged: .*/1 is "):
        kept.newest(read(kept), print)
    assert sorted(path.rglob("*")) == before
    assert keeper(tmp_path / "other/checkpoints").newest(print, print) is None


# ---- runs


def ended_as(path: Path, other: Path) -> bool:
    """Whether metrics and figures of two runs are equal."""
    kept = [{k: Workdir(p).summary()[k] for k in ("best", "val", "test", "frozen", "steps")} for p in (path, other)]
    return rows(path) == rows(other) and kept[0] == kept[1]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny, trained, tmp_path, monkeypatch, capsys):
    """On a slow disk, and with a clock that jumps days forward and back: no figure but the dates depends on it."""
    path = shutil.copytree(trained, tmp_path / "run")
    (path / "summary.json").unlink()
    flipped(values_of(path / "checkpoints/24"), 999)
    (path / "checkpoints/30.orbax-checkpoint-tmp-7").mkdir()
    rng, now = random.Random(0), time.time()
    monkeypatch.setattr(time, "time", lambda: now + rng.uniform(-1e6, 1e6))
    for name in ("fsync", "replace", "rename", "link"):
        called = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, called=called: (time.sleep(0.02), called(*args))[1])
    assert train.main([*tiny, f"--workdir={path}"]) == 0
    said = capsys.readouterr().out
    assert f"{path}/checkpoints/24 is damaged: " in said
    assert "the run goes on from step 18\n" in said
    assert "resumed from step 18" in said
    assert ended_as(path, trained)
    assert sorted(os.listdir(path / "checkpoints-damaged")) == ["24"]
    assert all(name.isdigit() for name in os.listdir(path / "checkpoints"))
    summary = json.loads((path / "summary.json").read_text())
    assert all(0 <= seconds < 1000 for seconds in summary["time"].values())
    assert 0 < summary["first_step_seconds"] < 1000


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_leaves_the_last_one_and_can_be_had_again(tiny, tmp_path, capsys):
    fields = {"select": "best", "metric": "val/accuracy", "optim_lr": 0.1, "eval_every": "4 steps"}
    argv = changed(tiny, tmp_path / "run", **fields)
    assert train.main(argv) == 0
    path, whole = tmp_path / "run", shutil.copytree(tmp_path / "run", tmp_path / "whole")
    best = json.loads((path / "summary.json").read_text())["best"]["step"]
    assert best < 18  # none of the last two: all of val are right from there on
    (path / "summary.json").unlink()
    flipped(values_of(path / f"checkpoints/{best}"), 999)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"checkpoints/{best} is damaged: [^\n]+ --checkpoint=last") as error:
            train.main(argv)
    assert "it was the best one" in str(error.value)
    assert sorted(os.listdir(path / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))
    assert evaluate.main([f"--workdir={path}", "--checkpoint=last"]) == 0
    shutil.rmtree(path / "checkpoints")
    assert train.main(argv) == 0
    assert ended_as(path, whole)


# One of two processes: it saves or restores a state of which each holds a part, or takes the workdir.
ONE_OF_TWO = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.lock import Lock
path, doing, address, index = pathlib.Path(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, int(index))
value = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
mesh = Mesh(np.array(jax.devices()), ("x",))
laid = lambda *spec: jax.make_array_from_callback(
    value.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: value[index])
state = {"laid": laid("x"), "whole": laid()}
try:
    if doing == "lock":
        Lock(path).take()
    else:
        checkpoints = Checkpoints(path / "checkpoints")
        if doing == "save":
            checkpoints.save(1, state, {"step": 1})
        else:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            restored = checkpoints.restore(1, like)
            for name in state:
                for a, b in zip(restored[name].addressable_shards, state[name].addressable_shards):
                    assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        checkpoints.close()
    print("done")
except UserError as error:
    print(error)
"""


def two(path: Path, doing: str) -> list[str]:
    """The line that each of two processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [script(ONE_OF_TWO, str(path), doing, address, str(i), devices=2) for i in range(2)]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [[line for line in out.splitlines() if "[Gloo]" not in line][-1] for out, _ in said]


@pytest.mark.slow
def test_what_one_of_two_processes_meets_all_say(tmp_path):
    assert two(tmp_path, "save") == ["done"] * 2
    assert two(tmp_path, "restore") == ["done"] * 2
    # Saved by two processes, read by one.
    x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = dict.fromkeys(("laid", "whole"), jax.ShapeDtypeStruct((64, 48), np.float32, sharding=here))
    restored = Checkpoints(tmp_path / "checkpoints", create=False).restore(1, like)
    assert all(np.asarray(value).tobytes() == x.tobytes() for value in restored.values())

    parts = (tmp_path / "checkpoints/1/state/ocdbt.process_1").rglob("d/*")
    flipped(max(parts, key=lambda file: file.stat().st_size), 999)
    said = two(tmp_path, "restore")
    assert said[0] == said[1]
    assert f"{tmp_path}/checkpoints/1 is damaged: " in said[0]

    assert two(tmp_path, "lock") == ["done"] * 2
    with Lock(tmp_path) as own:
        own.take()
        said = two(tmp_path, "lock")
    assert said[0] == said[1]
    assert said[0].startswith(f"another run is in {tmp_path}: process {os.getpid()} on ")


@pytest.mark.slow
def test_a_run_in_two_processes_goes_on_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path):
    fields = changed(tiny, tmp_path / "run")
    ended(launch(*fields))
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "run/summary.json").unlink()
    flipped(tmp_path / "run/checkpoints/24/notes/metadata", 99)
    out, err = ended(launch(*fields))
    assert err == ""
    assert out.count("the run goes on from step 18\n") == 1
    assert ended_as(tmp_path / "run", whole)
