"""The same pass in tljax and in PyTorch, each side in a process of its own: what the benchmarks of steps share.

A pass is forward, or one training step: AdamW after one clip by global norm, on the same random uint8 batch, weights
random. PyTorch is given its best form: timm's networks, channels last, `requires_grad=False` and a prefix under
`no_grad` in evaluation mode for what is frozen, eager or through `torch.compile`; on a GPU both sides compute in
bfloat16, PyTorch by autocast. On the CPU the sides take turns, so that all see the same machine; on a GPU, whose
memory one of them may fill, they come one after another.
"""

from tljax import pages

if __name__ == "__main__":
    pages.restart()

import contextlib
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import turns

SIDES = ("tljax", "eager", "compiled")
NETWORKS = {
    "resnet50": "resnet50",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "mobilenet_v2": "mobilenetv2_100",
    "convnext_tiny": "convnext_tiny",
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_base_patch16": "vit_base_patch16_224",
}
RANK, ALPHA = 8, 16.0
STRATEGIES = {
    "full": "full()",
    "last 3": "partial(last=3)",
    "head": "frozen()",
    "LoRA": f"lora(rank={RANK}, alpha={ALPHA}, targets='**/attn/{{query,value}}')",
}
CLASSES = 1000
FORWARD, TRAIN = "forward", "train"


def ours(name: str, strategy: str, batch: int, size: int, bfloat16: bool) -> dict:
    """{"forward", "train"}: functions that do one pass and wait for it."""
    import jax

    from tljax import config as configs
    from tljax import experiment, parallel
    from tljax.step import init_state, make_predict_step, make_train_step

    config = configs.base(name)
    config.weights, config.reset, config.strategy, config.image_size = "", (), STRATEGIES[strategy], size
    config.batch_size, config.dtype = batch, "bfloat16" if bfloat16 else "float32"
    exp = experiment.build(config, CLASSES)
    layout = parallel.Layout(config.parallel, batch, devices=1)
    p, (params, stats, _) = exp.preprocessing, exp.load()
    phase = exp.in_time(100 * batch)[0]
    tx, _ = exp.optimizer(phase, 100 * batch)
    step = make_train_step(exp.model, phase.plan, tx, mean=p.mean, std=p.std, num_classes=CLASSES)
    rng = np.random.default_rng(0)
    placed = layout.place_batch(
        {
            "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
            "label": rng.integers(0, CLASSES, batch).astype(np.int32),
        }
    )
    predict = layout.compile_predict(make_predict_step(exp.model, mean=p.mean, std=p.std))
    state = layout.place(jax.jit(init_state, static_argnums=(0, 1, 4))(phase.plan, tx, params, stats, 0.0))
    params, stats = layout.place((params, stats))
    compiled = layout.compile_train(step, state, layout.abstract_batch(batch, size))
    held = [state]

    def train():
        held[0], measured = compiled(held[0], placed)
        jax.block_until_ready(measured)

    return {FORWARD: lambda: jax.block_until_ready(predict(params, stats, placed["image"])), TRAIN: train}


def peer(name: str, strategy: str, batch: int, size: int, bfloat16: bool, compiled: bool) -> dict:
    """As `ours`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
    import torch
    from torch_zoo import import_timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    sized = {"img_size": size} if name.startswith("vit") else {}
    net = import_timm().create_model(NETWORKS[name], num_classes=CLASSES, **sized)
    net = net.to(device, memory_format=torch.channels_last)
    frozen, trained = parts(net, strategy)
    if strategy == "LoRA":
        low_rank(trained)
    learned = [p for p in trained.parameters() if p.requires_grad]
    compile_ = torch.compile if compiled else lambda part: part
    first, behind = (compile_(part) if len(part) else part for part in (frozen, trained))
    x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch,), device=device)
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in statistics)
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.1, foreach=True)
    cast = lambda: torch.autocast(device, torch.bfloat16, enabled=bfloat16)
    done = torch.cuda.synchronize if device == "cuda" else lambda: None

    def forward():
        frozen.eval(), trained.eval()
        with torch.inference_mode(), cast():
            behind(first((x.float() - mean) / std))
        done()

    def train():
        frozen.eval(), trained.train()
        with cast():
            with torch.no_grad() if len(frozen) else contextlib.nullcontext():
                features = first((x.float() - mean) / std)
            loss = torch.nn.functional.cross_entropy(behind(features), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        done()

    return {FORWARD: forward, TRAIN: train}


def parts(net, strategy: str):
    """(what is frozen from the input on, the rest) of a timm network, both `Sequential`, cut where tljax cuts it."""
    from torch import nn

    class Of(nn.Module):  # a function of the network as a module
        def __init__(self, of, *owned):
            super().__init__()
            self.of, self.owned = of, nn.ModuleList(owned)

        def forward(self, x):
            return self.of(x)

    if hasattr(net, "patch_embed"):
        embed = Of(lambda x: net.norm_pre(net._pos_embed(net.patch_embed(x))), net.patch_embed)
        for name in ("cls_token", "pos_embed"):
            embed.register_parameter(name, getattr(net, name))
        stages = [embed, *net.blocks, net.norm, Of(net.forward_head, net.fc_norm, net.head)]
    elif hasattr(net, "layer4"):
        stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)
        blocks = (block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer)
        stages = [stem, *blocks, nn.Sequential(net.global_pool, net.fc)]
    elif hasattr(net, "conv_stem"):
        stem, top = nn.Sequential(net.conv_stem, net.bn1), nn.Sequential(net.conv_head, net.bn2)
        blocks = (block for stage in net.blocks for block in stage)
        stages = [stem, *blocks, top, nn.Sequential(net.global_pool, net.classifier)]
    else:
        stages = [net]
    cut = {"head": -1, "last 3": -4}.get(strategy, 0) % len(stages)
    frozen, trained = nn.Sequential(*stages[:cut]), nn.Sequential(*stages[cut:])
    frozen.requires_grad_(False)
    return frozen, trained


def low_rank(trained) -> None:
    """LoRA on queries and values of timm's blocks, whose projections are one matrix; the head trains beside it."""
    import torch
    from torch import nn

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, width = base, base.in_features
            new = lambda *shape: nn.Parameter(torch.zeros(shape, device=base.weight.device))
            self.a = nn.ParameterList(new(RANK, width) for _ in range(2))
            self.b = nn.ParameterList(new(width, RANK) for _ in range(2))
            for a in self.a:
                nn.init.kaiming_uniform_(a)

        def forward(self, x):
            query, value = (ALPHA / RANK * ((x @ a.T) @ b.T) for a, b in zip(self.a, self.b))
            return self.base(x) + torch.cat([query, torch.zeros_like(query), value], -1)

    trained[:-1].requires_grad_(False)
    for block in trained:
        if hasattr(block, "attn"):
            block.attn.qkv = Lora(block.attn.qkv)


# ---- one side's process, and all of them


def serve(side: str, of: tuple) -> None:
    """Answers the name of a pass with its seconds: the second of two."""

    def functions():
        passes = ours(*of) if side == SIDES[0] else peer(*of, side == SIDES[2])

        def timed(run):
            run()
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun

        return {name: functools.partial(timed, run) for name, run in passes.items()}

    turns.serve(functions)


def compare(name: str, strategy: str, passes: tuple, batch: int, size: int, repeats: int, gpu: bool) -> dict:
    """{pass: {side: median seconds}}."""
    start = lambda side: turns.Process(
        sys.executable, __file__, json.dumps([side, (name, strategy, batch, size, gpu)]),
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )  # fmt: skip
    return turns.medians({side: functools.partial(start, side) for side in SIDES}, passes, repeats, together=not gpu)


def row(seconds: dict, batch: int) -> tuple:
    """Images a second of the sides, and the ratios of ours to the others."""
    own, *others = (batch / seconds[side] for side in SIDES)
    return (*(f"{speed:.1f}" for speed in (own, *others)), *(f"{own / other:.2f}" for other in others))


HEAD = ("tljax", "PyTorch eager", "PyTorch compiled", "ratio to eager", "ratio to compiled")


def versions() -> str:
    """The versions of both sides."""
    from importlib.metadata import version

    return f"jax {version('jax')}, PyTorch {version('torch')} with timm's networks, channels last"


if __name__ == "__main__":
    side, of = json.loads(sys.argv[1])
    serve(side, of)
