"""What must be alike in all processes of a run: config, code, versions, settings, devices, clocks."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from tljax import config as configs
from tljax.errors import UserError, listing

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections", "libtpu",
    "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
# Of the environment what changes a program, its numbers or the devices.
SETTINGS = (
    "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL",
    "JAX_DEFAULT_DTYPE_BITS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_THREEFRY_PARTITIONABLE", "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
)  # fmt: skip
CLOCKS = 60.0  # seconds that they may be apart


def facts(config: Mapping, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What one process says of itself: {name: value}."""
    found = {f"config.{field}": repr(value) for field, value in configs.flatten(config).items()}
    found |= {"python": platform.python_version(), "tljax's code": code_digest()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {name: repr(environ[name]) if name in environ else "not set" for name in SETTINGS}


def code_digest() -> str:
    """Eight hexadecimal digits of the package's source files."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def digest(trees: Iterable, names: Iterable[str]) -> str:
    """Sixteen hexadecimal digits of the values of some leaves."""
    from tljax import plan

    values = {path: leaf for tree in trees for path, leaf in plan.flat(tree).items()}
    return plan.combined(plan.digests({name: values[name] for name in names if name in values}))[:16]


def differences(said: Mapping[int, Mapping[str, str]], hosts: Mapping[int, str]) -> list[str]:
    """Of what the processes say of themselves, a text for each name under which they differ, fewest processes last."""
    found = []
    for name in dict.fromkeys(name for facts in said.values() for name in facts):
        values: dict[str, list[int]] = {}
        for index in sorted(said):
            values.setdefault(said[index].get(name, "not known"), []).append(index)
        if len(values) > 1:
            by_size = sorted(values.items(), key=lambda item: -len(item[1]))
            found.append(f"{name} is " + " and ".join(f"{v} on {_processes(at, hosts)}" for v, at in by_size[:3]))
    return found


def apart(offsets: Mapping[int, float], hosts: Mapping[int, str]) -> list[str]:
    """A text for each process whose clock is too far from process 0's; offsets in seconds."""
    return [
        f"the clock of {_processes([index], hosts)} is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"
        for index, seconds in sorted(offsets.items())
        if abs(seconds) > CLOCKS
    ]


def _processes(indices: list[int], hosts: Mapping[int, str]) -> str:
    if len(indices) == 1:
        return f"process {indices[0]} ({hosts[indices[0]]})"
    return f"processes {listing(indices, 4)}"


def same_devices() -> None:
    """Looks at the devices of all processes. Raises UserError where not all have as many of one kind."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(f"the processes' devices do not come together: {' '.join(str(error).split())[:300]}") from error
    own: dict[int, list[str]] = {index: [] for index in range(jax.process_count())}
    for device in devices:
        own[device.process_index].append(device.device_kind)
    said = {i: {"the number of devices": str(len(kinds))} for i, kinds in own.items()}
    for i, kinds in own.items():
        said[i]["their kind"] = listing(sorted(set(kinds))) or "none"
    wrong = differences(said, {i: f"{len(kinds)} devices" for i, kinds in own.items()})
    if wrong:
        raise UserError(f"the processes differ: {'; '.join(wrong)}")
