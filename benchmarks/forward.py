"""Images a second of five networks, forward and in a full training step, against PyTorch (eager and compiled).

    python benchmarks/forward.py                          # extra `parity`; writes docs/speed.md
    python benchmarks/forward.py --only=resnet50 --size=128

The same batch and optimizer (AdamW) on both sides, PyTorch's networks from timm, channels last, all with large pages
(tljax/pages.py). Each side is a process of its own, one after another: side by side each would find the caches, the
memory and the spinning threads of the other. float32 on the CPU; on a GPU bfloat16, PyTorch by autocast. The figures
are medians over the repeats.
"""

from tljax import pages

if __name__ == "__main__":
    pages.restart()

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import sections

NETWORKS = {
    "resnet50": "resnet50",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "mobilenet_v2": "mobilenetv2_100",
    "convnext_tiny": "convnext_tiny",
    "vit_small_patch16": "vit_small_patch16_224",
}
CLASSES = 1000
SIDES = ("tljax", "eager", "compiled")


def ours(name: str, batch: int, size: int, bfloat16: bool) -> dict:
    """{"forward", "train"}: functions that do one and wait for it."""
    from tljax import config as configs
    from tljax import experiment, parallel
    from tljax.step import init_state, make_predict_step, make_train_step

    config = configs.base(name)
    config.weights, config.reset, config.strategy, config.image_size = "", (), "full()", size
    config.batch_size, config.dtype = batch, "bfloat16" if bfloat16 else "float32"
    exp = experiment.build(config, CLASSES)
    layout = parallel.Layout(config.parallel, batch, devices=1)
    p, (params, stats, _) = exp.preprocessing, exp.load()
    phase = exp.in_time(100 * batch)[0]
    tx, _ = exp.optimizer(phase, 100 * batch)
    step = make_train_step(exp.model, phase.plan, tx, mean=p.mean, std=p.std, num_classes=CLASSES)
    state = layout.place(jax.jit(init_state, static_argnums=(0, 1, 4))(phase.plan, tx, params, stats, 0.0))
    predict = layout.compile_predict(make_predict_step(exp.model, mean=p.mean, std=p.std))
    params, stats = layout.place((params, stats))
    rng = np.random.default_rng(0)
    images = {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "label": rng.integers(0, CLASSES, batch).astype(np.int32),
    }
    placed = layout.place_batch(images)
    compiled = layout.compile_train(step, state, layout.abstract_batch(batch, size))
    held = [state]

    def train():
        held[0], measured = compiled(held[0], placed)
        jax.block_until_ready(measured)

    return {"forward": lambda: jax.block_until_ready(predict(params, stats, placed["image"])), "train": train}


def peer(name: str, batch: int, size: int, bfloat16: bool, compiled: bool) -> dict:
    """As `ours`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
    import torch
    from torch_zoo import import_timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sized = {"img_size": size} if name.startswith("vit") else {}
    net = import_timm().create_model(NETWORKS[name], num_classes=CLASSES, **sized)
    net = net.to(device, memory_format=torch.channels_last)
    call = torch.compile(net) if compiled else net
    x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch,), device=device)
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in statistics)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)
    cast = lambda: torch.autocast(device, torch.bfloat16, enabled=bfloat16)
    done = torch.cuda.synchronize if device == "cuda" else lambda: None

    def forward():
        net.eval()
        with torch.inference_mode(), cast():
            call((x.float() - mean) / std)
        done()

    def train():
        net.train()
        with cast():
            loss = torch.nn.functional.cross_entropy(call((x.float() - mean) / std), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        done()

    return {"forward": forward, "train": train}


def side(name: str, of: tuple, repeats: int) -> None:
    """Prints the median seconds of the passes of one side, as JSON."""
    functions = ours(*of) if name == SIDES[0] else peer(*of, name == SIDES[2])
    found = {}
    for what, function in functions.items():
        seconds = []
        for _ in range(repeats + 2):  # the first compile, and warm up
            begun = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begun)
        found[what] = float(np.median(seconds[2:]))
    print(json.dumps(found))


def measure(name: str, given) -> dict:
    """{(side, "forward" | "train"): images a second}."""
    found = {}
    for one in SIDES:
        flags = (f"--only={name}", f"--batch={given.batch}", f"--size={given.size}", f"--repeats={given.repeats}")
        command = [sys.executable, __file__, *flags, f"--side={one}"]
        told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
        found |= {(one, what): given.batch / seconds for what, seconds in told.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", default="", choices=("", *SIDES), help="one side, for the script's own use")
    given = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    if given.side:
        return side(given.side, (given.only, given.batch, given.size, gpu), given.repeats)
    from importlib.metadata import version

    rows = []
    for name in given.only.split(","):
        speed = measure(name, given)
        for what in ("forward", "train"):
            own, eager, compiled = (speed[side, what] for side in SIDES)
            rows.append(
                (name, what, f"{own:.1f}", f"{eager:.1f}", f"{compiled:.1f}", f"{own / eager:.2f}",
                 f"{own / compiled:.2f}")
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    head = ("network", "pass", "tljax", "PyTorch eager", "PyTorch compiled", "ratio to eager", "ratio to compiled")
    text = f"""## Forward and full training step

Images a second, by `python benchmarks/forward.py`: batch {given.batch} at {given.size} pixels,
{"bfloat16" if gpu else "float32"}, AdamW on all parameters, medians of {given.repeats}; jax {jax.__version__}, PyTorch
{version("torch")} with timm's networks, channels last. Machine: {sections.machine()}.

{sections.table(head, rows)}
"""
    if given.only == ",".join(NETWORKS):
        sections.write("forward", text)
    return None


if __name__ == "__main__":
    main()
