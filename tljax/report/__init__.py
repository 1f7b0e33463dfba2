"""What a run tells: figures, tables, pictures, one page."""

import importlib

__all__ = ["console", "html", "metrics", "page", "pictures", "table"]


def __getattr__(name: str):
    # Late: a command that only formats numbers should not wait for numpy and rich.
    if name == "html":
        return importlib.import_module("tljax.report.page").html
    if name in __all__:
        return importlib.import_module(f"tljax.report.{name}")
    raise AttributeError(f"module 'tljax.report' has no attribute {name!r}")
