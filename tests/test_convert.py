"""python -m tljax.convert: formats in, types kept, cards in headers, a run's workdir, and what can be wrong."""

import json

import jax
import numpy as np
import pytest
from conftest import changed
from safetensors.numpy import load_file, save_file

from tljax import convert, models, train, weights
from tljax.errors import UserError
from tljax.weights import inverse, matcher, safetensors

CLASSES = 7


def arrays(model="resnet_tiny", naming="torchvision", dtype=np.float32, seed=0):
    """A whole random file of a model, in one of its namings."""
    rng = np.random.default_rng(seed)
    shapes = matcher.flatten(models.shapes(models.create(model, CLASSES)))
    leaves = {leaf: rng.normal(size=shape.shape).astype(dtype) for leaf, shape in shapes.items()}
    names = inverse.names(models.conversion(model)[naming], leaves, naming)
    return {name: inverse.made(parts, leaves) for name, parts in names.parts.items()}


@pytest.fixture
def source(tmp_path):
    save_file(arrays(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def error_of(*argv):
    with pytest.raises(UserError) as caught:
        convert.main([str(a) for a in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_there_and_back(source, tmp_path, capsys):
    own, back = tmp_path / "own.safetensors", tmp_path / "back.safetensors"
    assert convert.main([str(source), str(own)]) == 0
    assert "resnet_tiny: 67 tensors in tljax naming" in capsys.readouterr().out  # found out from the names
    assert set(load_file(own)) == set(matcher.flatten(models.shapes(models.create("resnet_tiny", CLASSES))))
    assert convert.main([str(own), str(back), "--to=safetensors", "--naming=timm"]) == 0
    said = capsys.readouterr().out
    assert "and 13 constants that its readers ask for: bn1.num_batches_tracked" in said
    assert "licence: unknown" in said
    before, after = load_file(source), load_file(back)
    counts = {name for name in after if name.endswith("num_batches_tracked")}
    assert set(after) - counts == set(before)
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert safetensors.metadata(back)["format"] == "pt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.safetensors", "own.safetensors", "source.safetensors"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "bfloat16"])
def test_types_stay(tmp_path, dtype):
    import ml_dtypes  # noqa: F401

    given = arrays("vit_mini", "timm", np.dtype(dtype))
    safetensors.write(tmp_path / "a.safetensors", {k: (lambda v=v: v) for k, v in given.items()}, {})
    convert.convert(str(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "google")
    convert.convert(str(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", "timm")
    found = safetensors.read(tmp_path / "c.safetensors")
    assert found.keys() == given.keys()
    assert all(found[k].dtype == np.dtype(dtype) and found[k].tobytes() == given[k].tobytes() for k in given)


def test_npz_is_read_too_and_sizes_are_as_in_the_file(tmp_path):
    """Another image size, one channel, 5 classes: what no other network needs is no mistake here."""
    given = arrays("vit_mini", "timm")
    given["pos_embed"] = np.zeros((1, 1 + 9, 32), np.float32)
    given["patch_embed.proj.weight"] = given["patch_embed.proj.weight"][:, :1]
    given |= {"head.weight": np.ones((5, 32), np.float32), "head.bias": np.ones(5, np.float32)}
    np.savez(tmp_path / "source.npz", **given)
    done = convert.convert(str(tmp_path / "source.npz"), tmp_path / "own.safetensors", model="vit_mini")
    found = load_file(tmp_path / "own.safetensors")
    assert found["params/embed/position"].shape == (10, 32)
    assert found["params/embed/patch/kernel"].shape == (8, 8, 1, 32)
    assert found["params/head/kernel"].shape == (32, 5)
    assert (done.source_naming, done.left_out) == ("timm", ())
    # Without a head it has none afterwards.
    np.savez(tmp_path / "body.npz", **{k: v for k, v in given.items() if not k.startswith("head")})
    done = convert.convert(str(tmp_path / "body.npz"), tmp_path / "body.safetensors", "torchvision", "vit_mini")
    assert not any(name.startswith("heads") for name in done.written)
    assert "conv_proj.weight" in done.written


def test_a_card_travels_in_the_header(source, tmp_path):
    own = tmp_path / "own.safetensors"
    convert.convert(str(source), own)
    card = weights.card(str(own))
    assert (card.model, card.input_size, card.source) == ("resnet_tiny", 32, str(own))
    assert "assumed" in card.note
    # As it was for the source, whatever is asked now.
    assert (card.mean, card.std, card.crop) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875)
    with pytest.raises(UserError, match="are of the model resnet_tiny, not vit_mini"):
        weights.load(str(own), "vit_mini", models.shapes(models.create("vit_mini", CLASSES)))
    told = safetensors.metadata(own)["tljax.card"]
    for wrong in (
        "",
        "{}",
        "[]",
        told.replace("0.485, ", ""),
        told.replace("0.875", "7"),
        told.replace("0.485", '"x"'),
    ):
        save_file({"a": np.zeros(1)}, tmp_path / "wrong.safetensors", {"tljax.card": wrong})
        assert "assumed" in weights.card(str(tmp_path / "wrong.safetensors"), "resnet18").note


def test_a_run_is_a_source_and_weights_with_its_head(trained, tiny, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    done = convert.convert(str(trained), tmp_path / "run.safetensors")
    assert (done.model, done.source_naming) == (config["model"], "tljax")
    assert json.loads(safetensors.metadata(tmp_path / "run.safetensors")["tljax.classes"]) == ["blue", "green", "red"]
    # Training goes on from either, with the head: the first loss is that of a trained network, not of a new head.
    found = {}
    for name, spec in (("run", trained), ("file", tmp_path / "run.safetensors")):
        workdir = tmp_path / name
        fields = {"reset": "()", "train_for": "1 steps", "optim_lr": 0.0, "norm_stats": "frozen"}
        assert train.main(changed(tiny, workdir, weights=spec, **fields, optim_warmup="0 steps")) == 0
        summary = json.loads((workdir / "summary.json").read_text())
        found[name] = summary["test"]["nll"]
    expected = json.loads((trained / "summary.json").read_text())["test"]["nll"]
    assert found["run"] == pytest.approx(expected, rel=1e-4)
    assert found["file"] == pytest.approx(expected, rel=1e-4)
    card = weights.card(str(trained))
    assert card.origin.startswith(f"the run {trained.name}")
    assert card.trained_on.startswith("folder:")


def test_bad_input(source, tmp_path):
    new = tmp_path / "new.safetensors"
    before = sorted(tmp_path.iterdir())
    assert error_of(source) == f"expected SRC and DST, found 1 names: {source}"
    assert error_of(source, tmp_path / "x.pth") == f"{tmp_path}/x.pth: expected a file that ends in .safetensors"
    assert error_of(source, source) == f"{source} exists: delete it, or give another name"
    assert "there is no folder" in error_of(source, tmp_path / "no/x.safetensors")
    assert error_of(source, new, "--to=npz") == "unknown format 'npz'; there are: safetensors"
    assert error_of(source, new, "--naming=torchvison") == "unknown naming 'torchvison'; nearest: torchvision"
    assert error_of(source, new, "--naming=google") == (
        "the model resnet_tiny has no naming 'google'; it has: timm, tljax, torchvision"
    )
    assert error_of(source, new, "--model=resnet_tny").startswith("unknown model 'resnet_tny'; nearest: resnet_tiny")
    assert error_of("resnt18", new).startswith("unknown weights 'resnt18'")
    assert "does not exist" in error_of(tmp_path / "none.pth", new)
    assert "naming): " in error_of(source, new, "--model=vit_mini")
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "strange.safetensors")
    assert error_of(tmp_path / "strange.safetensors", new) == (
        f"the keys of {tmp_path}/strange.safetensors look like those of no model here: say which it is of, --model=…"
    )
    (tmp_path / "strange.safetensors").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_a_failure_leaves_no_half_a_file(source, tmp_path):
    """Neither where an array turns out damaged in the middle, nor where the disk is full."""

    def damaged():
        raise UserError("damaged")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="damaged"):
        safetensors.write(tmp_path / "x.safetensors", {"a": lambda: np.zeros(9), "b": damaged}, {})
    with pytest.raises(UserError, match="is of type complex128, which safetensors does not have"):
        safetensors.write(tmp_path / "x.safetensors", {"a": lambda: np.zeros(9, complex)}, {})
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match=r"cannot write /proc/x.safetensors"):
        safetensors.write("/proc/x.safetensors", {"a": lambda: np.zeros(9)}, {})


def test_what_is_written_the_library_reads(tmp_path):
    """All types, scalars and empty arrays, non-contiguous and big-endian ones; names that JSON escapes."""
    rng = np.random.default_rng(0)
    given = {f"ü\n{i}": rng.integers(0, 2, (3, i)).astype(t) for i, t in enumerate(("?", "u1", "i8", "f2", "f4", "f8"))}
    given |= {"scalar": np.float32(3), "turned": rng.normal(size=(4, 5)).T, "big": np.arange(5, dtype=">f4")}
    size = safetensors.write(tmp_path / "x.safetensors", {k: (lambda v=v: v) for k, v in given.items()}, {"a": "ö"})
    assert (tmp_path / "x.safetensors").stat().st_size == size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    assert all(np.array_equal(found[k], given[k]) for k in given)
    assert safetensors.metadata(tmp_path / "x.safetensors") == {"a": "ö"}


def test_filling_compiles_nothing_and_draws_no_numbers(source, monkeypatch):
    """Loading a whole network: no program is built, and no random number is asked for."""
    built = []
    model = models.create("resnet_tiny", CLASSES)
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: built.append(event))
    shapes = models.shapes(model)
    for name in ("bits", "key", "normal", "truncated_normal", "uniform"):
        monkeypatch.setattr(jax.random, name, lambda *_, **__: pytest.fail("a random number is drawn"))
    loaded = weights.load(str(source), "resnet_tiny", shapes)
    assert loaded.report.reset == ()
    assert not [event for event in built if "backend_compile" in event]
    # The listener hears a compilation.
    jax.jit(lambda x: x * 3 + len(built))(np.ones(3)).block_until_ready()
    assert [event for event in built if "backend_compile" in event]
