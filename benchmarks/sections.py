"""docs/speed.md in sections, each written by the script that measured it."""

import os
import platform
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
HEAD = """# Speed, measured

Every section is written by the script named in it, with the peer or the plain way in the same run. Times are medians,
and a ratio says more than a time. Machines are named with their sections.

What a run itself took is in its summary and on its page: seconds of each part (*start* are imports, *model* the shapes
and the plan, then data, weights, compile, features, first step, train, …), the seconds from the command to the end of
the first step, and the *input wait*. Steps run asynchronously: the next batch is fetched and put on the device while
one computes; metrics are fetched with the rows of the log, and a step's own part of the state is donated to it. So a
batch that comes late costs nothing until the device has finished all that it was given. The input wait is the time
from then, or from when the loop asked for the batch if that is later, to the step on it; its share is that of the time
in training. Computing kept features is the device's work, and counts as *features*.
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
