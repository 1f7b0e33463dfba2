"""The document and the picture of `scaling.py`, from its records of programs."""

from collections.abc import Iterable
from pathlib import Path

# TPU v5e as published (https://cloud.google.com/tpu/docs/v5e): a chip, and the pod's network and hosts of 8 chips.
PEAK = 197e12  # FLOP/s in bfloat16
HBM, HBM_RATE = 16e9, 819e9  # bytes, bytes/s
ICI = 1600e9 / 8  # bytes/s each way
NETWORK = 6.4e12 / 8 / 32  # bytes/s a host: a pod has 32
HOST, VCPUS = 8, 224  # chips, and what a ct5lp-hightpu-8t has
JPEG = 110e3  # bytes of an average photograph of ImageNet
DECODES = 1100  # 224-pixel crops/s a thread (OpenCV, 500×375), measured on this project's machine: docs/speed.md
RESOURCES = ("MXU", "HBM", "ICI", "network", "decoding")


def held(record: dict) -> float:
    """Bytes of a chip that a program takes."""
    return sum(record[part] for part in ("arguments", "results", "temporary", "code"))


def passed(record: dict) -> float:
    """Bytes that a chip sends in a step, by the ring algorithms' counts (Patarasuk & Yuan 2009)."""
    n, part = record["chips"], 8 if "fsdp" in record["layout"] else record["chips"]
    factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": (part - 1) / part, "reduce-scatter": part - 1}
    return sum(count * factor.get(kind, 1.0) for kind, count in record["collectives"].items())


def seconds(record: dict) -> dict[str, float]:
    """{resource: seconds of a step, if it alone bounded the step}."""
    images = record["images_a_chip"]
    return {
        "MXU": record["flops"] / PEAK,
        "HBM": record["bytes_accessed"] / HBM_RATE,
        "ICI": passed(record) / ICI,
        "network": images * HOST * JPEG / NETWORK,
        "decoding": images * HOST / (DECODES * VCPUS),
    }


def size(count: float) -> str:
    """Bytes as a reader likes them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def table(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ordered(records: Iterable[dict], models: dict) -> list[dict]:
    """By model, then by what trains."""
    return sorted(records, key=lambda r: (list(models).index(r["model"]), r["trainable"] / r["parameters"]))


def communication(papers: dict, records: list[dict], models: dict) -> str:
    """Bytes reduced a step: theory, and the programs of each number of chips."""
    plain = {(r["model"], r["strategy"], r["chips"]): r for r in records if r["layout"] == "replicated"}
    rows = []
    for paper in ordered(papers.values(), models):
        found = [plain.get((paper["model"], paper["strategy"], chips), {}) for chips in (8, 64, 256)]
        told = [f"{sum(r['collectives'].values()):,}" if "collectives" in r else "-" for r in found]
        share = f"{100 * paper['trainable'] / paper['parameters']:.3g} %"
        rows.append((f"{models[paper['model']]}, {paper['strategy']}", share, f"{paper['theory']:,}", *told))
    return table(("", "trains", "theory", "8 chips", "64 chips", "256 chips"), rows)


def memory(papers: dict, records: list[dict], models: dict) -> str:
    """Bytes of a chip by plan and layout: of the state by theory, and of the programs for the largest slice."""
    by = {(r["model"], r["strategy"], r["layout"]): r for r in records if r["chips"] == 256}
    rows = []
    for paper in ordered(papers.values(), models):
        seen: set[int] = set()
        for layout, count in paper["held"].items():
            r = by.get((paper["model"], paper["strategy"], layout), {})
            if not r and count in seen:  # the same state, in a program that is not there
                continue
            seen.add(count)
            told = ("-", "-", f"refused: {r['refused']}" if "refused" in r else "-")
            if "flops" in r:
                told = size(r["arguments"]), size(r["temporary"]), f"{size(held(r))} ({100 * held(r) / HBM:.0f} %)"
            rows.append((f"{models[paper['model']]}, {paper['strategy']}", layout, size(count), *told))
    return table(("", "layout", "state and batch, theory", "compiled", "scratch", "in all"), rows)


def of_the_pod(records: Iterable[dict]) -> list[dict]:
    """The programs of the largest slice in the plain layout, of which the bounds are told."""
    return [r for r in records if r["chips"] == 256 and r["layout"] == "replicated" and "flops" in r]


def bounds(records: list[dict], models: dict) -> str:
    """What each resource would take of a step, what binds, and the input that keeps up with it."""
    rows = []
    for r in of_the_pod(records):
        times = seconds(r)
        chip = max(times[resource] for resource in ("MXU", "HBM", "ICI"))
        rate = r["images_a_chip"] * HOST / chip
        pixels = r["size"] ** 2 * 3
        rows.append((
            f"{models[r['model']]}, {r['strategy']}",
            *(f"{float(f'{1000 * times[resource]:.2g}'):g}" for resource in RESOURCES),
            f"**{max(times, key=times.get)}**",
            f"{rate:,.0f}", f"{size(rate * JPEG)}/s", f"{size(rate * pixels)}/s", f"{rate / DECODES:.0f}",
        ))  # fmt: skip
    head = ("", *(f"{r}, ms" for r in RESOURCES), "binds", "images/s a host", "JPEG", "pixels", "threads")
    return table(head, rows)


def remarks(records: list[dict], models: dict) -> str:
    """What the tables say, in sentences that are made of their figures."""
    by = {(r["model"], r["strategy"], r["layout"], r["chips"]): r for r in records if "flops" in r}
    said = []
    for model, name in models.items():
        get = lambda strategy, layout="replicated", m=model: by.get((m, strategy, layout, 256))
        full, head = get("full"), get("frozen")
        if full and head:
            moved = [sum(r["collectives"].values()) for r in (full, head)]
            said.append(
                f"{name}: training the head alone passes {moved[0] / moved[1]:,.0f} times fewer bytes than training "
                f"all, computes {full['flops'] / head['flops']:.1f} times less and takes "
                f"{held(full) / held(head):.1f} times less memory."
            )
        for strategy in ("frozen", "LoRA", "last 4", "full"):
            if plain := get(strategy):
                times = seconds(plain)
                share = max(times["network"], times["decoding"]) / times["MXU"]
                if share > 0.5:
                    said.append(
                        f"{name}, {strategy}: reading the photographs takes {100 * share:.0f} % of the time that the "
                        "MXU needs at its peak: outside the chips, the input binds first."
                    )
        for strategy in ("frozen", "last 4", "LoRA"):
            wide, narrow = get(strategy), get(strategy, "frozen bf16")
            if wide and narrow:
                less = size(wide["arguments"] - narrow["arguments"])
                said.append(f"{name}, {strategy}: frozen leaves in bfloat16 take {less} less of each chip.")
        for strategy in ("last 4", "LoRA", "full"):
            plain, again = get(strategy), get(strategy, "remat")
            if plain and again:
                said.append(
                    f"{name}, {strategy}: remat brings the scratch memory from {size(plain['temporary'])} to "
                    f"{size(again['temporary'])}, for {100 * (again['flops'] / plain['flops'] - 1):.0f} % more FLOPs."
                )
    return "\n".join(f"- {line}" for line in said)


def document(papers: dict, records: list[dict], models: dict, total: int) -> str:
    """The text of docs/scaling.md."""
    records = ordered(records, models)
    if not records:
        return "# Scaling, on paper\n\nNo program is compiled yet: `python benchmarks/scaling.py`.\n"
    versions = ", ".join(f"{k} {v}" for k, v in records[0]["versions"].items())
    images = records[0]["images_a_chip"]
    missing, left = total - len(records), ""
    if missing:
        left = f" {missing} of {total} programs\nare not compiled yet: a dash stands for them."
    times = [seconds(r) for r in of_the_pod(records)]
    inside = times and all(max(t[x] for x in ("ICI", "network", "decoding")) < t["MXU"] for t in times)
    others = "With all at their peaks the links and the input need less than the MXU does." if inside else ""
    said = remarks(records, models)
    said += "\n\n" if said else ""
    return f"""# Scaling, on paper

**Derived, not measured**: no TPU was used. What is not called theory is read off the training step as the TPU's own
compiler makes it for a slice of 8, 64 or 256 TPU v5e chips ({versions}; ahead of time, from shapes), and set beside
what is published of a chip: {PEAK / 1e12:.0f} TFLOP/s in bfloat16, {HBM / 1e9:.0f} GB of memory at
{HBM_RATE / 1e9:.0f} GB/s, links of 1,600 Gbit/s; a pod of 256 in 32 hosts, with 6.4 Tbit/s to the outside
([Google's page](https://cloud.google.com/tpu/docs/v5e)). bfloat16, AdamW, {images} images of 224 pixels a chip, 1,000
classes; *LoRA* is of rank 8, *last 4* the last four stages before the head, and the head.{left}

![What a step asks of a chip](scaling.png)

## What passes between chips

Bytes that a step reduces, a chip. Theory: the gradient of what trains, in the dtype in which its layer reads it, three
vectors for each BatchNorm that moves, two scalars. What is frozen adds nothing, and the number of chips changes
nothing: a ring sends each byte twice, over however many chips. The compiler reduces less than that in two places: where
a block has a downsample, the biases of two norms have one gradient; and LoRA's B, which is scaled in float32, has its
gradient reduced in bfloat16, before it is widened.

{communication(papers, records, models)}

## What a chip holds

On 256 chips. *fsdp 8* lays large leaves over 8 chips, *frozen bf16* is `frozen_dtype`, *remat* is by stage
([devices.md](devices.md)). Of ResNet-50 the plain layout alone is compiled. Scratch is what the compiler reserves for
activations, gradients and gathered leaves.

{memory(papers, records, models)}

## What would bind first on a v5e-256

Milliseconds of a step if one resource alone bounded it: the MXU by the compiler's FLOPs, ICI by the ring's volume, the
hosts' network by {JPEG / 1e3:.0f} kB a photograph, decoding by {VCPUS} vCPUs at {DECODES:,} photographs/s a thread: no
resource reaches its peak, so these are lower bounds. HBM by the bytes that the compiler says its fused operations
access, some of which never leave the chip: an upper bound. The largest binds: where that is HBM, it or the MXU does.
{others}
The last columns are the input that a host of 8 chips needs where its chips work at their bound: photographs, JPEG bytes
read, pixels sent to the devices, threads that decode.

{bounds(records, models)}

{said}Kept features ([cache.md](cache.md)) take the frozen prefix out of the step and photographs out of the input:
where the tables say that a head-only run would wait for its photographs, that is the way round it.

`python benchmarks/scaling.py` writes this page.
"""


def picture(papers: dict, records: list[dict], models: dict, file: Path) -> None:
    """Bytes that pass, bytes that a chip holds, and the time that each resource would take."""
    import matplotlib
    from matplotlib.figure import Figure

    from tljax.report.pictures import STYLE

    whole = [r for r in ordered(records, models) if r["chips"] == 256 and "flops" in r]
    plain = [r for r in whole if r["layout"] == "replicated"]
    name = lambda r: f"{models[r['model']]}, {r['strategy']}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 5.6), layout="constrained")
        passes, holds, takes = figure.subplots(1, 3)
        by_trained = ordered(papers.values(), models)
        passes.barh(list(map(name, by_trained)), [r["theory"] / 1e6 for r in by_trained], 0.5, color="#a9c9e8",
                    label="theory")  # fmt: skip
        moved = [sum(r["collectives"].values()) / 1e6 for r in plain]
        passes.scatter(moved, list(map(name, plain)), s=36, color="#2f6db5", label="compiled")
        passes.legend(loc="upper right")
        passes.set(xscale="log", xlabel="MB reduced a step", title="what passes between chips")
        labels = [f"{name(r)}\n{r['layout']}" for r in whole]
        room = 4 + 0.22 * len(labels)
        figure.set_size_inches(14, max(5.0, room))
        state, scratch = ([r[part] / 1e9 for r in whole] for part in ("arguments", "temporary"))
        holds.barh(labels, state, color="#2f6db5", label="state and batch")
        holds.barh(labels, scratch, left=state, color="#a9c9e8", label="scratch")
        holds.axvline(HBM / 1e9, color="0.4", linestyle="--", linewidth=1)
        holds.tick_params(axis="y", labelsize=6)
        holds.set(xlabel="GB a chip (dashed: what it has)", title="what a chip holds")
        holds.legend(loc="lower right")
        for i, resource in enumerate(RESOURCES):
            times = [1000 * seconds(r)[resource] for r in plain]
            takes.scatter(times, [name(r) for r in plain], s=36, marker="os^Dv"[i], label=resource)
        takes.set(xscale="log", xlabel="ms of a step, if it alone bounded it", title="what would bind on 256 chips")
        takes.legend(loc="lower left", ncols=2, fontsize=8)
        takes.set_ylim(-0.5, len(plain) + 0.5)
        for axes in (passes, holds, takes):
            axes.invert_yaxis()
        figure.savefig(file)
