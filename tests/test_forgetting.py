"""What was forgotten, and the path between the weights: recomputed by hand from the run's checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
import source_task
from conftest import changed
from PIL import Image

from tljax import evaluate, experiment, forgetting, source, train, weights, wise_ft
from tljax import plan as plans
from tljax.data.table import Table
from tljax.errors import UserError
from tljax.report import console
from tljax.workdir import Workdir


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    source_task.write(root / "weights.safetensors")
    source_task.photographs(root / "photos")
    return root


@pytest.fixture(scope="module")
def finished(tiny, place, tmp_path_factory):
    """A run whose last body stage trained, with a source task."""
    path = tmp_path_factory.mktemp("runs") / "run"
    fields = {"weights": place / "weights.safetensors", "train_for": "6 steps", "ema": 0.5, "batch_size": 8}
    argv = [*changed(tiny, path, **fields), f"--config.source.data=folder:{place / 'photos'}"]
    assert train.main(argv) == 0
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def summary(path):
    return json.loads((path / "summary.json").read_text())


def images(place, p) -> tuple[np.ndarray, np.ndarray]:
    """The source photographs as the network sees them, prepared with PIL, and their classes."""
    found, labels = [], []
    for file in sorted((place / "photos").rglob("*.png")):
        image = Image.open(file)
        scale = round(p.size / p.crop) / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - p.size) / 2), round((image.height - p.size) / 2)
        x = np.asarray(image.crop((left, top, left + p.size, top + p.size)), np.float32) / 255
        found.append((x - np.array(p.mean, np.float32)) / np.array(p.std, np.float32))
        labels.append(int(file.parent.name))
    return np.stack(found), np.array(labels)


def by_hand(place, path):
    """(features {stage: maps} of the loaded network, of the trained one, logits of both, labels)."""
    exp, _, params, stats, _ = evaluate.restore(Workdir(path))
    x, labels = images(place, exp.preprocessing)
    loaded = source_task.variables()
    params = {**jax.tree.map(np.asarray, params), "head": loaded["params"]["head"]}  # the new head has other classes
    model = exp.model.clone(num_classes=source_task.CLASSES)
    features, logits = [], []
    for variables in (loaded, {"params": params, "batch_stats": stats}):
        after = (*model.stages[1:],)
        features.append({s: np.asarray(model.apply(variables, x, stop=a)) for s, a in zip(model.stages, after)})
        logits.append(np.asarray(model.apply(variables, x), np.float64))
    return *features, *logits, labels


def hsic_cka(x, y):
    """Linear CKA by the definition through centred kernels (Kornblith et al. 2019, equations 1 to 3)."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, h = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return np.trace(k @ h) / np.sqrt(np.trace(k @ k) * np.trace(h @ h))


def test_the_figures_by_hand(finished, place):
    found = summary(finished)["forgetting"]
    first, second, before, after, labels = by_hand(place, finished)
    assert (found["examples"], found["labelled"], found["classes"]) == (21, 21, source_task.CLASSES)
    for figures, logits in ((found["before"], before), (found["after"], after)):
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert figures["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
        assert figures["nll"] == pytest.approx(-log_p[np.arange(21), labels].mean(), rel=2e-3)
    ranks = (after > after[np.arange(21), labels][:, None]).sum(-1)
    assert found["after"]["top5"] == pytest.approx((ranks < 5).mean())
    assert found["after"]["agreement"] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean())
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (before, after))
    assert found["after"]["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-2)
    assert found["before"]["kl"] == 0
    assert found["before"]["agreement"] == 1
    moved = found["stages"]["block3"]
    assert moved["relative_l2"] == pytest.approx(
        np.linalg.norm(second["block3"] - first["block3"]) / np.linalg.norm(first["block3"]), rel=1e-2
    )
    assert moved["relative_l2"] > 0
    pooled = lambda f: f.reshape(21, -1, f.shape[-1]).mean(1).astype(np.float64)
    assert moved["cka"] == pytest.approx(hsic_cka(pooled(first["block3"]), pooled(second["block3"])), abs=2e-3)
    assert moved["cka"] < 1


def test_frozen_stages_have_not_moved_at_all(finished):
    stages = summary(finished)["forgetting"]["stages"]
    assert list(stages) == ["stem", "block1", "block2", "block3"]
    for stage in ("stem", "block1", "block2"):
        assert stages[stage]["relative_l2"] == 0
        assert stages[stage]["cka"] == 1


@pytest.mark.parametrize(("examples", "features"), [(40, 6), (6, 40), (12, 12)])
def test_cka_of_grams_and_of_covariances_is_the_definition(examples, features):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 1.0, (examples, features))
    y = x @ rng.normal(size=(features, features)) + rng.normal(size=(examples, features))
    found = forgetting.Displacement(examples)
    for part in np.array_split(np.arange(examples), 3):
        squares = np.square(y[part] - x[part]).sum(1), np.square(x[part]).sum(1)
        found.add(*squares, x[part], y[part])
    assert found.cka() == pytest.approx(hsic_cka(x, y), rel=1e-9)
    assert found.relative_l2() == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    # Rotations and scales change nothing, as CKA promises.
    turned = forgetting.Displacement(examples)
    rotation = np.linalg.qr(rng.normal(size=(features, features)))[0]
    turned.add([1.0], [1.0], x, 3 * x @ rotation)
    assert turned.cka() == pytest.approx(1.0)


def test_the_run_shows_it(finished):
    page = (finished / "report.html").read_text()
    assert "<h2>Forgetting</h2>" in page
    assert (finished / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    told = summary(finished)
    assert told["time"]["forgetting"] > 0
    before, after = (100 * told["forgetting"][when]["accuracy"] for when in ("before", "after"))
    assert console.final_rows(told)["source accuracy"] == f"{after:.2f} %, {before:.2f} % before training"


def test_the_command_repeats_it_and_takes_another_source(run, place, capsys):
    before = summary(run)["forgetting"]
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary(run).items() if k != "forgetting"}))
    assert forgetting.main([f"--workdir={run}"]) == 0
    out = capsys.readouterr().out
    assert "21 photographs of folder:" in out
    assert "stem … block2" in out
    after = summary(run)["forgetting"]
    assert after["stages"] == before["stages"]
    assert after["after"] == before["after"]
    other = shutil.copytree(place / "photos", run / "named")
    for folder in list(other.iterdir()):
        folder.rename(other / f"class{folder.name}")  # no numbers, and too few
    shutil.rmtree(other / "class5")
    assert forgetting.main([f"--workdir={run}", f"--source=folder:{other}"]) == 0
    assert "6 class names, the loaded head has 7 classes: used without labels" in capsys.readouterr().out
    without = summary(run)["forgetting"]
    assert without["labelled"] == 0
    assert set(without["after"]) == {"agreement", "kl"}


@pytest.mark.parametrize(
    ("labels", "declared", "names", "expected"),
    [
        (["3", "0", "3"], None, (), [3, 0, 3]),  # folders named by numbers
        ([2, None, -1], None, (), [2, -1, -1]),
        (["b", "a", "c", "d"], None, (), [1, 0, 2, 3]),  # as many as the head: in order
        ([1, 0], ("z", "y", "x", "w"), (), [1, 0]),  # declared names, as many as the head
        (["cat", "dog"], None, ("eel", "dog", "fox", "cat"), [3, 1]),
        ([1, 0], ("cat", "dog"), ("eel", "dog", "fox", "cat"), [1, 3]),
        ([1, 0], ("cat", "dog"), (), [-1, -1]),  # numbers of other classes
        (["cat", "dog"], None, (), [-1, -1]),
    ],
)
def test_classes_of_the_loaded_head(labels, declared, names, expected):
    table = Table([], labels, [""] * len(labels), np.full(len(labels), "train"), class_names=declared)
    found, said = source.class_numbers(table, 4, names)
    assert found.tolist() == expected
    assert bool(said) == (set(expected) == {-1})


def test_mistakes(place, run, tmp_path, capsys):
    table = Table([], ["5", "9"], ["", ""], np.full(2, "train"))
    with pytest.raises(UserError, match="source class 9 found, the loaded head has the classes 0 to 6"):
        source.class_numbers(table, 7)
    with pytest.raises(UserError, match=r"config\.source\.classes does not name: 5, 9"):
        source.class_numbers(Table([], ["5", "9", "a"], [""] * 3, np.full(3, "train")), 7, ("a", *"bcdefg"))
    with pytest.raises(UserError, match="unknown data source"):
        forgetting.main([f"--workdir={run}", "--source=fldr:x"])
    fields = {"split": "", "limit": 0, "classes": "", "image_column": "", "label_column": "", "data_dir": ""}
    photos = {"data": f"folder:{place / 'photos'}"}
    with pytest.raises(UserError, match="has no photographs in val"):
        source.photographs(fields | photos | {"split": "val"}, 7)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="names 2 classes, the loaded head has 7"):
        source.photographs(fields | photos | {"classes": str(tmp_path / "names.txt")}, 7)
    found = source.photographs(fields | photos | {"limit": 5}, 7)
    assert len(found.split) == 5
    for argv, line in (
        (["--alphas=0,2"], "--alphas=0,2: expected different numbers from 0 to 1"),
        (["--alphas=a"], "expected different numbers"),
        ([], "no --workdir"),
    ):
        with pytest.raises(UserError, match=line):
            wise_ft.main(argv + ([f"--workdir={run}"] if argv else []))


def test_a_network_without_weights_has_no_source_task(trained):
    with pytest.raises(UserError, match="no network is loaded, so there is no source task"):
        forgetting.main([f"--workdir={trained}", "--source=folder:x"])


def test_the_classes_of_the_loaded_head_are_read_from_the_file(place):
    assert weights.num_classes(str(place / "weights.safetensors"), "resnet_tiny") == source_task.CLASSES


# ---- wise_ft


def test_the_path_ends_at_the_runs_own_figures_and_begins_at_the_loaded_weights(run, place, capsys):
    assert wise_ft.main([f"--workdir={run}", "--alphas=0,0.5,1"]) == 0
    out = capsys.readouterr().out
    assert "best by val/nll" in out
    found, told = json.loads((run / "wise_ft.json").read_text()), summary(run)
    first, middle, last = found["path"]
    for split in ("val", "test"):
        for key in ("accuracy", "nll", "macro_f1"):
            assert last[split][key] == pytest.approx(told[split][key], rel=1e-6)
    assert last["source"] == pytest.approx(told["forgetting"]["after"], rel=1e-3, abs=1e-6)
    assert first["source"] == pytest.approx(told["forgetting"]["before"], rel=1e-3, abs=1e-6)
    assert first["source"]["agreement"] == 1
    nll = {point["alpha"]: point["val"]["nll"] for point in found["path"]}
    assert found["best"] == {"alpha": min(nll, key=nll.get), "metric": "val/nll", "value": min(nll.values())}
    assert (run / "wise_ft.png").read_bytes().startswith(b"\x89PNG")
    assert "Between loaded and trained" in (run / "report.html").read_text()

    # α = 0.5 once more: halves added by hand, one network, the trained head on val.
    exp, _, params, stats, _ = evaluate.restore(Workdir(run))
    loaded = source_task.variables()
    half = lambda a, b: jax.tree.map(lambda x, y: 0.5 * np.asarray(x) + 0.5 * np.asarray(y), a, b)
    body = {stage: half(loaded["params"][stage], params[stage]) for stage in params if stage != "head"}
    variables = {"params": {**body, "head": params["head"]}, "batch_stats": half(loaded["batch_stats"], stats)}
    dataset = train.data.load(Workdir(run).config().data)
    p, nll = exp.preprocessing, []
    for batch in train.data.eval_batches(dataset.val, batch_size=9, size=p.size, crop=p.crop, interpolation="bilinear"):
        x = (batch["image"] / 255.0 - np.array(p.mean)) / np.array(p.std)
        z = np.asarray(exp.model.apply(variables, x.astype(np.float32)), np.float64)
        nll += list(np.log(np.exp(z).sum(-1)) - z[np.arange(9), batch["label"]])
    assert middle["val"]["nll"] == pytest.approx(np.mean(nll), rel=1e-4)


def test_adapters_are_folded_in_and_their_share_is_alpha_too(tiny, place, tmp_path):
    """LoRA in block3 alone: everything before it has not moved; the ends of the path are the run and the source."""
    fields = {"weights": place / "weights.safetensors", "train_for": "6 steps",
              "strategy": "lora(rank=2, targets='block3/conv*')"}  # fmt: skip
    argv = [*changed(tiny, tmp_path, **fields), f"--config.source.data=folder:{place / 'photos'}"]
    assert train.main(argv) == 0
    told = summary(tmp_path)
    stages = told["forgetting"]["stages"]
    assert [stages[s]["relative_l2"] == 0 for s in stages] == [True, True, True, False]
    assert wise_ft.main([f"--workdir={tmp_path}", "--alphas=0,1"]) == 0
    first, last = json.loads((tmp_path / "wise_ft.json").read_text())["path"]
    assert last["test"]["nll"] == pytest.approx(told["test"]["nll"], rel=1e-4)
    assert last["source"]["kl"] == pytest.approx(told["forgetting"]["after"]["kl"], rel=1e-2, abs=1e-6)
    assert first["source"]["kl"] == pytest.approx(0, abs=1e-9)
    assert last["source"]["kl"] > 1e-6


def test_interpolation_is_exact_at_its_ends_and_leaves_what_was_not_loaded():
    rng = np.random.default_rng(0)
    loaded, trained = (
        {"body": {"kernel": rng.normal(size=(50, 50)).astype(np.float32)}, "head": {"bias": rng.normal(size=n)}}
        for n in (3, 4)
    )
    trained["body"]["still"] = loaded["body"]["still"] = np.float32(rng.normal(size=100))
    trained["body"]["lora"] = rng.normal(size=3)
    for alpha, equal in ((0.0, loaded), (1.0, trained)):
        found = wise_ft.interpolate(loaded, trained, alpha, reset=("head",))
        assert found["body"]["kernel"].tobytes() == equal["body"]["kernel"].tobytes()
    found = wise_ft.interpolate(loaded, trained, 0.3, reset=("head",))
    assert found["body"]["still"].tobytes() == loaded["body"]["still"].tobytes()  # frozen: the same bits
    assert np.array_equal(found["head"]["bias"], trained["head"]["bias"])
    assert np.array_equal(found["body"]["lora"], trained["body"]["lora"])
    expected = 0.7 * loaded["body"]["kernel"].astype(np.float64) + 0.3 * trained["body"]["kernel"]
    np.testing.assert_allclose(found["body"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_was_loaded_is_the_trained_one_on_the_source_task(place):
    from tiny import get_config

    config = get_config()
    config.weights, config.reset = str(place / "weights.safetensors"), ()
    exp = experiment.build(config, source_task.CLASSES)
    net = source.network(exp)
    params, _, report = exp.load()
    trained = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    model, under = source.under_loaded_head(exp, net, trained)
    assert report.reset == ()
    assert model == net.model
    assert np.array_equal(under["head"]["bias"], net.params["head"]["bias"] + 1)
    assert set(plans.paths(net.params)) == set(exp.paths)


@pytest.mark.parametrize("lacking", ["source", "val", "labels"])
def test_the_pictures_of_less(tmp_path, lacking):
    """Without a source task the path is drawn over alpha, without labels against the agreement."""
    from tljax.report import source_pictures

    figures = {"accuracy": 0.5, "nll": 1.0, "agreement": 0.9, "kl": 0.1, "top5": 0.8}
    point = lambda alpha: {"alpha": alpha} | {k: dict(figures) for k in ("val", "test", "source")}
    found = {"path": [point(0.0), point(1.0)], "best": {"alpha": 1.0, "metric": "val/nll", "value": 1.0},
             "source": {"data": "x", "examples": 3, "labelled": 0 if lacking == "labels" else 3}}  # fmt: skip
    if lacking == "source":
        found["source"] = None
    if lacking == "val":
        found["best"] = None
        found["path"] = [{k: v for k, v in p.items() if k != "val"} for p in found["path"]]
    figure = source_pictures.wise_ft(found, tmp_path / "w.png")
    labels = {"source": "α", "val": "source accuracy, % (3 photographs)",
              "labels": "source: guesses as the loaded network, % (3 photographs)"}  # fmt: skip
    assert figure.axes[0].get_xlabel() == labels[lacking]
    assert len(wise_ft.lines(found)) == 3 + (lacking == "val")
    assert any("nothing chooses" in line for line in wise_ft.lines(found)) == (lacking == "val")
    stages = {"stem": {"relative_l2": 0.0, "cka": 1.0}, "body": {"relative_l2": None, "cka": None}}
    lost = {"data": "x", "examples": 3, "labelled": 0, "before": {"agreement": 1.0}, "after": {"agreement": 0.5},
            "stages": stages}  # fmt: skip
    source_pictures.forgetting(lost, tmp_path / "f.png")
    assert any(line.split() == ["body", "-", "-"] for line in forgetting.lines(lost))
