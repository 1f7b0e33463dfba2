"""The files in launch/, which are the truth about what runs: found beside the package, and filled in.

In a manifest `${NAME}` stands for a setting. Scripts are run as they are.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from tljax.errors import UserError

PLACEHOLDER = re.compile(r"\$\{([A-Z_]+)\}")


def folder() -> Path:
    """launch/, of the clone that this package is in, or as installed with it. Raises UserError where there is none."""
    clone = Path(__file__).parents[2] / "launch"
    if (clone / "local.sh").is_file():
        return clone
    try:
        installed = importlib.metadata.files("tljax") or ()
    except importlib.metadata.PackageNotFoundError:
        installed = ()
    for file in installed:  # pyproject.toml puts them beside other programs' shared files
        if file.parts[-2:] == ("launch", "local.sh"):
            return Path(file.locate()).resolve().parent
    raise UserError("the folder launch/ is not installed with tljax: use a clone of the repository")


def source(target: str) -> Path:
    """The clone that a target takes to its machines. Raises UserError where the package is not in one."""
    found = folder().parent
    if not (found / "pyproject.toml").is_file():
        raise UserError(f"target {target} takes the source to its machines: run it in a clone of the repository")
    return found


def fill(text: str, values: Mapping[str, str]) -> str:
    """A manifest with its values. Lines whose value is "" are left out, and so is the comment at the top.

    Raises KeyError for a placeholder that has no value.
    """
    lines = text.splitlines()
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    filled = []
    for line in lines:
        names = PLACEHOLDER.findall(line)
        if all(values[name] != "" for name in names):
            filled.append(PLACEHOLDER.sub(lambda found: values[found[1]], line))
    return "\n".join(filled) + "\n"
