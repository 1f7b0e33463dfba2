"""Adapters: small trainable additions to a frozen network, without editing any model (PEFT).

`adapt` wraps a Linen model; the wrapper has the parameters of both and is used as the model is. A config asks for
adapters by a strategy, as `lora(rank=8)` (`tljax.strategies`). Nothing is imported before it is used.
"""

import importlib

__all__ = ["IA3", "KINDS", "Adapted", "Adapter", "Bottleneck", "Lora", "Prompts", "adapt", "merge", "plain"]


def __getattr__(name: str):
    # Late, so that `python -m tljax.adapters --help` answers at once.
    if name in __all__:
        return getattr(importlib.import_module("tljax.adapters.wrapper"), name)
    raise AttributeError(f"module 'tljax.adapters' has no attribute {name!r}")
