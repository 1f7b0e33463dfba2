"""A program starts over with the C library's setting, once, as the same process and with the same arguments."""

import json
import os
import subprocess
import sys

import pytest

from tljax.pages import environment

MODE, LIBC = "always [madvise] never", ("glibc", "2.36")
PROGRAM = """
import json, os, sys
from pathlib import Path
from tljax import pages
pages.MODE = Path(sys.argv[1])
pages.platform.libc_ver = lambda: ("glibc", "2.36")
pages.restart()
print(json.dumps({"pid": os.getpid(), "argv": sys.argv, "tunables": os.environ.get("GLIBC_TUNABLES")}))
"""


def test_the_tunable_joins_those_that_are_there():
    assert environment({"A": "b"}, MODE, LIBC) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    found = environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, MODE, ("glibc", "2.40.1"))
    assert found == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("given", "mode", "libc"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, MODE, LIBC),  # the user's own choice
        ({}, "[always] madvise never", LIBC),
        ({}, "always madvise [never]", LIBC),
        ({}, "", LIBC),
        ({}, MODE, ("glibc", "2.31")),
        ({}, MODE, ("", "")),
    ],
)
def test_where_it_serves_nothing_nothing_happens(given, mode, libc):
    assert environment(given, mode, libc) is None


def test_a_program_starts_over_as_itself(tmp_path):
    """Through a real exec: one process, its arguments, and the variable at the second start."""
    (tmp_path / "mode").write_text(MODE)
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "mode"), "a b", "--c=ü"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environ, text=True)
    told = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 0
    assert told["pid"] == process.pid
    assert told["argv"][1:] == argv[3:]
    assert told["tunables"] == "glibc.malloc.hugetlb=1"
