"""CLIP against transformers and open_clip: each stage of both towers, the similarity, the files of each naming."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
import torch_clip
import torch_reference as reference
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.errors import UserError
from tljax.models import clip

CLASSES = 10
TINY = clip.VARIANTS["clip_vit_tiny"]
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def net():
    net = torch_clip.transformers_clip("clip_vit_tiny")
    reference.fill(net)
    return net


@pytest.fixture(scope="module")
def state(net):
    return {key: value.numpy().copy() for key, value in net.state_dict().items()}


def sentences(count=5):
    """Random tokens; each ends, at a place of its own, with the highest number, and goes on with others."""
    tokens = RNG.integers(3, 598, (count, TINY.text.context))
    ends = RNG.integers(2, TINY.text.context, count)
    tokens[np.arange(count), ends] = 599
    return tokens


def of_text(state, naming="transformers"):
    return traverse_util.unflatten_dict(reference.converted(clip.text_conversion()[naming], state), sep="/")


def of_images(state, naming="transformers"):
    found = reference.converted(models.conversion("clip_vit_tiny")[naming], state)
    head = {"params/head/kernel": np.ones((TINY.dim, CLASSES)), "params/head/bias": np.zeros(CLASSES)}
    return traverse_util.unflatten_dict(head | found, sep="/")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As open_clip's table of its models has them, in millions; in full where they are known.
    [
        ("clip_vit_base_patch32", 151277313),
        ("clip_vit_base_patch16", 149620737),
        ("clip_vit_large_patch14", 427616513),
        ("clip_vit_large_patch14_336", 427944193),
        ("clip_vit_base_patch32_laion", 151277313),
        ("clip_vit_huge_patch14_laion", 986109441),
    ],
)
def test_parameter_counts(name, parameters):
    towers = {**models.shapes(models.create(name, 7))["params"], "text": clip.text_shapes(name)}
    assert (
        sum(leaf.size for stage in towers if stage != "head" for leaf in jax.tree.leaves(towers[stage])) == parameters
    )


@pytest.mark.parametrize(
    ("name", "size"), [("clip_vit_tiny", 32), pytest.param("clip_vit_base_patch32", 224, marks=pytest.mark.slow)]
)
def test_the_output_of_every_stage(name, size):
    net, model, x = reference.model(name, CLASSES, size), models.create(name, CLASSES), reference.images(2, size)
    flat = reference.converted(reference.table(name), reference.state_dict(net, size))
    depth = clip.VARIANTS[name].image.depth
    blocks = {f"block{i}": f"vision_model.encoder.layers.{i - 1}" for i in range(1, depth + 1)}
    expected = reference.stages_of(net, {"embed": "vision_model.pre_layrnorm", **blocks, "head": "head"}, x)
    embedded = net.embed(reference.torch_order(x)).detach().numpy()
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)
    expected = {stage: expected.get(stage, embedded) for stage in model.stages}
    reference.assert_stages(expected, model, traverse_util.unflatten_dict(flat, sep="/"), x)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_layer_of_the_text_tower(activation, net, state, monkeypatch):
    image = dataclasses.replace(TINY.image, activation=activation)
    monkeypatch.setitem(clip.VARIANTS, "other", dataclasses.replace(TINY, image=image))
    net = torch_clip.transformers_clip("other")
    reference.fill(net)
    tokens = sentences()
    places = {
        **{f"block{i}": f"text_model.encoder.layers.{i - 1}" for i in (1, 2)},
        "norm": "text_model.final_layer_norm",
        "projection": "text_projection",
    }
    expected, hooks = {}, []
    for name, place in places.items():
        save = lambda module, inputs, output, name=name: expected.__setitem__(name, output.detach().numpy())
        hooks.append(net.get_submodule(place).register_forward_hook(save))
    from torch import from_numpy

    net.get_text_features(from_numpy(tokens))
    tower = clip.TextTower(clip.VARIANTS["other"])
    (got, _), seen = tower.apply(of_text(state), tokens, capture_intermediates=True)
    assert len(expected) == 4
    for name, value in expected.items():
        reference.assert_close(seen["intermediates"][name]["__call__"][0], value)
    lengths = np.linalg.norm(expected["projection"], axis=1, keepdims=True)
    reference.assert_close(got, expected["projection"] / lengths)


def similarity(net, tokens, x):
    from torch import from_numpy

    return net(input_ids=from_numpy(tokens), pixel_values=reference.torch_order(x)).logits_per_image.detach().numpy()


@pytest.mark.parametrize("end", [2, 17])
def test_the_similarity(end, state):
    """Pooled where the highest number stands, or at the first place of the token that ends texts."""
    net = torch_clip.transformers_clip("clip_vit_tiny", end)
    reference.fill(net)
    tokens, x = sentences(), reference.images(3, 32)
    tokens[:, -1] = 17  # again, for those that had one before
    tokens[::2, 4] = 17
    model, tower = models.create("clip_vit_tiny", CLASSES), clip.TextTower(TINY, end=None if end == 2 else end)
    images = jax.jit(model.apply, static_argnames="stop")(of_images(state), x, stop="head")
    texts, scale = jax.jit(tower.apply)(of_text(state), tokens)
    assert scale == pytest.approx(np.exp(state["logit_scale"]), rel=1e-6)
    reference.assert_close(scale * images @ texts.T, similarity(net, tokens, x))


def test_gradients_of_the_text_tower(net, state):
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    tokens, factors = sentences(), reference.draw("loss", (5, TINY.dim))
    twin = torch_clip.transformers_clip("clip_vit_tiny").double()
    twin.load_state_dict(net.state_dict())
    texts = twin.get_text_features(torch.from_numpy(tokens)).pooler_output
    texts = texts / texts.norm(dim=-1, keepdim=True)
    (torch.exp(twin.logit_scale) * (texts * torch.from_numpy(factors)).sum()).backward()
    grads = {key: leaf.grad.numpy() for key, leaf in twin.named_parameters() if leaf.grad is not None}
    expected = reference.converted(clip.text_conversion()["transformers"], grads)

    def loss(params):
        texts, scale = clip.TextTower(TINY).apply({"params": params}, tokens)
        return scale * (texts * factors).sum()

    got = traverse_util.flatten_dict({"params": jax.jit(jax.grad(loss))(of_text(state)["params"])}, sep="/")
    assert got.keys() == expected.keys()
    rounding = 3e-6 * max(map(np.linalg.norm, expected.values()))
    for path, value in got.items():
        error = np.linalg.norm(value - expected[path])
        assert error <= 1e-4 * np.linalg.norm(expected[path]) + rounding, path


def load(path, **more):
    model = models.create("clip_vit_tiny", CLASSES)
    return weights.load(str(path), "clip_vit_tiny", models.shapes(model), reset=("head",), **more)


def load_text(path):
    return weights.load(str(path), "clip_vit_tiny", clip.text_shapes("clip_vit_tiny"), tables=clip.text_conversion())


def assert_loads(path, naming, net):
    """Both towers fit the file strictly, each leaves out what is the other's, and the similarity is the reference's."""
    images, texts = load(path), load_text(path)
    assert images.report.naming == texts.report.naming == naming
    names = set(weights.read(path))
    about = {"input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"}
    assert set(images.report.ignored) | set(texts.report.ignored) == names | (names & about)
    assert set(images.report.ignored) & set(texts.report.ignored) <= about
    tokens, x = sentences(), reference.images(2, 32)
    head = {"kernel": np.zeros((TINY.dim, CLASSES)), "bias": np.zeros(CLASSES)}
    model = models.create("clip_vit_tiny", CLASSES)
    embedded = jax.jit(model.apply, static_argnames="stop")({"params": images.params | {"head": head}}, x, stop="head")
    vectors, scale = jax.jit(clip.TextTower(TINY).apply)({"params": texts.params}, tokens)
    reference.assert_close(scale * embedded @ vectors.T, similarity(net, tokens, x))


def test_files_of_transformers(net, tmp_path):
    """Written by the library itself, in the names of the published files."""
    net.save_pretrained(tmp_path)
    assert_loads(tmp_path / "model.safetensors", "transformers", net)


def test_files_of_openai(net, state, tmp_path):
    about = {"input_resolution": np.array(32), "context_length": np.array(32), "vocab_size": np.array(600)}
    save_file(torch_clip.openai_names(state) | about, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", "openai", net)


@pytest.mark.parametrize("custom_text", [False, True])
def test_files_of_open_clip(custom_text, net, state, tmp_path):
    """Its own network takes the arrays by the names, gives the same similarity, and its files fit."""
    reference.import_torchvision()
    open_clip = pytest.importorskip("open_clip", reason="pip install --no-deps open_clip_torch")
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    image, text = TINY.image, TINY.text
    theirs = kind(
        TINY.dim,
        {"image_size": 32, "layers": image.depth, "width": 32, "head_width": 16, "patch_size": 8},
        {"context_length": text.context, "vocab_size": 600, "width": 24, "heads": 3, "layers": text.depth},
        quick_gelu=True,
    ).eval()
    arrays = torch_clip.openai_names(state)
    if custom_text:
        own = lambda key: not key.startswith("visual.") and key != "logit_scale"
        arrays = {f"text.{key}" if own(key) else key: value for key, value in arrays.items()}
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()}, strict=True)
    tokens, x = sentences(), reference.images(2, 32)
    embedded, vectors, scale = theirs(reference.torch_order(x), torch.from_numpy(tokens))
    reference.assert_close((scale * embedded @ vectors.T).detach().numpy(), similarity(net, tokens, x))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert_loads(tmp_path / "open_clip_pytorch_model.bin", "openai", net)
    if custom_text:
        return
    # As OpenAI published its models: a traced program, of which the arrays are read and nothing is run.
    inputs = (reference.torch_order(x), torch.from_numpy(tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(theirs, inputs, check_trace=False)
    traced.save(tmp_path / "traced.pt")
    assert set(traced.state_dict()) <= set(weights.read(tmp_path / "traced.pt"))
    assert_loads(tmp_path / "traced.pt", "openai", net)


def test_an_array_too_many_or_too_few_is_named(state, tmp_path):
    arrays = dict(state)
    del arrays["vision_model.post_layernorm.weight"], arrays["text_model.final_layer_norm.weight"]
    save_file(arrays, tmp_path / "short.safetensors")
    for read, name in ((load, "projection/norm/scale"), (load_text, "norm/scale")):
        with pytest.raises(UserError, match=f"1 missing: {name}"):
            read(tmp_path / "short.safetensors")
    save_file(state | {"text_model.extra": np.zeros(2, np.float32)}, tmp_path / "long.safetensors")
    for read in (load, load_text):
        with pytest.raises(UserError, match=r"1 unexpected: text_model\.extra"):
            read(tmp_path / "long.safetensors")


def test_positions_are_resized(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    shapes = models.shapes(models.create("clip_vit_tiny", CLASSES), 48)
    found = weights.load(
        str(tmp_path / "model.safetensors"), "clip_vit_tiny", shapes, reset=("head",), resize=("embed/position",)
    )
    position = found.params["embed"]["position"]
    assert position.shape == (1 + 36, 32)
    np.testing.assert_array_equal(position[0], state["vision_model.embeddings.position_embedding.weight"][0])
