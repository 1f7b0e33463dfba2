"""What the feature cache saves: whole runs with it and without, alternately, and the accuracy of both over seeds.

    python benchmarks/cache.py                # extra `demo`; about an hour on 2 cores; writes docs/speed.md
    python benchmarks/cache.py --seeds=1

Head only: 30 epochs of a linear probe on centre crops. The main job: configs/partial.py with the views that it keeps,
against new augmented views each epoch. Seconds are those of the whole command, and of its training alone (features,
steps, evaluations on val); finished runs are kept in --workdir.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sections
from fruit import spread

CONFIGS = Path(__file__).parent.parent / "configs"
PLAIN = ("augment.crop_min_scale=1.0", "augment.flip=False")
PROBE = (*PLAIN, "train_for=30 epochs")
RUNS = {
    "head only, uncached": ("frozen.py", (*PROBE, "cache=off")),
    "head only, cached": ("frozen.py", (*PROBE, "cache=memory")),
    "main job, uncached": ("partial.py", ("cache=off", "cache_views=0")),
    "main job, cached": ("partial.py", ("cache=memory",)),
}


def finished(folder: Path, name: str, seed: int) -> dict:
    """The summary of a run, with the seconds of the command."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    file = path / "summary.json"
    config, fields = RUNS[name]
    if not (path / "seconds").exists():
        flags = [f"--config.{field}" for field in (*fields, f"seed={seed}")]
        begun = time.time()
        subprocess.run(
            [sys.executable, "-m", "tljax.train", f"--config={CONFIGS / config}", f"--workdir={path}", *flags],
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        (path / "seconds").write_text(str(time.time() - begun))
    return json.loads(file.read_text()) | {"seconds": float((path / "seconds").read_text())}


def training(summary: dict) -> float:
    """Seconds of features, steps and evaluations on val."""
    return sum(summary["time"].get(part, 0.0) for part in ("features", "train", "eval"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/cache"))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    found = {name: [] for name in RUNS}
    for seed in range(given.seeds):
        for name in RUNS:
            found[name].append(finished(given.workdir, name, seed))
            last = found[name][-1]
            print(f"{name}, seed {seed}: {last['seconds']:.0f} s, {last['test']['accuracy']:.1%}", flush=True)
    rows = []
    for name, runs in found.items():
        whole, alone = (np.median([of(run) for run in runs]) for of in (lambda run: run["seconds"], training))
        rows.append(
            (name, len(runs), f"{whole:.0f}", f"{alone:.1f}", spread([r["test"]["accuracy"] for r in runs]),
             spread([r["test"]["nll"] for r in runs], 3, 1))
        )  # fmt: skip
    ratio = lambda of, what: (
        np.median([of(r) for r in found[f"{what}, uncached"]]) / np.median([of(r) for r in found[f"{what}, cached"]])
    )
    lines = [
        f"{what.capitalize()}: the cached command is {ratio(lambda r: r['seconds'], what):.1f} times faster, its "
        f"training {ratio(training, what):.1f} times."
        for what in ("head only", "main job")
    ]
    head = ("run", "seeds", "command, s", "training, s", "test accuracy, %", "NLL")
    views = found["main job, cached"][0]["cache"]["views"]
    text = f"""## The feature cache

By `python benchmarks/cache.py`: EfficientNet-Lite0 on the fruit photographs, medians over seeds; accuracies are means
± standard deviations. A head is trained for 30 epochs on centre crops; the main job keeps {views} augmented views of
each photograph, uncached it draws new ones each epoch. *Command*: from start to exit, imports, compilation, evaluation
and pictures included; *training*: features, steps and evaluations on val;
the test split is evaluated once in each. Machine: {sections.machine()}.

{sections.table(head, rows)}

{" ".join(lines)}
"""
    print(text)
    sections.write("cache", text)


if __name__ == "__main__":
    main()
