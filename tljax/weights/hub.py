"""Weights on the Hugging Face hub, through its library and its cache (extra `hf`)."""

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tljax.errors import UserError
from tljax.weights import parts
from tljax.weights.readers import NAMES, SUFFIXES

_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/pr/\d+|[^/@]+))?(?:/(?P<inside>[^@]+))?")


class _Place(NamedTuple):
    """A repository at a revision; `what`: how an error begins."""

    repo: str
    revision: str
    what: str


class _Absent(Exception):
    """The repository has no such file."""


def locate(spec: str, what: str) -> Path:
    """The local file of "hf:org/name[@revision][/file or folder]", with its shards beside it, fetched if need be.

    Without a file: model.safetensors, its index, or the same of pytorch_model.bin, what the cache has first. What
    is in the cache is not asked for again, so that a run resumes on the same weights. Raises UserError, which begins
    with `what`.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: the hub needs huggingface_hub: pip install -e '.[hf]'") from None
    found = _SPEC.fullmatch(spec)
    inside = (found["inside"] or "").rstrip("/") if found else ""
    if not found or ".." in inside.split("/") or inside.startswith("/"):
        raise UserError(f"{what}: {spec!r} is not hf:<organisation>/<name>[@<revision>][/<file>]")
    place = _Place(found["repo"], found["revision"] or "main", what)
    if inside.endswith(SUFFIXES):
        names = [inside]
    else:
        names = [f"{inside}/{name}" if inside else name for name in NAMES]
    path, name = _first(place, names)
    if path.suffix == ".json":
        # Of the very commit that the index is of, should the branch have moved.
        pinned = place._replace(revision=_commit(path) or place.revision)
        folder = name.rpartition("/")[0]
        shards = [f"{folder}/{shard}" if folder else shard for shard in parts.names(path)]
        for shard in shards:
            try:
                _get(pinned, shard, shards)
            except _Absent:
                raise UserError(f"{what}: {place.repo} has no {shard}, which its {name} names") from None
    return path


def beside(spec: str, name: str) -> Path | None:
    """The local file `name` that lies in the repository with what `spec` names; None where there is none to be had."""
    found = _SPEC.fullmatch(spec)
    if not found:
        return None
    inside = (found["inside"] or "").rstrip("/")
    folder = inside.rpartition("/")[0] if inside.endswith(SUFFIXES) else inside
    place = _Place(found["repo"], found["revision"] or "main", name)
    try:
        return _get(place, f"{folder}/{name}" if folder else name, [])
    except (_Absent, UserError):
        return None


def _first(place: _Place, names: list[str]) -> tuple[Path, str]:
    for name in names:
        path = _cached(place, name)
        if path:
            return path, name
    for name in names:
        try:
            return _get(place, name, names), name
        except _Absent:
            pass
    held = f"no {names[0]}" if len(names) == 1 else f"none of {', '.join(names)}: name a file, hf:{place.repo}/<file>"
    raise UserError(f"{place.what}: {place.repo} at revision {place.revision} has {held}")


def _commit(path: Path) -> str:
    """The commit whose snapshot in the cache holds the file."""
    folders = path.parts[:-1]
    return folders[folders.index("snapshots") + 1] if "snapshots" in folders[:-1] else ""


def _cached(place: _Place, name: str) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(place.repo, name, constants.HF_HUB_CACHE, place.revision)
    except ValueError as error:
        raise UserError(f"{place.what}: {_one_line(error)}") from None
    return Path(found) if isinstance(found, str) else None


def _get(place: _Place, name: str, wanted: list[str]) -> Path:
    """The file from the cache or the hub. `wanted`: all that would be fetched, for the message without a network."""
    path = _cached(place, name)
    if path:
        return path
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(place, wanted, "HF_HUB_OFFLINE is set")
    if not _resolves(constants.ENDPOINT):
        raise _unreachable(place, wanted, "there is no network to fetch it")
    try:
        with _quiet():
            return Path(
                huggingface_hub.hf_hub_download(
                    place.repo, name, revision=place.revision, cache_dir=constants.HF_HUB_CACHE
                )
            )
    except errors.LocalEntryNotFoundError:
        raise _unreachable(place, wanted, "the hub cannot be reached") from None
    except errors.EntryNotFoundError:
        raise _Absent from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{place.what}: {place.repo} has no revision {place.revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{place.what}: the hub has no {place.repo}, or shows it to some only: `hf auth login` makes you known"
        ) from None
    except Exception as error:  # its transport's errors have no base in common
        raise UserError(f"{place.what}: {name} of {place.repo} could not be fetched ({_one_line(error)})") from None


def _unreachable(place: _Place, wanted: list[str], why: str) -> UserError:
    from huggingface_hub import constants

    missing = [name for name in wanted if not _cached(place, name)]
    several = "one of " if wanted[1:] and wanted[-1].endswith(NAMES[-1]) else ""
    at = "" if place.revision == "main" else f" --revision {place.revision}"
    folder = Path(constants.HF_HUB_CACHE, f"models--{place.repo.replace('/', '--')}")
    return UserError(
        f"{place.what}: {several}{', '.join(missing)} of {place.repo} is not in the cache, and {why}: "
        f"`hf download {place.repo} {missing[0] if several else ' '.join(missing)}{at}` on a machine with a network, "
        f"copy what it makes to {folder}, or give the file itself as file:PATH"
    )


def _resolves(endpoint: str) -> bool:
    """Whether the hub's name is known; the library itself would try for half a minute."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(endpoint).hostname, 443))
    except OSError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's line for each of its attempts."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
