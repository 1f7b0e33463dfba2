"""launch/local.sh: two processes of two devices each do what one process does, stop together, and fail together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, command

from tljax import evaluate, train
from tljax.workdir import Workdir

SCRIPT = Path(__file__).parent.parent / "launch" / "local.sh"
# Gradients are summed in another order: 24 steps end within a relative 4e-7 (measured).
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
EXACT = {"rtol": 0, "atol": 0}


def launch(*argv: str, processes: str = "2") -> subprocess.Popen:
    """Starts launch/local.sh with two CPU devices a process."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "16", "PYTHON": sys.executable}
    return subprocess.Popen(
        [SCRIPT, processes, *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What a process said, after it ended with this code."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # of the script: it ends its processes
        raise
    assert process.returncode == code, err
    return out, err


def assert_same(path: Path, other: Path, tolerance: dict) -> None:
    """Metrics, final figures and digest of the frozen leaves are those of another run."""
    rows, others = Workdir(path).rows(), Workdir(other).rows()
    assert [(r["step"], sorted(r)) for r in rows] == [(r["step"], sorted(r)) for r in others]
    for row, expected in zip(rows, others):
        numbers = [k for k in row if k != "images_per_second"]
        np.testing.assert_allclose([row[k] for k in numbers], [expected[k] for k in numbers], **tolerance)
    summary, expected = (Workdir(p).summary() for p in (path, other))
    assert summary["frozen"] == expected["frozen"]
    for split in ("val", "test"):  # an example left out or taken twice would show in the mean over 9 and 13
        assert summary[split]["confusion"] == expected[split]["confusion"]
        np.testing.assert_allclose(summary[split]["nll"], expected[split]["nll"], **tolerance)


def kept(folder: Path) -> dict:
    """Fields that keep features on disk."""
    return {"cache": "disk", "cache_views": 2, "cache_folder": folder / "features"}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> dict[str, Path]:
    """The tiny experiment in two processes, and in one with four devices and with one.

    Each keeps its features elsewhere, and one does not keep any.
    """
    root = tmp_path_factory.mktemp("launch")
    paths = {name: root / name for name in ("two", "four devices", "one device")}
    processes = [
        launch(*changed(tiny, paths["two"], **kept(root))),
        command("tljax.train", *changed(tiny, paths["four devices"], cache="memory", cache_views=2), devices=4),
        command("tljax.train", *changed(tiny, paths["one device"], cache="off", cache_views=2), devices=1),
    ]
    said = [ended(process) for process in processes]
    for name, text in zip(("out", "err"), said[0]):
        (root / name).write_text(text)
    return paths


def test_two_processes_end_as_one_process(runs):
    assert Workdir(runs["two"]).summary()["devices"]["processes"] == 2
    assert_same(runs["two"], runs["four devices"], CLOSE)
    assert_same(runs["two"], runs["one device"], CLOSE)
    features = list((runs["two"].parent / "features").rglob("*"))
    assert sum(f.suffix == ".npy" for f in features) == 4 == len(features) - 1  # two views, val and test, in a folder


def test_only_process_0_writes_and_speaks(runs):
    names = lambda path: sorted(p.name for p in path.iterdir() if not p.name.startswith("events"))
    assert names(runs["two"]) == names(runs["one device"])
    assert len(list(runs["two"].glob("events.out.tfevents*"))) == 1
    steps = [r["step"] for r in Workdir(runs["two"]).rows() if "train/loss" in r]
    assert steps == [4, 8, 12, 16, 20, 24]
    said = (runs["two"].parent / "out").read_text()
    assert said.count("step 24/24") == said.count("everything is in") == 1
    assert "Gloo" not in said
    assert (runs["two"].parent / "err").read_text() == ""


def test_one_process_evaluates_the_checkpoint_of_two(runs, capsys):
    assert evaluate.main([f"--workdir={runs['two']}"]) == 0
    assert "the same figures as summary.json" in capsys.readouterr().out


def test_sigterm_stops_all_at_one_step_and_any_number_goes_on(tiny, runs, tmp_path):
    path = tmp_path / "stopped"
    process = launch(*changed(tiny, path, **kept(tmp_path)))
    begun = time.time()
    while not (path / "config.json").exists() and time.time() < begun + 60:  # the processes have found each other
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process, 143)
    assert err == ""
    step = evaluate.restore(Workdir(path), "last")[-1]["step"]
    assert 0 < step < 24
    assert out.splitlines()[-1] == f"stopped by SIGTERM at step {step}, saved; the same command goes on from there"

    one = shutil.copytree(path, tmp_path / "one")
    resumed = launch(*changed(tiny, path, **kept(tmp_path)))
    assert train.main(changed(tiny, one, **kept(tmp_path))) == 0
    out, err = ended(resumed)
    assert f"resumed from step {step}" in out
    assert_same(path, runs["two"], EXACT)
    assert_same(one, runs["two"], CLOSE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--config.optim.rate=1", "unknown config field 'optim.rate'"),
        ("--config.parallel.mode=pmap", "config.parallel.mode = 'pmap' is for one process, not 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, more, message):
    out, err = ended(launch(*changed(tiny, tmp_path / "run"), more), 2)
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert out == ""


def test_the_number_of_processes_comes_first(tiny):
    _, err = ended(launch(*tiny, processes="two"), 2)
    assert err.startswith("error: expected the number of processes first")


def test_one_process_that_fails_ends_all(tiny, photos, tmp_path):
    """A broken photograph meets only the process whose part of the batch it is in."""
    broken = shutil.copytree(photos, tmp_path / "photos")
    photo = broken / "train" / "red" / "red0.png"
    photo.write_bytes(photo.read_bytes()[:900])
    _, err = ended(launch(*changed([tiny[0], f"--config.data.source=folder:{broken}"], tmp_path / "run")), 2)
    assert "train/red/red0.png: image file is truncated" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "tiny"
