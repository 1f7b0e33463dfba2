"""The models by name (`tljax.models.zoo`); nothing is imported before it is used."""

import importlib

__all__ = [
    "Chain", "conversion", "create", "initialise", "input_size", "names", "patches", "positions", "shapes", "stem",
]  # fmt: skip


def __getattr__(name: str):
    # Late, so that `python -m tljax.models --help` answers at once.
    if name in __all__:
        return getattr(importlib.import_module("tljax.models.zoo"), name)
    raise AttributeError(f"module 'tljax.models' has no attribute {name!r}")
