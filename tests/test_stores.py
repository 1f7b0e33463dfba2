"""Workdirs, checkpoints, weights and data in stores: fakes of GCS and S3 on loopback, asked by the real libraries."""

import json
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, command, launch, script
from test_launch import EXACT, assert_same
from test_resume import KILLED, end

from tljax import command as command_line
from tljax import config, files, status, stores, sweep, train, workdir
from tljax.checkpoint import Checkpoints, Damaged
from tljax.errors import UserError
from tljax.workdir import Workdir

BEAT = ("time", "since", "alive", "every")
FAKES = ("gs", "s3")


@pytest.fixture(autouse=True)
def held(buckets):
    """What both stores hold: nothing, at first."""
    return buckets


def tiny_config():
    found = config.base("resnet_tiny")
    found.update(name="tiny", weights="")
    return found


def local(tmp_path):
    """The files that are left on this machine."""
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


@pytest.mark.parametrize("scheme", FAKES)
def test_a_workdir_in_a_store_has_the_rows_when_they_are_flushed(held, scheme, tmp_path, monkeypatch):
    """What a SIGKILL leaves is what the store has: each flush is looked at as another machine would see it."""
    monkeypatch.setattr(workdir, "COPY_EVERY", 1e9)
    place, there = f"{scheme}://bucket/runs/a", held[scheme]
    run = Workdir(place)
    run.copied_at = 1e9
    run.claim(tiny_config())
    run.rewind(0)
    run.log({"step": 1, "train/loss": 0.5})
    assert there.read(f"{place}/metrics.jsonl") == b""
    assert run.rows() == [{"step": 1, "train/loss": 0.5}]
    run.flush()
    assert Workdir(place).rows() == [{"step": 1, "train/loss": 0.5}]
    count = len(there.requests)
    run.flush()
    assert len(there.requests) == count, "what has not grown was copied again"
    run.log({"step": 2, "train/loss": 0.25})

    resumed = Workdir(place)  # on another machine, after a kill
    resumed.claim(tiny_config())
    resumed.rewind(1)
    resumed.copied_at = 1e9
    resumed.log({"step": 2, "train/loss": 0.125})
    resumed.write("summary.json", json.dumps({"steps": 2}))
    resumed.close()
    assert Workdir(place).rows() == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.125}]
    assert Workdir(place).summary() == {"steps": 2}
    names = there.names_below(place)
    assert [n for n in names if not n.startswith("events.")] == ["config.json", "metrics.jsonl", "summary.json"]
    assert len(names) > 3
    assert local(tmp_path) == []
    other = tiny_config()
    other.seed = 7
    with pytest.raises(UserError, match=rf"^{scheme}://bucket/runs/a holds a run with another config: seed: 0 → 7"):
        Workdir(place).claim(other)


def test_rows_reach_the_store_by_the_clock_too(held, monkeypatch):
    monkeypatch.setattr(workdir, "COPY_EVERY", 0.0)
    run = Workdir("gs://bucket/a")
    run.rewind(0)
    run.log({"step": 1})
    assert held["gs"].read("gs://bucket/a/metrics.jsonl") == b'{"step": 1}\n'


@pytest.mark.parametrize("scheme", FAKES)
def test_status_of_runs_in_a_store(held, scheme):
    place, there = f"{scheme}://bucket/runs/a", held[scheme]
    run = Workdir(place)
    run.claim(tiny_config())
    run.rewind(0)
    run.log({"step": 8, "train/loss": 0.5})
    run.flush()
    run.write("heartbeat.json", json.dumps({"end": "stopped", "why": "by SIGTERM"} | dict.fromkeys(BEAT, 1.0)))
    marker = {"gs": "commit_success.txt", "s3": "whole.json"}[scheme]
    for name in (f"6/{marker}", "7/half"):
        there.put("bucket", f"runs/a/checkpoints/{name}", b"{}")
    there.put("bucket", "runs/other/file", b"")
    for given in (place, f"{scheme}://bucket/runs/*"):
        folders, others = status.find([given])
        assert ([os.fspath(folder) for folder in folders], others) == ([place], [])
        told = status.look(folders[0])
        assert (told["state"], told["why"], told["loss"]) == ("stopped", "by SIGTERM", 0.5)
        assert (told["step"], told["checkpoint"]["step"]) == (8, 6)
    assert status.find([f"{scheme}://bucket/runs/other"])[1]


def state(step):
    return {"params": {"w": jnp.arange(600.0) + step, "b": jnp.ones((3, 4), jnp.bfloat16) * step}}


def like():
    return jax.eval_shape(lambda: state(0))


def placed(tree):
    spot = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spot), tree)


def test_a_checkpoint_that_orbax_writes_to_the_store(held, tmp_path):
    place = "gs://bucket/runs/a/checkpoints"
    checkpoints = Checkpoints(place)
    checkpoints.save(1, state(1), {"step": 1}, best=None)
    checkpoints.close()
    held["gs"].put("bucket", "runs/a/checkpoints/2/state/manifest.ocdbt", b"half")
    reading = Checkpoints(place, create=False)
    assert reading.steps() == [1]
    assert reading.notes(1) == {"step": 1}
    assert float(reading.restore(1, placed(like()))["params"]["w"][-1]) == 600
    reading.close()
    assert local(tmp_path) == []


@pytest.mark.parametrize("scheme", [pytest.param("gs", marks=pytest.mark.slow), "s3"])
def test_checkpoints_in_a_store(held, scheme, tmp_path):
    place, there = f"{scheme}://bucket/runs/a/checkpoints", held[scheme]
    checkpoints = Checkpoints(place)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step}, best=None)
    checkpoints.close()
    assert {name.partition("/")[0] for name in there.names_below(place)} == {"2", "3"}
    assert local(tmp_path) == []

    # A kill in the middle of saving, or of removing: all but the last object that is written.
    last = {"gs": "commit_success.txt", "s3": "whole.json"}[scheme]
    for (bucket, name), _ in list(there.objects.items()):
        if "/3/" in name and not name.endswith(f"/3/{last}"):
            there.put(bucket, name.replace("/3/", "/4/"), b"half")
    again = Checkpoints(place)
    assert again.steps() == [2, 3]
    assert again.latest() == 3
    assert again.notes(3) == {"step": 3}
    restored = again.restore(3, placed(like()))
    assert jax.tree.map(lambda a, b: bool(jnp.all(a == b)), restored, state(3)) == {"params": {"w": True, "b": True}}
    again.save(4, state(4), {"step": 4}, best=2)
    again.save(5, state(5), {"step": 5}, best=2)
    again.close()
    reading = Checkpoints(place, create=False)
    assert reading.steps() == [2, 4, 5]
    assert float(reading.restore(4, placed(like()))["params"]["w"][0]) == 4
    reading.close()


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(held):
    place = "gs://bucket/runs/a/checkpoints"
    checkpoints = Checkpoints(place)
    checkpoints.save(1, state(1), {}, best=None)
    checkpoints.wait()
    held["gs"].refused = "GET .*/o/runs/a/checkpoints/1/state/(d|ocdbt.process_0)/"
    with pytest.raises(UserError, match=rf"^cannot read {place}/1: ") as caught:
        checkpoints.restore(1, placed(like()))
    assert not isinstance(caught.value, Damaged)
    held["gs"].refused = ""
    assert float(checkpoints.restore(1, placed(like()))["params"]["w"][0]) == 1
    checkpoints.close()


def test_a_checkpoint_that_does_not_arrive(held):
    place = "s3://bucket/a/checkpoints"
    checkpoints = Checkpoints(place)
    checkpoints.save(1, state(1), {}, best=None)
    checkpoints.wait()
    held["s3"].refused = "PUT .*/2/"
    checkpoints.save(2, state(2), {}, best=None)
    with pytest.raises(
        UserError, match=r"cannot write a checkpoint to s3://bucket/a/checkpoints: .*; the last whole one is of"
    ):
        checkpoints.wait()
    held["s3"].refused = ""
    assert Checkpoints(place).steps() == [1]  # what was left here goes: the store is right


def test_what_was_damaged_in_the_store_is_not_read(held):
    place = "s3://bucket/a/checkpoints"
    checkpoints = Checkpoints(place)
    checkpoints.save(1, state(1), {}, best=None)
    checkpoints.close()
    key = next(k for k in held["s3"].objects if k[1].endswith("/1/notes/metadata"))
    held["s3"].put(*key, b"damaged")
    with pytest.raises(Damaged, match="s3://bucket/a/checkpoints/1 is damaged: "):
        Checkpoints(place).notes(1)


def test_a_damaged_checkpoint_that_is_saved_again_is_replaced_in_the_store(held):
    """Also one of which only a damaged list is left."""
    place, there = "s3://bucket/a/checkpoints", held["s3"]
    checkpoints = Checkpoints(place)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step}, best=None)
    checkpoints.close()
    key = next(k for k in there.objects if k[1].endswith("/2/notes/metadata"))
    there.put(*key, b"damaged")
    there.put("bucket", "a/checkpoints/3/whole.json", b"half")
    again = Checkpoints(place)
    for step in (2, 3):
        with pytest.raises(Damaged):
            again.notes(step)
    again.set_aside([2, 3])
    again.save(2, state(2), {"again": 2}, best=None)
    again.close()
    reading = Checkpoints(place, create=False)
    assert reading.steps() == [1, 2]
    assert reading.notes(2) == {"again": 2}
    assert float(reading.restore(2, placed(like()))["params"]["w"][0]) == 2
    listed = json.loads(there.read(f"{place}/2/whole.json"))
    assert there.names_below(f"{place}/2") == sorted([*listed, "whole.json"]), "files of the damaged one were left"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gs://nothere/run", "cannot write to gs://nothere/run: there is no bucket nothere, or it cannot be seen"),
        ("s3://nothere/run", "cannot write to s3://nothere/run: there is no bucket nothere, or it cannot be seen"),
        ("strange://bucket/run", "--workdir: strange:// is no scheme that etils.epath knows, as gs:// and s3:// are"),
        ("gs:///run", "--workdir: 'gs:///run' names no bucket, as gs://bucket/folder does"),
    ],
)
def test_a_workdir_that_cannot_be(place, message):
    with pytest.raises(UserError) as caught:
        Workdir(place).claim(tiny_config())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", FAKES)
def test_a_store_that_lets_nobody_write_or_read(held, scheme):
    held[scheme].refused = "^(POST|PUT)"
    with pytest.raises(UserError, match=rf"^cannot write to {scheme}://bucket/run: (OSError|PermissionError): "):
        Workdir(f"{scheme}://bucket/run").claim(tiny_config())
    held[scheme].refused = "."
    with pytest.raises(UserError, match=rf"cannot read {scheme}://bucket/run: (OSError|PermissionError): "):
        Workdir(f"{scheme}://bucket/run").config()


def test_a_scheme_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"^--workdir: s3:// needs s3fs: pip install -e '\.\[s3\]'$"):
        Workdir("s3://bucket/run")


def test_what_a_store_refuses_is_one_line_wherever_it_comes_up(held):
    held["gs"].refused = held["s3"].refused = "."
    for scheme in FAKES:
        with pytest.raises(OSError, match=r"(?i)forbidden|denied") as caught:
            stores.place(f"{scheme}://bucket/a.png", "").read_bytes()
        line = command_line.explained(caught.value)
        assert line, caught.value
        assert line.startswith("a store cannot be read or written (")
    assert stores.failed(ValueError("UNAVAILABLE: Error reading gs://bucket/a"))
    assert not stores.failed(ValueError("NOT_FOUND: Error reading gs://bucket/a"))


def test_what_needs_a_file_system_says_so():
    with pytest.raises(UserError, match="--workdir=gs://bucket/sweep: a sweep's folder is shared by links"):
        sweep.main([f"--config={TINY}", "--workdir=gs://bucket/sweep"])
    with pytest.raises(UserError, match=r"config.cache_folder = 'gs://bucket/features': features are kept in a local"):
        train.main([f"--config={TINY}", "--config.cache_folder=gs://bucket/features"])


@pytest.mark.parametrize("scheme", FAKES)
def test_a_folder_is_copied_once(held, scheme, photos, tmp_path):
    place, there = f"{scheme}://bucket/data/photos", held[scheme]
    for file in photos.rglob("*.png"):
        there.put("bucket", f"data/photos/{file.relative_to(photos).as_posix()}", file.read_bytes())
    there.put("bucket", "data/photos/train/", b"")  # as consoles make it, to show a folder
    there.put("bucket", "data/photos2/other.png", b"not of the folder")
    near = files.locate(place, "data")
    same = lambda: {p.relative_to(near): p.read_bytes() for p in near.rglob("*") if p.is_file()}
    assert same() == {p.relative_to(photos): p.read_bytes() for p in photos.rglob("*") if p.is_file()}

    there.requests.clear()
    assert files.locate(place, "data") == near
    asked = [r for r in there.requests if ".png" in r]
    assert asked == []
    there.put("bucket", "data/photos/test/red/red0.png", b"another")
    del there.objects["bucket", "data/photos/test/red/red1.png"]
    (near / "test/red/red2.png").write_bytes(b"cut off")
    (near / "test/red/red9.png").write_bytes(b"not there")
    files.locate(place, "data")
    assert {r.rpartition("/")[2] for r in there.requests if ".png" in r} == {"red0.png", "red2.png"}
    assert sorted(p.name for p in (near / "test/red").iterdir()) == ["red0.png", "red2.png", "red3.png"]
    assert (near / "test/red/red0.png").read_bytes() == b"another"

    there.refused = "."
    assert files.locate(place, "data") == near  # the copy serves
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^data: {scheme}://bucket/data/photos cannot be read \("):
        files.locate(place, "data")


def test_folders_that_cannot_be_copied(held, monkeypatch):
    there = held["s3"]
    there.put("bucket", "data/a/../b.png", b"content")
    with pytest.raises(UserError, match=r"^data: s3://bucket/data holds 'a/../b.png', which lies in no folder$"):
        files.locate("s3://bucket/data", "data")
    there.objects.clear()
    there.put("bucket", "data/a/b.png", b"content")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6))
    with pytest.raises(UserError, match=r"s3://bucket/data takes 7 B more, and 6 B are free at .*XDG_CACHE_HOME"):
        files.locate("s3://bucket/data", "data")
    with pytest.raises(UserError, match=r"^data: s3://bucket/nothing does not exist$"):
        files.locate("s3://bucket/nothing", "data")


def test_half_a_copy_of_a_folder_goes_on(held):
    there = held["s3"]
    for name in "abc":
        there.put("bucket", f"data/{name}.png", name.encode() * 9)
    there.refused = "GET .*/b.png"
    with pytest.raises(UserError, match="cannot be read"):
        files.locate("s3://bucket/data", "data")
    there.refused = ""
    there.requests.clear()
    near = files.locate("s3://bucket/data", "data")
    assert sorted(p.name for p in near.iterdir()) == ["a.png", "b.png", "c.png"]
    assert (near / "b.png").read_bytes() == b"b" * 9


SHORT = (
    "--config.train_for=9 steps", "--config.checkpoint_every=3 steps", "--config.eval_every=4 steps",
    "--config.log_every=2 steps", "--config.augment.mixup=0.2", "--config.drop_rate=0.3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scheme", FAKES)
def test_a_run_killed_on_one_machine_goes_on_at_another(held, scheme, tiny, tmp_path):
    """Killed in a save, and behind one; each process knows only what the store has. It ends as a local run does."""
    from etils import epath

    place = f"{scheme}://bucket/killed"
    argv = [*tiny, *SHORT]
    whole = command("tljax.train", *argv, f"--workdir={tmp_path / 'whole'}")
    for i, (moment, step) in enumerate((("during", 3), ("after", 6))):
        machine = str(tmp_path / f"machine{i}")
        process = script(KILLED, moment, str(step), *argv, f"--workdir={place}", XDG_CACHE_HOME=machine)
        _, err = process.communicate(timeout=500)
        assert process.returncode == -signal.SIGKILL, err
    process = command("tljax.train", *argv, f"--workdir={place}", XDG_CACHE_HOME=str(tmp_path / "last"))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "resumed from step 6" in out
    _, err = whole.communicate(timeout=500)
    assert whole.returncode == 0, err
    assert end(epath.Path(place)) == end(tmp_path / "whole")
    left = [p for p in (tmp_path / "last").rglob("*") if p.is_file() and "xla" not in p.parts]
    assert not [p for p in left if "workdirs" in p.parts]
    held[scheme].requests.clear()
    # What is at an end needs no step more, and serves as weights.
    process = command("tljax.evaluate", f"--workdir={place}", XDG_CACHE_HOME=str(tmp_path / "other"))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "the same figures as summary.json" in out
    process = command(
        "tljax.train", *argv, f"--config.weights={place}", f"--workdir={tmp_path / 'next'}",
        XDG_CACHE_HOME=str(tmp_path / "other"),
    )  # fmt: skip
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert f"weights   {place}" in out


@pytest.mark.slow
def test_two_processes_write_one_run_to_a_store(held, tiny, tmp_path):
    argv = [*tiny, *SHORT, "--config.parallel.fsdp=2"]
    for place in ("gs://bucket/two", tmp_path / "two"):
        process = launch(*argv, f"--workdir={place}")
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    assert_same("gs://bucket/two", tmp_path / "two", EXACT)
    names = held["gs"].names_below("gs://bucket/two/checkpoints/9")
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= {part for name in names for part in name.split("/")}
