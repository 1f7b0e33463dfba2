"""Delta checkpoints: what is on disk, what comes back, and onto which base."""

import json

import jax
import numpy as np
import pytest
from conftest import changed
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from tljax import command, delta, evaluate, experiment, models, plan, predict, train
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.step import State
from tljax.workdir import Workdir

# The last stage of the body trains up to step 6, and is frozen with what it has learned when the stem trains.
PHASES = "phases(('6 steps', partial(last=1)), ('rest', rules(('stem', 1), ('head', 1), ('**', 0))))"
FIELDS = {
    "train_for": "12 steps", "checkpoint_every": "3 steps", "eval_every": "6 steps", "ema": 0.5, "phases": PHASES
}  # fmt: skip


def torch_names(path: str) -> str:
    """torchvision's name of a leaf of the tiny ResNet, whose layers have a block each."""
    _, stage, *module, leaf = path.split("/")
    module = ".".join(module).replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    where = {"stem": "", "head": "fc."}.get(stage, f"layer{stage[-1]}.0.") + (f"{module}." if module else "")
    return where + {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf)


def weights_file(file, change: str = ""):
    """Random weights of the tiny ResNet as a file of torchvision's; in `change` one value is another."""
    rng, arrays = np.random.default_rng(0), {}
    shapes = models.shapes(models.create("resnet_tiny", 10))
    for path, leaf in zip(plan.paths(shapes), jax.tree.leaves(shapes)):
        values = np.abs(rng.normal(size=leaf.shape)).astype(np.float32) / np.sqrt(max(leaf.size, 1))
        if path == change:
            values.flat[0] += 1
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        arrays[torch_names(path)] = np.ascontiguousarray(values.transpose(axes))
    save_file(arrays, file)
    return file


def last_state(path):
    """The whole state of a run's last checkpoint, {path: bytes}."""
    exp, layout, *_, notes = evaluate.restore(Workdir(path), "last")
    checkpoints = Checkpoints(path / "checkpoints")
    _, state = exp.restore(checkpoints, notes["step"], layout, notes["examples"])
    return {p: np.asarray(x).tobytes() for p, x in zip(plan.paths(state), jax.tree.leaves(state))}


def told(path) -> dict:
    return json.loads((path / "summary.json").read_text())


class Killed(Exception):
    pass


def killed_at(step: int, argv: list[str]) -> None:
    """Starts a run and ends it, as a kill would, when the checkpoint of a step is whole."""
    save = Checkpoints.save

    def killing(self, at, state, notes, best=None):
        save(self, at, state, notes, best)
        if at == step:
            self.wait()
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killing)
        with pytest.raises(Killed):
            train.main(argv)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The same run twice, with whole checkpoints and with deltas: {"whole": workdir, "delta": workdir}, weights."""
    root = tmp_path_factory.mktemp("delta")
    file = weights_file(root / "tiny.safetensors")
    argv = [*tiny, f"--config.weights={file}"]
    for name in ("whole", "delta"):
        more = ["--config.checkpoint.delta=true"] * (name == "delta")
        assert train.main([*changed(argv, root / name, **FIELDS), *more]) == 0
    return root, argv


def test_a_run_with_deltas_is_the_run_without(runs):
    root, _ = runs
    assert last_state(root / "delta") == last_state(root / "whole")
    assert told(root / "delta")["test"] == told(root / "whole")["test"]
    assert told(root / "delta")["frozen"] == told(root / "whole")["frozen"]


def test_a_checkpoint_holds_what_has_trained(runs):
    """The summary's figures against the model's shapes, and the names that are on disk."""
    root, _ = runs
    shapes = models.shapes(models.create("resnet_tiny", 3))
    values = lambda collection, stages: sum(x.size for s in stages for x in jax.tree.leaves(shapes[collection].get(s)))
    absent = 4 * (values("params", ("block1", "block2")) + values("batch_stats", ("block1", "block2")))
    figures = told(root / "delta")["checkpoint"]
    assert figures["delta"] is True
    assert figures["whole_bytes"] - figures["bytes"] == absent
    whole = told(root / "whole")["checkpoint"]
    assert whole["delta"] is False
    assert whole["bytes"] == whole["whole_bytes"] == figures["whole_bytes"]
    checkpoints = Checkpoints(root / "delta" / "checkpoints", create=False)
    saved = checkpoints.manager.item_metadata(12)["state"]
    saved = plan.paths(getattr(saved, "tree", saved))
    stages = {p.split("/")[1] for p in saved if p.startswith(("params/", "stats/"))}
    assert stages == {"stem", "block3", "head"}
    assert checkpoints.notes(12)["base"] == figures["base"] == told(root / "delta")["frozen"]["digest"]


def test_evaluate_and_predict_fill_a_delta_from_the_weights(runs, photos, capsys):
    root, _ = runs
    assert evaluate.main([f"--workdir={root / 'delta'}"]) == 0
    assert "the same figures as summary.json" in capsys.readouterr().out
    said = []
    for name in ("delta", "whole"):
        assert predict.main([f"--workdir={root / name}", str(photos / "test/red/red0.png")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_best_of_deltas_gives_the_final_figures(runs, tmp_path, capsys):
    _, argv = runs
    more = {"select": "best", "metric": "val/accuracy", "optim_lr": 0.3, "optim_name": "sgd", "eval_every": "2 steps"}
    argv = [*changed(argv, tmp_path, **more, strategy="partial(last=1)"), "--config.checkpoint.delta=true"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    figures = told(tmp_path)
    assert figures["evaluated_step"] == figures["best"]["step"]
    assert evaluate.main([f"--workdir={tmp_path}"]) == 0
    share = 100 * figures["checkpoint"]["bytes"] / figures["checkpoint"]["whole_bytes"]
    assert f"({share:.0f} %), the rest is the base's: {figures['frozen']['digest'][:16]}" in out


@pytest.mark.parametrize(("mode", "fsdp"), [("jit", 1), ("jit", 2), ("pmap", 1)])
def test_what_is_filled_in_is_placed_as_the_rest(mode, fsdp, tmp_path, monkeypatch):
    """Through a checkpoint, as a resume restores it: each leaf lies where the compiled step expects it."""
    monkeypatch.setattr("tljax.parallel.FSDP_LEAST", 64)
    layout = Layout(ConfigDict({"mode": mode, "fsdp": fsdp}), 8)
    rng = np.random.default_rng(0)
    params = {s: {"kernel": rng.normal(size=(16, 8)).astype(np.float32)} for s in ("body", "head")}
    stats = {"body": {"bn": {"mean": np.ones(8, np.float32)}}}
    made = plan.build([("head", 1), ("**", 0)], params, stats)
    state = layout.place(State(np.int32(3), params, stats, {"mu": {"head": params["head"]}}, None))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, delta.cut(state, made.frozen), {})
    checkpoints.wait()
    saved = checkpoints.restore(3, layout.abstract(delta.cut(state, made.frozen)))
    digests = made.frozen_digests(params, stats)
    filled = delta.fill(saved, made, (params, stats), digests, layout, "a checkpoint")
    assert jax.tree.structure(filled) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(state)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert a.sharding == b.sharding
    whole = filled.params["body"]["kernel"].addressable_shards[0].data.size
    assert whole == 128 // fsdp


def test_another_base_is_refused_with_both_digests(runs, tmp_path):
    root, argv = runs
    argv = [*changed(argv, tmp_path, **FIELDS), "--config.checkpoint.delta=true"]
    argv = [a.replace("tiny.safetensors", "other.safetensors") for a in argv]
    file = weights_file(root / "other.safetensors")
    killed_at(9, argv)
    began = Checkpoints(tmp_path / "checkpoints", create=False).notes(9)["base"]
    weights_file(file, change="params/block1/conv2/kernel")
    message = (
        r"checkpoint 9 of .* is a delta to the base ([0-9a-f]{16}), the weights loaded are ([0-9a-f]{16}): "
        "params/block1/conv2/kernel differs$"
    )
    for again in (lambda: train.main(argv), lambda: evaluate.main([f"--workdir={tmp_path}"])):
        with pytest.raises(UserError, match=message) as error:
            again()
        digests = [word.strip(",:") for word in str(error.value).split() if len(word.strip(",:")) == 16]
        assert began[:16] in digests
    # What has trained is in the checkpoint: another value of it in the file changes nothing.
    weights_file(file, change="params/block3/conv2/kernel")
    assert train.main(argv) == 0
    assert last_state(tmp_path) == last_state(root / "whole")


def test_the_bytes_on_disk_fall_by_the_bytes_left_out(tmp_path):
    """At a size at which orbax's own files are nothing. Random numbers compress by a tenth at most."""
    rng = np.random.default_rng(0)
    params = {s: {"kernel": rng.normal(size=n * 2**18).astype(np.float32)} for s, n in (("body", 6), ("head", 1))}
    state = State(np.int32(1), params, {}, {"mu": {"head": params["head"]}}, None)
    disk = {}
    for name, saved in (("whole", state), ("delta", delta.cut(state, {"params/body/kernel"}))):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(1, saved, {})
        checkpoints.close()
        disk[name] = sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file())
        assert 0.85 * delta.nbytes(saved) < disk[name] < 1.1 * delta.nbytes(saved)
    assert delta.nbytes(state) - delta.nbytes(saved) == 6 * 2**20


def test_what_the_seed_made_is_held_though_it_never_trains(runs):
    """A reset stage that stays frozen: not in the file, so that another machine could not make the same bits."""
    _, argv = runs
    for reset, held in (("('head',)", ()), ("('head','stem/bn1')", ("stem/bn1",)), ("('**',)", ("stem", "block1"))):
        given = [
            *argv,
            f"--config.reset={reset}",
            "--config.checkpoint.delta=true",
            "--config.strategy=partial(last=2)",
        ]
        exp = experiment.build(command.from_command_line(given, "").config, 3)
        absent = exp.left_out(exp.in_time(24))
        frozen = {p for p in exp.plans[0][1].frozen if not any(f"/{name}/" in p for name in held)}
        assert set(absent) == frozen


def test_random_weights_are_no_base(tiny):
    config = command.from_command_line([*tiny, "--config.checkpoint.delta=true"], "").config
    with pytest.raises(UserError, match=r"config.checkpoint.delta = True needs config.weights"):
        experiment.build(config, 3)


def test_nothing_but_parameters_and_statistics_is_cut():
    shapes = {"a": {"kernel": np.ones((2, 2))}, "head": {"kernel": np.ones(3)}}
    state = State(np.int32(1), shapes, {"a": {"bn": {"mean": np.ones(2)}}}, shapes, {"params": shapes})
    found = delta.cut(state, {"params/a/kernel", "batch_stats/a/bn/mean"})
    assert plan.paths(found) == (
        "step", "params/head/kernel", "optimizer/a/kernel", "optimizer/head/kernel", "average/params/a/kernel",
        "average/params/head/kernel",
    )  # fmt: skip
    assert delta.nbytes(state) - delta.nbytes(found) == 8 * (4 + 2)
