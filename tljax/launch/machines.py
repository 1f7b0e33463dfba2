"""Machine types of Google Compute Engine, and the GPUs that come with them."""

import re

from tljax.errors import UserError, listing, nearest

WITH_GPUS = {"a2": r"\w+gpu-\d+g", "a3": r"\w+gpu-\d+g", "a4": r"\w+gpu-\d+g", "g2": r"standard-\d+"}
FAMILIES = ("c2", "c2d", "c3", "c3d", "c4", "c4a", "c4d", "e2", "h3", "m1", "m2", "m3", "n1", "n2", "n2d", "n4", "t2d")


def machine(text: str) -> str:
    """A machine type. Raises UserError with the nearest."""
    family, _, rest = text.partition("-")
    if family in WITH_GPUS and re.fullmatch(WITH_GPUS[family], rest):
        return text
    if family in FAMILIES and re.fullmatch(r"(standard|highcpu|highmem|megamem|ultramem)-\d+", rest):
        return text
    known = [f"{f}-standard-8" for f in (*FAMILIES, "g2")] + [f"{f}-highgpu-8g" for f in ("a2", "a3", "a4")]
    raise UserError(f"unknown machine type {text!r}{nearest(text, known) or f'; there are: {listing(known)}'}")


def gpus(machine: str) -> int:
    """The GPUs that come with a machine type."""
    found = re.fullmatch(r"a\d-\w+-(\d+)g", machine)
    if found:
        return int(found[1])
    return {"24": 2, "48": 4, "96": 8}.get(machine.rpartition("-")[2], 1) if machine.startswith("g2-") else 0
