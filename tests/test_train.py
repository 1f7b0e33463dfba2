"""A whole run as a user starts it: what it leaves, what it says, and how it ends."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
from conftest import changed, command, rows

from tljax import evaluate, experiment, predict, status, train
from tljax import plan as plans
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.workdir import Workdir


def test_the_workdir_holds_what_one_wants_to_look_at(trained):
    names = {p.name for p in trained.iterdir()}
    assert {
        "config.json", "plan.txt", "metrics.jsonl", "checkpoints", "summary.json", "curves.png", "confusion.png",
        "mistakes.png", "report.html",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert "frozen prefix" in (trained / "plan.txt").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 24
    assert summary["data"]["test"] == 13
    assert summary["frozen"]["values"] > 0
    assert summary["plan"]["trainable"] < summary["plan"]["parameters"]
    assert {"start", "data", "weights", "compile", "train", "eval", "report", "total"} <= set(summary["time"])
    assert summary["first_step_seconds"] > 0
    assert summary["flops_per_step"] > 0
    assert summary["compile"]["programs"] >= summary["compile"]["from_cache"] >= 0
    assert summary["compile"]["programs"] >= 2  # steps of training and evaluation
    assert {"python", "jax", "flax", "optax"} <= set(summary["versions"])


def test_metrics_have_a_row_an_interval_and_an_evaluation_each(trained):
    rows = Workdir(trained).rows()
    assert [r["step"] for r in rows if "train/loss" in r] == [4, 8, 12, 16, 20, 24]
    assert [r["step"] for r in rows if "val/nll" in r] == [8, 16, 24]
    assert [r["epoch"] for r in rows] == pytest.approx([r["step"] / 3 for r in rows], abs=1e-4)
    best = json.loads((trained / "summary.json").read_text())["best"]
    nll = {r["step"]: r["val/nll"] for r in rows if "val/nll" in r}
    assert best["step"] == min(nll, key=nll.get)
    assert best["value"] == nll[best["step"]]


def test_status_tells_a_finished_run(trained):
    told, rows = status.look(trained), Workdir(trained).rows()
    assert told["state"] == "finished"
    assert (told["step"], told["total"], told["checkpoint"]["step"]) == (24, 24, 24)
    assert told["loss"] == [r["train/loss"] for r in rows if "train/loss" in r][-1]
    assert told["val"] == {"metric": "val/nll", "value": rows[-1]["val/nll"]}
    assert json.loads((trained / "heartbeat.json").read_text())["end"] == "finished"
    assert not (trained / "stacks.txt").exists()


def test_the_final_figures_are_those_of_the_whole_test_split(trained, photos):
    """Recomputed from the best checkpoint, one image at a time, with PIL."""
    from PIL import Image

    exp, _, params, stats, notes = evaluate.restore(Workdir(trained))
    p, right, nll = exp.preprocessing, [], []
    files = sorted((photos / "test").rglob("*.png"))
    for file in files:
        image = Image.open(file)
        short = round(p.size / p.crop)
        scale = short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = round((image.width - p.size) / 2), round((image.height - p.size) / 2)
        x = np.asarray(image.crop((left, top, left + p.size, top + p.size)), np.float32) / 255
        x = (x - np.array(p.mean, np.float32)) / np.array(p.std, np.float32)
        logits = np.asarray(exp.model.apply({"params": params, "batch_stats": stats}, x[None]))[0].astype(float)
        label = notes["classes"].index(file.parent.name)
        right.append(logits.argmax() == label)
        nll.append(np.log(np.exp(logits).sum()) - logits[label])
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["test"]["accuracy"] == pytest.approx(np.mean(right))
    assert summary["test"]["nll"] == pytest.approx(np.mean(nll), rel=1e-3)
    assert np.sum(summary["test"]["confusion"]) == len(files) == 13


def test_evaluate_repeats_the_figures(trained, capsys):
    assert evaluate.main([f"--workdir={trained}"]) == 0
    assert "the same figures as summary.json" in capsys.readouterr().out
    assert evaluate.main([f"--workdir={trained}", "--checkpoint=last"]) == 0


def test_predict_prints_the_top_classes(trained, photos, capsys):
    files = [str(photos / "test/red/red0.png"), str(photos / "test/blue/blue1.png")]
    assert predict.main([f"--workdir={trained}", "--top=2", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == files
    shares = [float(lines[i].split("%")[0]) for i in (1, 2)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.1
    assert {line.split()[-1] for line in (*lines[1:3], *lines[4:])} <= {"red", "green", "blue"}


def test_the_same_command_again_finds_the_run_complete(tiny, trained, capsys):
    before = (trained / "summary.json").read_bytes()
    (trained / "report.html").unlink()
    assert train.main([*tiny, f"--workdir={trained}"]) == 0
    assert "this run is complete" in capsys.readouterr().out
    assert (trained / "summary.json").read_bytes() == before
    assert (trained / "report.html").exists()


def test_another_config_in_the_same_workdir_is_refused_by_field(tiny, trained):
    with pytest.raises(UserError, match=r"another config: batch_size: 8 → 16, optim.lr: 0.01 → 0.5;"):
        train.main([*tiny, f"--workdir={trained}", "--config.optim.lr=0.5", "--config.batch_size=16"])


@pytest.mark.parametrize("fields", [{"parallel_mode": "pmap"}, {"parallel_fsdp": 2}])
def test_pmap_and_fsdp_end_with_the_figures_of_jit(tiny, trained, tmp_path, fields):
    """Also when they go on from a checkpoint, and when one device evaluates what eight have trained."""
    assert train.main(changed(tiny, tmp_path, **fields)) == 0
    new, old = (json.loads((p / "summary.json").read_text()) for p in (tmp_path, trained))
    assert new["test"]["nll"] == pytest.approx(old["test"]["nll"], rel=1e-3)
    assert new["frozen"] == old["frozen"]
    losses = [[row["train/loss"] for row in Workdir(p).rows() if "train/loss" in row] for p in (tmp_path, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    shutil.rmtree(tmp_path / "checkpoints" / "24")
    (tmp_path / "summary.json").unlink()
    assert train.main(changed(tiny, tmp_path, **fields)) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["test"] == new["test"]
    out, err = command("tljax.evaluate", f"--workdir={tmp_path}", devices=1).communicate(timeout=120)
    assert "the same figures" in out, err


def test_early_stopping_ends_the_run_and_keeps_the_best(tiny, tmp_path):
    argv = changed(
        tiny, tmp_path, early_stop=1, train_for="80 steps", optim_lr=0.3, optim_name="sgd", eval_every="2 steps"
    )
    assert train.main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] < 80
    assert summary["best"]["step"] == summary["steps"] - 2
    assert summary["evaluated_step"] == summary["steps"]
    assert evaluate.restore(Workdir(tmp_path), "best")[4]["step"] == summary["best"]["step"]


def test_the_best_checkpoint_gives_the_final_figures_where_the_config_says_so(tiny, tmp_path, capsys):
    argv = changed(
        tiny, tmp_path, select="best", optim_lr=0.3, optim_name="sgd", eval_every="2 steps", metric="val/accuracy"
    )
    assert train.main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["evaluated_step"] == summary["best"]["step"]
    accuracy = {r["step"]: r["val/accuracy"] for r in Workdir(tmp_path).rows() if "val/accuracy" in r}
    assert summary["best"]["step"] == max(accuracy, key=accuracy.get)  # the first of equals
    assert summary["val"]["accuracy"] == max(accuracy.values())
    assert evaluate.main([f"--workdir={tmp_path}"]) == 0
    assert "the same figures" in capsys.readouterr().out


def test_a_run_without_val_keeps_the_last(tiny, tmp_path):
    argv = changed(tiny, tmp_path, data_val="none", train_for="4 steps")
    assert train.main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] is None
    assert summary["data"]["train"] == 24 + 9
    assert "test" in summary


@pytest.mark.parametrize("field", ["select=best", "early_stop=2"])
def test_choosing_on_val_needs_a_val_split(tiny, tmp_path, field):
    argv = [*changed(tiny, tmp_path, data_val="none"), f"--config.{field}"]
    with pytest.raises(UserError, match=r"config\.(select = 'best'|early_stop = 2) needs a val split"):
        train.main(argv)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    argv = changed(tiny, tmp_path, optim_lr=1e30, optim_name="sgd", optim_clip=0.0, strategy="full()")
    message = r"the loss is (nan|inf) at step \d+; the last good checkpoint is .*smaller config.optim.lr"
    with pytest.raises(UserError, match=message):
        train.main(argv)
    told = status.look(tmp_path)
    assert told["state"] == "diverged"
    assert told["why"].startswith("the loss is ")


def test_bfloat16_and_every_option_at_once(tiny, tmp_path):
    argv = changed(
        tiny,
        tmp_path,
        dtype="bfloat16",
        ema=0.9,
        augment_mixup=0.2,
        augment_cutmix=1.0,
        augment_randaugment=(2, 9),
        augment_color_jitter=0.3,
        batch_size=16,
        optim_name="lamb",
        optim_schedule="linear",
        train_for="6 steps",
        drop_rate=0.5,
        strategy="layerwise_decay(0.8)",
    )
    assert train.main(argv) == 0
    exp, _, params, _, _ = evaluate.restore(Workdir(tmp_path))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert exp.model.dtype == np.dtype("bfloat16")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tiny, tmp_path, number):
    argv = changed(tiny, tmp_path, train_for="3000 steps", checkpoint_every="3000 steps", eval_every="3000 steps")
    process = command("tljax.train", *argv)
    while not (tmp_path / "metrics.jsonl").exists() or not Workdir(tmp_path).rows():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == ""
    step = int(out.split(f"stopped by {number.name} at step ")[1].split(",")[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert "\x1b" not in out  # plain lines where the output is no terminal
    told = status.look(tmp_path)
    assert (told["state"], told["why"]) == ("stopped", f"by {number.name}")
    assert (told["step"], told["total"], told["checkpoint"]["step"]) == (step, 3000, step)


def test_phases_train_what_each_says_and_the_rest_stays(tiny, tmp_path, capsys):
    """The stages outside all phases are bit-identical at the end; each phase compiles once."""
    fields = {"phases": "phases(('9 steps', frozen()), ('rest', partial(last=1)))", "ema": 0.5, "optim_restart": "true"}
    assert train.main(changed(tiny, tmp_path, **fields)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert capsys.readouterr().out.count("lint: ") == 1  # both steps are clean: told once
    assert summary["leaks"] == []
    exp, _, params, _, _ = evaluate.restore(Workdir(tmp_path))
    (_, probe), (_, last) = exp.plans
    assert summary["frozen"]["values"] == sum(size for path, size in last.frozen.items() if path in probe.frozen)
    start, *_ = exp.load()
    moved = {path: a.tobytes() != np.asarray(b).tobytes() for path, a, b in zip(
        plans.paths(start), map(np.asarray, jax.tree.leaves(start)), jax.tree.leaves(params))}  # fmt: skip
    assert {path for path in moved if moved[path]} == {leaf.path for leaf in last.trainable}
    lr = {r["step"]: r["lr"] for r in Workdir(tmp_path).rows() if "lr" in r}
    assert lr[12] > lr[8]  # the schedule began anew at step 9


@pytest.mark.slow
def test_a_resume_on_a_boundary_and_inside_a_phase_is_the_run_never_stopped(tiny, tmp_path):
    fields = {"phases": "lp_ft(head='6 steps', then=partial(last=2))", "ema": 0.5, "checkpoint_every": "3 steps"}
    whole = tmp_path / "whole"
    assert train.main(changed(tiny, whole, **fields)) == 0
    states = {}
    for step in (6, 9):
        # A run that ends at `step`, as a kill after that checkpoint would leave it.
        part = tmp_path / str(step)
        save = Checkpoints.save

        class Killed(Exception):
            pass

        def killing(self, at, state, notes, best=None, step=step, save=save):
            save(self, at, state, notes, best)
            if at == step:
                self.wait()
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", killing)
            with pytest.raises(Killed):
                train.main(changed(tiny, part, **fields))
        assert train.main(changed(tiny, part, **fields)) == 0
        states[step] = part
    for path in states.values():
        a, b = (evaluate.restore(Workdir(p)) for p in (whole, path))
        assert all(
            x.tobytes() == y.tobytes() for x, y in zip(*(map(np.asarray, jax.tree.leaves(t[2:4])) for t in (a, b)))
        )
        assert rows(path) == rows(whole)


def test_a_leak_in_the_step_is_told_and_stops_nothing(tiny, tmp_path, capsys, monkeypatch):
    """The step with a norm over the gradients of all leaves: the run says so, and its summary."""
    make = experiment.make_train_step

    def leaking(model, plan, tx, **more):
        step = make(model, plan, tx, **more)

        def whole(state, batch):
            loss = lambda params: model.apply(
                {"params": params, "batch_stats": state.stats}, batch["image"] / 255
            ).sum()
            new, metrics = step(state, batch)
            return new, metrics | {"norm": optax.tree.norm(jax.grad(loss)(state.params))}

        return whole

    monkeypatch.setattr(experiment, "make_train_step", leaking)
    fields = {
        "phases": "lp_ft(head='2 steps', then=partial(last=1))",
        "train_for": "4 steps",
        "optim_warmup": "1 steps",
    }
    assert train.main(changed(tiny, tmp_path, **fields)) == 0
    out = capsys.readouterr().out
    leaks = json.loads((tmp_path / "summary.json").read_text())["leaks"]
    assert any("gradient of frozen stem/conv1/kernel" in leak for leak in leaks)
    assert all(f"lint: {leak}" in out for leak in leaks)
    assert "no gradient of a frozen leaf is formed" not in out


def test_runs_that_differ_in_numbers_share_a_program(tiny, tmp_path, monkeypatch):
    """Rate, decay, smoothing and seed are arguments of the step: its program is one, and the compilation cache's."""
    texts, program = [], train.parallel.Layout.program

    class Seen:
        def __init__(self, jitted):
            self.jitted = jitted

        def __call__(self, *args):
            return self.jitted(*args)

        def lower(self, *args):
            lowered = self.jitted.lower(*args)
            texts.append(lowered.as_text())
            return lowered

    monkeypatch.setattr(train.parallel.Layout, "program", lambda *a, **k: Seen(program(*a, **k)))
    common = {"train_for": "3 steps", "drop_rate": 0.5, "augment_mixup": 0.3}
    others = {"optim_lr": 0.3, "optim_weight_decay": 0.7, "label_smoothing": 0.4, "seed": 11}
    for i, fields in enumerate(({}, others, {"ema": 0.9})):
        assert train.main(changed(tiny, tmp_path / str(i), **common | fields)) == 0
    assert texts[0] == texts[1] != texts[2]
    rows = [Workdir(tmp_path / str(i)).rows() for i in range(2)]
    assert rows[0][0]["train/loss"] != rows[1][0]["train/loss"]
