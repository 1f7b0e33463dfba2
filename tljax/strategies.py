"""Strategies: functions that write rules. A strategy knows a model's stages, never its weights.

Each function here returns a `Strategy`; given the stages from input to output it writes ordered rules
`(pattern, multiplier)` for `tljax.plan`. In a config a strategy is written as the call itself:
`config.strategy = "partial(last=4)"`. They compose: `first` puts rules before rules, `scaled` multiplies them,
`within` sets them under a path.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

from tljax.config import call
from tljax.errors import UserError, nearest, unknown
from tljax.patterns import matches, under

Rules = tuple[tuple[str, float], ...]
Strategy = Callable[[tuple[str, ...]], Rules]
# Modules are recognised by name: a strategy never sees what they hold.
NORMS = "**/{*norm*,*Norm*,bn*,*_bn*,ln*,*_ln*}/{scale,bias}"
ATTENTION = "**/{*attn*,*attention*,*Attention*}"


def rules(*pairs: tuple[str, float]) -> Strategy:
    """Plain rules: `rules(("head", 1), ("**/bias", 0.1), ("**", 0))`; the first that matches decides."""
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], int | float)
            and 0 <= pair[1] < math.inf
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
        before_head = len(_counted(stages)) - 1
        if last > before_head:
            raise UserError(f"strategy partial(last={last}): the model has {before_head} stages before its head")
        start = _index(from_stage, stages) if from_stage else before_head - last
        return _only(stages[start:], stages, body)

    return write


def full(body: float = 1.0) -> Strategy:
    """Trains everything, the stages before the head with `body` times the learning rate."""
    if not body > 0:
        raise UserError(f"strategy full(body={body!r}): expected a multiplier above 0")
    return lambda stages: (("**", 1.0),) if body == 1 else ((_counted(stages)[-1], 1.0), ("**", float(body)))


def layerwise_decay(rate: float, floor: float | dict[str, float] = 0.0) -> Strategy:
    """Multiplies the learning rate by `rate**depth`, depth counted in stages from the head (ULMFiT, BEiT).

    No multiplier falls below `floor`, which may differ by stage and by parameter: `{"**/bias": 0.5, "block1*": 0.1}`,
    where patterns with a `/` are of parameters, those without of stages. Parameters come first; of each kind the first
    that matches decides.
    """
    if not 0 < rate <= 1:
        raise UserError(f"strategy layerwise_decay({rate}): expected 0 < rate <= 1")
    floors = floor if isinstance(floor, dict) else {"**": floor}
    for value in floors.values():
        if not 0 <= value <= 1:
            raise UserError(f"strategy layerwise_decay(floor={floor!r}): expected 0 <= floor <= 1")

    of_parameters = {pattern: float(value) for pattern, value in floors.items() if "/" in pattern}
    of_stages = {pattern: float(value) for pattern, value in floors.items() if "/" not in pattern}

    def write(stages):
        decayed = {s: rate ** (len(stages) - 1 - i) for i, s in enumerate(_counted(stages))}
        for pattern in of_stages:
            if not any(matches(pattern, stage) for stage in stages):
                raise UserError(
                    f"strategy layerwise_decay: floor {pattern!r} matches no stage{nearest(pattern, stages)}"
                )
        least = lambda stage: next((value for pattern, value in of_stages.items() if matches(pattern, stage)), 0.0)
        by_stage = {s: max(m, least(s)) for s, m in decayed.items()}
        rules, pairs = [], list(of_parameters.items())
        reaches = lambda pattern, stage: pattern.startswith(("**", "!", "re:")) or matches(pattern.split("/")[0], stage)
        for i, (pattern, value) in enumerate(pairs):
            # The stages in which the floor differs from what comes after it, by their multiplier: mostly one group.
            lifted = {}
            for stage in (stage for stage in stages if reaches(pattern, stage)):
                multiplier = max(decayed[stage], value)
                after = {max(decayed[stage], later) for p, later in pairs[i + 1 :] if reaches(p, stage)}
                if after | {by_stage[stage]} != {multiplier}:
                    lifted.setdefault(multiplier, []).append(stage)
            if not lifted:
                raise UserError(f"strategy layerwise_decay: floor {value:g} of {pattern!r} changes nothing")
            either = lambda group: group[0] if len(group) == 1 else f"{{{','.join(group)}}}"
            rules += [(f"{either(group)} & {pattern}", multiplier) for multiplier, group in lifted.items()]
        return (*rules, *by_stage.items())

    return write


def surgical(stage: str) -> Strategy:
    """Trains one stage and the head (surgical fine-tuning, Lee et al. 2023)."""
    return lambda stages: _only(dict.fromkeys((_counted(stages)[_index(stage, stages)], stages[-1])), stages)


def discriminative(groups: dict[str, float]) -> Strategy:
    """Gives each group of stages its own multiplier: `discriminative({"block1*": 0.1, "head": 1})`.

    Patterns are those of rules, and as with all rules every parameter must fall into a group.
    """
    if not isinstance(groups, dict):
        raise UserError(f"strategy discriminative({groups!r}): expected {{pattern: multiplier, …}}")
    return rules(*groups.items())


def head_and(*patterns: str, body: float = 1.0) -> Strategy:
    """Trains the head and what the patterns match: `head_and("**/se_*", "block16/**/bias")`.

    `body` multiplies the learning rate of what is before the head.
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"strategy head_and{patterns!r}: expected at least one pattern")
    if not body > 0:
        raise UserError(f"strategy head_and(body={body!r}): expected a multiplier above 0")
    before_head = tuple((pattern, float(body)) for pattern in patterns)
    return lambda stages: ((_counted(stages)[-1], 1.0), *before_head, ("**", 0.0))


def biases_only(body: float = 1.0) -> Strategy:
    """Trains every bias and the head (BitFit, Ben Zaken et al. 2022)."""
    return head_and("**/bias", body=body)


def norms_only(body: float = 1.0) -> Strategy:
    """Trains the scales and biases of the norms and the head (Frankle et al. 2021).

    A norm is a module with `norm`, or `bn` or `ln` as a word, in its name; its statistics move, as it trains.
    """
    return head_and(NORMS, body=body)


def frozen_norms(strategy: Strategy) -> Strategy:
    """The strategy with every norm frozen, by the names that `norms_only` knows: stored statistics go on being used.

    A rule of the strategy that is about a stage that is a norm itself is left out.
    """

    def write(stages):
        is_norm = lambda pattern: pattern in stages and pattern.rstrip("0123456789").endswith(("norm", "bn", "ln"))
        return ((NORMS, 0.0), *(rule for rule in strategy(stages) if not is_norm(rule[0])))

    return _with_adapters(write, adapters_of(strategy))


def attention_only(body: float = 1.0) -> Strategy:
    """Trains the attention modules (`attn`, `attention`) and the head (Touvron et al. 2022, "Three things …")."""
    return head_and(ATTENTION, body=body)


@dataclasses.dataclass(frozen=True)
class Adapting:
    """A strategy with adapters (`tljax.adapters`), whose parameters its rules speak of."""

    write: Strategy
    adapters: tuple

    def __call__(self, stages: tuple[str, ...]) -> Rules:
        """Writes the rules."""
        return self.write(stages)


def adapters_of(*strategies: Strategy) -> tuple:
    """The adapters that strategies ask for, each once."""
    return tuple(dict.fromkeys(adapter for strategy in strategies for adapter in getattr(strategy, "adapters", ())))


def _with_adapters(write: Strategy, adapters: tuple) -> Strategy:
    return Adapting(write, adapters) if adapters else write


def first(*strategies: Strategy) -> Strategy:
    """Joins strategies; the rules of the earlier come first: `first(rules(("**/bn*", 0)), partial(last=2))`."""
    write = lambda stages: tuple(rule for strategy in strategies for rule in strategy(stages))
    return _with_adapters(write, adapters_of(*strategies))


def scaled(strategy: Strategy, factor: float) -> Strategy:
    """The strategy with every multiplier times `factor`, the head's included."""
    if not 0 < factor < math.inf:
        raise UserError(f"strategy scaled(factor={factor!r}): expected a factor above 0")
    write = lambda stages: tuple((pattern, multiplier * factor) for pattern, multiplier in strategy(stages))
    return _with_adapters(write, adapters_of(strategy))


def within(prefix: str, strategy: Strategy, stages: tuple[str, ...] = ()) -> Strategy:
    """The strategy under a path, for a model of several towers.

    `first(within("image", partial(last=2), ("stem", "block1", "head")), within("text", full()))`; `stages` are
    the tower's own, needed where the strategy counts or names stages. The last one is the tower's head.
    """
    if not prefix or prefix.startswith(("!", "re:")) or prefix.endswith("/"):
        raise UserError(f"strategy within({prefix!r}, …): expected a path, as 'image' or 'towers/*'")
    write = lambda _: tuple((under(prefix, pattern), m) for pattern, m in strategy(tuple(stages)))
    return _with_adapters(write, tuple(adapter.within(prefix) for adapter in adapters_of(strategy)))


def _only(live: Iterable[str], stages: tuple[str, ...], body: float = 1.0) -> Rules:
    """These stages train, the others, if there are any, do not."""
    live = tuple(live)
    rest = (("**", 0.0),) if len(live) < len(stages) else ()
    return tuple((stage, 1.0 if stage == stages[-1] else float(body)) for stage in live) + rest


def _counted(stages: tuple[str, ...]) -> tuple[str, ...]:
    if not stages:
        raise UserError("the strategy counts stages: name the tower's, within(prefix, strategy, ('stem', …, 'head'))")
    return stages


def _index(stage: str, stages: tuple[str, ...]) -> int:
    if stage not in stages:
        raise unknown("stage", stage, stages)
    return stages.index(stage)


STRATEGIES = {
    f.__name__: f
    for f in (
        rules, frozen, partial, full, layerwise_decay, surgical, discriminative, head_and, biases_only, norms_only,
        attention_only, first, scaled, within, frozen_norms,
    )
}  # fmt: skip


def known() -> dict[str, Callable[..., Strategy]]:
    """All that a config may call, adapters included."""
    from tljax.adapters.strategies import ADAPTERS

    return STRATEGIES | ADAPTERS


def parse(text: str) -> Strategy:
    """Returns the strategy that a config's text calls. Raises UserError for unknown names and arguments."""
    strategy = call(text, known(), "strategy")

    def write(stages):
        try:
            return strategy(stages)
        except TypeError as error:  # an argument of another type, met only now
            raise UserError(f"strategy {text!r}: {error}") from None

    return _with_adapters(write, adapters_of(strategy))
