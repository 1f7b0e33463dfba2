"""Eight fake CPU devices, a shared compilation cache, and the environment that makes both reliable."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Before jax starts: with fewer threads than devices the CPU collectives can wait for each other for ever.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tljax-test-xla-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("EPATH_USE_TF", "false")  # as tljax.command
# Tests compile far more than they compute: LLVM's costly passes are left out (XLA's own, on HLO, stay).
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

TINY = Path(__file__).parent / "tiny.py"
COLOURS = {"blue": (60, 80, 190), "green": (70, 170, 80), "red": (200, 70, 60)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of noisy coloured squares: 24 train, 9 val and 13 test images (no round number) of 3 classes."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, counts in (("train", (8, 8, 8)), ("val", (3, 3, 3)), ("test", (5, 4, 4))):
        for (name, colour), count in zip(COLOURS.items(), counts):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(colour, 60, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    return root


@pytest.fixture(scope="session")
def tiny(photos) -> list[str]:
    """Command-line arguments of the tiny experiment; more may follow."""
    return [f"--config={TINY}", f"--config.data.source=folder:{photos}"]


def changed(tiny: list[str], workdir: Path, **fields) -> list[str]:
    """The tiny experiment in a workdir, with fields changed: `optim_lr=0.1` is `--config.optim.lr=0.1`."""
    groups = ("data", "augment", "optim", "parallel")
    dotted = lambda k: k.replace("_", ".", 1) if k.partition("_")[0] in groups else k
    return [*tiny, f"--workdir={workdir}", *(f"--config.{dotted(k)}={v}" for k, v in fields.items())]


TIMES = ("images_per_second", "compile_seconds")  # of a row of metrics: the only thing that may differ


def rows(path: Path) -> list[dict]:
    """The rows of metrics of a workdir, without times."""
    from tljax.workdir import Workdir

    return [{k: v for k, v in row.items() if k not in TIMES} for row in Workdir(path).rows()]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """The workdir of a finished tiny run."""
    from tljax import train

    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main([*tiny, f"--workdir={path}"]) == 0
    return path


@pytest.fixture(scope="session")
def servers():
    """Fakes of GCS and S3: one of each, as gcsfs, s3fs, tensorstore and epath remember where an address led."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("s3fs")
    import fake_gcs
    import fake_s3

    with fake_gcs.serving("bucket") as gs, fake_s3.serving("bucket") as s3:
        yield {"gs": gs, "s3": s3}, fake_gcs.environment(gs.url) | fake_s3.environment(s3.url)


@pytest.fixture
def buckets(servers, tmp_path, monkeypatch):
    """What both stores hold: nothing, at first. This process and those that it starts are led to them."""
    from etils.epath import backend

    for name, value in servers[1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backend.fsspec_backend._get_filesystem.cache_clear()
    for held in servers[0].values():
        held.clear()
    yield servers[0]
    backend.fsspec_backend._get_filesystem.cache_clear()


# Where the tests run in the background, SIGINT is ignored, and what they start would inherit that.
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""


def command(module: str, *argv: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts `python -m module argv…` as a process of its own with so many CPU devices."""
    return script(START, module, *argv, devices=devices, **environment)


def script(text: str, *argv: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts `python -c text argv…` as a process of its own with so many CPU devices."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", text, *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def race(text: str, argument: str, count: int = 5) -> list[str]:
    """What so many processes of `python -c text argument` print, sorted.

    Each says "ready", reads a line, prints one, and reads another, so that all are there until all have printed.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", text, argument], **pipes) for _ in range(count)]
    try:
        assert {process.stdout.readline() for process in processes} == {"ready\n"}
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return sorted(process.stdout.readline().strip() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


SCRIPT = Path(__file__).parent.parent / "launch" / "local.sh"


def launch(*argv: str, processes: str = "2") -> subprocess.Popen:
    """Starts launch/local.sh with two CPU devices a process."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "16", "PYTHON": sys.executable}
    return subprocess.Popen(
        [SCRIPT, processes, *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
