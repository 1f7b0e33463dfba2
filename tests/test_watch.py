"""What is seen of a run from outside: its heartbeat, its stacks when it stalls, profiles, other writers."""

import contextlib
import ctypes
import gzip
import io
import json
import shutil
import signal
import struct
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed, command, script

from tljax import config as configs
from tljax import data, durations, parallel, sweep, train, writers
from tljax.clock import Clock
from tljax.compiles import Compiles
from tljax.errors import Diverged, UserError
from tljax.profiling import Profile
from tljax.report.console import Console
from tljax.waiting import InputWait
from tljax.watch import Watch
from tljax.workdir import Workdir


def watch(path, **fields):
    """A watch over a run in a workdir, with fields of the config, and what it says."""
    config, said = configs.base(), io.StringIO()
    config.update_from_flattened_dict({"stall": "", **fields})
    return Watch(config, Workdir(path), Clock(), Console(file=said)), said


def beat(path) -> dict:
    return json.loads((path / "heartbeat.json").read_text())


def until(true, seconds=60):
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- lengths of time


def test_lengths_of_time():
    given = ("90 seconds", "10 minutes", "1.5 hours", "1 hour", "0", "")
    assert [durations.seconds(text, "stall") for text in given] == [90, 600, 5400, 3600, 0, 0]
    given = ("steps:100-110", "steps:7", "")
    assert [durations.window(text, "profile") for text in given] == [(100, 110), (7, 7), None]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stall", "10", r"config.stall = '10': expected 'n seconds', 'n minutes' or 'n hours', or '' for never"),
        ("stall", "-1 minutes", "config.stall = '-1 minutes': expected"),
        ("profile", "100-110", "config.profile = '100-110': expected 'steps:FIRST-LAST', as 'steps:100-110'"),
        ("profile", "steps:9-8", "config.profile = 'steps:9-8': expected 1 <= first <= last"),
        ("profile", "steps:0-8", "expected 1 <= first <= last"),
        ("profile", "steps:1-1001", "1001 steps; a trace takes at most 1000"),
        ("wandb", "a/b/c", "config.wandb = 'a/b/c': expected 'PROJECT' or 'ENTITY/PROJECT'"),
    ],
)
def test_values_that_no_run_could_use(field, value, message):
    config = configs.base()
    config[field] = value
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_what_watches_a_run_is_no_part_of_it(tmp_path):
    """A run goes on under another, and has the same folder."""
    one, other = configs.base(), configs.base()
    other.stall, other.profile, other.wandb = "1 minutes", "steps:1-2", "fruit"
    assert configs.digest(one) == configs.digest(other)
    workdir = Workdir(tmp_path)
    workdir.claim(one)
    workdir.claim(other)
    other.seed = 1
    with pytest.raises(UserError, match="another config: seed: 0 → 1;"):
        workdir.claim(other)


# ---- the heartbeat


def test_the_clock_says_which_part_it_is_in():
    clock = Clock()
    assert clock.part == "start"
    with clock("compile"):
        inside = clock.since
        with clock("features"):
            assert clock.part == "features"
        assert clock.part == "compile"
        assert clock.since >= inside
    assert clock.part == "start"


def test_steps_count_when_the_device_has_finished_them(tmp_path):
    it, _ = watch(tmp_path)
    held = threading.Event()

    class Result:
        def block_until_ready(self):
            held.wait()

    with it.steps(5) as wait:
        wait.given(Result())
        time.sleep(0.05)
        assert it.step == 5
        held.set()
        wait.given(Result())
        until(lambda: it.step == 7)
    assert it.clock.part == "train"


def test_the_heartbeat_says_where_the_run_is_and_how_long_it_takes(tmp_path):
    it, _ = watch(tmp_path)
    it.expect(100)
    it.begin()
    until((tmp_path / "heartbeat.json").exists)
    assert beat(tmp_path)["left"] is None
    with it.steps(10) as wait:
        for _ in range(3):
            wait.given(jnp.zeros(()))
            time.sleep(0.05)
        until(lambda: it.step == 13)
        it._beat()
    told = beat(tmp_path)
    assert (told["step"], told["total"], told["part"], told["end"]) == (13, 100, "train", "")
    assert told["left"] >= 0.04 * 87  # two steps between the first and the last
    assert abs(told["time"] - time.time()) < 60
    assert [p.name for p in tmp_path.iterdir()] == ["heartbeat.json"]
    it.over(lambda: 0)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("work", "end", "why"),
    [
        (lambda: 0, "finished", ""),
        (lambda: 128 + signal.SIGTERM, "stopped", "by SIGTERM"),
        (lambda: 75, "stopped", "exit code 75"),
        (lambda: _raise(KeyboardInterrupt()), "stopped", "by SIGINT"),
        (lambda: _raise(Diverged("the loss is nan at step 4")), "diverged", "the loss is nan at step 4"),
        (lambda: _raise(OSError(28, "No space left on device")), "failed", "No space left on device"),
        (lambda: _raise(ValueError("two\nlines")), "failed", "ValueError: two lines"),
    ],
)
def test_the_last_heartbeat_says_how_the_run_has_ended(tmp_path, work, end, why):
    it, _ = watch(tmp_path)

    def begun():
        it.expect(10)
        it.begin()
        return work()

    with contextlib.suppress(BaseException):
        it.over(begun)
    assert (beat(tmp_path)["end"], beat(tmp_path)["why"]) == (end, why)
    assert not it._thread.is_alive()


def test_a_run_that_never_began_leaves_the_folder_alone(tmp_path):
    """Another run may be at work there."""
    it, _ = watch(tmp_path)
    with pytest.raises(UserError):
        it.over(lambda: _raise(UserError("no data")))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_or_full_stops_no_run(tmp_path):
    it, said = watch(tmp_path / "none")
    it.stall = it._patience = 0.05
    it.expect(10)
    it.begin()
    until(lambda: it.stalled)
    assert it.over(lambda: 7) == 7
    until(lambda: "no step for" in said.getvalue())


# ---- stalls


def test_the_stacks_of_a_run_that_has_no_folder_yet_go_to_stderr(tmp_path, capsys):
    """As of one whose photographs lie on a disk that does not answer: another run may be in that folder."""
    it, said = watch(tmp_path, stall="10 minutes")
    with it.clock("data"):
        assert it._look(it.clock.since + 610)
    assert "the run is in data; the run goes on; the stacks of all threads are in stderr" in said.getvalue()
    assert "test_the_stacks_of_a_run_that_has_no_folder_yet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_lives_while_its_data_are_read(tiny, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("summary.json", "heartbeat.json"):
        (tmp_path / "run" / name).unlink()

    def load(config):
        until((tmp_path / "run" / "heartbeat.json").exists)
        assert beat(tmp_path / "run")["part"] == "data"
        raise UserError("the disk does not answer")

    monkeypatch.setattr(train.data, "load", load)
    with pytest.raises(UserError, match="the disk does not answer"):
        train.main([*tiny, f"--workdir={tmp_path / 'run'}"])
    assert beat(tmp_path / "run")["end"] == "failed"
    assert beat(tmp_path / "run")["why"] == "the disk does not answer"


def test_a_silence_is_told_once_a_while_and_its_end(tmp_path):
    """The clock is told: nothing here waits."""
    it, said = watch(tmp_path, stall="10 minutes")
    it.begun = True
    it.total = 50
    it.steps(4)
    it.clock.since = it._alive = begun = 1000.0  # of which minutes are whole to the last bit
    told = [minute for minute in range(90) if it._look(begun + 60 * minute)]
    assert told == [10, 20, 40, 80]  # each silence at twice the length of the one before
    stacks = f"the run goes on; the stacks of all threads are in {tmp_path / 'stacks.txt'}"
    assert said.getvalue().splitlines()[0] == f"no step for 10 min 00 s: step 4 of 50 was the last; {stacks}"
    assert (tmp_path / "stacks.txt").read_text().count("no step for") == 4
    assert it.stalled
    it._alive = begun + 60 * 100
    assert it._look(begun + 60 * 101)
    assert not it.stalled
    assert said.getvalue().splitlines()[-1] == "the run goes on, in train, at step 4"
    assert not any(it._look(begun + 60 * minute) for minute in range(101, 110))


def test_a_long_compile_is_called_one(tmp_path):
    it, said = watch(tmp_path, stall="10 minutes")
    it.begun = True
    it.steps(4)
    with it.clock("compile"):
        assert not it._look(it.clock.since + 590)  # not of the time before it
        assert it._look(it.clock.since + 610)
        assert beat(tmp_path)["part"] == "compile"
        assert beat(tmp_path)["stalled"]
    assert "no step for 10 min 10 s: the run is in compile" in said.getvalue()


def test_without_a_length_nothing_stalls(tmp_path):
    it, _ = watch(tmp_path)
    assert not it._look(time.monotonic() + 1e6)


def test_the_stacks_name_what_hangs(tmp_path):
    held = threading.Event()

    def hanging_here():
        held.wait()

    hangs = threading.Thread(target=hanging_here, name="reader", daemon=True)
    hangs.start()
    it, said = watch(tmp_path, stall="0.1 seconds")
    it.expect(10)
    it.begin()
    until(lambda: "in " in said.getvalue())
    held.set()
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "no step for " in stacks.splitlines()[0]
    assert "in hanging_here" in stacks
    assert f"0x{hangs.ident:016x}: reader" in stacks
    assert it.over(lambda: 0) == 0


def test_other_processes_have_files_of_their_own(tmp_path, capsys):
    config = configs.base()
    it = Watch(config, Workdir(tmp_path, writes=False), Clock(), Console(enabled=False))
    it._process, it.begun = 3, True
    assert it._look(it.clock.since + 601)
    assert [p.name for p in tmp_path.iterdir()] == ["stacks-3.txt"]
    assert capsys.readouterr().err.startswith("no step for 10 min 01 s")


@pytest.mark.slow
def test_a_run_that_hangs_in_its_input_says_so_and_ends_as_ever(tiny, tmp_path, monkeypatch, capsys):
    def hanging_input(*args, original=data.train_batches, **kwargs):
        for i, batch in enumerate(original(*args, **kwargs)):
            if i == 9:
                time.sleep(6)
            yield batch

    monkeypatch.setattr(data, "train_batches", hanging_input)
    assert train.main(changed(tiny, tmp_path, stall="2 seconds", cache="off")) == 0
    out = capsys.readouterr().out
    assert "step 9 of 24 was the last" in out
    assert "the run goes on, in train" in out
    assert "in hanging_input" in (tmp_path / "stacks.txt").read_text()
    assert beat(tmp_path)["end"] == "finished"


@pytest.mark.slow
def test_a_thread_that_keeps_pythons_lock_is_found_all_the_same(tmp_path):
    """No Python code runs then: C code writes the stacks."""
    assert hasattr(ctypes, "PyDLL")
    text = """
import ctypes, sys
sys.path.insert(0, "tests")
import pathlib, test_watch
it, _ = test_watch.watch(pathlib.Path(sys.argv[1]), stall="0.5 seconds")

def holding_the_lock():
    ctypes.PyDLL(None).sleep(4)

it.expect(10)
it.begin()
test_watch.until((it.workdir.path / "heartbeat.json").exists)
holding_the_lock()
"""
    _, err = script(text, str(tmp_path)).communicate(timeout=120)
    assert "in holding_the_lock" in err


# ---- the input


def test_an_input_that_starves_the_devices_is_told_once(tmp_path):
    it, said = watch(tmp_path, **{"data.threads": 10**6})
    it.clock.seconds["train"] = 20.0
    it.waited(19.0, cached=False)
    assert not said.getvalue()  # too early to tell
    it.clock.seconds["train"] = 100.0
    it.waited(19.0, cached=False)
    assert not said.getvalue()  # not much
    for _ in range(2):
        it.waited(43.0, cached=False)
    assert said.getvalue() == (
        "the devices have waited for input for 43 % of the time in training; try config.cache_views = 4 (a frozen "
        "prefix is computed once), a smaller config.image_size\n"
    )
    it, said = watch(tmp_path, **{"data.threads": 0})
    it.clock.seconds["train"] = 100.0
    it.waited(43.0, cached=True)
    assert "config.data.threads = " in said.getvalue()
    assert "cache_views" not in said.getvalue()


def test_the_input_wait_calls_back_a_step():
    done = []
    with InputWait(lambda: done.append(1)) as wait:
        for _ in range(3):
            wait.given(jnp.ones(()))
        until(lambda: len(done) == 3)


# ---- memory


def test_the_fullest_device_counts(monkeypatch):
    device = lambda now, peak: types.SimpleNamespace(
        memory_stats=lambda: now and {"bytes_in_use": now, "peak_bytes_in_use": peak}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device(5, 30), device(7, 20)])
    assert parallel.memory() == {"memory_bytes": 7, "memory_peak_bytes": 30}
    assert parallel.memory_peak() == 30
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None, None)])
    assert parallel.memory() == {}
    assert parallel.memory_peak() > 10**6  # of the process


def test_all_programs_are_counted():
    compiles = Compiles()
    step = jax.jit(lambda x: x * 3 + 1)
    for size in (5, 7, 5):
        step(np.ones(size))
    told = compiles.told()
    assert told["programs"] == 2
    assert told["seconds"] > 0
    assert Compiles().told() == {"programs": 0, "from_cache": 0, "seconds": 0}


# ---- the profiler's window


def profiled(folder, window, start=0, total=10, stop=None):
    """Runs steps under a profile; returns what was said."""
    said = []
    profile = Profile(window, Workdir(folder), said.append, Clock())
    profile.check(total)
    profile.begin(start)
    step = jax.jit(lambda x: (x @ x, {"loss": x.sum()}))
    x = jnp.eye(8)
    for i in range(start + 1, (stop or total) + 1):
        x, _ = profile(i, step, x)
    profile.close()
    return said


def steps_in(folder) -> list[int]:
    """The steps that a trace holds."""
    (file,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")


def test_the_trace_holds_the_steps_of_the_window(tmp_path):
    (line,) = profiled(tmp_path, "steps:3-5")
    assert line.startswith("profile of steps 3–5 (")
    assert f"xprof --logdir={tmp_path / 'profile'}" in line
    assert ".trace.json.gz at https://ui.perfetto.dev" in line
    assert steps_in(tmp_path / "profile") == [3, 4, 5]


def test_a_window_that_is_partly_or_wholly_behind(tmp_path):
    said = profiled(tmp_path / "part", "steps:3-5", start=4, stop=5)
    assert said[0] == "config.profile = 'steps:3-5': the run goes on from step 4; steps 5–5 are profiled"
    assert steps_in(tmp_path / "part" / "profile") == [5]
    said = profiled(tmp_path / "behind", "steps:3-5", start=5)
    assert said == ["config.profile = 'steps:3-5': the run goes on from step 5; nothing is profiled"]
    assert not (tmp_path / "behind").exists()
    with pytest.raises(UserError, match=r"config.profile = 'steps:3-11': the run has 10 steps"):
        profiled(tmp_path, "steps:3-11")


def test_a_profile_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "file").touch()
    (line,) = profiled(tmp_path / "file", "steps:3-5", stop=4)  # which ends within the window
    assert line.startswith("config.profile = 'steps:3-5': no profile: ")


# ---- Weights & Biases


class FakeRun:
    """What wandb.init returns."""

    url, offline = "https://wandb.invalid/run", False

    def __init__(self, **given):
        self.given, self.rows, self.summary, self.end = given, [], {}, None

    def log(self, row, step):
        if row.get("fail"):
            raise RuntimeError("the disk\nis full")
        self.rows.append((step, row))

    def finish(self, exit_code=None):
        self.end = exit_code


@pytest.fixture
def wandb(monkeypatch):
    runs = []

    def init(**given):
        runs.append(FakeRun(**given))
        return runs[-1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings, fake.runs = init, dict, runs
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def writing(path, project, rows, summary=None, writes=True):
    config, said = configs.base(), []
    config.wandb = project
    path.mkdir(exist_ok=True)
    workdir = Workdir(path, writes=writes)
    workdir.rewind(0)
    workdir.writers = writers.begin(config, workdir, said.append)
    for row in rows:
        workdir.log(row)
    workdir.close(summary)
    return said


def test_rows_and_final_figures_go_there_and_a_resumed_run_goes_on(tmp_path, wandb):
    rows = [{"step": 2, "train/loss": 0.5}, {"step": 2, "val/nll": 0.7}]
    said = writing(tmp_path, "team/fruit", rows)
    writing(tmp_path, "team/fruit", [], {"test": {"accuracy": 0.8, "confusion": [[1]]}, "steps": 4, "leaks": []})
    one, other = wandb.runs
    assert said == ["Weights & Biases: https://wandb.invalid/run"]
    assert (one.given["project"], one.given["entity"]) == ("fruit", "team")
    assert one.rows == [(2, {"train/loss": 0.5}), (2, {"val/nll": 0.7})]
    assert Workdir(tmp_path).rows() == []  # rewound; W&B has them
    assert one.given["id"] == other.given["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert one.given["resume"] == "allow"
    assert other.summary == {"final/test/accuracy": 0.8, "final/steps": 4}
    assert (one.end, other.end) == (1, None)
    writing(tmp_path / "other", "fruit", [])
    assert wandb.runs[-1].given["id"] != one.given["id"]


def test_figures_that_are_lost_there_stop_no_run(tmp_path, wandb):
    said = writing(tmp_path, "fruit", [{"step": 1, "fail": 1}, {"step": 2}])
    assert said[1:] == ["Weights & Biases has failed, the run goes on: the disk is full"]
    assert [row["step"] for row in Workdir(tmp_path).rows()] == [1, 2]
    assert wandb.runs[0].rows == []


def test_only_who_writes_and_who_asks_for_it_has_it(tmp_path, wandb):
    writing(tmp_path, "fruit", [], writes=False)
    writing(tmp_path, "", [])
    assert wandb.runs == []


def test_what_stands_in_its_way_is_told_in_a_line(tmp_path, wandb, monkeypatch):
    def no_key(**given):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", no_key)
    with pytest.raises(UserError, match=r"'fruit': No API key configured. Use `wandb login`; WANDB_MODE=offline"):
        writing(tmp_path, "fruit", [])
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'tljax\[wandb\]'"):
        watch(tmp_path, wandb="fruit")


def records(file):
    """What the library has written down, read anew: LevelDB's log format behind a header of 7 bytes."""
    content, whole, at = file.read_bytes(), b"", 7
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # what is left of a block holds no record's header
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_offline_for_real(tiny, tmp_path):
    """Without a network: stopped, resumed, and read back."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    argv = changed(tiny, tmp_path, wandb="tests", train_for="32 steps", checkpoint_every="9 epochs")
    kept = {"WANDB_MODE": "offline"}
    process = command("tljax.train", *argv, **kept)
    until(lambda: process.poll() is not None or Workdir(tmp_path).rows(), 600)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert "Weights & Biases: offline" in out, err
    assert process.returncode == 143, err
    out, err = command("tljax.train", *argv, **kept).communicate(timeout=600)
    assert "resumed from step" in out, err
    assert err == ""
    found, final = {}, {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    name = lambda item: item.key or "/".join(item.nested_key)
    for read in (read for file in files for read in records(file)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(read)
        row = {name(item): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            found[row["_step"]] = row["train/loss"]
        final |= {name(item): json.loads(item.value_json) for item in record.summary.update}
    assert found == {row["step"]: row["train/loss"] for row in Workdir(tmp_path).rows() if "train/loss" in row}
    assert final["final/test/accuracy"] == Workdir(tmp_path).summary()["test"]["accuracy"]
    (one,) = {file.parent.name.rpartition("-")[2] for file in files}
    assert one == json.loads((tmp_path / "wandb.json").read_text())["id"]


def test_a_sweep_has_neither():
    for field, value in (("profile", "steps:1-2"), ("wandb", "fruit")):
        config = configs.base()
        config[field] = value
        with pytest.raises(UserError, match=f"config.{field} = '{value}' is for single runs"):
            sweep._check(config)
