"""Disks that are full or read-only: one line, nothing that was saved is lost, and with room the run goes on."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import changed, command
from test_bad_input import one_line
from test_faults import ended_as
from test_resume import newest

pytestmark = pytest.mark.slow


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.mount("size=50m")

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], check=True, capture_output=True)

    def remount(self, options: str) -> None:
        self.mount(f"remount,{options}")

    def fill(self) -> None:
        """Takes all the room that is left."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass

    def empty(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    if os.geteuid():
        pytest.skip("only root mounts a file system")
    try:
        made = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError:
        pytest.skip("no file system can be mounted here")
    yield made
    subprocess.run(["umount", made.path], check=True)


def says(process: subprocess.Popen) -> str:
    """The one line with which a command ends."""
    _, err = process.communicate(timeout=600)
    return one_line(process.returncode, err)


def finishes(process: subprocess.Popen) -> str:
    """What a command says that ends well."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def long(tiny, tmp_path):
    """Arguments of a run that logs each step: `long(workdir, …)`."""
    fields = {"train_for": "600 steps", "log_every": "1 steps", "eval_every": "300 steps"}
    return lambda path, **more: changed(tiny, path, **fields | {"checkpoint_every": "100 steps"} | more)


def until(process: subprocess.Popen, reached) -> None:
    """Waits until something is so, while a process runs."""
    begun = time.monotonic()
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < begun + 600
        time.sleep(0.05)


def test_a_disk_that_fills_up_between_checkpoints(long, disk, tmp_path):
    """Rows of metrics are what no longer fits: the last checkpoint stays, and the rows behind it are written anew."""
    run = disk.path / "w"
    process = command("tljax.train", *long(run, checkpoint_every="250 steps"))
    until(process, lambda: newest(run) >= 250)
    disk.fill()
    line = says(process)
    assert line.startswith(f"cannot write to {run}: No space left on device")
    before = newest(run)
    line = says(command("tljax.train", *long(run, checkpoint_every="250 steps")))  # still
    assert line.startswith(f"cannot write to {run}")
    assert newest(run) == before
    disk.empty()
    assert f"resumed from step {before};" in finishes(command("tljax.train", *long(run, checkpoint_every="250 steps")))
    finishes(command("tljax.train", *long(tmp_path / "whole", checkpoint_every="250 steps")))
    assert ended_as(run, tmp_path / "whole")


def test_a_disk_that_is_full_of_features(tiny, disk, tmp_path):
    fields = {"cache": "disk", "cache_views": 4, "cache_folder": disk.path / "features"}
    disk.remount("size=48k")
    line = says(command("tljax.train", *changed(tiny, tmp_path / "run", **fields)))
    assert line.startswith(f"feature cache: {disk.path / 'features'}")
    assert line.endswith("cannot be used (No space left on device)")
    assert not list(disk.path.rglob("*.tmp"))
    disk.remount("size=50m")
    finishes(command("tljax.train", *changed(tiny, tmp_path / "run", **fields)))
    finishes(command("tljax.train", *changed(tiny, tmp_path / "whole", **fields)))
    assert ended_as(tmp_path / "run", tmp_path / "whole")


def test_a_disk_that_has_become_read_only(long, disk, tmp_path):
    run = disk.path / "w"
    process = command("tljax.train", *long(run))
    until(process, lambda: newest(run) >= 100)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = newest(run)
    disk.remount("ro")
    listed = sorted(run.rglob("*"))
    assert says(command("tljax.train", *long(run))) == f"cannot write to {run}: Read-only file system"
    finishes(command("tljax.evaluate", f"--workdir={run}"))  # reads alone
    assert sorted(run.rglob("*")) == listed
    disk.remount("rw")
    assert f"resumed from step {before};" in finishes(command("tljax.train", *long(run)))
    finishes(command("tljax.train", *long(tmp_path / "whole")))
    assert ended_as(run, tmp_path / "whole")


def test_a_full_disk_at_the_start(tiny, disk, tmp_path):
    disk.fill()
    line = says(command("tljax.train", *changed(tiny, disk.path / "w")))
    assert line.startswith(f"cannot write to {disk.path / 'w'}: No space left on device")
    shutil.rmtree(disk.path / "w", ignore_errors=True)
