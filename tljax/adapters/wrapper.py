"""A model with adapters: the wrapper, and how adapters are merged into the model's own weights or left out."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from flax import linen as nn

from tljax.adapters.kinds import IA3, KINDS, Adapter, Bottleneck, Lora, Prompts, Site
from tljax.errors import UserError, nearest, unknown

__all__ = ["IA3", "KINDS", "Adapted", "Adapter", "Bottleneck", "Lora", "Prompts", "adapt", "merge", "plain"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with adapters: `init` and `apply` as the model's own, over a tree that holds the adapters too."""

    model: nn.Module
    adapters: tuple[Adapter, ...]
    sites: dict[str, tuple[str, ...]]  # {adapter: paths of its modules, in the order of the forward pass}
    active: tuple[str, ...]

    def __getattr__(self, name: str):
        # Only what the wrapper has not: the model's stages, size, dtype, …
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def clone(self, **fields) -> "Adapted":
        """The wrapper around the model's clone."""
        return dataclasses.replace(self, model=self.model.clone(**fields))

    def using(self, *names: str) -> "Adapted":
        """With these adapters at work, and no others: none is the model alone. Raises UserError for unknown names."""
        for name in names:
            if name not in self.sites:
                raise unknown("adapter", name, self.sites)
        return dataclasses.replace(self, active=names)

    def init(self, key: Any, *args, **kwargs) -> Tree:
        """The model's variables, as it makes them alone, with new adapters: the identity all of them."""
        with nn.intercept_methods(self._creating):
            return self.model.init(key, *args, **kwargs)

    def apply(self, variables: Tree, *args, **kwargs):
        """The model's `apply` with the active adapters; their dropout is on where the stage is live and has a key."""
        live = kwargs.get("live")

        def intercept(call, args, kwargs, context):
            path = "/".join(context.module.path)
            running = [a for a in self.adapters if a.name in self.active and path in self.sites[a.name]]
            if context.method_name != "__call__" or not running:
                return call(*args, **kwargs)
            module, (x, *rest) = context.module, args
            training = module.has_rng("dropout") and (live is None or path.split("/")[0] in live)
            adapted = lambda x: call(x, *rest, **kwargs)
            for adapter in running:
                values, last = module.get_variable("params", adapter.name), path == self.sites[adapter.name][-1]
                site = Site(module, values, last, training, getattr(self.model, "axis_name", None))
                adapted = adapter.around(adapted, site)
            return adapted(x)

        with nn.intercept_methods(intercept):
            return self.model.apply(variables, *args, **kwargs)

    def _creating(self, call, args, kwargs, context):
        y, module, path = call(*args, **kwargs), context.module, "/".join(context.module.path)
        if context.method_name == "__call__":
            for adapter in self.adapters:
                wanted = path in self.sites[adapter.name] and not module.has_variable("params", adapter.name)
                if wanted and adapter.has_values(path == self.sites[adapter.name][0]):
                    # After the module's own parameters: a leaf of the model depends on no adapter.
                    values = adapter.create(module.make_rng("params"), module, path, args[0], y)
                    module.put_variable("params", adapter.name, values)
        return y


def adapt(model: nn.Module, adapters: Iterable[Adapter], *example) -> Adapted:
    """Wraps a model; `example`: its arguments, or their shapes, for one look at its modules.

    The last stage of a model that has `stages`, its head, takes no adapters. Raises UserError: two adapters of one
    name, a name that the tree has already, targets that match no module which the adapter can change.
    """
    adapters = tuple(adapters)
    names = [adapter.name for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two adapters are called {name!r}: give one another name, as lora(name='other')")
    head = model.stages[-1] if hasattr(model, "stages") else None
    sites: dict[str, dict[str, None]] = {name: {} for name in names}
    fitting: dict[str, list[str]] = {name: [] for name in names}

    def look(call, args, kwargs, context):
        y, module, path = call(*args, **kwargs), context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not path or not args or path.split("/")[0] == head:
            return y
        for adapter in adapters:
            if module.has_variable("params", adapter.name):
                raise UserError(f"adapter {adapter.name!r}: {path!r} has parameters of that name already")
            if adapter.fits(module, args[0], y):
                fitting[adapter.name].append(path)
                if adapter.chooses(path):
                    sites[adapter.name][path] = None
        return y

    with nn.intercept_methods(look):
        jax.eval_shape(model.init, jax.random.key(0), *example)
    for adapter in adapters:
        if not sites[adapter.name]:
            close = nearest(adapter.targets, fitting[adapter.name]) or f"; such are {fitting[adapter.name][:6]}"
            raise UserError(f"adapter {adapter.name!r}: targets {adapter.targets!r} match no {adapter.what}{close}")
    return Adapted(model, adapters, {name: tuple(paths) for name, paths in sites.items()}, tuple(names))


def merge(model: Adapted, params: Tree) -> Tree:
    """The parameters of the plain model that computes what `model` does: active adapters folded in, all removed.

    Raises UserError for adapters that are no linear map of weights (bottlenecks, prompts).
    """
    params = plain(model, params, keep=model.active)
    for adapter in model.adapters:
        if adapter.name in model.active:
            for path in model.sites[adapter.name]:
                params = _at(params, path.split("/"), lambda node, a=adapter: _folded(a, node))
    return params


def _folded(adapter: Adapter, node: dict) -> dict:
    own = {key: value for key, value in node.items() if key != adapter.name}
    return adapter.fold(own, node[adapter.name])


def plain(model: nn.Module | Adapted, tree: Tree, keep: Iterable[str] = ()) -> Tree:
    """A tree like the parameters without the adapters, but for those to `keep`: the model's own part."""
    if not isinstance(model, Adapted):
        return tree
    for name in set(model.sites) - set(keep):
        for path in model.sites[name]:
            tree = _at(tree, path.split("/"), lambda node, n=name: {k: v for k, v in node.items() if k != n})
    return tree


def _at(tree: Tree, keys: list[str], change) -> Tree:
    """The nested dict with the node at `keys` changed; all else is shared."""
    if not keys:
        return change(tree)
    return {**tree, keys[0]: _at(tree[keys[0]], keys[1:], change)}
