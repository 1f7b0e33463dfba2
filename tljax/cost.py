"""What a plan costs: the compiler's estimates of a step, beside the theory.

The step is compiled from shapes: no weights, no data. FLOPs and memory are XLA's own estimates of the program that it
made; nothing here is a measurement of time. `python -m tljax.plan --config=… --cost` prints them.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable

import jax
import numpy as np

from tljax import optim
from tljax.errors import UserError
from tljax.experiment import Experiment, build
from tljax.parallel import Layout, cost
from tljax.plan import Plan
from tljax.report import text

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A plan's step: FLOPs over all devices, bytes of one device, and what theory says."""

    strategy: str
    trainable: float  # share of the parameters
    flops: float
    theory: float  # FLOPs
    temporary: int  # bytes of scratch memory
    peak: int  # bytes: arguments, results and scratch memory
    state: int  # bytes of the whole training state, optimizer included
    optimizer: int  # bytes
    collective: int  # bytes that collectives move, a device
    devices: int


def collective_bytes(compiled) -> dict[str, int]:
    """{collective: bytes of its results on one device} of a compiled program, read from its HLO."""
    found: dict[str, int] = {}
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match:
            sizes = [_bytes(kind, dims) for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", match[1])]
            # The start of a gather or a permutation also names its operands, before its results.
            started = match[3] and match[2] in ("all-gather", "collective-permute")
            found[match[2]] = found.get(match[2], 0) + (max(sizes) if started else sum(sizes))
    return found


def _bytes(kind: str, dims: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.ceil(math.prod(int(d) for d in dims.split(",") if d) * bits / 8)


def forward_flops(exp: Experiment) -> dict[str, float]:
    """{stage: FLOPs of its forward pass on a batch}, of each stage alone."""
    size = exp.preprocessing.size
    x = jax.ShapeDtypeStruct((exp.config.batch_size, size, size, exp.model.channels), np.float32)
    model, found = exp.model.clone(axis_name=None), {}
    for stage, after in zip(model.stages, (*model.stages[1:], None)):
        run = lambda variables, x, start=stage, stop=after: model.apply(variables, x, start=start, stop=stop)
        analysis = jax.jit(run).lower(exp.shapes, x).cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis or {}
        found[stage] = float(analysis.get("flops", 0))
        x = jax.eval_shape(run, exp.shapes, x)
    return found


def theory(plan: Plan, forward: dict[str, float]) -> float:
    """FLOPs of a step by counting passes: (N + 2k)/3N of full training for the last k of N equal blocks.

    Every stage runs forward; from the first live stage on the gradient of the activations runs back through every
    stage, frozen or not, and costs one forward pass each (none in the first stage: images have no gradient); the
    gradient of the weights costs one more, in proportion to the share of the stage's kernels that trains. (A first
    live stage whose first layer alone trains costs a pass back less: nothing needs the gradient of its input.)
    """
    behind = plan.stages[plan.stages.index(plan.live_stages[0]) :]
    activations = sum(forward[stage] for stage in behind if stage != plan.stages[0])
    return sum(forward.values()) + activations + sum(forward[s] * kernel_share(plan, s) for s in behind)


def kernel_share(plan: Plan, stage: str) -> float:
    """The share of a stage's kernels (leaves of two dimensions or more) that trains, by number of values."""
    kernels = [leaf for leaf in plan.leaves if leaf.stage == stage and len(leaf.shape) >= 2]
    return sum(leaf.size for leaf in kernels if leaf.multiplier) / max(sum(leaf.size for leaf in kernels), 1)


def remark(plan: Plan, forward: dict[str, float]) -> str | None:
    """Where the plan leaves savings on the table: what trains early makes the backward pass run through what is frozen.

    "a bias trains in 'stem': the backward pass runs through all 16 stages from 'block1' to 'block16', of which no
    kernel trains: 31 % of the step". None where no such stage lies behind the first live one.
    """
    first = plan.stages.index(plan.live_stages[0])
    # Up to the first stage behind it whose kernels train: from there the backward pass is needed anyway.
    until = next((i for i in range(first + 1, len(plan.stages)) if kernel_share(plan, plan.stages[i])), first + 1)
    crossed = plan.stages[first + 1 : until]
    if not crossed:
        return None
    own = [leaf for leaf in plan.trainable if leaf.stage == plan.stages[first]]
    if kernel_share(plan, plan.stages[first]):
        what = f"{len(own)} leaves train" if len(own) > 1 else "a kernel trains"
    elif len(own) == 1:
        what = f"a {own[0].path.split('/')[-1]} trains"
    else:
        what = f"no kernel but {len(own)} leaves train"
    spent = sum(forward[stage] for stage in crossed) / theory(plan, forward)
    through = f"{crossed[0]!r}" if len(crossed) == 1 else f"all {len(crossed)} stages {crossed[0]!r} … {crossed[-1]!r}"
    return (
        f"{what} in {plan.stages[first]!r}: the backward pass runs through {through}, "
        f"of which no kernel trains: {100 * spent:.0f} % of the step"
    )


def estimate(exp: Experiment, plan: Plan, layout: Layout, forward: dict[str, float], name: str = "") -> Estimate:
    """Compiles the experiment's step under a plan on the layout, and reads what the compiler says."""
    config, p = exp.config, exp.preprocessing
    tx = optim.optimizer(plan, config.optim, lambda step: config.optim.lr)
    step = exp.train_step(plan, tx, layout)
    state = exp.state_shapes(plan, tx)
    compiled = layout.compile_train(step, state, layout.abstract_batch(config.batch_size, p.size))
    found, memory, totals = cost(compiled), compiled.memory_analysis(), plan.totals()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Estimate(
        strategy=name or config.strategy,
        trainable=totals["trainable"] / totals["parameters"],
        # XLA counts the body of a loop once, and the parts of an accumulated batch are one.
        flops=found["flops_per_step"] * len(layout.devices) * config.optim.accumulate,
        theory=theory(plan, forward),
        temporary=found["temporary_bytes"],
        peak=arguments + found["temporary_bytes"],
        state=sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state)),
        optimizer=optim.state_bytes(tx, plan)[1],
        collective=sum(collective_bytes(compiled).values()),
        devices=len(layout.devices),
    )


def strategies_of(given: str) -> list[str]:
    """Reads `frozen,partial:last=2,full`: strategies with their arguments behind colons; calls stay as they are."""
    depth, items = 0, [""]
    for letter in given:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    calls = []
    for item in filter(None, map(str.strip, items)):
        name, *arguments = item.split(":")
        calls.append(item if "(" in item else f"{name}({', '.join(arguments)})")
    return calls


def compare(config, num_classes: int, strategies: Iterable[str], devices: int = 1) -> tuple[list[Estimate], list[str]]:
    """Returns (an estimate a strategy, what to say of them: see `remark`); without strategies one a phase.

    Raises UserError where there are fewer devices, and for whatever in the config or a strategy does not fit.
    """
    if devices > len(jax.devices()):
        raise UserError(f"--devices={devices}: there are {len(jax.devices())}")
    layout = Layout(config.parallel, config.batch_size, config.optim.accumulate, devices)
    if strategies:
        # Each with its own tree: adapters are part of it.
        alone = [config.copy_and_resolve_references() for _ in strategies]
        for one, strategy in zip(alone, strategies):
            one.strategy, one.phases = strategy, ""
        exps = [build(one, num_classes, layout) for one in alone]
        plans = [(strategy, exp, exp.plans[0][1]) for strategy, exp in zip(strategies, exps)]
    else:
        exp = build(config, num_classes, layout)
        several = len(exp.plans) > 1
        only = config.phases or config.strategy
        plans = [(f"phase {i}, {t}" if several else only, exp, plan) for i, (t, plan) in enumerate(exp.plans, 1)]
    passes, found, said = {}, [], []
    for name, exp, plan in plans:
        if plan.structure not in passes:
            passes[plan.structure] = forward_flops(exp)
        forward = passes[plan.structure]
        found.append(estimate(exp, plan, layout, forward, name))
        said += [f"{name}: {line}"] if (line := remark(plan, forward)) else []
    return found, said


def table(estimates: list[Estimate]) -> str:
    """The estimates as text, a row each, with FLOPs as shares of the costliest."""
    most, in_theory = (max(getattr(e, name) for e in estimates) for name in ("flops", "theory"))
    share = lambda part, whole: f"{100 * part / whole:.1f} %" if whole else "-"
    head = "strategy|trains|FLOPs|theory|of most|theory|scratch|peak|state|optimizer|collectives"
    rows = [tuple(head.split("|"))]
    for e in estimates:
        shares = share(e.flops, most), share(e.theory, in_theory)
        sizes = map(text.size, (e.temporary, e.peak, e.state, e.optimizer, e.collective))
        rows.append((e.strategy, share(e.trainable, 1), text.flops(e.flops), text.flops(e.theory), *shares, *sizes))
    widths = [max(map(len, column)) for column in zip(*rows)]
    count = estimates[0].devices
    where = "one device" if count == 1 else f"{count} devices: FLOPs of all, bytes of each"
    return "\n".join(
        [
            f"compiler estimates of one step on {where} ({jax.devices()[0].platform})",
            *(
                "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
                for row in rows
            ),
            "theory: one pass forward, one back from the first live stage on, one more for the weights that train",
        ]
    )


def main_lines(config, num_classes: int, given: str, devices: str, picture: str) -> list[str]:
    """What `python -m tljax.plan --cost` prints, and draws where strategies are compared."""
    if not (devices or "1").isdigit() or int(devices or 1) < 1:
        raise UserError(f"--devices={devices}: expected a whole number")
    # Before jax starts: so many devices are pretended where there is only the processor.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(int(devices or 1), jax.config.jax_num_cpu_devices))
    asked = abs(config.parallel.data * config.parallel.fsdp)
    if asked > int(devices or 1):
        raise UserError(f"config.parallel asks for {asked} devices: give --devices={asked} or more")
    found, said = compare(config, num_classes, strategies_of(given), int(devices or 1))
    lines = [table(found), *said]
    if given:
        from tljax.report.pictures import costs

        costs(found, picture or "plan.png")
        lines.append(f"drawn in {picture or 'plan.png'}")
    return lines
