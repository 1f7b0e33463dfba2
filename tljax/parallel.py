"""Where things live: the mesh, the placement of state and batches, and the compiled steps (jit or pmap)."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tljax import files
from tljax.errors import UserError

Tree = Any
BATCH = ("data", "fsdp")  # a batch is spread over every device
AXIS = "devices"  # the axis name under pmap
FSDP_LEAST = 2**14  # values; smaller leaves stay whole: gathering them costs more than it saves


def start() -> None:
    """What comes before the first use of a device: the compilation cache, and threads for fake devices."""
    if int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1) > 1:
        # With fewer threads than fake CPU devices their collectives can wait for each other for ever.
        os.environ.setdefault("PJRT_NPROC", "16")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(files.cached("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


class Layout:
    """The devices of a run and how arrays lie on them, from `config.parallel`.

    The devices are all that there are, or the first so many of them, or those given: a topology's will do for
    compiling. Raises UserError where the sizes do not fit.
    """

    def __init__(self, config: ConfigDict, batch_size: int, accumulate: int = 1, devices: int | Sequence | None = None):
        self.mode, self.batch_size = config.mode, batch_size
        given = devices if isinstance(devices, Sequence) else jax.devices()
        # Process by process: the parts of a batch lie in the order of the processes that read them.
        ordered = sorted(given, key=lambda d: (d.process_index, d.id))
        self.devices = ordered[:devices] if isinstance(devices, int) else ordered
        self.local = [d for d in self.devices if d.process_index == jax.process_index()]
        count = len(self.devices)
        data, fsdp = mesh_sizes(config.get("data", -1), config.fsdp, count)
        if self.mode == "pmap" and fsdp > 1:
            raise UserError("config.parallel.fsdp needs config.parallel.mode = 'jit'")
        if self.mode == "pmap" and jax.process_count() > 1:
            raise UserError(
                f"config.parallel.mode = 'pmap' is for one process, not {jax.process_count()}: "
                "its arrays belong to one process each; 'jit' gives the same results in any number"
            )
        if batch_size % (count * accumulate):
            raise UserError(
                f"config.batch_size = {batch_size} is not divisible by {count} devices"
                + (f" × {accumulate} parts of config.optim.accumulate" if accumulate > 1 else "")
            )
        self.mesh = Mesh(np.array(self.devices).reshape(data, fsdp), BATCH)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch = NamedSharding(self.mesh, PartitionSpec(BATCH))

    @classmethod
    def for_evaluation(cls, batch_size: int) -> "Layout":
        """Plain data parallelism over the devices that are here, whatever a run was trained on."""
        count = jax.device_count()
        return cls(ConfigDict({"mode": "jit", "fsdp": 1}), -(-batch_size // count) * count)

    def __str__(self):
        data, fsdp = self.mesh.devices.shape
        return self.mode + (f", data {data} × fsdp {fsdp}" if fsdp > 1 else "")

    @property
    def axis_name(self) -> str | None:
        """The axis over which modules and the step reduce by hand: only under pmap."""
        return AXIS if self.mode == "pmap" else None

    def shardings(self, tree: Tree) -> Tree:
        """Replicated; under FSDP the largest divisible dimension of each large leaf is laid over `fsdp`."""
        if self.mode == "pmap":  # the placement that its own outputs have
            whole = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec())
            return jax.tree.map(lambda _: whole, tree)
        size = self.mesh.shape["fsdp"]

        def sharding(leaf):
            dims = [d for d in np.argsort(leaf.shape)[::-1] if leaf.shape[d] % size == 0]
            if size == 1 or leaf.size < FSDP_LEAST or not dims:
                return self.replicated
            spec = [None] * leaf.ndim
            spec[dims[0]] = "fsdp"
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree.map(sharding, tree)

    def abstract(self, tree: Tree) -> Tree:
        """Shapes, dtypes and shardings of a state, for compiling and restoring."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, self.shardings(tree))

    def place(self, tree: Tree) -> Tree:
        """Puts a state on the devices, as buffers of its own (they are donated to the step)."""

        def put(x, sharding):
            if jax.process_count() > 1 and not (isinstance(x, jax.Array) and not x.is_fully_addressable):
                # What `device_put` makes of a process's own array has shards of shards, which no checkpoint takes.
                x = np.asarray(x)
                return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))
            return jax.device_put(x, sharding, may_alias=False)

        return jax.tree.map(put, tree, self.shardings(tree))

    def place_batch(self, batch: dict) -> dict:
        """Puts this process's part of a batch on its devices."""
        if self.mode == "pmap":
            return {k: v.reshape(len(self.local), -1, *v.shape[1:]) for k, v in batch.items()}
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        return {k: jax.make_array_from_process_local_data(self.batch, v) for k, v in batch.items()}

    def abstract_batch(self, batch_size: int, size: int, features: jax.ShapeDtypeStruct | None = None) -> dict:
        """Shapes of a placed batch of uint8 images, or of features as the one example's, and int32 labels."""
        shapes = {"image": ((batch_size, size, size, 3), np.uint8), "label": ((batch_size,), np.int32)}
        if features is not None:
            shapes = {"features": ((batch_size, *features.shape), features.dtype), "label": shapes["label"]}
        if self.mode == "pmap":
            local, b = len(self.local), batch_size // len(self.devices)
            return {k: jax.ShapeDtypeStruct((local, b, *s[1:]), d) for k, (s, d) in shapes.items()}
        return {k: jax.ShapeDtypeStruct(s, d, sharding=self.batch) for k, (s, d) in shapes.items()}

    def program(self, train_step, *states: Tree, more: int = 0):
        """`train_step(*states, batch, …) -> (the first of the states, metrics)` as it runs on the devices.

        The first state is donated. The step takes so many arguments `more`, which are whole on every device.
        """
        if self.mode == "pmap":
            return jax.pmap(
                train_step,
                axis_name=AXIS,
                in_axes=(*(None,) * len(states), 0, *(None,) * more),
                out_axes=(None, None),
                donate_argnums=(0,),
                devices=self.devices,
            )
        shardings = tuple(map(self.shardings, states))
        return jax.jit(
            train_step,
            in_shardings=(*shardings, self.batch, *(self.replicated,) * more),
            out_shardings=(shardings[0], self.replicated),
            donate_argnums=(0,),
        )

    def compile_train(self, train_step, state: Tree, batch: dict):
        """Compiles `train_step(state, batch) -> (state, metrics)`."""
        return self.program(train_step, state).lower(self.abstract(state), batch).compile()

    def compile_predict(self, predict_step):
        """Jits `predict_step(params, stats, images) -> logits`; logits come back whole on every process."""
        if self.mode == "pmap":
            return jax.pmap(
                lambda *args: jax.lax.all_gather(predict_step(*args), AXIS, tiled=True),
                axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, devices=self.devices,
            )  # fmt: skip
        return jax.jit(predict_step, out_shardings=self.replicated)

    @functools.cached_property
    def _gather(self):
        return jax.jit(lambda tree: tree, out_shardings=self.replicated)

    def to_host(self, tree: Tree) -> Tree:
        """The whole arrays as numpy, also where a leaf is laid over several devices or processes."""
        reached = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        if not all(map(reached, jax.tree.leaves(tree))):
            tree = self._gather(tree)
        return jax.tree.map(np.asarray, tree)


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """The sizes of the mesh's axes over so many devices, from `config.parallel`'s, of which -1 is the rest.

    Raises UserError where they do not multiply to the devices.
    """
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size < -1 or not size:
            raise UserError(f"config.parallel.{name} = {size}: expected a number of devices, or -1 for the rest")
    open_ = [name for name, size in sizes.items() if size == -1]
    if len(open_) == 2:
        raise UserError("config.parallel.data and config.parallel.fsdp are both -1: only one of them can be the rest")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_ and count % fixed:
        (name,) = set(sizes) - set(open_)
        raise UserError(f"config.parallel.{name} = {fixed} does not divide the {count} devices")
    if not open_ and fixed != count:
        raise UserError(
            f"config.parallel.data × config.parallel.fsdp = {data} × {fsdp} = {fixed}, but there are {count} devices; "
            "-1 takes the rest"
        )
    return tuple(size if size != -1 else count // fixed for size in (data, fsdp))


class Spread:
    """The devices over which the members of a sweep are laid: each runs its own, and nothing passes between them."""

    def __init__(self, devices: int):
        self.devices = jax.local_devices()[:devices]
        self.mesh = Mesh(np.array(self.devices), ("members",))
        self.members = NamedSharding(self.mesh, PartitionSpec("members"))  # leaves [members, …]
        self.shared = NamedSharding(self.mesh, PartitionSpec())

    def each(self, count: int) -> int:
        """How many of so many members each device runs."""
        return -(-count // len(self.devices))

    def program(self, function, *laid: bool, donate: tuple[int, ...] = ()):
        """Jits a function; the leaves of arguments that are `laid`, and of all results, are [members, …].

        Every device runs the function on its part of them, and on the whole of the other arguments.
        """
        specs = tuple(PartitionSpec("members") if is_laid else PartitionSpec() for is_laid in laid)
        if len(self.devices) > 1:
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec("members"), check_vma=False
            )
        shardings = tuple(NamedSharding(self.mesh, spec) for spec in specs)
        return jax.jit(function, in_shardings=shardings, out_shardings=self.members, donate_argnums=donate)


def members_over(wanted: int, count: int) -> int:
    """Over how many devices so many members are laid, from `config.parallel.members`. Raises UserError."""
    there = jax.local_device_count()
    if wanted > there:
        raise UserError(f"config.parallel.members = {wanted}: there are {there} devices; 0 takes all there are")
    return min(wanted or there, count)


def memory() -> dict[str, int]:
    """Bytes of this process's fullest device, {"memory_bytes": now, "memory_peak_bytes"}; {} where none tells them."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) for name, key in names.items() if stats and all(key in s for s in stats)}


def memory_peak() -> int:
    """Bytes: the largest device's peak where the backend tells it, else the process's peak resident size."""
    found = memory().get("memory_peak_bytes")
    if found is not None:
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost(compiled) -> dict[str, float]:
    """What the compiler says of a step: {"flops_per_step": of one device, "temporary_bytes": its scratch memory}."""
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis or {}
    return {
        "flops_per_step": float(analysis.get("flops", 0)),
        "temporary_bytes": int(getattr(memory, "temp_size_in_bytes", 0)),
    }
