"""Memory and time of loading weights: `python benchmarks/load.py`, prints a row a format and a row a network.

Memory: a ViT-L/16 of random numbers (1.2 GB) in each format, loaded by a process of its own; the peak growth of what
the process holds itself (RssAnon) and of all that is resident, pages of the mapped file included (RSS), both over the
file's size. Time: real EfficientNet-Lite0 and a random ResNet-50 into device arrays, over that of reading the file's
bytes; both with the file in the page cache and without.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LARGE, CLASSES = "vit_large_patch16", 1000
REPEATS = 5


def random_file(model: str, naming: str) -> dict:
    """{name: function that makes its array} of a model in a naming."""
    from tljax import models
    from tljax.weights import inverse, matcher

    leaves = {p: leaf.shape for p, leaf in matcher.flatten(models.shapes(models.create(model, CLASSES))).items()}

    class Drawn(dict):
        def __missing__(self, leaf):
            return np.random.default_rng(0).standard_normal(leaves[leaf], dtype=np.float32)

    names = inverse.names(models.conversion(model)[naming], leaves, naming)
    return {name: (lambda parts=parts: inverse.made(parts, Drawn())) for name, parts in names.parts.items()}


def formats(folder: Path) -> dict[str, Path]:
    """The large file in every format that can be written here."""
    from tljax.weights import safetensors

    arrays = random_file(LARGE, "timm")
    found = {"safetensors": folder / "large.safetensors"}
    safetensors.write(found["safetensors"], arrays, {})
    names = list(arrays)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for shard, some in parts.items():
        safetensors.write(folder / shard, {name: arrays[name] for name in some}, {})
    found["sharded"] = folder / "model.safetensors.index.json"
    places = {name: shard for shard, some in parts.items() for name in some}
    found["sharded"].write_text(json.dumps({"weight_map": places}))
    found["npz"] = folder / "large.npz"
    np.savez(found["npz"], **{name: make() for name, make in arrays.items()})
    try:
        import torch
    except ImportError:
        print("pth is left out: PyTorch, which would write it, is not installed")
    else:
        found["pth"] = folder / "large.pth"
        torch.save({name: torch.from_numpy(make()) for name, make in arrays.items()}, found["pth"])
    return found


def resident() -> tuple[int, int]:
    """(RssAnon, RSS) of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[field].split()[0]) * 1024 for field in ("RssAnon", "VmRSS"))


def measure(path: str, model: str) -> None:
    """In a process of its own: loads the file, and prints the growth at its peak."""
    import jax

    from tljax import models, weights

    shapes = models.shapes(models.create(model, CLASSES))
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before, peak, done = resident(), [0, 0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[:] = map(max, peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = weights.load(path, model, shapes)
    done.set()
    watcher.join()
    peak[:] = map(max, peak, resident())
    assert loaded.params
    print(json.dumps([after - start for after, start in zip(peak, before)]))


def size(path: Path) -> int:
    from tljax.weights import readers

    return sum(file.stat().st_size for file in readers.files(path))


def forget(path: Path) -> None:
    """Asks the kernel to drop the file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action, path: Path, cold: bool) -> float:
    """The median time of the action."""
    found = []
    for _ in range(REPEATS):
        if cold:
            forget(path)
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def times(spec: str, model: str, path: Path) -> None:
    import jax

    from tljax import models, weights

    shapes, card = models.shapes(models.create(model, CLASSES)), weights.card(spec, model)

    def load():
        loaded = weights.load(card, model, shapes)
        jax.block_until_ready(jax.device_put((loaded.params, loaded.batch_stats)))

    load()
    for cold in (False, True):
        read, whole = seconds(path.read_bytes, path, cold), seconds(load, path, cold)
        where = "from the disk" if cold else "from the page cache"
        print(
            f"{model}, {path.stat().st_size / 1e6:.0f} MB {where}: read {1e3 * read:.1f} ms, loaded {1e3 * whole:.1f} "
            f"ms, {whole / read:.2f} times"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    folder = Path(tempfile.mkdtemp(prefix="tljax-load-"))
    try:
        for name, path in formats(folder).items():
            argv = [sys.executable, __file__, "--measure", str(path), LARGE]
            out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            own, whole = (grown / size(path) for grown in json.loads(out))
            print(f"{name}, {size(path) / 1e9:.2f} GB: own memory {own:.2f}, resident {whole:.2f} times the file")
        from tljax import files, weights
        from tljax.weights import safetensors

        resnet = folder / "resnet50.safetensors"
        safetensors.write(resnet, random_file("resnet50", "torchvision"), {})
        times(str(resnet), "resnet50", resnet)
        lite = "efficientnet_lite0"
        times(lite, lite, files.locate(weights.CARDS[lite].source, "weights"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
