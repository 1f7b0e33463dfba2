"""A tiny CLIP with random weights as a folder in the form that transformers writes, and its vocabulary."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tljax.models import clip

NAME = "clip_vit_tiny"
WORDS = ("photo", "red", "green", "blue", "the", "of")
START, END = "<|startoftext|>", "<|endoftext|>"


def merges() -> list[tuple[str, str]]:
    """Each word from left to right: p+h, ph+o, …"""
    found = []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(letters)):
            found.append(("".join(letters[:i]), letters[i]))
    return list(dict.fromkeys(found))


def vocabulary() -> dict[str, int]:
    """The 256 bytes, the same at the end of a word, the merges, two special tokens."""
    shown = [c for c in range(256) if 33 <= c <= 126 or 161 <= c <= 172 or 174 <= c <= 255]
    alphabet = [*map(chr, shown), *map(chr, range(256, 256 + 256 - len(shown)))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges()), START, END]
    return {word: i for i, word in enumerate(words)}


def write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    variant, rng = clip.VARIANTS[NAME], np.random.default_rng(seed)
    image, text, dim = variant.image, variant.text, variant.dim
    tokens = 1 + (image.size // image.patch) ** 2
    shapes = {
        "logit_scale": (),
        "visual_projection.weight": (dim, image.width),
        "text_projection.weight": (dim, text.width),
        "vision_model.embeddings.class_embedding": (image.width,),
        "vision_model.embeddings.patch_embedding.weight": (image.width, 3, image.patch, image.patch),
        "vision_model.embeddings.position_embedding.weight": (tokens, image.width),
        "text_model.embeddings.token_embedding.weight": (text.vocabulary, text.width),
        "text_model.embeddings.position_embedding.weight": (text.context, text.width),
    }
    norms = {"vision_model.pre_layrnorm": image, "vision_model.post_layernorm": image}
    norms["text_model.final_layer_norm"] = text
    for tower, part in (("vision", image), ("text", text)):
        for i in range(part.depth):
            layer, width = f"{tower}_model.encoder.layers.{i}", part.width
            norms |= {f"{layer}.layer_norm1": part, f"{layer}.layer_norm2": part}
            sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
            sizes = {f"self_attn.{name}": size for name, size in sizes.items()}
            for name, size in (sizes | {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}).items():
                shapes |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]}
    found = {}
    for name, shape in shapes.items():
        gain = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and "embedding" not in name else 0.3
        found[name] = np.asarray(gain * rng.normal(size=shape), np.float32)
    for name, part in norms.items():
        found[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=part.width)).astype(np.float32)
        found[f"{name}.bias"] = (0.1 * rng.normal(size=part.width)).astype(np.float32)
    found["logit_scale"] = np.asarray(3.0, np.float32)
    return found


def write(folder: Path, seed: int = 0, **config) -> Path:
    """model.safetensors, config.json, vocab.json and merges.txt; `config` changes fields of the text tower's."""
    write_vocabulary(folder)
    save_file(arrays(seed), folder / "model.safetensors")
    about = {"model_type": "clip", "text_config": {"hidden_act": "quick_gelu", "eos_token_id": 2} | config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def text_vector(found: dict[str, np.ndarray], tokens) -> np.ndarray:
    """One text's vector in numpy, float64, not yet of length one; `tokens` end with the text."""
    text = clip.VARIANTS[NAME].text
    layer = lambda name, x: x @ np.float64(found[f"{name}.weight"]).T + found[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * found[f"{name}.weight"] + found[f"{name}.bias"]

    embeddings = "text_model.embeddings"
    x = np.float64(found[f"{embeddings}.token_embedding.weight"][tokens])
    x = x + found[f"{embeddings}.position_embedding.weight"][: len(tokens)]
    for i in range(text.depth):
        block = f"text_model.encoder.layers.{i}"
        q, k, v = (layer(f"{block}.self_attn.{name}_proj", norm(f"{block}.layer_norm1", x)) for name in "qkv")
        heads, size = [], text.width // text.heads
        for part in (slice(h * size, (h + 1) * size) for h in range(text.heads)):
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size)) * np.tri(len(x))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        x = x + layer(f"{block}.self_attn.out_proj", np.concatenate(heads, axis=1))
        inner = layer(f"{block}.mlp.fc1", norm(f"{block}.layer_norm2", x))
        x = x + layer(f"{block}.mlp.fc2", inner / (1 + np.exp(-1.702 * inner)))
    return found["text_projection.weight"] @ norm("text_model.final_layer_norm", x)[-1]
