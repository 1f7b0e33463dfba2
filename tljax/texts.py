"""Class names as vectors: a CLIP's zero-shot classifier, which may also be the head that fine-tuning begins with."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax import files, tokens, weights
from tljax.errors import UserError, listing, nearest
from tljax.models import clip

# Sets of prompts by name. A class is the mean of its prompts' vectors, which averages out what is no part of the class.
TEMPLATES = {
    "default": ("a photo of a {}.",),
    "ensemble": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture that shows a {}.",
        "a blurred snapshot of a {}.",
        "a {} seen from very near.",
        "a {} far away in the scene.",
        "a dark photo of a {}.",
        "a bright photo of a {}.",
        "several {} together in one photo.",
        "a part of a {}.",
        "a drawing of a {}.",
        "a {} in front of a plain background.",
    ),
}
BATCH = 64  # texts at a time


def require(model: str, what: str) -> None:
    """Raises UserError, which begins with `what`, unless the model is a CLIP."""
    if model not in clip.VARIANTS:
        raise UserError(f"{what} needs a CLIP, not {model!r}: there are {', '.join(clip.VARIANTS)}")


def templates(given: str) -> tuple[str, ...]:
    """The prompts of a named set, or of a file's lines; {} stands for the class. Raises UserError."""
    given = given or "default"
    if given in TEMPLATES:
        return TEMPLATES[given]
    found = _lines(given, "templates", "; sets of prompts are " + ", ".join(TEMPLATES) + nearest(given, TEMPLATES))
    for number, line in found:
        if line.count("{}") != 1:
            raise UserError(f"templates {given}, line {number}: {line!r} has not one {{}}, where the class goes")
    return tuple(line for _, line in found)


def names(given: str, what: str = "classes") -> tuple[str, ...]:
    """Class names: a file's lines, or of a list with commas. Raises UserError for one without a name, or twice."""
    if "," in given:
        found = [(i, name.strip()) for i, name in enumerate(given.split(","), 1)]
    else:
        found = _lines(given, what, "; class names are a file with a line each, or a list with commas")
    return _distinct(found, f"{what} {given}")


def readable(classes: Sequence[str]) -> tuple[str, ...]:
    """The names that data give their classes, as one writes them. Raises UserError where they are mere numbers."""
    found = tuple(" ".join(name.replace("_", " ").split()) for name in classes)
    if all(name.isdecimal() for name in found):
        raise UserError(
            f"the classes of the data have no names ({listing(found, 3)}): give them with --classes=FILE or "
            "config.class_names"
        )
    return _distinct(list(enumerate(found, 1)), "classes of the data")


def _distinct(found: list[tuple[int, str]], what: str) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for number, name in found:
        if not any(c.isalnum() for c in name):
            raise UserError(f"{what}: class {number} has no name ({name!r})")
        if name in seen:
            raise UserError(f"{what}: classes {seen[name]} and {number} are both called {name!r}")
        seen[name] = number
    return tuple(seen)


def _lines(file: str, what: str, hint: str) -> list[tuple[int, str]]:
    """(number, text) of a file's lines; empty ones at its end are none."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {file!r}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {file}: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise UserError(f"{what} {file}: the file is empty")
    return [(i, line.strip()) for i, line in enumerate(text.rstrip().splitlines(), 1)]


def head(exp: Any) -> dict[str, np.ndarray]:
    """{path: array} of the zero-shot classifier as the head of an `experiment.Experiment`. Raises UserError."""
    config, classes = exp.config, exp.classes
    if config.class_names:
        classes = names(config.class_names, "config.class_names")
        if exp.classes and len(classes) != len(exp.classes):
            raise UserError(f"config.class_names: {len(classes)} names for {len(exp.classes)} classes")
    elif not classes:
        raise UserError("config.head = 'zeroshot' needs the classes' names: give them as config.class_names")
    else:
        classes = readable(classes)
    vectors, scale = classifier(exp.card, config.model, classes, templates(config.templates), config.tokenizer)
    shapes = exp.shapes["params"]["head"]
    made = {"kernel": scale * vectors.T, "bias": np.zeros(len(classes))}
    return {f"params/head/{name}": value.astype(shapes[name].dtype) for name, value in made.items()}


def classifier(
    card: weights.Card, model: str, classes: Sequence[str], prompts: Sequence[str], tokenizer: str = ""
) -> tuple[np.ndarray, float]:
    """(vectors [classes, dim] of length one, the factor of their products with images') of a CLIP's text tower.

    A class is the mean of the vectors of its prompts, over its length (Radford et al. 2021, section 3.1.4).
    Raises UserError for weights without a text tower, a tokenizer that is missing or of another vocabulary.
    """
    variant = clip.VARIANTS[model]
    numbered = tokens.load(tokenizer, card.source)
    if numbered.size > variant.text.vocabulary:
        raise UserError(
            f"tokenizer {numbered.source} has {numbered.size} tokens, the text tower of {model} knows "
            f"{variant.text.vocabulary}"
        )
    _, end = beside(card.source)
    if end is not None and end != numbered.end:
        raise UserError(
            f"tokenizer {numbered.source}: texts end with token {numbered.end}, the weights' config.json says {end}"
        )
    rows = numbered([prompt.replace("{}", name) for name in classes for prompt in prompts], variant.text.context)
    try:
        loaded = weights.load(card, model, clip.text_shapes(model), tables=clip.text_conversion())
    except UserError as error:
        raise UserError(f"the text tower: {error}") from None
    apply = jax.jit(clip.TextTower(variant, end).apply)
    size, parts = min(BATCH, len(rows)), []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])  # one shape, one compilation
        vectors, scale = apply({"params": loaded.params}, filled)
        parts.append(np.asarray(vectors)[: len(part)])
    vectors = np.concatenate(parts).reshape(len(classes), len(prompts), -1).astype(np.float64).mean(1)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), float(scale)


@functools.cache
def beside(source: str) -> tuple[str | None, int | None]:
    """(activation, number of the token that ends a text) as the files beside weights say; None where they do not.

    As transformers has it, an `eos_token_id` of 2 means the highest number of a text: None, too.
    """
    for name in ("config.json", "open_clip_config.json"):
        path = weights.beside(source, name)
        try:
            found = files.parsed(path.read_text(encoding="utf-8")) if path else {}
            if "model_cfg" in found:
                return ("quick_gelu" if found["model_cfg"].get("quick_gelu") else "gelu"), None
            if "text_config" in found:
                text = found["text_config"]
                end, activation = text.get("eos_token_id", 2), text.get("hidden_act", "quick_gelu")
                if not isinstance(activation, str):
                    raise ValueError(f"hidden_act is {str(activation)[:40]}, expected a name")
                return activation, end if isinstance(end, int) and end != 2 else None
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: {error}") from None
    return None, None


def check_activation(card: weights.Card, model: str) -> None:
    """Raises UserError where a file beside the weights of a CLIP says another activation than the model's.

    The arrays have the same names and shapes whichever it is, and a wrong one costs accuracy in silence.
    """
    said, ours = beside(card.source)[0], clip.VARIANTS[model]
    if said is not None and said != ours.image.activation:
        wanted = dataclasses.replace(ours, image=dataclasses.replace(ours.image, activation=said))
        hint = "".join(f": the model is {name}" for name, variant in clip.VARIANTS.items() if variant == wanted)
        raise UserError(
            f"weights {card.name!r} were trained with the activation {said}, and {model} has "
            f"{ours.image.activation}{hint}"
        )
