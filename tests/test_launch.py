"""launch/local.sh: two processes of two devices each do what one process does, stop together, and fail together."""

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, command, launch, rows, script
from test_resume import KILLED

from tljax import evaluate, plan, train
from tljax.workdir import Workdir

# Gradients are summed in another order: the figures of 24 steps end within a relative 4e-7 (measured).
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
TIMEOUT = 900  # seconds, on a busy machine
EXACT = {"rtol": 0, "atol": 0}


def together(text: str, argvs, processes: int, devices: int) -> list[subprocess.Popen]:
    """Starts `python -c text argv…` so often with so many CPU devices each, joined without the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        script(text, *argv, devices=devices, JAX_PROCESS_ID=str(i), **joined)
        for i, argv in zip(range(processes), argvs)
    ]


def ended(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What a process said, after it ended with this code."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # of the script: it ends its processes
        raise
    assert process.returncode == code, err
    return out, err


def assert_same(path: Path, other: Path, tolerance: dict) -> None:
    """Metrics, parameters, statistics, final figures and digest of the frozen leaves are those of another run."""
    for row, expected in zip(rows(path), rows(other), strict=True):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(list(row.values()), [expected[k] for k in row], **tolerance)
    summary, expected = (Workdir(p).summary() for p in (path, other))
    assert summary["frozen"] == expected["frozen"]
    for split in ("val", "test"):  # an example left out or taken twice would show in the mean over 9 and 13
        assert summary[split]["confusion"] == expected[split]["confusion"]
        np.testing.assert_allclose(summary[split]["nll"], expected[split]["nll"], **tolerance)
    leaves, expected = last_state(path), last_state(other)
    assert leaves.keys() == expected.keys()
    for name, value in leaves.items():
        # As vectors: Adam makes more of the rounding of single small gradients.
        apart, length = (np.linalg.norm(np.ravel(x)) for x in (value - expected[name], value))
        assert apart <= tolerance["rtol"] * length, (name, apart, length)


def last_state(path: Path) -> dict:
    """{path: value} of the parameters and statistics that a run has ended with."""
    _, _, params, stats, _ = evaluate.restore(Workdir(path), "last")
    return plan.flat({"params": params, "stats": stats})


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
    out, err = ended(launch(*changed(tiny, path, **kept(tmp_path))))
    # Behind it: on other devices features are rounded otherwise, and who comes first keeps them for both.
    assert train.main(changed(tiny, one, **kept(tmp_path))) == 0
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
    assert re.match(rf"(\[1\] )?error: {re.escape(message)}", err)
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


# ---- slow: processes that are killed, other numbers of them, other layouts

# As in test_resume, but as a command.
DIES = KILLED.replace(
    "sys.exit(train.main(argv))", "from tljax import command\nsys.argv[1:] = argv\ncommand.run(train.main)"
)
TRAIN = "import sys; from tljax import command, train; sys.argv[0] = 'train'; command.run(train.main)"
SHARDED = f"from tljax import parallel; parallel.FSDP_LEAST = 64; {TRAIN}"


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_one_process_that_is_killed_is_named_by_the_other_and_any_number_goes_on(tiny, runs, tmp_path, dead):
    path = tmp_path / "killed"
    argv = changed(tiny, path, **kept(tmp_path))
    texts, argvs = [TRAIN, TRAIN], [argv, argv]
    texts[dead], argvs[dead] = DIES, ["after", "12", *argv]
    processes = together(f"import os; exec({texts!r}[int(os.environ['JAX_PROCESS_ID'])])", argvs, 2, devices=2)
    _, err = ended(processes[1 - dead], 75)
    who = rf"process {dead} \(.+, pid {processes[dead].pid}\)"
    assert re.fullmatch(rf"(\[1\] )?error: {who} is gone; start all processes again.*\n", err)
    ended(processes[dead], -signal.SIGKILL)

    four = shutil.copytree(path, tmp_path / "four")
    out, _ = ended(launch(*argv))
    assert re.search("resumed from step (6|12);", out)  # the last save may have been about to be whole
    assert_same(path, runs["two"], EXACT)
    resumed = together(TRAIN, itertools.repeat(changed(tiny, four, **kept(tmp_path))), 4, devices=1)
    out, *_ = [ended(process)[0] for process in resumed]
    assert re.search("resumed from step (6|12);", out)  # the last save may have been about to be whole
    assert Workdir(four).summary()["devices"]["processes"] == 4
    assert_same(four, runs["two"], CLOSE)


@pytest.mark.slow
def test_leaves_over_the_devices_of_two_processes_give_the_same_with_the_statistics_of_the_whole_batch(tiny, tmp_path):
    often = dict.fromkeys(("log_every", "eval_every", "checkpoint_every"), "2 steps") | {"train_for": "4 steps"}
    fields = {"strategy": "full()", "norm_stats": "batch", "cache": "off", **often}
    # Where all of it trains, another order of sums grows step by step: 3 steps end within a relative 4e-6 (measured).
    close = {"rtol": 2e-4, "atol": 1e-5}
    spread = lambda name: changed(tiny, tmp_path / name, **fields, parallel_fsdp=4)
    two = together(SHARDED, itertools.repeat(spread("two")), 2, devices=2)
    four = script(SHARDED, *spread("four devices"), devices=4)
    one = command("tljax.train", *changed(tiny, tmp_path / "one device", **fields), devices=1)
    for process in (*two, four, one):
        ended(process)
    assert_same(tmp_path / "two", tmp_path / "four devices", close)
    assert_same(tmp_path / "two", tmp_path / "one device", close)


@pytest.mark.slow
def test_processes_with_other_configs_or_devices_all_say_so(tiny, tmp_path):
    argvs = [changed(tiny, tmp_path / "run", seed=seed) for seed in (0, 1)]
    said = [ended(process, 2)[1] for process in together(TRAIN, argvs, 2, devices=1)]
    assert said[1] == f"[1] {said[0]}"
    assert said[0].startswith("error: the processes differ: config.seed is 0 on process 0 (")
    text = f"import os; os.environ['JAX_NUM_CPU_DEVICES'] = str(1 + int(os.environ['JAX_PROCESS_ID'])); {TRAIN}"
    said = [ended(process, 2)[1] for process in together(text, argvs[:1] * 2, 2, devices=1)]
    assert said[1] == f"[1] {said[0]}"
    assert said[0].startswith("error: the processes differ: JAX_NUM_CPU_DEVICES is '1' on process 0 (")
    assert not (tmp_path / "run").exists()
