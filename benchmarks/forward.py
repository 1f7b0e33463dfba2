"""Images a second of five networks, forward and in a full training step, against PyTorch (eager and compiled).

    python benchmarks/forward.py                          # extra `parity`; writes docs/speed.md
    python benchmarks/forward.py --only=resnet50 --size=128

The same batch and optimizer (AdamW) on both sides, PyTorch's networks from timm, channels last, in the same process
and with large pages (tljax/pages.py): round by round each side takes its turn. float32 on the CPU; on a GPU bfloat16,
PyTorch by autocast. The figures are medians over the rounds.
"""

from tljax import pages

if __name__ == "__main__":
    pages.restart()

import argparse
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


def peers(name: str, batch: int, size: int, bfloat16: bool) -> dict[str, dict]:
    """{"eager", "compiled"}: as `ours`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
    import torch
    from torch_zoo import import_timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sized = {"img_size": size} if name.startswith("vit") else {}
    net = import_timm().create_model(NETWORKS[name], num_classes=CLASSES, **sized)
    net = net.to(device, memory_format=torch.channels_last)
    x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch,), device=device)
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in statistics)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)
    cast = lambda: torch.autocast(device, torch.bfloat16, enabled=bfloat16)
    done = torch.cuda.synchronize if device == "cuda" else lambda: None

    def side(call):
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

    return {"eager": side(net), "compiled": side(torch.compile(net))}


def measure(name: str, batch: int, size: int, rounds: int, bfloat16: bool) -> dict:
    """{(side, "forward" | "train"): images a second}."""
    sides = {"tljax": ours(name, batch, size, bfloat16), **peers(name, batch, size, bfloat16)}
    seconds = {(side, what): [] for what in ("forward", "train") for side in sides}
    for what in ("forward", "train"):
        for i in range(rounds + 1):  # the first round compiles
            for side, functions in sides.items():
                begun = time.perf_counter()
                functions[what]()
                if i:
                    seconds[side, what].append(time.perf_counter() - begun)
    return {key: batch / np.median(values) for key, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    import torch

    gpu = jax.default_backend() == "gpu"
    rows = []
    for name in given.only.split(","):
        speed = measure(name, given.batch, given.size, given.rounds, gpu)
        for what in ("forward", "train"):
            own, eager, compiled = (speed[side, what] for side in ("tljax", "eager", "compiled"))
            rows.append(
                (name, what, f"{own:.1f}", f"{eager:.1f}", f"{compiled:.1f}", f"{own / eager:.2f}",
                 f"{own / compiled:.2f}")
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    head = ("network", "pass", "tljax", "PyTorch eager", "PyTorch compiled", "ratio to eager", "ratio to compiled")
    text = f"""## Forward and full training step

Images a second, by `python benchmarks/forward.py`: batch {given.batch} at {given.size} pixels,
{"bfloat16" if gpu else "float32"}, AdamW on all parameters, medians of {given.rounds}; jax {jax.__version__}, PyTorch
{torch.__version__} with timm's networks, channels last. Machine: {sections.machine()}.

{sections.table(head, rows)}
"""
    if given.only == ",".join(NETWORKS):
        sections.write("forward", text)


if __name__ == "__main__":
    main()
