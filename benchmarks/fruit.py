"""The accuracy table of the README: frozen, partial, full and scratch on the fruit photographs, over seeds.

    python benchmarks/fruit.py                     # everything: hours on 2 cores; finished runs are not repeated
    python benchmarks/fruit.py --only=frozen,partial --seeds=5
    python benchmarks/fruit.py --folds             # cross-validation within train + val instead of the test split

All recipes train on the 732 photographs of train + val (`config.data.val=none`), as the reference does: logistic
regression (scikit-learn, C = 1) on frozen features, computed here in the same run. Each recipe was fixed by
cross-validation within these photographs; the test split chose nothing. Each epoch draws new augmented views, so that
all recipes see the same, and a step costs what it costs without the feature cache (benchmarks/cache.py has that).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

RECIPES = {
    "frozen": "frozen.py",
    "partial": "partial.py",
    "full": "full.py",
    "scratch": "scratch.py",
    "partial:last=3": "partial.py:last=3",
    "partial:norms=true": "partial.py:norms=true",
}
TABLE = ("frozen", "partial", "full", "scratch")
CONFIGS = Path(__file__).parent.parent / "configs"


def finished(folder: Path, recipe: str, *overrides: str) -> dict:
    """The summary of a run, which is started, resumed or found complete."""
    command = [
        sys.executable, "-m", "tljax.train", f"--config={CONFIGS / RECIPES[recipe]}", f"--workdir={folder}",
        "--config.cache_views=0",
    ]  # fmt: skip
    log = folder.parent / f"{folder.name}.log"
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            code = subprocess.run([*command, *overrides], stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise SystemExit(f"{recipe} ended with {code}: see {log}")
    return json.loads((folder / "summary.json").read_text())


def reference() -> tuple[float, float]:
    """(fine, coarse) test accuracy of logistic regression on frozen features of the centre crops of train + val."""
    import jax
    from sklearn.linear_model import LogisticRegression

    from tljax import config as configs
    from tljax import data, experiment
    from tljax.step import normalise

    config = configs.base()
    config.data.val = "none"
    dataset = data.load(config.data)
    exp = experiment.build(config, len(dataset.classes))
    params, stats, _ = exp.load()
    p, variables = exp.preprocessing, {"params": params, "batch_stats": stats}
    features = jax.jit(lambda images: exp.model.apply(variables, normalise(images, p.mean, p.std), stop="head"))

    def of(split):
        batches = data.eval_batches(split, batch_size=16, size=p.size, crop=p.crop, interpolation=p.interpolation)
        return np.concatenate([np.asarray(features(batch["image"])) for batch in batches])[: len(split)]

    probe = LogisticRegression(max_iter=5000).fit(of(dataset.train), dataset.train.labels)
    guess, coarse = probe.predict(of(dataset.test)), np.array(dataset.coarse)
    labels = dataset.test.labels
    return float((guess == labels).mean()), float((coarse[guess] == coarse[labels]).mean())


def shares(names: list[str]) -> dict[str, float]:
    """{recipe: FLOPs of a step as a share of full training's, by theory}: passes over each stage, counted."""
    from tljax import command, cost, experiment

    plans = {}
    for name in names:
        flags = command.from_command_line([f"--config={CONFIGS / RECIPES[name]}"], "")
        exp = experiment.build(flags.config, experiment.classes_without_data(flags.config))
        plans[name] = exp.plans[0][1]
    forward = cost.forward_flops(exp)
    return {name: cost.theory(plan, forward) / (3 * sum(forward.values())) for name, plan in plans.items()}


def spread(values: list[float], digits: int = 1, scale: float = 100) -> str:
    """Mean ± sample standard deviation."""
    mean = f"{scale * np.mean(values):.{digits}f}"
    return f"{mean} ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def table(runs: dict[str, list[dict]]) -> str:
    """The rows of the README's table; FLOPs as the compiler counts them and by theory, as shares of full training."""
    flops = {name: found[0]["flops_per_step"] for name, found in runs.items()}
    theory = shares(list(runs))
    whole = flops.get("full", max(flops.values()))
    fine, coarse = reference()
    head = (
        "recipe", "seeds", "fine accuracy, %", "coarse accuracy, %", "NLL", "trainable",
        "GFLOP a step (share; theory)", "temporary memory, GB", "peak memory, GB",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    rows.append(("logistic regression on frozen features", "", f"{100 * fine:.1f}", f"{100 * coarse:.1f}", *[""] * 5))
    for name, found in runs.items():
        test, first = [s["test"] for s in found], found[0]
        rows.append((
            f"`{name}`",
            f"{len(found)}",
            spread([t["accuracy"] for t in test]),
            spread([t["coarse_accuracy"] for t in test]),
            spread([t["nll"] for t in test], 3, 1),
            f"{first['plan']['trainable'] / first['plan']['parameters']:.1%}",
            f"{flops[name] / 1e9:.1f} ({flops[name] / whole:.2f}; {theory[name]:.2f})",
            f"{first['temporary_bytes'] / 1e9:.2f}",
            f"{np.median([s['peak_memory_bytes'] for s in found]) / 1e9:.1f}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/fruit"))
    parser.add_argument("--only", default=",".join(TABLE), help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", action="store_true", help="5-fold cross-validation within train + val")
    parser.add_argument(
        "--finished", action="store_true", help="the table of the runs that are finished; none is started"
    )
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = set(names) - set(RECIPES)
    if unknown:
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}: expected {', '.join(RECIPES)}")
    if arguments.folds:
        for name in names:
            found = [
                finished(
                    arguments.workdir / f"{name}-fold{k}", name, f"--config.data.val=fold:{k}/5", f"--config.seed={k}"
                )
                for k in range(1, 6)
            ]
            accuracy, nll = ([s["val"][key] for s in found] for key in ("accuracy", "nll"))
            print(f"{name}: fine accuracy over 5 folds {spread(accuracy)} %, NLL {spread(nll, 3, 1)}")
        return
    runs = {}
    for name in names:
        folders = [arguments.workdir / f"{name}-{seed}" for seed in range(arguments.seeds)]
        if arguments.finished:
            folders = [folder for folder in folders if (folder / "summary.json").exists()]
        found = [finished(f, name, "--config.data.val=none", f"--config.seed={f.name.split('-')[-1]}") for f in folders]
        runs |= {name: found} if found else {}
    print(table(runs))


if __name__ == "__main__":
    main()
