"""Strategies: functions that write rules. A strategy knows a model's stages, never its weights.

Each function here returns a `Strategy`; given the stages from input to output it writes ordered rules
`(pattern, multiplier)` for `tljax.plan`. In a config a strategy is written as the call itself:
`config.strategy = "partial(last=4)"`.
"""

from collections.abc import Callable, Iterable

from tljax.config import call
from tljax.errors import UserError, unknown

Rules = tuple[tuple[str, float], ...]
Strategy = Callable[[tuple[str, ...]], Rules]


def rules(*pairs: tuple[str, float]) -> Strategy:
    """Plain rules: `rules(("head", 1), ("**/bias", 0.1), ("**", 0))`; the first that matches decides."""
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], int | float)
            and pair[1] >= 0
        ):
            raise UserError(f"rule {pair!r}: expected (pattern, multiplier >= 0)")
    return lambda stages: tuple((pattern, float(multiplier)) for pattern, multiplier in pairs)


def frozen() -> Strategy:
    """Trains the head alone: a linear probe of the pre-trained features."""
    return partial(last=0)


def partial(last: int = -1, from_stage: str = "", body: float = 1.0) -> Strategy:
    """Trains the `last` stages before the head, or all from `from_stage` on, and the head.

    `body` multiplies the learning rate of the stages before the head: what is pre-trained learns more slowly.
    """
    if (last >= 0) == bool(from_stage):
        raise UserError("strategy partial: give either last=n or from_stage='name'")
    if not body > 0:
        raise UserError(f"strategy partial(body={body!r}): expected a multiplier above 0")

    def write(stages):
        before_head = len(stages) - 1
        if last > before_head:
            raise UserError(f"strategy partial(last={last}): the model has {before_head} stages before its head")
        start = _index(from_stage, stages) if from_stage else before_head - last
        return _only(stages[start:], stages, body)

    return write


def full(body: float = 1.0) -> Strategy:
    """Trains everything, the stages before the head with `body` times the learning rate."""
    if not body > 0:
        raise UserError(f"strategy full(body={body!r}): expected a multiplier above 0")
    return lambda stages: (("**", 1.0),) if body == 1 else ((stages[-1], 1.0), ("**", float(body)))


def layerwise_decay(rate: float) -> Strategy:
    """Multiplies the learning rate by `rate**depth`, depth counted in stages from the head (ULMFiT, BEiT)."""
    if not 0 < rate <= 1:
        raise UserError(f"strategy layerwise_decay({rate}): expected 0 < rate <= 1")
    return lambda stages: tuple((s, rate ** (len(stages) - 1 - i)) for i, s in enumerate(stages))


def surgical(stage: str) -> Strategy:
    """Trains one stage and the head (surgical fine-tuning, Lee et al. 2023)."""
    return lambda stages: _only(dict.fromkeys((stages[_index(stage, stages)], stages[-1])), stages)


def discriminative(groups: dict[str, float]) -> Strategy:
    """Gives each group of stages its own multiplier: `discriminative({"block1*": 0.1, "head": 1})`.

    Patterns are those of rules, and as with all rules every parameter must fall into a group.
    """
    if not isinstance(groups, dict):
        raise UserError(f"strategy discriminative({groups!r}): expected {{pattern: multiplier, …}}")
    return rules(*groups.items())


def first(*strategies: Strategy) -> Strategy:
    """Joins strategies; the rules of the earlier come first: `first(rules(("**/bn*", 0)), partial(last=2))`."""
    return lambda stages: tuple(rule for strategy in strategies for rule in strategy(stages))


def _only(live: Iterable[str], stages: tuple[str, ...], body: float = 1.0) -> Rules:
    """These stages train, the others, if there are any, do not."""
    live = tuple(live)
    rest = (("**", 0.0),) if len(live) < len(stages) else ()
    return tuple((stage, 1.0 if stage == stages[-1] else float(body)) for stage in live) + rest


def _index(stage: str, stages: tuple[str, ...]) -> int:
    if stage not in stages:
        raise unknown("stage", stage, stages)
    return stages.index(stage)


STRATEGIES = {f.__name__: f for f in (rules, frozen, partial, full, layerwise_decay, surgical, discriminative, first)}


def parse(text: str) -> Strategy:
    """Returns the strategy that a config's text calls. Raises UserError for unknown names and arguments."""
    return call(text, STRATEGIES, "strategy")
