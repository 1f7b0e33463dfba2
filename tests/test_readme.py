"""What README and docs say works: their Python runs, the files and flags of their commands exist."""

import re
from pathlib import Path

import pytest

from tljax.command import from_command_line
from tljax.places import FLAGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EVERYTHING = "\n".join([README, *(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))])


@pytest.mark.parametrize("file", ["README.md", "docs/adapters.md"])  # docs/anywhere.md: test_anywhere.py
def test_its_python_runs(file):
    found = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)
    assert found
    for code in found:
        exec(compile(code, file, "exec"), {})


@pytest.mark.parametrize("line", re.findall(r"^python -m tljax\.(?:train|plan) (.*?)(?:\s+#.*)?$", EVERYTHING, re.M))
def test_its_configs_and_flags_exist(line, monkeypatch):
    import shlex

    monkeypatch.chdir(ROOT)
    assert from_command_line(shlex.split(line), "", workdir="", compare="", **FLAGS).config.model


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:configs|benchmarks|launch|tljax|docs)/[\w/.]+)`|\]\((docs/[\w/.]+)\)", EVERYTHING)
)
def test_its_files_exist(path):
    assert (ROOT / "".join(path)).exists()
