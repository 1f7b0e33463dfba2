"""What a target must be told: its settings, their defaults, and what is wrong with a value."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from tljax.errors import UserError, unknown
from tljax.launch import accelerators


@dataclasses.dataclass(frozen=True)
class Setting:
    """A flag of a target. With `default` None it must be given; `read(text)` returns its value or raises UserError."""

    help: str
    default: str | None = ""
    read: Callable[[str], Any] = str


def values(target: str, settings: Mapping[str, Setting], given: Mapping[str, str]) -> dict[str, Any]:
    """The value of every setting. Raises UserError for one that is missing or wrong."""
    found = {}
    for name, setting in settings.items():
        text = given.get(name) or setting.default
        if text is None:
            raise UserError(f"--{name} is missing: {setting.help}")
        try:
            found[name] = setting.read(text) if text else text
        except UserError as error:
            raise UserError(f"--{name}: {error}") from None
    return found


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UserError(f"{text!r}: expected a number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else number(text)


def yes(text: str) -> bool:
    """A flag that is given alone."""
    if text.lower() not in ("true", "false"):
        raise UserError(f"{text!r}: expected nothing, true or false")
    return text.lower() == "true"


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """Reads a text of a form."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise UserError(f"{text!r}: expected {expected}")
        return text

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """Reads one of some names."""

    def read(text: str) -> str:
        if text not in names:
            raise unknown("value", text, names)
        return text

    return read


def url(*schemes: str) -> Callable[[str], str]:
    """Reads the URL of a folder in a bucket, without the slash at its end."""

    def read(text: str) -> str:
        expected = " or ".join(f"{scheme}://BUCKET/FOLDER" for scheme in schemes)
        scheme, sign, place = text.partition("://")
        if not sign:
            raise UserError(f"{text!r} is no URL: expected {expected}; nearest: {schemes[0]}://{text.strip('/')}")
        if scheme not in schemes:
            raise UserError(f"{text!r}: expected {expected}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[\w.=+-]+)*/?", place):
            raise UserError(f"{text!r}: {place.partition('/')[0]!r} and what follows name no folder in a bucket")
        return text.rstrip("/")

    return read


PROJECT = Setting(
    "the Google Cloud project, as my-project",
    None,
    matching(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "a project: 6 to 30 lower-case letters, digits, hyphens"),
)
ZONE = Setting("the zone, as us-west4-a", None, matching(r"[a-z]+-[a-z]+\d+-[a-z]+\d?", "a zone, as us-west4-a"))
EXTRAS = Setting(
    "the package's extras that the run needs, beside those of its bucket",
    "demo",
    matching(r"[a-z0-9]+(,[a-z0-9]+)*", "names of extras, as demo,hf"),
)
SPOT = Setting("machines that cost less and may be taken away", "false", yes)
TPU = Setting("a TPU slice, as v5litepod-16", None, accelerators.tpu)
IMAGE = matching(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", "an image, as REGISTRY/NAME:TAG")
