"""Tells which model a file's names belong to, when they are not those of the one that was asked for."""

from collections.abc import Iterable, Iterator, Mapping

from tljax.weights import matcher

# What tljax writes itself names every leaf by its path.
OWN = {"tljax": ((r"(?:params|batch_stats)/.+", lambda match: match[0], "same"),)}


def tables(model_name: str) -> dict[str, tuple]:
    """The conversion tables of a model, by naming, and our own."""
    from tljax import models

    return OWN | models.conversion(model_name)


def best_table(names: list[str], model_name: str) -> tuple[str, tuple]:
    """(naming, table) of the model whose rows match the most of `names`."""
    return best_of(names, tables(model_name))


def best_of(names: list[str], tables: Mapping[str, tuple]) -> tuple[str, tuple]:
    """(naming, table) of those whose rows match the most of `names`."""

    def matched(entry: tuple[str, tuple]) -> int:
        return sum(found is not None for found in matcher.targets(names, entry[1]).values())

    return max(tables.items(), key=matched)


def find(source: Mapping[str, tuple[int, ...]], model_name: str) -> tuple[str, str] | None:
    """(model, naming) that `source` (name → shape) fits but for its head, other than `model_name`; or None."""
    from tljax import models

    return next(fitting(source, (name for name in models.names() if name != model_name)), None)


def fitting(source: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each (model, naming) of `names` that `source` (name → shape) fits but for its head.

    Names and numbers of stages are compared first, so that only the few models left are traced for shapes.
    """
    from tljax import models

    for name in names:
        for naming, table in tables(name).items():
            found = matcher.targets(source, table).values()
            if any(parts is None for parts in found):
                continue
            leaves = {part.leaf for parts in found for part in parts if part.leaf}
            stages = {matcher.path_of(leaf).split("/")[0] for leaf in leaves}
            model = models.create(name, 2)
            if stages | {"head"} != set(model.stages):
                continue
            shapes = {path: leaf.shape for path, leaf in matcher.flatten(models.shapes(model)).items()}
            if matcher.fit(source, table, shapes, reset=("head",)).problems == 0:
                yield name, naming
