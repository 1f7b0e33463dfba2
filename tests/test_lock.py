"""One run at a time in a workdir: who is in it is named, and who is dead is in nobody's way."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tljax import claims, lock
from tljax.errors import UserError
from tljax.lock import Lock

ELSEWHERE = {"machine": "another", "host": "worker-7", "pid": 4711}


def held(path: Path, **changed) -> Path:
    """A claim of another holder of a workdir: by default of the process that started this one."""
    identity = claims.identity() | {"pid": os.getppid(), "born": claims._born(os.getppid())} | changed
    file = path / lock.FOLDER / "claim-0004"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(identity | {"since": "2026-01-02 03:04:05"}))
    return file


def aged(file: Path, seconds: float) -> None:
    """Sets a file's time of change so many seconds back."""
    os.utime(file, (time.time() - seconds,) * 2)


def names(path: Path) -> list[str]:
    """The files of a lock."""
    return sorted(os.listdir(path / lock.FOLDER))


@pytest.fixture
def fast(monkeypatch):
    """Heartbeats are old after half a second."""
    monkeypatch.setattr(claims, "STALE", 0.5)
    monkeypatch.setattr(lock, "LOOK", 0.02)


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path):
    held(tmp_path)
    with Lock(tmp_path) as own, pytest.raises(UserError) as error:
        own.take()
    line = f"another run is in {tmp_path}: process {os.getppid()} on {claims.identity()['host']}, since 2026-01-02 03:"
    assert str(error.value).startswith(line)
    assert names(tmp_path) == ["claim-0004"]


def test_an_end_of_any_kind_leaves_the_workdir_free(tmp_path):
    for _ in range(5):
        with Lock(tmp_path) as own:
            own.take()
            with pytest.raises(UserError, match=f"another run is in .*: process {os.getpid()} on "):
                Lock(tmp_path).take()
    with contextlib.suppress(KeyboardInterrupt), Lock(tmp_path) as own:
        own.take()
        raise KeyboardInterrupt
    with Lock(tmp_path) as own:
        own.take()
        own.check()
    assert names(tmp_path) == ["claim-0007", "claim-0007.left"]  # nothing grows


@pytest.mark.parametrize(
    "dead",
    [{"pid": 2**22 + 1}, {"born": "1"}],  # no process has this number; another process has it by now
    ids=["gone", "its number is another's"],
)
def test_a_dead_process_of_this_machine_does_not_block(tmp_path, dead):
    held(tmp_path, **dead)
    with Lock(tmp_path) as own:
        own.take()
        assert names(tmp_path) == ["claim-0005"]


def test_who_sleeps_on_this_machine_keeps_the_workdir(tmp_path):
    """A laptop that was closed, a process that was stopped: it goes on, and would write."""
    aged(held(tmp_path), 3600)
    with pytest.raises(UserError, match="another run is in"):
        Lock(tmp_path).take()


def assert_that_heartbeats_block(workdir: str | Path, touch) -> None:
    """While `touch` is called again and again, the holder ELSEWHERE counts as alive, and is named."""
    ended, said = threading.Event(), []

    def beat():
        while not ended.wait(0.05):
            touch()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"another run is in {workdir}: process 4711 on worker-7, since 2026"):
            Lock(workdir).take(said.append)
    finally:
        ended.set()
        thread.join()
    assert "process 4711 on worker-7 was here before: looking" in said[0]


def test_a_heartbeat_from_elsewhere_blocks_whatever_the_clocks_say(tmp_path, fast):
    file = held(tmp_path, **ELSEWHERE)
    # That machine's clock is a day ahead.
    assert_that_heartbeats_block(tmp_path, lambda: aged(file, -1e5 + time.perf_counter()))


@pytest.mark.parametrize("age", [0, 3600, -3600], ids=["just now", "long ago", "to come"])
def test_no_heartbeat_from_elsewhere_blocks_for_a_bounded_time(tmp_path, fast, age):
    aged(held(tmp_path, **ELSEWHERE), age)
    begun = time.monotonic()
    with Lock(tmp_path) as own:
        own.take(lambda line: None)
    assert time.monotonic() - begun < 30
    assert "claim-0005" in names(tmp_path)


def test_a_claim_that_is_not_whole_blocks_as_one_from_elsewhere(tmp_path, fast):
    held(tmp_path).write_text("")
    with Lock(tmp_path) as own:
        own.take(lambda line: None)


def test_of_several_that_find_a_dead_holder_one_gets_the_workdir(tmp_path):
    held(tmp_path, pid=2**22 + 1)
    locks, barrier, got = [Lock(tmp_path) for _ in range(8)], threading.Barrier(8), []

    def take(own):
        barrier.wait()
        try:
            own.take()
            got.append(own)
        except UserError:
            pass

    threads = [threading.Thread(target=take, args=(own,)) for own in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].check()
    got[0].__exit__()


def test_a_late_contender_does_not_slip_in_behind_what_was_tidied_up(tmp_path):
    """It has seen claim 4 dead, slept, and awakes where 5 has come and gone and 6 holds."""
    held(tmp_path, pid=2**22 + 1)
    with Lock(tmp_path) as first:
        first.take()
    with Lock(tmp_path) as second:
        second.take()
        assert names(tmp_path) == ["claim-0006"]
        assert claims.succeed(tmp_path / lock.FOLDER, 4) is None
        assert claims.succeed(tmp_path / lock.FOLDER, 5) is None
        assert names(tmp_path) == ["claim-0006"]


def test_who_was_taken_for_dead_stops(tmp_path):
    with Lock(tmp_path) as own:
        own.take()
        other = claims.succeed(tmp_path / lock.FOLDER, 1)
        with pytest.raises(UserError, match=r"another run is in .*; it took this one for dead"):
            own.check()
        other.__exit__()


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / lock.FOLDER).write_text("")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: "):
        Lock(tmp_path).take()


def test_a_terminated_process_leaves_its_workdir(tmp_path, monkeypatch):
    """At its beginning and its end, when nothing waits for the signal: another machine need not wait for it."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda *how: killed.append((how, signal.getsignal(signal.SIGTERM))))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        own = Lock(tmp_path)
        own.take()
        signal.raise_signal(signal.SIGTERM)
        assert killed == [((os.getpid(), signal.SIGTERM), signal.SIG_DFL)]
        assert names(tmp_path) == ["claim-0001", "claim-0001.left"]
        with Lock(tmp_path) as own:
            own.take()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
