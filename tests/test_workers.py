"""Workers that share a sweep: each unit is done once, whoever dies, and the tables are those of one worker."""

import contextlib
import csv
import errno
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
import test_sweep
from conftest import script
from tiny import get_config

from tljax import claims, config, grid, launchers, sweep, workers
from tljax.errors import UserError
from tljax.folder import Folder, Unit, share

UNITS = [Unit(number // 4, "", (number,)) for number in range(12)]
START = "import sys; from tljax import command, sweep; sys.argv[0] = 'sweep'; command.run(sweep.main)"


weights = test_sweep.weights  # a fixture


@pytest.fixture
def made(photos, weights):
    """Twelve members in three groups: those that train the head, and of those that train its bias each seed's."""
    made = get_config()
    made.data.source, made.weights, made.cache_views = f"folder:{photos}", weights, 2
    made.train_for, made.log_every, made.eval_every = "4 steps", "2 steps", "2 steps"
    made.sweep = grid.axes(
        {"strategy": ("frozen()", "rules(('head/bias', 1), ('**', 0))"), "optim.lr": (0.01, 0.02, 0.03), "seed": (0, 1)}
    )
    return made


@pytest.fixture
def file(made, tmp_path):
    """The config as a file."""
    file, text = tmp_path / "config.py", config.to_json(made).replace("\\", "\\\\")
    file.write_text(f'from tljax.config import from_json\ndef get_config():\n    return from_json("""{text}""")\n')
    return file


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take seconds a sweep; workers that are processes of their own draw them."""
    monkeypatch.setattr(sweep.sweep_page.Page, "write", lambda *_, **__: None)


class Said:
    """A console that remembers."""

    def __init__(self):
        self.lines = []

    def print(self, line):
        self.lines.append(line)


def run(made, folder, **more) -> list[str]:
    """Runs a sweep here; returns what it says."""
    said = Said()
    assert sweep.Sweep(made, folder, said, "auto", 10**9, **more).run() == 0
    return said.lines


def tables(path) -> list:
    """The tables without the time that members took."""
    rows = list(csv.DictReader((path / "sweep.csv").open()))
    return [[r for r in row.items() if r[0] != "seconds"] for row in rows], (path / "curves.jsonl").read_text()


def begun_by_the_dead(folder, unit) -> None:
    """A claim of a process that has been killed."""
    folder.place(unit).mkdir(parents=True)
    dead = claims.identity() | {"pid": 2**22 + 1, "since": "then"}
    (folder.place(unit) / "claim-0001").write_text(json.dumps(dead))


# ---- without training


@pytest.mark.parametrize("count", [1, 2, 5])
def test_several_workers_do_each_unit_once(tmp_path, count):
    done, order = [], {i: [] for i in range(count)}
    begun_by_the_dead(Folder(tmp_path), UNITS[5])

    def worker(i):
        def work(unit, claim):
            assert not claim.lost
            done.append(unit.name)
            order[i].append(unit.group)
            time.sleep(0.01)
            assert folder.keep(unit, [{"number": unit.numbers[0]}])

        folder = Folder(tmp_path)
        share(folder, UNITS, work, print)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [unit.name for unit in UNITS]
    assert [row["number"] for row in Folder(tmp_path).results()] == list(range(12))
    if count == 1:  # what is compiled serves until its group is done
        assert order[0] == [0] * 4 + [2] * 4 + [1] * 4


def test_who_does_not_wait_tells_what_others_are_at(tmp_path):
    folder, said = Folder(tmp_path), []
    with folder.take(UNITS[3]), folder.take(UNITS[4]):
        share(folder, UNITS[:5], lambda unit, _: folder.keep(unit, []), said.append, wait=False)
    (line,) = said
    me = re.escape(claims.name())
    assert re.fullmatch(rf"2 units with other workers: 00003-\w+ \({me}, since [-\d]+ [:\d]+\), 00004-\w+ \(.*\)", line)
    assert len(folder.finished()) == 3


def test_the_first_result_stays(tmp_path):
    folder, rows = Folder(tmp_path), [{"number": 0}]
    with folder.take(UNITS[0]):
        assert folder.keep(UNITS[0], rows)
        assert not folder.keep(UNITS[0], [{"number": 1}])
    assert folder.results() == rows
    assert folder.workers() == {claims.name(): 1}
    assert folder.take(UNITS[0]) is None


def test_a_member_that_two_generations_have_trained_has_one_row(tmp_path):
    """A later generation holds what is left of an earlier one, parted otherwise."""
    folder, rows = Folder(tmp_path), lambda unit: [{"number": number} for number in unit.numbers]
    for unit in (Unit(0, "", (0,)), Unit(0, "", (0, 1)), Unit(0, "", (1, 2))):
        assert not folder.done(unit)
        with folder.take(unit):
            assert folder.keep(unit, rows(unit))
    assert [row["number"] for row in folder.results()] == [0, 1, 2]


def launched(tmp_path, monkeypatch, made, text, call="local(2)") -> list[str]:
    """Launches workers that run `python -c text FOLDER` instead; returns what is said."""
    said = Said()
    made_jobs = workers._jobs

    def jobs(launcher, *more):
        command = (sys.executable, "-c", text, str(tmp_path / "sweep"))
        return [job._replace(command=command) for job in made_jobs(launcher, *more)]

    monkeypatch.setattr(workers, "_jobs", jobs)
    monkeypatch.setattr(sweep.Sweep, "tables", lambda _: "the best")
    plan = sweep.Sweep(made, Folder(tmp_path / "sweep"), said, "auto", 0)
    try:
        assert workers.launch(call, plan, ["--config=x", f"--launch={call}"], 0.8) == 0
    finally:
        said.lines.append("")
    return said.lines


WORKER = """
import os, signal, sys, time
from tljax import claims, workers
from tljax.folder import Folder, Unit, share
workers.end_with_parent()
folder = Folder(sys.argv[1], stale=5)
def work(unit, claim):
    print(unit.name)
    time.sleep(0.1)
    dead = folder.path / "dead"
    if DIES and claims.name() == "local-1":
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while DIES and not dead.exists():
        time.sleep(0.01)
    folder.keep(unit, [{"number": n} for n in unit.numbers])
share(folder, [Unit(0, "", (2 * i, 2 * i + 1)) for i in range(6)], work, print)
"""


def test_a_launch_waits_and_says_what_each_has_done(made, tmp_path, monkeypatch):
    lines = launched(tmp_path, monkeypatch, made, WORKER.replace("DIES", "False"))
    units = [re.fullmatch(r"local-(\d): (\d+) units?, ended", line) for line in lines[-4:-2]]
    assert sum(int(found[2]) for found in units) == 6
    shown = [found[1] for line in lines if (found := re.fullmatch(r"local-\d: (\d{5})-\w+", line))]
    assert sorted(shown) == [f"{2 * i:05d}" for i in range(6)]
    assert lines[-2] == f"the best; everything is in {tmp_path / 'sweep'}"


def test_who_is_killed_is_told_and_others_do_its_work(made, tmp_path, monkeypatch):
    lines = launched(tmp_path, monkeypatch, made, WORKER.replace("DIES", "True"))
    assert lines[-4] == "local-1: 0 units, killed by SIGKILL"
    assert lines[-3] == "local-2: 6 units, ended"


def test_a_launch_that_leaves_members_is_an_error(made, tmp_path, monkeypatch):
    text = "import sys; print('error: no such data'); sys.exit(2)"
    with pytest.raises(UserError, match="12 members without a result: local-1: error: no such data; the same command"):
        launched(tmp_path, monkeypatch, made, text)


def test_workers_end_with_their_launcher(tmp_path):
    text = (
        "import sys, time; from tljax.launchers import Job\n"
        "command = (sys.executable, '-c', 'from tljax import workers; import os, time; workers.end_with_parent();'\n"
        "           'print(os.getpid(), flush=True); time.sleep(60)')\n"
        "Job('one', command, {}, sys.argv[1], '.').start(); time.sleep(60)"
    )
    process, log = script(text, str(tmp_path / "log")), tmp_path / "log"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.time() < deadline:
        time.sleep(0.05)
    pid = int(log.read_text())
    assert claims._born(pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while claims._born(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not claims._born(pid)


def test_shares_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name in ("OMP_NUM_THREADS", "PJRT_NPROC", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launchers.glob, "glob", lambda _: [])
    assert launchers.Local(3).shares() == [{"OMP_NUM_THREADS": "2", "PJRT_NPROC": "2"}] * 3
    monkeypatch.setenv("PJRT_NPROC", "16")
    assert launchers.Local(20).shares() == [{"OMP_NUM_THREADS": "1"}] * 20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    of = lambda count, field: [share.get(field) for share in launchers.Local(count).shares()]
    assert of(2, "CUDA_VISIBLE_DEVICES") == ["4,6", "5"]
    assert of(3, "XLA_PYTHON_CLIENT_MEM_FRACTION") == [None] * 3
    assert of(5, "CUDA_VISIBLE_DEVICES") == ["4", "5", "6", "4", "5"]
    assert of(5, "XLA_PYTHON_CLIENT_MEM_FRACTION") == ["0.375"] * 5
    assert launchers.Slurm(time="1-02:03:04").minutes == 26 * 60 + 4


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--launch=locl(2)"], "unknown --launch 'locl'; nearest: local"),
        (["--launch=local"], "--launch 'local': "),
        (["--launch=local(0)"], "--launch: local's count = 0: expected at least 1"),
        (["--launch=local(2.5)"], "--launch: local's count = 2.5: expected int"),
        (["--launch=local(2"], "--launch 'local(2' cannot be read: expected a call"),
        (["--launch=slurm(2, queue='gpu')"], "unexpected keyword argument 'queue'"),
        (["--launch=slurm(2, time='2h')"], "--launch: slurm's time = '2h': expected [days-]hours:minutes:seconds"),
        (["--launch=slurm(2, cluster='pbs')"], "--launch: slurm's cluster = 'pbs': expected 'slurm' or 'local'"),
        (["--launch=slurm(2, gpus=-1)"], "--launch: slurm's gpus = -1: expected at least 0"),
        (["--launch=ray(True)"], "--launch: ray's count = True: expected int"),
        (["--workers=0"], "--workers = '0': expected a number of workers"),
        (["--stale=soon"], "--stale = 'soon': expected seconds"),
        (["--stale=0.0"], "--stale = '0.0': expected seconds"),
        (["--wait=maybe"], "unknown --wait 'maybe'"),
    ],
)
def test_bad_flags_are_told_in_one_line(file, tmp_path, flags, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        sweep.main([f"--config={file}", f"--workdir={tmp_path / 'sweep'}", *flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_slurm_without_slurm_is_told(file, tmp_path, monkeypatch):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: pip install 'tljax[slurm]'")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"--launch: .*(SLURM|slurm|sbatch|srun)"):
        sweep.main([f"--config={file}", f"--workdir={tmp_path / 'sweep'}", "--launch=slurm(2)"])


def test_a_folder_that_is_a_file_is_told(file, tmp_path):
    (tmp_path / "file").touch()
    for flags in ([], ["--launch=local(2)"]):
        with pytest.raises(UserError, match=f"cannot write to {tmp_path / 'file'}"):
            sweep.main([f"--config={file}", f"--workdir={tmp_path / 'file'}", *flags])
    if os.path.isdir("/proc/self"):
        with pytest.raises(UserError, match="cannot write to /proc/sweep: No such file or directory"):
            sweep.main([f"--config={file}", "--workdir=/proc/sweep"])


# ---- with training


@pytest.mark.slow
def test_a_plan_is_kept_whoever_goes_on_with_it(made, tmp_path, monkeypatch):
    """A full disk ends the first worker; one with less memory, that would part it otherwise, goes on with its plan."""
    whole, cut = Folder(tmp_path / "whole"), Folder(tmp_path / "cut")
    run(made, whole)
    assert sorted(path.name[:5] for path in (whole.path / "units").iterdir()) == ["00000", "00001", "00003"]
    publish = claims.publish

    def full(path, text):
        if path.name == "result.json" and cut.finished():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return publish(path, text)

    monkeypatch.setattr(claims, "publish", full)
    with pytest.raises(UserError, match=f"cannot write to {cut.path}: No space left on device"):
        run(made, cut, workers=4)
    monkeypatch.undo()
    (plan,) = cut.path.glob("plans/00000-*/plan.json")
    planned = json.loads(plan.read_text())["groups"]
    assert [group["units"] for group in planned] == [[[0, 2, 4], [6, 8, 10]], [[1, 5, 9]], [[3, 7, 11]]]
    assert [row["number"] for row in cut.results()] == [0, 2, 4]
    left = [Unit(0, "memory", (6, 8, 10)), Unit(1, "memory", (1, 5, 9)), Unit(2, "memory", (3, 7, 11))]
    with contextlib.ExitStack() as held:
        for unit in left:
            held.enter_context(cut.take(unit))
        lines = run(made, cut, wait=False)
    assert lines[-2].startswith(f"3 units with other workers: {left[0].name} ({claims.name()}, since ")
    assert "; 9 members with other workers; everything is in" in lines[-1]
    lines = run(made, cut)
    assert lines[0].endswith("; 3 are done")
    assert [line[:18] for line in lines if line.startswith("group 1: ")] == ["group 1: 3 members"]
    for a, b in zip(cut.results(), whole.results(), strict=True):
        assert a["number"] == b["number"]
        for name in ("nll", "accuracy"):
            assert a["test"][name] == pytest.approx(b["test"][name], rel=1e-5)


@pytest.mark.slow
def test_a_killed_worker_s_units_are_done_by_another(made, file, tmp_path):
    run(made, Folder(tmp_path / "whole"))
    folder = Folder(tmp_path / "shared")
    argv = [f"--config={file}", f"--workdir={folder.path}"]
    first = script(START, *argv, TLJAX_WORKER="first")
    try:
        deadline = time.time() + 300
        while not list(folder.path.glob("units/*/claim-*")) and time.time() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        held = [path.parent.name for path in folder.path.glob("units/*/claim-*")]
        assert len(held) == 1
        others = [script(START, *argv, TLJAX_WORKER=name) for name in ("second", "third")]
        said = [process.communicate(timeout=300) for process in others]
        assert [process.returncode for process in others] == [0, 0], said
    finally:
        first.kill()
        first.communicate()
    assert tables(folder.path) == tables(tmp_path / "whole")
    assert sum(folder.workers().values()) == 3
    assert "first" not in folder.workers()
    for unit in folder.path.glob("units/*"):  # each was begun once, but the one that was interrupted
        assert len(list(unit.glob("claim-????"))) == (2 if unit.name in held else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "module"), [("local(2)", "jax"), ("slurm(2, cluster='local')", "submitit"), ("ray(2)", "ray")]
)
def test_workers_are_launched_and_do_what_one_does(made, file, tmp_path, call, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'tljax[{call.partition('(')[0]}]'")
    run(made, Folder(tmp_path / "whole"))
    folder = Folder(tmp_path / "shared")
    process = script(START, f"--config={file}", f"--workdir={folder.path}", f"--launch={call}")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "the best by val/nll" in out.splitlines()[-1]
    assert tables(folder.path) == tables(tmp_path / "whole")
    assert sum(folder.workers().values()) == 3
    assert set(folder.workers()) <= {f"{call.partition('(')[0]}-{i}" for i in (1, 2)}
    assert all(len(list(unit.glob("claim-????"))) == 1 for unit in folder.path.glob("units/*"))


@pytest.mark.slow
def test_processes_that_are_launched_together_are_workers_of_one_sweep(made, file, tmp_path):
    """The variables with which JAX would join them say how many they are, and who is who; none waits for another."""
    run(made, Folder(tmp_path / "whole"))
    folder = Folder(tmp_path / "shared")
    joined = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2"}
    processes = [
        script(START, f"--config={file}", f"--workdir={folder.path}", JAX_PROCESS_ID=str(i), **joined) for i in (0, 1)
    ]
    for i, process in enumerate(processes):
        out, err = process.communicate(timeout=500)
        assert (process.returncode, err) == (0, "")
        assert "the best by val/nll" in out.splitlines()[-1]
        assert all(line.startswith("[1] ") == bool(i) for line in out.splitlines())
    assert tables(folder.path) == tables(tmp_path / "whole")
    assert sum(folder.workers().values()) == 3
    assert set(folder.workers()) <= {"process-0", "process-1"}
