"""Large pages for the scratch memory of steps on the CPU: a setting of the C library, which it reads as it starts.

XLA takes a step's scratch memory from malloc and gives it back, step after step. glibc maps so large a block anew each
time, and the kernel then zeroes it, page of 4 KiB by page: more than half of the CPU time of a full training step
(`benchmarks/pages.py`). With the tunable `glibc.malloc.hugetlb=1` (glibc 2.35) the kernel gives pages of 2 MiB.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts the program over, as the same process, with the tunable set; returns where that serves nothing.

    To be called before anything large is imported, and by programs alone.
    """
    mode = MODE.read_text() if MODE.exists() else ""
    wanted = environment(os.environ, mode, platform.libc_ver())
    if wanted is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def environment(given: Mapping[str, str], mode: str, libc: tuple[str, str]) -> dict[str, str] | None:
    """`given` with the tunable; None where it is there, or the kernel or the C library knows nothing of it.

    mode: the kernel's for transparent huge pages, the one in force in brackets: in "[always]" all memory has them, in
    "[never]" none can, in "[madvise]" what asks for them.
    """
    name, version = libc[0], tuple(int(part) for part in libc[1].split(".") if part.isdigit())
    tunables = given.get(VARIABLE, "")
    if TUNABLE in tunables or "[madvise]" not in mode or name != "glibc" or version < (2, 35):
        return None
    return {**given, VARIABLE: ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}
