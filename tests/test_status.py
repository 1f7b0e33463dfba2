"""`python -m tljax.status`: what workdirs tell of their runs, living, stopped and dead."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import changed, command, script

from tljax import claims, status
from tljax.errors import UserError

BEAT = {"step": 120, "total": 400, "left": 90.0, "part": "train", "stalled": False, "every": 15.0, "end": "", "why": ""}
ELSEWHERE = {"machine": "another", "host": "node7", "pid": 7, "born": "1"}


def run(folder, ago=1.0, identity=None, rows=(), summary=None, **beat):
    """A workdir as a run leaves it, whose last heartbeat came some seconds ago; `beat=None` for none."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": "fruit", "metric": "val/nll"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    now = time.time()
    told = BEAT | {"time": now - ago, "since": now - 300, "alive": now - ago} | (identity or claims.identity()) | beat
    (folder / "heartbeat.json").write_text(json.dumps(told))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def dead() -> dict:
    """The identity of a process of this machine that is no more."""
    text = "import json; from tljax import claims; print(json.dumps(claims.identity()))"
    return json.loads(subprocess.run([sys.executable, "-c", text], capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    ("given", "state", "why"),
    [
        ({}, "running", ""),
        ({"part": "compile"}, "running", "in compile for 5 min 00 s"),
        ({"stalled": True, "alive": 0.0}, "stalled", "no step for \\d+ h .*, in train: see stacks.txt"),
        ({"ago": 200.0}, "stalled", "process .* is there, without a heartbeat for 3 min 20 s: suspended, or a full"),
        ({"identity": ELSEWHERE}, "running", ""),
        (
            {"identity": ELSEWHERE, "ago": 200.0},
            "silent",
            "no heartbeat of process 7 on node7 for 3 min 20 s, in ",
        ),
        ({"end": "stopped", "why": "by SIGTERM"}, "stopped", "by SIGTERM"),
        ({"end": "diverged", "why": "the loss is nan at step 4"}, "diverged", "the loss is nan at step 4"),
        ({"end": "failed", "why": "out of memory"}, "failed", "out of memory"),
        ({"summary": {"steps": 400}}, "finished", ""),
        ({"identity": ELSEWHERE, "ago": 1e6, "summary": {"steps": 400}}, "finished", ""),
        ({"time": "yesterday"}, "unknown", "no heartbeat: it has not begun to train"),
    ],
)
def test_alive_or_dead_and_why(tmp_path, given, state, why):
    found = status.look(run(tmp_path / "run", **given))
    assert found["state"] == state
    assert re.match(why + ("" if why else "$"), found["why"]), found["why"]
    assert (found["part"] is not None) == (state in ("running", "stalled"))


def test_a_process_that_is_gone_was_killed(tmp_path, dead):
    """Also where another one has its number now."""
    found = status.look(run(tmp_path / "run", identity=dead, rows=[{"step": 130, "train/loss": 1.0}]))
    assert (found["state"], found["step"], found["left"]) == ("killed", 130, None)
    assert found["why"] == f"process {dead['pid']} on {dead['host']} is gone, in train; the same command goes on"
    again = claims.identity() | {"born": dead["born"]}
    assert status.look(run(tmp_path / "again", identity=again))["state"] == "killed"


def test_figures_and_the_table(tmp_path, capsys):
    rows = [{"step": i, "train/loss": 1 / i, "images_per_second": 100.4 + i} for i in range(1, 3000)]
    rows.insert(-1, {"step": 2990, "val/nll": 0.25, "val/accuracy": 0.9})
    folder = run(tmp_path / "a", rows=rows, step=3000, total=4000, ago=30.0, left=90.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3000, "train/lo')  # cut off
    for name, age in (("500", 7000), ("2500", 200), ("3000.orbax-checkpoint-tmp", 1)):
        (folder / "checkpoints" / name).mkdir(parents=True)
        os.utime(folder / "checkpoints" / name, (time.time() - age,) * 2)
    run(tmp_path / "b", summary={"steps": 400})
    found = status.look(folder)
    assert (found["step"], found["total"], found["loss"]) == (3000, 4000, 1 / 2999)
    assert found["val"] == {"metric": "val/nll", "value": 0.25}
    assert found["images_per_second"] == 100.4 + 2999
    assert found["left"] == pytest.approx(60.0, abs=5)
    assert found["checkpoint"]["step"] == 2500
    assert found["checkpoint"]["age"] == pytest.approx(200, abs=5)
    assert status.main([f"{tmp_path}/*"]) == 0
    head, a, b = capsys.readouterr().out.splitlines()
    assert head.split() == list(status.COLUMNS)
    assert a.split()[:6] == [str(folder), "3,000/4,000", "3.33e-04", "nll", "0.250", "3099"]
    assert "2,500, 3 min ago  running" in a
    assert b.split()[1] == "400/400"
    assert b.endswith("finished")
    assert status.main(["--json", str(folder), str(tmp_path / "b")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(run["workdir"], run["state"]) for run in told] == [(str(folder), "running"), (f"{tmp_path}/b", "finished")]


def test_what_is_no_run_is_named_behind_the_others(tmp_path, capsys, monkeypatch):
    folder, empty = run(tmp_path / "runs" / "a"), tmp_path / "empty"
    empty.mkdir()
    expected = "expected a folder with the config.json that tljax.train leaves there"
    for given, line in (
        ([empty], f"{empty} is no workdir of a run: {expected}"),
        ([tmp_path / "none"], f"{tmp_path / 'none'} does not exist: {expected}"),
        ([tmp_path / "none*"], f"{tmp_path / 'none*'} matches no workdir of a run: {expected}"),
        ([tmp_path / "runs"], f"{tmp_path / 'runs'} is no workdir of a run, but holds some: give '{tmp_path}/runs/*'"),
        (
            [empty, folder, folder / "config.json"],
            f"{empty} is no workdir of a run: {expected}; likewise {folder}/config",
        ),
    ):
        with pytest.raises(UserError) as error:
            status.main(list(map(str, given)))
        assert str(error.value).startswith(line)
        assert "\n" not in str(error.value)
        assert capsys.readouterr().out.count(str(folder)) == (folder in given)
    monkeypatch.chdir(tmp_path)
    assert status.main([]) == 0  # runs/*
    assert "runs/a " in capsys.readouterr().out
    monkeypatch.chdir(empty)
    with pytest.raises(UserError, match="there are no runs under runs/"):
        status.main([])


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", '{"metric": ["a"]}'), ("config.json", "[" * 10**5), ("metrics.jsonl", "[" * 10**5),
     ("heartbeat.json", '{"step": "many"}'), ("summary.json", "[1]"), ("config.json", '{"sweep": 1}'),
     ("metrics.jsonl", '{"step": 1, "train/loss": {}, "images_per_second": "x"}')],
)  # fmt: skip
def test_damaged_files_hide_no_other_run(tmp_path, capsys, name, content):
    run(tmp_path / "a")
    (run(tmp_path / "b") / name).write_text(content)
    assert status.main([f"{tmp_path}/*"]) == 0
    assert f"{tmp_path}/a" in capsys.readouterr().out


def test_a_sweep_is_a_row_too(tmp_path):
    (tmp_path / "plans" / "p").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"name": "s", "metric": "val/accuracy", "sweep": {"seed": [0]}}))
    plan = {"groups": [{"kept": "", "units": [[0, 1], [2]]}]}
    (tmp_path / "plans" / "p" / "plan.json").write_text(json.dumps(plan))
    row = lambda number, accuracy: {"number": number, "val": {"accuracy": accuracy}}
    for name, rows in (("one", [row(0, 0.5), row(1, 0.8)]), ("two", [row(2, 0.6)])):
        claim = claims.take(tmp_path / "units" / name)
        found = status.look(tmp_path)
        assert (found["state"], found["total"]) == ("running", 3)
        assert found["why"] == f"1 worker: {claims.name()}"
        (tmp_path / "units" / name / "result.json").write_text(json.dumps({"worker": "w", "rows": rows}))
        claim.__exit__()
        found = status.look(tmp_path)
    assert (found["state"], found["step"], found["val"]["value"]) == ("finished", 3, 0.8)
    assert "3/3 members" in "\n".join(status.table([found]))
    (tmp_path / "units" / "two" / "result.json").unlink()
    assert status.look(tmp_path)["state"] == "stopped"


def test_the_command_is_quick_and_says_its_mistakes_in_a_line(tmp_path):
    """Nothing of JAX, nor what is slow beside it, is imported."""
    run(tmp_path / "run")
    text = """
import runpy, sys
sys.argv[0] = "status"
try:
    runpy.run_module("tljax.status", run_name="__main__")
finally:
    heavy = {"jax", "flax", "numpy", "rich", "matplotlib", "orbax", "grain", "wandb"} & set(sys.modules)
    print("heavy:", heavy or "none")
"""
    process = script(text, str(tmp_path / "run"), str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == f"error: {tmp_path} is no workdir of a run, but holds some: give '{tmp_path}/*'\n"
    assert "running" in out
    assert out.endswith("heavy: none\n")


@pytest.mark.slow
def test_a_run_that_is_killed_is_dead_at_once(tiny, tmp_path):
    process = command("tljax.train", *changed(tiny, tmp_path, train_for="3000 steps"))
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    found = status.look(tmp_path)
    assert found["state"] == "running"
    assert found["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert status.look(tmp_path)["state"] == "killed"
