"""One run at a time in a workdir in a store, on fakes of GCS and S3; `test_lock` and `test_claims` say it of a disk."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import PurePosixPath

import pytest
from conftest import command, race, script
from etils import epath
from test_claims import at_once
from test_lock import ELSEWHERE, assert_that_heartbeats_block, fast  # noqa: F401
from test_stores import FAKES, SHORT

from tljax import claims, lock, stores
from tljax.claim_objects import Objects
from tljax.errors import UserError
from tljax.lock import Lock
from tljax.workdir import Workdir

RUN = "bucket/runs/a"


@pytest.fixture(params=FAKES)
def place(buckets, request):
    """A workdir's address."""
    return f"{request.param}://{RUN}"


def there(buckets, place):
    """The bucket in which an address lies."""
    return buckets[place.partition(":")[0]]


def hold(buckets, place, **changed) -> None:
    """Puts a claim of another holder there: by default of the process that started this one."""
    identity = claims.identity() | {"pid": os.getppid(), "born": claims._born(os.getppid())} | changed
    text = json.dumps(identity | {"since": "2026-01-02 03:04:05"})
    there(buckets, place).put("bucket", "runs/a/.lock/claim-0004", text.encode())


def names(buckets, place) -> list[str]:
    """The objects of a lock."""
    return there(buckets, place).names_below(f"{place}/.lock")


def test_of_many_that_write_an_object_one_does(buckets, place):
    texts = [json.dumps({"of": i}) for i in range(16)]
    won = at_once(16, lambda i: Objects(f"{place}/.lock").create("claim-0001", texts[i]))
    assert sum(won) == 1
    assert there(buckets, place).read(f"{place}/.lock/claim-0001").decode() == texts[won.index(True)]
    # A library that has not heard the answer asks again.
    assert [i for i in range(16) if Objects(f"{place}/.lock").create("claim-0001", texts[i])] == [won.index(True)]


def test_a_store_that_does_not_say_why_it_refuses(buckets):
    buckets["s3"].conditions = "kept"
    objects = Objects(f"s3://{RUN}")
    assert [objects.create("claim-0001", text) for text in ("1", "2", "1")] == [True, False, True]


def test_a_second_run_is_refused_and_the_first_one_named(buckets, place):
    hold(buckets, place)
    with Lock(place) as own, pytest.raises(UserError) as error:
        own.take()
    line = f"another run is in {place}: process {os.getppid()} on {claims.identity()['host']}, since 2026-01-02 03:"
    assert str(error.value).startswith(line)
    assert names(buckets, place) == ["claim-0004"]


def test_an_end_leaves_the_workdir_free(buckets, place):
    for _ in range(3):
        with Lock(place) as own:
            own.take()
            with pytest.raises(UserError, match=f"another run is in {place}: process {os.getpid()} on "):
                Lock(place).take()
            own.check()
    assert names(buckets, place) == ["claim-0003", "claim-0003.left"]  # nothing grows


def test_a_dead_process_of_this_machine_does_not_block(buckets, place):
    hold(buckets, place, pid=2**22 + 1)
    with Lock(place) as own:
        own.take(pytest.fail)
        assert names(buckets, place) == ["claim-0005"]


def test_a_heartbeat_from_elsewhere_blocks(buckets, place, fast):  # noqa: F811
    hold(buckets, place, **ELSEWHERE)
    objects, text = Objects(f"{place}/.lock"), there(buckets, place).read(f"{place}/.lock/claim-0004").decode()
    assert_that_heartbeats_block(place, lambda: objects.touch("claim-0004", text))


def test_no_heartbeat_from_elsewhere_blocks_for_a_bounded_time(buckets, place, fast):  # noqa: F811
    hold(buckets, place, **ELSEWHERE)
    begun = time.monotonic()
    with Lock(place) as own:
        own.take(lambda line: None)
    assert time.monotonic() - begun < 30
    assert "claim-0005" in names(buckets, place)


@pytest.mark.parametrize(("age", "patience"), [(0, 60), (20, 40), (3600, 30), (-3600, 30)])
def test_how_long_one_looks_depends_on_the_last_heartbeat_by_the_store_s_clock(buckets, place, age, patience):
    """Of the two times both are the store's: what this machine's clock says is nowhere."""
    hold(buckets, place, **ELSEWHERE)
    found, said = claims.last(f"{place}/.lock"), []
    bucket = there(buckets, place)
    bucket.set_back("runs/a/.lock/claim-0004", age)
    seen = lock.Heartbeat(f"{place}/.lock", found, said.append)
    assert seen.patience == pytest.approx(patience, abs=5)
    assert "process 4711 on worker-7 was here before" in said[0]


def test_heartbeats_are_sparing(buckets, place):
    """One request each."""
    with claims.succeed(stores.place(f"{place}/.lock", ""), 0, stale=1.0):
        bucket = there(buckets, place)
        bucket.requests.clear()
        time.sleep(1.1)
        beats = list(bucket.requests)
    assert 2 <= len(beats) <= 4, beats
    assert all(request.startswith(("POST", "PUT")) for request in beats)
    assert json.loads(bucket.read(f"{place}/.lock/claim-0001"))["pid"] == os.getpid()


def test_of_several_that_find_a_dead_holder_one_gets_the_workdir(buckets, place):
    hold(buckets, place, pid=2**22 + 1)
    locks = [Lock(place) for _ in range(8)]

    def take(i):
        try:
            locks[i].take()
        except UserError as error:
            return str(error)

    said = at_once(8, take)
    assert said.count(None) == 1
    assert all("another run is in" in line for line in said if line)
    winner = locks[said.index(None)]
    winner.check()
    winner.__exit__()


def test_a_late_contender_does_not_slip_in_behind_what_was_tidied_up(buckets, place):
    hold(buckets, place, pid=2**22 + 1)
    with Lock(place) as first:
        first.take()
    with Lock(place) as second:
        second.take()
        for number in (4, 5):
            assert claims.succeed(first.path / ".lock", number) is None
        assert names(buckets, place) == ["claim-0006"]


def test_who_was_taken_for_dead_stops_and_its_heartbeat_gives_nothing_back(buckets, place):
    with Lock(place) as own:
        own.take()
        with claims.succeed(own.path / ".lock", 1) as other:
            other.tidy()
            own.claim._there.touch("claim-0001", own.claim._text)  # it wakes up
            with pytest.raises(UserError, match=rf"another run is in {place}: .*; it took this one for dead"):
                own.check()
            with pytest.raises(UserError, match=f"another run is in {place}"):
                Lock(place).take()


def test_a_lock_that_cannot_be_written_is_one_line(buckets, place):
    there(buckets, place).refused = r"^(POST|PUT)"
    with pytest.raises(UserError, match=f"^cannot write to {place}: ") as caught:
        Lock(place).take()
    assert "\n" not in str(caught.value)
    there(buckets, place).refused = ""
    with pytest.raises(UserError, match=r"^cannot write to nothere/runs/a/\.lock: there is no bucket nothere"):
        Lock(place.replace("bucket", "nothere")).take()


def test_what_a_store_cannot_do_is_said_and_the_run_goes_on(buckets, monkeypatch):
    said = []
    buckets["s3"].conditions = "ignored"
    with Lock(f"s3://{RUN}") as own:
        own.take(said.append)
        own.check()
        with pytest.raises(UserError, match="another run is in"):  # but for two that come at once
            Lock(f"s3://{RUN}").take()
    assert said == [f"two runs that begin at once are not kept apart in s3://{RUN}: what is there is overwritten"]

    said.clear()
    fs = Objects(f"gs://{RUN}")._fs
    monkeypatch.setattr(fs, "_pipe_file", lambda path, data, **kwargs: None)  # as versions of before 2024.12
    with Lock(f"gs://{RUN}") as own:
        own.take(said.append)
        own.check()
    assert len(said) == 1
    assert said[0].startswith(f"nothing keeps another run out of gs://{RUN}: this gcsfs has no write that fails")


def test_of_other_schemes_nothing_is_known():
    @epath.register_path_cls("unlocked://")
    class Far(PurePosixPath):
        def __str__(self):
            return super().__str__().replace(":/", "://", 1)

        __fspath__ = __str__

    said = []
    with Lock("unlocked://bucket/run") as own:
        own.take(said.append)
        own.check()
    assert len(said) == 1
    assert "nothing is known of a write to unlocked:// that fails where" in said[0]


CONTENDER = """
import sys
from tljax.errors import UserError
from tljax.lock import Lock
from tljax.workdir import Workdir
lock = Lock(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.take()
    print(lock.claim.number, flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()  # the winner lives until all have tried
"""


@pytest.mark.slow
def test_of_several_processes_one_takes_over(buckets, place):
    hold(buckets, place, pid=2**22 + 1)
    found = race(CONTENDER, place)
    assert found[0] == "5"
    assert all(line.startswith(f"another run is in {place}: ") for line in found[1:])


PAUSED = """
import os, sys, time
from tljax import command, loop, train
step, released, *argv = sys.argv[1:]
save = loop.save

def pausing_save(run, state):
    if int(state.step) == int(step):
        print("waits", flush=True)
        while not os.path.exists(released):
            time.sleep(0.05)
    save(run, state)

loop.save = pausing_save
sys.argv[1:] = argv
command.run(train.main)
"""


def paused(step: int, released, argv) -> subprocess.Popen:
    """A run that waits before it saves a step until a file is there."""
    process = script(PAUSED, str(step), str(released), *argv)
    for line in process.stdout:
        if line == "waits\n":
            return process
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_runs_in_one_workdir(buckets, place, tiny, tmp_path):
    """A second one is refused; a killed one is in nobody's way here; one that was taken for dead elsewhere stops."""
    argv = [*tiny, *SHORT, f"--workdir={place}"]
    first = paused(6, tmp_path / "never", argv)
    process = command("tljax.train", *argv)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 2, err
    assert err.startswith(f"error: another run is in {place}: process {first.pid} on ")
    assert err.count("\n") == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()

    second = paused(9, tmp_path / "go", argv)  # at once: it would say that it looks for a heartbeat
    other = claims.identity() | ELSEWHERE | {"since": "2026-01-02 03:04:05"}
    there(buckets, place).put("bucket", "runs/a/.lock/claim-0003", json.dumps(other).encode())
    (tmp_path / "go").touch()
    out, err = second.communicate(timeout=500)
    assert second.returncode == 2, err
    assert "was here before" not in out
    assert f"another run is in {place}: process 4711 on worker-7, since 2026-01-02" in err
    assert "it took this one for dead" in err
    held = " ".join(there(buckets, place).names_below(place))
    assert "checkpoints/9" not in held
    # It may have stopped with the save before this one on its way.
    newest = max(map(int, re.findall(r"checkpoints/(\d+)/(?:commit_success.txt|whole.json)", held)))

    process = command("tljax.train", *argv)  # the other one is dead as well
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    looked = int(re.search(r"process 4711 on worker-7 was here before: looking for (\d+) s", out)[1])
    assert 30 <= looked <= 60
    assert f"resumed from step {newest};" in out


def test_who_was_taken_for_dead_overwrites_no_rows(buckets, place):
    """Rows are copied whole, also between checkpoints: by the clock, and after evaluations."""
    run = Workdir(place)
    with Lock(place) as own:
        own.take()
        run.check = own.check
        run.rewind(0)
        run.log({"step": 1})
        rows = there(buckets, place).read(f"{place}/metrics.jsonl")
        assert rows == b'{"step": 1}\n'
        with claims.succeed(own.path / ".lock", 1):
            run.log({"step": 2})
            with pytest.raises(UserError, match="it took this one for dead"):
                run.flush()
            with pytest.raises(UserError, match="it took this one for dead"):
                run.close()
        assert there(buckets, place).read(f"{place}/metrics.jsonl") == rows
