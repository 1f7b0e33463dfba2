"""Every strategy on the fruit photographs, each at the learning rate that suits it: writes `docs/strategies.md`.

    python benchmarks/strategies.py                       # everything: hours on 2 cores; finished runs are kept
    python benchmarks/strategies.py --only=frozen,lora    # some of it
    python benchmarks/strategies.py --finished            # the document from the runs that there are

All start from the same weights and train for the same number of epochs at the same image size. The learning rate of
each is tuned over one grid with seed 0, by the NLL on the val photographs; then come the other seeds at that rate.
The test photographs choose nothing. FLOPs are the compiler's, the time of a step is measured here, one strategy
after another and then all again, so that a busy machine is as busy for all.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from fruit import spread

ROOT = Path(__file__).parent.parent
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = 3
COMMON = {
    "image_size": 128, "train_for": "6 epochs", "optim.warmup": "0.5 epochs", "eval_every": "6 epochs",
    "checkpoint_every": "6 epochs", "data.threads": 1,
}  # fmt: skip
# What each overrides of tljax.config.base(): one learning rate for all that trains, but where a multiplier is the idea.
STRATEGIES = {
    "frozen": "frozen()",
    "partial, last 2": "partial(last=2)",
    "partial, last 4": "partial(last=4)",
    "surgical, block 1": "surgical('block1')",
    "surgical, block 16": "surgical('block16')",
    "biases only (BitFit)": "biases_only()",
    "norms only": "norms_only()",
    "LoRA, rank 8": "lora(rank=8)",
    "IA3": "ia3()",
    "bottleneck adapters": "bottleneck()",
    "layer-wise decay 0.75": "layerwise_decay(0.75)",
    "Auto-RGN": "auto_rgn",
    "full": "full()",
    "LP-FT": "lp_ft(head='2 epochs')",
    "FreezeOut": "freeze_progressively(every='1.2 epochs')",
    "gradual unfreezing": "gradual_unfreezing(every='0.3 epochs')",
    "chain-thaw": "chain_thaw(each='0.25 epochs')",
}


def overrides(name: str, workdir: Path) -> dict:
    """The config fields that make a strategy. Auto-RGN is measured, once, and then is a strategy like others."""
    from tljax.phases import SCHEDULES

    call = STRATEGIES[name]
    if call == "auto_rgn":
        file = workdir / "auto_rgn.txt"
        if not file.exists():
            command = [sys.executable, "-m", "tljax.auto_rgn", f"--config={ROOT / 'configs/full.py'}"]
            command.append(f"--config.image_size={COMMON['image_size']}")
            line = (
                subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().splitlines()[-1]
            )
            file.write_text(line.split(" = ", 1)[1].strip('"'))
        call = file.read_text()
    return {"phases" if call.split("(")[0] in SCHEDULES else "strategy": call}


def flags(name: str, workdir: Path, rate: float, seed: int) -> list[str]:
    """The command line of a run."""
    fields = COMMON | overrides(name, workdir) | {"optim.lr": rate, "seed": seed, "name": call_name(name)}
    return [f"--config={ROOT / 'configs/full.py'}", *(f"--config.{field}={value}" for field, value in fields.items())]


def call_name(name: str) -> str:
    """A strategy's name as a folder's."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).split()).lower()


def finished(name: str, workdir: Path, rate: float, seed: int, start: bool = True) -> dict | None:
    """The summary of a run, which is started, resumed or found complete; None where it is not and may not start."""
    folder = workdir / f"{call_name(name)}-lr{rate:g}-seed{seed}"
    if not (folder / "summary.json").exists():
        if not start:
            return None
        command = [sys.executable, "-m", "tljax.train", *flags(name, workdir, rate, seed), f"--workdir={folder}"]
        with Path(f"{folder}.log").open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            reason = Path(f"{folder}.log").read_text().strip().splitlines()[-1]
            if "loss is" not in reason:  # a rate at which it diverges is an answer
                raise SystemExit(f"{name} ended with {code}: {reason}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"diverged": reason}))
    return json.loads((folder / "summary.json").read_text())


def tuned(name: str, workdir: Path, start: bool = True) -> tuple[float, list[dict]] | None:
    """Returns (the rate that val chose, the summaries of all seeds at it); None where runs are missing."""
    tried = {rate: finished(name, workdir, rate, 0, start) for rate in RATES}
    if None in tried.values():
        return None
    rate = min(RATES, key=lambda rate: tried[rate]["val"]["nll"] if "val" in tried[rate] else np.inf)
    found = [tried[rate], *(finished(name, workdir, rate, seed, start) for seed in range(1, SEEDS))]
    return None if None in found else (rate, found)


def cost_of(names: list[str], workdir: Path, repeats: int = 5) -> dict[str, dict]:
    """{strategy: FLOPs, scratch bytes and seconds of a step}; of phases, the mean over the steps of the run.

    A step is compiled for each phase that costs something else; times are medians over rounds through all.
    """
    import jax

    from tljax import command, data, experiment, parallel, phases
    from tljax.step import init_state, make_train_step

    programs, shares, dataset = {}, {}, None
    for name in names:
        config = command.from_command_line(flags(name, workdir, 1e-3, 0), "").config
        dataset = dataset or data.load(config.data)
        exp = experiment.build(config, len(dataset.classes))
        layout = parallel.Layout(config.parallel, config.batch_size, devices=1)
        p, params, found = exp.preprocessing, exp.load()[:2], exp.in_time(len(dataset.train))
        total = found[-1].stop
        # Of many phases some: every fourth and the last.
        some = [ph for i, ph in enumerate(found) if len(found) <= 5 or i % 4 == 0 or ph is found[-1]]
        weights = np.diff([0, *(ph.stop for ph in some[:-1]), total]) / total
        for phase, weight in zip(some, weights):
            tx, _ = exp.optimizer(phase, len(dataset.train))
            step = make_train_step(
                exp.model, phase.plan, tx, mean=p.mean, std=p.std, num_classes=len(dataset.classes), seed=0
            )
            state = layout.place(jax.jit(init_state, static_argnums=(0, 1, 4))(phase.plan, tx, *params, 0.0))
            compiled = layout.compile_train(step, state, layout.abstract_batch(config.batch_size, p.size))
            key = (name, phases.index(found, phase.stop))
            programs[key] = (compiled, state)
            shares[key] = float(weight)
        batch = layout.place_batch(
            {"image": np.zeros((config.batch_size, p.size, p.size, 3), np.uint8),
             "label": np.zeros(config.batch_size, np.int32)}
        )  # fmt: skip
    seconds = {key: [] for key in programs}
    for _ in range(repeats):
        for key, (compiled, state) in programs.items():
            for _ in range(2):  # the first finds the memory as another program has left it
                begun = time.perf_counter()
                state, measured = compiled(state, batch)
                jax.block_until_ready(measured)
            seconds[key].append(time.perf_counter() - begun)
            programs[key] = (compiled, state)
    costs = {}
    for name in names:
        keys = [key for key in programs if key[0] == name]
        each = [parallel.cost(programs[key][0]) for key in keys]
        mean = lambda values, keys=keys: float(np.dot([shares[key] for key in keys], values))
        costs[name] = {
            "flops": mean([c["flops_per_step"] for c in each]),
            "scratch": max(c["temporary_bytes"] for c in each),
            "seconds": mean([np.median(seconds[key]) for key in keys]),
        }
    return costs


def document(runs: dict[str, tuple[float, list[dict]]], costs: dict[str, dict]) -> str:
    """The text of docs/strategies.md."""
    head = (
        "strategy", "test accuracy, %", "coarse, %", "NLL", "learning rate", "trains", "GFLOP a step", "scratch, GB",
        "step, ms", "peak memory, GB",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for name, (rate, found) in runs.items():
        test, cost, plan = [s["test"] for s in found], costs[name], found[0]["plan"]
        rows.append((
            f"{name} (`{found[0]['strategy'] if len(found[0]['strategy']) < 60 else 'discriminative({…})'}`)",
            spread([t["accuracy"] for t in test]),
            spread([t["coarse_accuracy"] for t in test]),
            spread([t["nll"] for t in test], 3, 1),
            f"{rate:g}",
            f"{plan['trainable'] / plan['parameters']:.1%}",
            f"{cost['flops'] / 1e9:.1f}",
            f"{cost['scratch'] / 1e9:.2f}",
            f"{1000 * cost['seconds']:.0f}",
            f"{np.median([s['peak_memory_bytes'] for s in found]) / 1e9:.1f}",
        ))  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    summary = next(iter(runs.values()))[1][0]
    data, rates = summary["data"], ", ".join(f"{rate:g}" for rate in RATES)
    size, epochs = COMMON["image_size"], COMMON["train_for"]
    left = [name for name in STRATEGIES if name not in runs]
    absent = f"Without runs as yet: {', '.join(left)}.\n\n" if left else ""
    return f"""# Strategies compared

{summary["model"]} on {data["train"]} photographs of {data["classes"]} classes, {data["test"]} more to test on;
{size} pixels, {epochs}, batches of 16. The learning rate of each strategy was tuned on the {data["val"]} val
photographs over one grid ({rates}; seed 0, by NLL); then {SEEDS} seeds at that rate: mean ± standard deviation.
Those val photographs are few and their choice is coarse; small images and few epochs make a benchmark that a laptop
can run, not the best figures on these data (those are in the README). One learning rate holds for head and body,
but where multipliers are what a strategy is about.

{table}

FLOPs and scratch memory are the compiler's estimates for one device; the time of a step is the median of steps taken
in turn on {summary["devices"]["kind"]}; with phases, FLOPs and time are means over the run and scratch is the largest.
Peak memory is that of the whole process. *trains* is the share of the last phase.

{absent}![Accuracy against the cost of a step](strategies.png)

`python benchmarks/strategies.py` writes this page.
"""


def picture(runs: dict[str, tuple[float, list[dict]]], costs: dict[str, dict], file: Path) -> None:
    """Test accuracy with its spread against the FLOPs of a step; the size of a point is the share that trains."""
    from matplotlib import pyplot

    from tljax.report.pictures import STYLE

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        named = []
        for name, (_, found) in runs.items():
            accuracy = [100 * s["test"]["accuracy"] for s in found]
            x, y, plan = costs[name]["flops"] / 1e9, np.mean(accuracy), found[0]["plan"]
            size = 20 + 180 * plan["trainable"] / plan["parameters"]
            axes.errorbar(x, y, np.std(accuracy, ddof=1), color="0.7", linewidth=1, zorder=1)
            axes.scatter(x, y, size, zorder=2)
            beside = [other > y for at, other in named if abs(at - x) < 0.8 and abs(other - y) < 1.2]
            named.append((x, y))
            place = (6, -12 if any(beside) else 8 if beside else 4)  # away from a neighbour
            axes.annotate(name, (x, y), xytext=place, textcoords="offset points", fontsize=8)
        axes.set(xlabel="GFLOP a step (compiler estimate)", ylabel="test accuracy, %")
        figure.savefig(file)
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--only", default="", help=f"names separated by semicolons, of {'; '.join(STRATEGIES)}")
    parser.add_argument("--jobs", type=int, default=1, help="strategies that train at the same time")
    parser.add_argument("--finished", action="store_true", help="start no run")
    parser.add_argument("--train-only", action="store_true", help="write no document")
    arguments = parser.parse_args()
    names = [n.strip() for n in arguments.only.split(";") if n.strip()] or list(STRATEGIES)
    unknown = set(names) - set(STRATEGIES)
    if unknown:
        parser.error(f"unknown strategy {', '.join(sorted(unknown))}: expected some of {'; '.join(STRATEGIES)}")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tune = lambda name: tuned(name, arguments.workdir, not arguments.finished)
        runs = {name: found for name, found in zip(names, pool.map(tune, names)) if found}
    if arguments.train_only:
        return
    costs = cost_of(list(runs), arguments.workdir)
    (ROOT / "docs/strategies.md").write_text(document(runs, costs))
    picture(runs, costs, ROOT / "docs/strategies.png")
    print((ROOT / "docs/strategies.md").read_text())


if __name__ == "__main__":
    main()
