"""What the README says works: its Python runs, its commands' files and flags exist."""

import re
from pathlib import Path

import pytest

from tljax.command import from_command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_python_runs():
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", re.findall(r"^python -m tljax\.(?:train|plan) (.*?)(?:\s+#.*)?$", README, re.M))
def test_its_configs_and_flags_exist(line, monkeypatch):
    import shlex

    monkeypatch.chdir(ROOT)
    assert from_command_line(shlex.split(line), "", workdir="").config.model


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:configs|benchmarks|launch|tljax|docs)/[\w/.]+)`|\]\((docs/[\w/.]+)\)", README)
)
def test_its_files_exist(path):
    assert (ROOT / "".join(path)).exists()
