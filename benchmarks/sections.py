"""docs/speed.md in sections, each written by the script that measured it."""

import os
import platform
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
HEAD = """# Speed, measured

Every section is written by the script named in it, with the peer or the plain way in the same run. Times are medians,
and a ratio says more than a time. Machines are named with their sections.
"""


def write(name: str, text: str) -> None:
    """Puts a section between its marks, in place of the one before, or at the end."""
    page = PAGE.read_text() if PAGE.exists() else HEAD
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    found = pattern.search(page)
    page = page[: found.start()] + section + page[found.end() :] if found else f"{page.rstrip()}\n\n{section}\n"
    PAGE.write_text(page)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine() -> str:
    """The machine in words: accelerators by JAX, else the processor and the cores of this process."""
    import jax

    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{cores} cores of {names[0] if names else platform.processor() or platform.machine()}"
