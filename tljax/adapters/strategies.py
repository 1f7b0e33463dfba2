"""Strategies that train adapters: `config.strategy = "lora(rank=8)"`. They compose as all strategies do."""

from tljax.adapters import files
from tljax.adapters.kinds import IA3, Adapter, Bottleneck, Lora, Prompts
from tljax.errors import UserError
from tljax.strategies import Adapting, Strategy, adapters_of, frozen


def adapted(adapter: Adapter, multiplier: float, rest: Strategy | None = None) -> Strategy:
    """Trains an adapter of any kind; of the rest what `rest` says, by default the head alone."""
    rest = rest or frozen()
    rule = (f"**/{adapter.name}", float(multiplier))
    return Adapting(lambda stages: (rule, *rest(stages)), (adapter, *adapters_of(rest)))


def lora(
    rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: str = "**", name: str = "lora",
    body: float = 1.0, rest: Strategy | None = None,
) -> Strategy:  # fmt: skip
    """Trains low-rank updates of dense layers and convolutions, and the head (LoRA, Hu et al. 2022).

    `targets`: a pattern of modules, as `"**/attn/{query,value}"`; by default all that are linear and not grouped.
    `body` multiplies their learning rate. `rest`: what trains beside them, another adapter too, by default the head.
    """
    _positive("lora", rank=rank, alpha=alpha)
    if not 0 <= dropout < 1:
        raise UserError(f"strategy lora(dropout={dropout!r}): expected 0 <= dropout < 1")
    return adapted(Lora(name, targets, rank=rank, alpha=alpha, dropout=dropout), body, rest)


def ia3(
    targets: str = "**", inputs: str = "", name: str = "ia3", body: float = 1.0, rest: Strategy | None = None
) -> Strategy:
    """Trains one factor a feature, and the head (IA3, Liu et al. 2022).

    The outputs of modules that `targets` matches are scaled, and the inputs of those that `inputs` does. The paper's
    form for a transformer is `ia3(targets="**/attn/{key,value}", inputs="**/mlp/fc2")`.
    """
    return adapted(IA3(name, targets, inputs=inputs), body, rest)


def bottleneck(
    width: int = 16, targets: str = "block*", name: str = "bottleneck", body: float = 1.0, rest: Strategy | None = None
) -> Strategy:
    """Trains a small network behind each module that `targets` matches, and the head (Houlsby et al. 2019)."""
    _positive("bottleneck", width=width)
    return adapted(Bottleneck(name, targets, width=width), body, rest)


def prompts(
    tokens: int = 10, deep: bool = True, targets: str = "block*", name: str = "prompts", body: float = 1.0,
    rest: Strategy | None = None,
) -> Strategy:  # fmt: skip
    """Trains tokens beside those of the image in transformer blocks, and the head (VPT, Jia et al. 2022)."""
    _positive("prompts", tokens=tokens)
    return adapted(Prompts(name, targets, tokens=tokens, deep=deep), body, rest)


def stored(file: str, body: float = 0.0, rest: Strategy | None = None) -> Strategy:
    """Puts adapters from a file (`python -m tljax.adapters --save`) onto their base, by default frozen.

    `lora(name="second", rest=stored("first.safetensors"))` trains a second one on top of the first.
    """
    strategy = rest or frozen()
    for adapter in files.adapters(file):
        strategy = adapted(adapter, body, strategy)
    return strategy


def _positive(strategy: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, int | float) and value > 0):
            raise UserError(f"strategy {strategy}({name}={value!r}): expected a number above 0")


ADAPTERS = {f.__name__: f for f in (lora, ia3, bottleneck, prompts, stored)}
