"""Zero-shot classification against numpy by hand, as a head, through fine-tuning to WiSE-FT; and what goes wrong."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import clip_files
import jax
import numpy as np
import pytest
from conftest import COLOURS, changed
from safetensors.numpy import save_file

from tljax import experiment, texts, tokens, train, weights, wise_ft, zeroshot
from tljax.config import base
from tljax.data.transforms import resize_and_centre_crop
from tljax.errors import UserError
from tljax.models import clip
from tljax.report import metrics

pytest.importorskip("tokenizers", reason="pip install -e '.[clip]'")
NAME = clip_files.NAME


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_files.write(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    """Short ones: the tiny text tower takes 30 tokens."""
    (tmp_path / "prompts.txt").write_text("a {}.\n{} photo\nthe {}\n")
    return tmp_path / "prompts.txt"


def by_hand(folder, classes, prompts):
    """[classes, dim]: one text at a time, nothing filled up."""
    arrays, tokenizer, found = weights.read(folder / "model.safetensors"), tokens.load(str(folder)), []
    for name in classes:
        total = 0
        for prompt in prompts:
            (row,) = tokenizer([prompt.replace("{}", name)], 32)
            vector = clip_files.text_vector(arrays, row[: list(row).index(tokenizer.end) + 1])
            total = total + vector / np.sqrt((vector**2).sum())
        found.append(total / np.sqrt((total**2).sum()))
    return np.array(found)


def test_the_ensemble_by_hand(folder):
    classes, prompts = ("red", "green", "blue"), ("a {}.", "{} photo", "the {}")
    vectors, scale = texts.classifier(weights.card(str(folder), NAME), NAME, classes, prompts)
    np.testing.assert_allclose(vectors, by_hand(folder, classes, prompts), atol=2e-6)
    assert scale == pytest.approx(np.exp(3.0))
    # More texts than go in one batch, and a remainder.
    many = [f"{a} {b}" for a in "abcdefghijkl" for b in "nopqrst"]
    vectors, _ = texts.classifier(weights.card(str(folder), NAME), NAME, many, ("a {}.",))
    np.testing.assert_allclose(
        vectors[[0, 40, 83]], by_hand(folder, [many[0], many[40], many[83]], ["a {}."]), atol=2e-6
    )


def vectors_of(exp, params, x):
    apply = jax.jit(lambda params, x: exp.model.apply({"params": params}, x, stop="head"))
    return np.asarray(apply(params, x))


def logits_by_hand(folder, photos, prompts, split="test"):
    """(logits, labels) of the folder's photographs: images' vectors times texts', times the factor."""
    dataset, classes, _ = zeroshot.photographs(f"folder:{photos}", split, ())
    config = base(NAME)
    config.update(weights=str(folder), data=config.data)
    exp = experiment.build(config, 3)
    params, _, _ = exp.load()
    p = exp.preprocessing
    prepared = lambda image: resize_and_centre_crop(image, p.size, p.crop, p.interpolation).astype(np.float32)
    x = np.array([prepared(dataset[i][0]) for i in range(len(dataset))])
    found = vectors_of(exp, params, (x / 255 - np.float32(p.mean)) / np.float32(p.std))
    assert p.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)  # CLIP's own
    assert p.crop == 1
    return np.exp(3.0) * found @ by_hand(folder, classes, prompts).T, dataset.labels


def test_the_command(folder, photos, prompts, tmp_path, capsys):
    argv = [f"--weights={folder}", f"--data=folder:{photos}", f"--templates={prompts}", f"--workdir={tmp_path / 'w'}"]
    assert zeroshot.main(argv) == 0
    found, out = json.loads((tmp_path / "w/zeroshot.json").read_text()), capsys.readouterr().out
    logits, labels = logits_by_hand(folder, photos, prompts.read_text().splitlines())
    expected = metrics.classification(logits, labels, sorted(COLOURS))
    assert found["model"] == NAME
    assert found["confusion"] == expected["confusion"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    low, high = found["interval"]["accuracy"]
    assert low < found["accuracy"] < high
    assert "13 photographs of 3 classes, test" in out
    assert "3 prompts a class" in out
    assert f"top-1 {100 * found['accuracy']:.2f} %" in out
    assert "top-5" not in out
    for name, count in zip(sorted(COLOURS), np.bincount(labels)):
        assert any(line.startswith(name) and line.endswith(f"of {count}") for line in out.splitlines())


DOCS = Path(__file__).parent.parent / "docs/clip.md"


@pytest.mark.parametrize("line", re.findall(r"^python -m tljax\.zeroshot (.*)$", DOCS.read_text(), re.M))
def test_the_commands_of_the_docs(line, folder, photos, tmp_path, monkeypatch, capsys):
    """On the tiny network and the tiny photographs in place of those that a network would bring."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("green\nred\nblue\n")
    (tmp_path / "prompts.txt").write_text("the {}\n")
    instead = {"--weights": str(folder), "--data": f"folder:{photos}"}
    given = dict(flag.split("=", 1) for flag in line.split())
    assert zeroshot.main([f"{flag}={value}" for flag, value in (given | instead).items()]) == 0
    assert "13 photographs of 3 classes, test" in capsys.readouterr().out


def test_the_python_of_the_docs(folder):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    exec(compile(code, "docs/clip.md", "exec"), found := {})
    vectors, scale = found["class_vectors"](str(folder), ("red", "blue"))
    np.testing.assert_allclose(vectors, by_hand(folder, ("red", "blue"), ["a photo of a {}."]), atol=2e-6)
    assert scale == pytest.approx(np.exp(3.0))


def test_names_that_one_gives(folder, photos, prompts, tmp_path, capsys):
    """More classes than the data have, in another order: the same photographs, labels by name."""
    names = ["apple", "Red", "the sea", "green", "photo", "blue"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    argv = [f"--weights={folder}", f"--data=folder:{photos}", "--split=all", f"--templates={prompts}"]
    assert zeroshot.main([*argv, f"--classes={tmp_path / 'names.txt'}", f"--workdir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "zeroshot.json").read_text())
    assert found["class_examples"] == {"apple": 0, "Red": 15, "the sea": 0, "green": 15, "photo": 0, "blue": 16}
    assert found["per_class"]["apple"] is None
    assert "top-5" in capsys.readouterr().out
    # As many names as the data have classes, none the same: in their order.
    split, _, said = zeroshot.photographs(f"folder:{photos}", "val", ("sky", "grass", "roses"))
    assert np.bincount(split.labels).tolist() == [3, 3, 3]
    assert "blue = sky, green = grass, red = roses" in said[-1]


def test_the_interval_by_its_definition():
    """Wilson's bounds are the shares from which what was seen is 1.96 standard errors away."""
    for hits, total in ((0, 7), (3, 7), (50, 61), (9, 9)):
        for bound in metrics.interval(hits, total):
            apart = abs(hits / total - bound)
            assert apart == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / total), abs=1e-9)


# ---- as a head


def arguments(tiny, folder, prompts, workdir, **fields):
    fields = {"model": NAME, "weights": folder, "head": "zeroshot", "templates": prompts, **fields}
    return changed(tiny, workdir, **fields)


@pytest.mark.parametrize("strategy", ["lora(rank=2)", pytest.param("full()", marks=pytest.mark.slow)])
def test_fine_tuning_begins_with_it_and_wise_ft_ends_at_both(strategy, tiny, folder, photos, prompts, tmp_path):
    fields = {"strategy": strategy, "optim_lr": 0.003, "train_for": "6 steps"}
    argv = arguments(tiny, folder, prompts, tmp_path / "w", **fields)
    assert train.main(argv) == 0
    logits, labels = logits_by_hand(folder, photos, prompts.read_text().splitlines())
    assert wise_ft.main([f"--workdir={tmp_path / 'w'}", "--alphas=0,0.5,1"]) == 0
    path = json.loads((tmp_path / "w/wise_ft.json").read_text())["path"]
    expected = metrics.classification(logits, labels, sorted(COLOURS))
    assert path[0]["test"]["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert path[0]["test"]["accuracy"] == expected["accuracy"]
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert path[2]["test"]["nll"] == pytest.approx(summary["test"]["nll"], rel=1e-5)
    assert len({point["test"]["nll"] for point in path}) == 3


@pytest.mark.parametrize("strategy", ["full()", "lora(rank=2)"])
def test_the_first_step_is_zero_shot_classification(strategy, tiny, folder, photos, prompts, tmp_path):
    """The logits with which a run begins, whatever trains and whatever adapters there are."""
    from tljax.command import from_command_line

    argv = [a for a in arguments(tiny, folder, prompts, tmp_path, strategy=strategy) if "workdir" not in a]
    exp = experiment.build(from_command_line(argv, "").config, sorted(COLOURS))
    params, _, _ = exp.load()
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    expected = (
        np.exp(3.0) * vectors_of(exp, params, x) @ by_hand(folder, sorted(COLOURS), prompts.read_text().splitlines()).T
    )
    np.testing.assert_allclose(jax.jit(exp.model.apply)({"params": params}, x), expected, atol=1e-4)
    assert not np.any(params["head"]["bias"])
    regular = experiment.build(
        from_command_line([*argv, "--config.regulariser=l2_sp(0.1)"], "").config, sorted(COLOURS)
    )
    assert "params" in regular.penalty.anchor(params, None)
    assert not regular.penalty.new  # the head was loaded, so to speak


def test_names_in_the_config(tiny, folder, prompts, tmp_path):
    from tljax.command import from_command_line

    argv = [a for a in arguments(tiny, folder, prompts, tmp_path) if "workdir" not in a]
    build = lambda *more, classes=("1", "2"): experiment.build(from_command_line([*argv, *more], "").config, classes)
    with pytest.raises(UserError, match=r"classes of the data have no names \(1, 2\)"):
        build().load()
    with pytest.raises(UserError, match=r"config\.class_names: 3 names for 2 classes"):
        build("--config.class_names=red,green,blue").load()
    with pytest.raises(UserError, match="needs the classes' names"):
        build(classes=2).load()
    named = build("--config.class_names=red,green").load()[0]["head"]["kernel"]
    np.testing.assert_array_equal(named, build(classes=("red", "green")).load()[0]["head"]["kernel"])


# ---- what goes wrong


def says(*argv):
    with pytest.raises(UserError) as error:
        zeroshot.main(list(map(str, argv)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_of_texts(folder, photos, tmp_path):
    tell = lambda *more: says(f"--weights={folder}", f"--data=folder:{photos}", *more)
    file = tmp_path / "lines.txt"
    file.write_text("a photo of a {}.\na photo\n")
    assert "line 2: 'a photo' has not one {}" in tell(f"--templates={file}")
    assert "no such file; sets of prompts are default, ensemble; nearest: ensemble" in tell("--templates=ensembel")
    file.write_text("red\n\nblue\n")
    assert "class 2 has no name ('')" in tell(f"--classes={file}")
    assert "classes 1 and 3 are both called 'red'" in tell("--classes=red,green,red")
    assert "names 2 classes and lacks green, red of the 3" in tell("--classes=blue,violet")
    assert "no such file" in tell("--classes=nowhere.txt")
    assert "has test, train, val; expected one of them, or all" in tell("--split=tets")
    assert says(f"--data=folder:{photos}").startswith("no --weights: a CLIP's")
    long = "the class of which one could say a great many things that take many tokens"
    assert "tokens, the text tower takes 30" in tell(f"--classes=blue,green,red,{long}")


def test_bad_input_of_weights(folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PACKAGES", ())
    tell = lambda where, *more: says(f"--weights={where}", f"--data=folder:{photos}", *more)
    assert "needs a CLIP, not 'efficientnet_lite0'" in tell("efficientnet_lite0")
    assert "--model=resnet_tiny needs a CLIP" in tell(folder, "--model=resnet_tiny")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "model.safetensors", bare)
    line = tell(bare)
    assert "no tokenizer is beside the weights" in line
    assert "tokenizer.json, or vocab.json and merges.txt" in line
    assert "pip install --no-deps open_clip_torch" in line
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        assert "need the library tokenizers: pip install -e '.[clip]'" in tell(folder)
    other = clip_files.write(tmp_path / "gelu", hidden_act="gelu")
    line = tell(other)
    assert "were trained with the activation gelu, and clip_vit_tiny has quick_gelu" in line
    other = clip_files.write(tmp_path / "end", eos_token_id=7)
    assert "texts end with token" in tell(other)
    arrays = clip_files.arrays()
    images = {name: a for name, a in arrays.items() if "text" not in name and name != "logit_scale"}
    other = clip_files.write(tmp_path / "images")
    save_file(images, other / "model.safetensors")
    assert "the text tower: " in (line := tell(other))
    assert "missing: " in line
    save_file({"a": np.zeros(3, np.float32)}, other / "model.safetensors")
    assert "are of no CLIP" in tell(other)
    assert "does not fit clip_vit_tiny" in tell(other, f"--model={NAME}")


def test_what_the_hub_lacks_is_told(photos, monkeypatch):
    """Without a network and with an empty cache: what would be fetched, and where to put it."""
    pytest.importorskip("huggingface_hub", reason="pip install -e '.[hf]'")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere/hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = says("--weights=clip_vit_base_patch32", f"--data=folder:{photos}")
    assert "of openai/clip-vit-base-patch32 is not in the cache, and HF_HUB_OFFLINE is set" in line
    assert "copy what it makes to /nowhere/hub/models--openai--clip-vit-base-patch32" in line


def test_the_model_is_found_out(folder, tmp_path, monkeypatch):
    assert zeroshot.model_of(weights.card(str(folder))) == (NAME, "")
    laion = "clip_vit_base_patch32_laion"
    assert zeroshot.model_of(weights.card("hf:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")) == (laion, "")
    # Two of the same shapes: what lies beside decides, and where nothing does, it is told.
    image = dataclasses.replace(clip.VARIANTS[NAME].image, activation="gelu")
    monkeypatch.setitem(clip.VARIANTS, "clip_vit_twin", dataclasses.replace(clip.VARIANTS[NAME], image=image))
    other = clip_files.write(tmp_path / "gelu", hidden_act="gelu")
    assert zeroshot.model_of(weights.card(str(other))) == ("clip_vit_twin", "")
    (tmp_path / "open").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "open")
    (tmp_path / "open/open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 16}}')
    assert zeroshot.model_of(weights.card(str(tmp_path / "open"))) == ("clip_vit_twin", "")
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "bare")
    model, said = zeroshot.model_of(weights.card(str(tmp_path / "bare")))
    assert model == NAME
    assert "otherwise --model=clip_vit_twin" in said


def test_bad_input_of_the_training_command(tiny, folder, photos, tmp_path):
    from tljax.command import from_command_line

    def tell(**fields):
        given = {"model": NAME, "weights": folder, "head": "zeroshot"} | fields
        argv = [a for a in changed(tiny, tmp_path, **given) if "workdir" not in a]
        with pytest.raises(UserError) as error:
            experiment.build(from_command_line(argv, "").config, sorted(COLOURS))
        return str(error.value)

    assert "config.head = 'zeroshot' needs a CLIP, not 'resnet_tiny'" in tell(model="resnet_tiny", weights="")
    assert "needs loaded weights" in tell(weights="")
    assert "config.reset = () has to name it" in tell(reset="()")
    assert "expected one of , zeroshot" in tell(head="zero")
    assert "no such file" in tell(templates="x.txt")
    assert "config.class_names = 'a,b,c' is of use with config.head" in tell(head="", class_names="a,b,c")
