"""The names of accelerators: Cloud TPU slices, with what a cluster has to know of them, and GPUs as SkyPilot says."""

from typing import NamedTuple

from tljax.errors import UserError, listing, nearest


class Slice(NamedTuple):
    """A TPU slice: its accelerator type, chips and topology, its image as Cloud TPU VMs, and in GKE its hosts and the
    kind of its nodes ("": there are none)."""

    type: str
    chips: int
    topology: str
    runtime: str
    hosts: int
    kind: str

    @property
    def chips_per_host(self) -> int:
        """Chips of one node."""
        return self.chips // self.hosts


SQUARE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
# Generation: {chips: topology}, its image, the kind of its nodes in GKE, what the number in a type's name counts for
# each chip, and the chips of the largest slice on one host. Of larger slices every host has four.
UBUNTU = "tpu-ubuntu2204-base"
GENERATIONS = {
    "v2": ({4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}, UBUNTU, "", 2, 4),
    "v3": ({c: SQUARE[c] for c in SQUARE if c not in (1, 8)} | {512: "16x32", 1024: "32x32"}, UBUNTU, "", 2, 4),
    "v4": (CUBE, UBUNTU, "tpu-v4-podslice", 2, 4),
    "v5litepod": (SQUARE, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, 8),
    "v5p": (CUBE | {4096: "16x16x16", 6144: "16x16x24"}, "v2-alpha-tpuv5", "tpu-v5p-slice", 2, 4),
    "v6e": (SQUARE, "v2-alpha-tpuv6e", "tpu-v6e-slice", 1, 8),
}
SLICES = {
    (name := f"{generation}-{chips * cores}"): Slice(
        name, chips, topology, runtime, 1 if chips <= one else chips // 4, kind
    )
    for generation, (topologies, runtime, kind, cores, one) in GENERATIONS.items()
    for chips, topology in topologies.items()
}
GPUS = (
    "A10", "A10G", "A100", "A100-80GB", "A40", "A6000", "B200", "B300", "GB200", "GH200", "H100", "H100-SXM", "H200",
    "H200-SXM", "K80", "L4", "L40", "L40S", "M60", "P100", "P4", "RTX4090", "RTX5090", "RTX6000-Ada", "RTXPRO6000",
    "T4", "T4g", "V100", "V100-32GB",
)  # fmt: skip


def tpu(name: str) -> Slice:
    """The slice of an accelerator type, as v5litepod-16. Raises UserError with the nearest types."""
    if name not in SLICES:
        generation, _, size = name.removeprefix("tpu-").replace("v5e", "v5litepod").partition("-")
        if generation in GENERATIONS and size.isdigit():
            sizes = [int(s.partition("-")[2]) for s in SLICES if s.startswith(f"{generation}-")]
            near = sorted(sizes, key=lambda there: abs(there - int(size)))[:2]
            raise UserError(f"unknown accelerator type {name!r}; nearest: {listing(f'{generation}-{n}' for n in near)}")
        there = nearest(name, SLICES) or f"; there are: {listing(GENERATIONS)}, each with -CHIPS or -CORES"
        raise UserError(f"unknown accelerator type {name!r}{there}")
    return SLICES[name]


def gpu_or_tpu(name: str) -> str:
    """An accelerator as SkyPilot writes it: tpu-v5litepod-8, H100 or A100:8. Raises UserError with the nearest."""
    if name.startswith("tpu-"):
        return f"tpu-{tpu(name.removeprefix('tpu-')).type}"
    kind, colon, count = name.partition(":")
    if kind not in GPUS:
        if kind.replace("v5e", "v5litepod").partition("-")[0] in GENERATIONS:
            raise UserError(f"unknown accelerator {name!r}; nearest: tpu-{tpu(kind.replace('v5e', 'v5litepod')).type}")
        raise UserError(f"unknown accelerator {name!r}{nearest(kind.upper(), GPUS) or f'; there are: {listing(GPUS)}'}")
    if colon and not (count.isdigit() and int(count) > 0):
        raise UserError(f"accelerator {name!r}: expected {kind}:NUMBER")
    return name
