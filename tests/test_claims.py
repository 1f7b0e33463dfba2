"""Claims: one holder at a time, whoever dies, stops or comes back, and files that are written once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import race
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import claims


def at_once(count: int, function) -> list:
    """What so many threads get that call a function together."""
    barrier, found = threading.Barrier(count), [None] * count

    def run(i):
        barrier.wait()
        found[i] = function(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def aged(path: Path, seconds: float) -> None:
    """Sets a file's time of change so many seconds back."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_file_is_published_whole_by_one_of_several(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    won = at_once(8, lambda i: claims.publish(tmp_path / "result", texts[i]))
    assert sum(won) == 1
    assert (tmp_path / "result").read_text() == texts[won.index(True)]
    assert not claims.publish(tmp_path / "result", "late")
    assert os.listdir(tmp_path) == ["result"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "result").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


def test_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert sum(at_once(8, lambda i: claims.publish(tmp_path / "result", str(i)))) == 1
    assert os.listdir(tmp_path) == ["result"]


def test_nothing_is_left_of_a_file_that_does_not_fit(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        claims.publish(tmp_path / "result", "text")
    assert os.listdir(tmp_path) == []


def test_a_claim_is_held_until_it_is_left(tmp_path):
    assert claims.holder(tmp_path / "work") is None
    with claims.take(tmp_path / "work") as claim:
        assert claims.take(tmp_path / "work") is None
        found = claims.holder(tmp_path / "work")
        assert (found["pid"], found["worker"]) == (os.getpid(), claims.name())
        assert not claim.lost
    assert claims.holder(tmp_path / "work") is None
    with claims.take(tmp_path / "work") as claim:
        assert claim.path.name == "claim-0002"


def test_a_heartbeat_keeps_a_claim_and_none_loses_it(tmp_path):
    with claims.take(tmp_path, stale=0.5) as claim:
        time.sleep(1.2)
        assert claims.take(tmp_path, stale=0.5) is None
        claim._end.set()  # the process is stopped
        time.sleep(0.8)
        with claims.take(tmp_path, stale=0.5) as other:
            assert other.number == claim.number + 1
            assert claim.lost
            assert not other.lost
    assert claims.begun(tmp_path)


def test_the_clock_is_that_of_the_file_system(tmp_path, monkeypatch):
    """A machine whose clock is a day ahead takes nobody for dead."""
    with claims.take(tmp_path) as claim:
        claim.path.write_text(json.dumps(claims.identity() | {"machine": "another"}))
        monkeypatch.setattr(time, "time", lambda: claim.path.stat().st_mtime + 24 * 3600)
        assert claims.take(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "age", "free"),
    [
        ({}, 0, False),
        ({"pid": 2**22 + 1}, 0, True),  # no process has this number
        ({"born": "1"}, 0, True),  # another process has it by now
        ({"pid": 2**22 + 1, "machine": "another"}, 0, False),  # who knows
        ({"pid": 2**22 + 1, "machine": "another"}, 61, True),
        ({}, 61, True),  # it has stopped
        ({"pid": 2**22 + 1, "machine": "another"}, -61, True),  # its clock was set back, and it does not touch it
        (None, 0, False),  # not whole
        (None, 61, True),
    ],
)
def test_who_counts_as_dead(tmp_path, changed, age, free):
    file = tmp_path / "claim-0003"
    file.write_text("" if changed is None else json.dumps(claims.identity() | changed))
    aged(file, age)
    assert (claims.holder(tmp_path) is None) == free
    taken = claims.take(tmp_path)
    assert bool(taken) == free
    if taken:
        taken.__exit__()


def test_a_killed_process_holds_nothing_even_before_its_parent_has_asked(tmp_path):
    text = "import sys, time; from tljax import claims; from pathlib import Path\n"
    text += "claim = claims.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", text, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"taken\n"
        assert claims.take(tmp_path) is None
        process.send_signal(signal.SIGKILL)
        deadline = time.time() + 10
        while (claim := claims.take(tmp_path)) is None and time.time() < deadline:
            time.sleep(0.01)
        with claim:
            assert claim.number == 2
    finally:
        process.kill()
        process.communicate()


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 8), before=st.integers(0, 3), how=st.sampled_from(["stale", "dead", "left"]),
    lag=st.lists(st.floats(0, 0.003), min_size=8, max_size=8),
)  # fmt: skip
def test_of_several_that_take_over_one_wins(tmp_path_factory, count, before, how, lag):
    """Whatever the claim's end was, and however the contenders lie in time."""
    folder = tmp_path_factory.mktemp("work")
    if before:
        file = folder / f"claim-{before:04d}"
        file.write_text(json.dumps(claims.identity() | ({"pid": 2**22 + 1} if how == "dead" else {})))
        if how == "stale":
            aged(file, 61)
        elif how == "left":
            (folder / f"{file.name}.left").touch()

    def contender(i):
        time.sleep(lag[i])
        return claims.take(folder)

    taken = [claim for claim in at_once(count, contender) if claim]
    assert [claim.number for claim in taken] == [before + 1]
    assert not taken[0].lost
    taken[0].__exit__()


CONTENDER = """
import sys, time
from pathlib import Path
from tljax import claims
print("ready", flush=True)
sys.stdin.readline()
claim = claims.take(Path(sys.argv[1]))
print(claim and claim.number, flush=True)
sys.stdin.readline()  # the winner lives until all have tried
"""


def test_of_several_processes_one_takes_over(tmp_path):
    (tmp_path / "claim-0001").write_text(json.dumps(claims.identity() | {"pid": 2**22 + 1}))
    assert race(CONTENDER, str(tmp_path)) == ["2"] + ["None"] * 4


def test_one_of_several_makes_what_all_read(tmp_path):
    made = []

    def make():
        made.append(1)
        time.sleep(0.3)
        return "plan"

    assert at_once(4, lambda _: claims.once(tmp_path / "plan", "plan.json", make)) == ["plan"] * 4
    assert made == [1]


def test_who_cannot_make_it_leaves_it_to_others(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        claims.once(tmp_path / "plan", "plan.json", fail)
    assert claims.once(tmp_path / "plan", "plan.json", lambda: "plan") == "plan"
