"""Files in packages of the npm registry: fetched once by `npm pack`, unpacked and never run."""

import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from tljax import files
from tljax.errors import UserError, nearest

_SPEC = re.compile(r"npm:(?P<name>(?:@[\w.-]+/)?\w[\w.-]*)@(?P<version>\w[\w.-]*)/(?P<inside>.+)")
_SECONDS = 600


def locate(source: str, what: str) -> Path:
    """The local file or folder of "npm:<package>@<version>/<path within>", fetched if need be.

    Packages lie under $XDG_CACHE_HOME/tljax/npm. Raises UserError, which begins with `what`.
    """
    found = _SPEC.fullmatch(source)
    if found is None or ".." in Path(found["inside"]).parts:
        raise UserError(f"{what}: {source!r} is not npm:<package>@<version>/<file within the package>")
    package = f"{found['name']}@{found['version']}"
    folder = files.cached("npm", package.replace("/", "+"))
    if not folder.is_dir():
        _fetch(package, folder, what)
    path = folder / found["inside"]
    if not path.exists():
        names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*"))]
        raise UserError(
            f"{what}: the npm package {package} holds no {found['inside']}{nearest(found['inside'], names)}"
        )
    return path


def _fetch(package: str, folder: Path, what: str) -> None:
    """Unpacks the package into the folder, whole or not at all."""
    npm = shutil.which("npm")
    by_hand = f"fetch it where there is one (npm pack {package}), and unpack its folder `package` as {folder}"
    if npm is None:
        raise UserError(f"{what}: the npm package {package} needs the command npm; or {by_hand}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as place:
        # A package of the registry comes as it was published: none of its scripts run.
        command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--pack-destination", place]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, cwd=place)
            archives = list(Path(place).glob("*.tgz"))
            if done.returncode or len(archives) != 1:
                raise OSError(" ".join((done.stderr or done.stdout).split())[-200:] or f"npm exits {done.returncode}")
            unpack(archives[0], Path(place, "whole"))
            os.replace(Path(place, "whole", "package"), folder)
        except (OSError, subprocess.TimeoutExpired, tarfile.TarError) as error:
            if not folder.is_dir():  # another process may have been faster
                detail = " ".join(str(error).split())[:300]
                raise UserError(f"{what}: the npm package {package} cannot be fetched ({detail}); {by_hand}") from None


def unpack(file: Path, folder: Path) -> None:
    """Writes the files of an archive, and nothing else that an archive may hold; raises OSError and TarError."""
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                inside = Path(member.name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise tarfile.TarError(f"{member.name!r} lies outside of the package")
                if member.isfile():
                    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, (folder / inside).open("wb") as target:
                        shutil.copyfileobj(source, target)
    except (ValueError, EOFError, zlib.error, lzma.LZMAError) as error:  # of a damaged archive
        raise tarfile.TarError(str(error)) from error
