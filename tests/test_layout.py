"""How a run is laid over devices: mesh sizes, what passes between them, what each holds."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed
from test_delta import weights_file

from tljax import config as configs
from tljax import cost, evaluate, experiment, frozen_dtype, memory, optim, parallel, train
from tljax.errors import UserError
from tljax.leaks import lint
from tljax.parallel import Layout, mesh_sizes
from tljax.step import init_state
from tljax.weights import runs
from tljax.workdir import Workdir

BATCH, CLASSES = 16, 5
SCALARS = 2 * 4  # loss and accuracy, float32
RNG = np.random.default_rng(0)


class Program:
    """A tiny experiment with fields changed (`parallel_fsdp=2`), and its step compiled for some fake devices."""

    def __init__(self, model="groupnorm_tiny", strategy="partial(last=1)", devices=8, **fields):
        config = configs.base(model)
        config.update(weights="", strategy=strategy, batch_size=BATCH, drop_rate=0.2, drop_path_rate=0.2)
        for field, value in fields.items():
            group, _, name = field.partition("_")
            owner, name = (config[group], name) if group in ("parallel", "optim") else (config, field)
            owner[name] = value
        self.layout = Layout(config.parallel, BATCH, config.optim.accumulate, devices)
        self.exp = experiment.build(config, CLASSES, self.layout)
        self.plan = self.exp.plans[0][1]
        self.tx = optim.optimizer(self.plan, config.optim, lambda step: 1e-3)
        self.step = self.exp.train_step(self.plan, self.tx, self.layout)
        self.state = self.exp.state_shapes(self.plan, self.tx)
        self.batch = self.layout.abstract_batch(BATCH, self.exp.preprocessing.size)

    @functools.cached_property
    def compiled(self):
        return self.layout.compile_train(self.step, self.state, self.batch)

    @property
    def moved(self) -> dict[str, int]:
        return cost.collective_bytes(self.compiled)

    @property
    def memory(self):
        return self.compiled.memory_analysis()

    @property
    def flops(self) -> float:
        return parallel.cost(self.compiled)["flops_per_step"] * len(self.layout.devices)

    def run(self, steps=2):
        """(losses, the last parameters) from values drawn with one seed."""
        params, stats, _ = self.exp.load()
        state = self.layout.place(init_state(self.plan, self.tx, params, stats, 0.0))
        rng, losses, size = np.random.default_rng(0), [], self.exp.preprocessing.size
        for _ in range(steps):
            image = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
            batch = {"image": image, "label": rng.integers(0, CLASSES, BATCH, dtype=np.int32)}
            state, measured = self.compiled(state, self.layout.place_batch(batch))
            losses.append(float(measured["loss"]))
        return losses, self.layout.to_host(state.params)


program = functools.cache(Program)


@pytest.mark.parametrize(
    ("data", "fsdp", "sizes"),
    [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (8, 1, (8, 1)), (1, -1, (1, 8)), (4, 2, (4, 2))],
)
def test_the_axes_of_the_mesh(data, fsdp, sizes):
    assert mesh_sizes(data, fsdp, 8) == sizes


@pytest.mark.parametrize(
    ("data", "fsdp", "line"),
    [
        (2, 2, "config.parallel.data × config.parallel.fsdp = 2 × 2 = 4, but there are 8 devices; -1 takes the rest"),
        (16, 1, "16 × 1 = 16, but there are 8 devices"),
        (3, -1, "config.parallel.data = 3 does not divide the 8 devices"),
        (-1, 16, "config.parallel.fsdp = 16 does not divide the 8 devices"),
        (-1, -1, "config.parallel.data and config.parallel.fsdp are both -1: only one of them can be the rest"),
        (0, 1, "config.parallel.data = 0: expected a number of devices, or -1 for the rest"),
        (-1, -2, "config.parallel.fsdp = -2: expected a number of devices, or -1 for the rest"),
    ],
)
def test_sizes_that_do_not_fit_the_devices(data, fsdp, line):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        mesh_sizes(data, fsdp, 8)
    assert line in str(error.value)


def test_only_what_trains_passes_between_devices():
    """One all-reduced gradient of each leaf that trains, loss and accuracy; nothing of what is frozen."""
    for model, strategy in (("groupnorm_tiny", "frozen()"), ("groupnorm_tiny", "partial(last=1)")):
        found = program(model, strategy)
        trains = sum(4 * leaf.size for leaf in found.plan.trainable)
        assert set(found.moved) == {"all-reduce"}, strategy
        assert found.moved["all-reduce"] == trains + SCALARS, strategy


@pytest.mark.slow
def test_batch_statistics_that_move_pass_between_devices_and_stored_ones_do_not():
    """Two moments a channel forward, and one gradient backward: the scale's and bias' own serve as the rest."""
    frozen, live = program("resnet_tiny", "frozen()"), program("resnet_tiny", "partial(last=1)")
    trains = lambda p: sum(4 * leaf.size for leaf in p.plan.trainable)
    assert frozen.moved == {"all-reduce": trains(frozen) + SCALARS}
    moving = sum(4 * size for path, size in live.plan.stats if path.rpartition("/")[0] in live.plan.live_norms)
    assert live.moved == {"all-reduce": trains(live) + SCALARS + moving + moving // 2}


def test_fsdp_divides_what_each_device_holds(monkeypatch):
    monkeypatch.setattr(parallel, "FSDP_LEAST", 1024)
    whole, laid = program(), Program(parallel_fsdp=4)
    images = (32 * 32 * 3 + 4) * BATCH // 8
    nbytes = lambda leaf, parts: math.prod(leaf.shape) * leaf.dtype.itemsize // parts
    large = lambda leaf: math.prod(leaf.shape) >= 1024 and any(d % 4 == 0 for d in leaf.shape)
    leaves = jax.tree.leaves(whole.state)
    assert whole.memory.argument_size_in_bytes == pytest.approx(sum(nbytes(x, 1) for x in leaves) + images, abs=64)
    held = sum(nbytes(x, 4 if large(x) else 1) for x in leaves)
    # The compiler pads each small array a little.
    assert laid.memory.argument_size_in_bytes == pytest.approx(held + images, abs=64)
    assert laid.moved["all-gather"] > 0


def test_frozen_leaves_in_the_compute_dtype_halve_and_give_the_same_losses_to_the_last_bit():
    """Kernels are; what a norm reads in float32 stays so, and what trains."""
    wide, narrow = (program(dtype="bfloat16", parallel_frozen_dtype=dtype) for dtype in ("", "bfloat16"))
    frozen = [leaf for leaf in narrow.plan.leaves if not leaf.multiplier]
    own = {leaf.path for leaf in frozen if leaf.path.endswith("kernel")}
    assert narrow.exp.narrow == own
    saved = sum(2 * leaf.size for leaf in frozen if leaf.path in own)
    assert wide.memory.argument_size_in_bytes - narrow.memory.argument_size_in_bytes == pytest.approx(saved, abs=64)
    (losses, params), (same, narrowed) = wide.run(), narrow.run()
    assert losses == same
    assert params["block1"]["conv1"]["kernel"].dtype == np.float32
    assert narrowed["block1"]["conv1"]["kernel"].dtype == jnp.bfloat16
    for leaf in narrow.plan.trainable:
        one, other = params, narrowed
        for key in leaf.path.split("/"):
            one, other = one[key], other[key]
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other, err_msg=leaf.path)


def narrow_experiment(**fields):
    config = configs.base("groupnorm_tiny")
    config.update(weights="", dtype="bfloat16", **fields)
    config.parallel.frozen_dtype = "bfloat16"
    return experiment.build(config, CLASSES)


def test_what_trains_in_any_phase_keeps_its_dtype():
    assert not narrow_experiment(phases="lp_ft(head='1 epochs')").narrow
    alone = narrow_experiment(strategy="partial(last=2)").narrow
    assert alone == {"stem/conv1/kernel", "block1/conv1/kernel", "block1/conv2/kernel"}


def test_what_leaves_a_run_has_its_frozen_leaves_in_full_again():
    exp = narrow_experiment()
    params, (stem, head) = jax.tree.map(np.array, exp.load()[0]), (("stem", "conv1"), ("head",))
    at = lambda tree, keys: functools.reduce(lambda node, key: node[key], keys, tree)["kernel"]
    at(params, head)[:] = 7.0  # trained
    wide = frozen_dtype.widened(exp, params)
    assert at(params, stem).dtype == jnp.bfloat16
    assert at(wide, stem).dtype == np.float32
    assert np.any(at(wide, stem) != at(params, stem))
    np.testing.assert_array_equal(at(wide, stem).astype(jnp.bfloat16), at(params, stem))
    np.testing.assert_array_equal(at(wide, head), 7.0)
    at(params, stem)[0, 0] += 1
    with pytest.raises(UserError, match="not those that the run began with: stem/conv1/kernel differ"):
        frozen_dtype.widened(exp, params)


def test_remat_keeps_less_and_computes_again_only_what_is_behind_the_frozen_prefix():
    """Kept by the program; XLA's CPU compiler chooses an order of its own, and saves nothing."""
    plain, again = (program(strategy="partial(last=3)", devices=1, parallel_remat=remat) for remat in ("", "stages"))
    forward = cost.forward_flops(plain.exp)
    assert plain.plan.prefix == ("stem",)
    behind = sum(flops for stage, flops in forward.items() if stage not in plain.plan.prefix)
    assert 0 < again.flops - plain.flops <= 1.05 * behind
    assert again.flops - plain.flops > 0.4 * behind  # the compiler leaves out what no gradient needs
    kept = lambda found: memory.peak(found.step, found.state, found.batch)
    assert kept(again) < 0.8 * kept(plain)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet_tiny", "vit_mini"])
def test_remat_changes_no_result(model):
    """With dropout, stochastic depth and batch statistics that move; and no gradient of a frozen leaf is formed."""
    plain, again = (program(model, devices=2, parallel_remat=remat, optim_name="sgd") for remat in ("", "stages"))
    assert lint(again.step, again.plan, again.state, again.batch) == ()
    (losses, params), (same, others) = plain.run(), again.run()
    assert losses == pytest.approx(same, rel=1e-5)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def again(path) -> None:
    """Takes back the end of a finished run: the same command resumes from the checkpoint before the last."""
    shutil.rmtree(path / "checkpoints" / "24")
    (path / "summary.json").unlink()


@pytest.mark.slow
def test_a_run_goes_on_under_another_mesh(tiny, tmp_path, monkeypatch, capsys):
    """From each layout to the next, with large leaves laid over other numbers of devices; the same figures."""
    monkeypatch.setattr(parallel, "FSDP_LEAST", 64)
    found = []
    layouts = (
        {"parallel_fsdp": 4}, {"parallel_data": 4, "parallel_fsdp": 2, "parallel_remat": "stages"},
        {"parallel_data": 1, "parallel_fsdp": -1}, {"parallel_mode": "pmap"}, {},
    )  # fmt: skip
    for layout in layouts:
        assert train.main(changed(tiny, tmp_path, **layout)) == 0
        found.append(json.loads((tmp_path / "summary.json").read_text()))
        again(tmp_path)
    assert capsys.readouterr().out.count("resumed from step 18") == len(layouts) - 1
    for one in found[1:]:
        assert one["test"]["nll"] == pytest.approx(found[0]["test"]["nll"], rel=1e-3)
        assert one["frozen"] == found[0]["frozen"]
    with pytest.raises(UserError, match=r"parallel\.frozen_dtype: '' → 'bfloat16'; give another"):
        train.main(changed(tiny, tmp_path, parallel_frozen_dtype="bfloat16", dtype="bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delta", "more"),
    [
        (False, {}),
        (False, {"cache": "memory", "augment_crop_min_scale": 1.0, "augment_flip": False}),
        (True, {}),
        (False, {"parallel_mode": "pmap"}),
        (False, {"parallel_fsdp": 4}),
    ],
    ids=["plain", "kept features", "deltas", "pmap", "fsdp"],
)
def test_a_run_on_narrow_frozen_leaves_is_that_on_wide_ones_and_resumes_exactly(
    tiny, tmp_path, monkeypatch, delta, more
):
    """Losses, figures and parameters to the last bit; its checkpoints hold them narrow, or not at all."""
    monkeypatch.setattr(parallel, "FSDP_LEAST", 64)
    tiny = [*tiny, f"--config.checkpoint.delta={delta}", f"--config.weights={weights_file(tmp_path / 'w.safetensors')}"]
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    fields = {"dtype": "bfloat16", **more}
    assert train.main(changed(tiny, wide, **fields)) == 0
    fields["parallel_frozen_dtype"] = "bfloat16"
    assert train.main(changed(tiny, narrow, **fields)) == 0
    read = lambda path: json.loads((path / "summary.json").read_text())
    losses = lambda path: [row["train/loss"] for row in Workdir(path).rows() if "train/loss" in row]
    first = read(narrow)
    assert losses(narrow) == losses(wide)
    assert first["test"] == read(wide)["test"]
    held = "whole_bytes" if delta else "bytes"
    assert first["checkpoint"][held] < read(wide)["checkpoint"][held]
    before = jax.tree.leaves(evaluate.restore(Workdir(narrow), "last")[2])
    assert {str(leaf.dtype) for leaf in before} == {"float32", "bfloat16"}
    again(narrow)
    assert train.main(changed(tiny, narrow, **fields)) == 0
    assert read(narrow)["test"] == first["test"]
    assert read(narrow)["frozen"] == first["frozen"]
    for one, other in zip(before, jax.tree.leaves(evaluate.restore(Workdir(narrow), "last")[2]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert evaluate.main([f"--workdir={narrow}"]) == 0  # the same figures
    own, others = (runs.read(path) for path in (narrow, wide))  # what leaves a run is in full again
    assert own.keys() == others.keys()
    for path, value in own.items():
        assert value.dtype == others[path].dtype
        np.testing.assert_array_equal(value, others[path], err_msg=path)
