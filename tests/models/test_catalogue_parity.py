"""The facts on the catalogue's cards against timm's own registry, field by field."""

import pytest
import torch_reference as reference
import torch_zoo

from tljax import models, weights
from tljax.weights import lookalike, matcher

CARDS = {name: card for name, card in weights.CARDS.items() if card.source.startswith("hf:timm/")}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_timm_s_registry_says(name):
    torch_zoo.import_timm()
    from timm.models import get_pretrained_cfg

    card, config = CARDS[name], get_pretrained_cfg(name, allow_unregistered=False)
    assert card.source == f"hf:{config.hf_hub_id}"
    assert (3, card.input_size, card.input_size) == config.input_size
    assert (card.mean, card.std) == (config.mean, config.std)
    assert (card.interpolation, card.crop) == (config.interpolation, config.crop_pct)
    assert card.licence.lower() == (config.license or "unknown")
    ends = {0: ("mae", "dino", "lvd142m"), 1000: ("in1k",), 21841: ("in22k",), 21843: ("in21k",)}
    assert name.endswith(ends[config.num_classes])
    assert (card.top1 is None) == (config.num_classes != 1000)


# One of each architecture; the tables themselves are tested for all sizes elsewhere.
NAMES = [
    "resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k",
    "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_224.dino", "vit_base_patch16_224.mae",
    "mobilenetv2_100.ra_in1k", "efficientnet_b0.ra_in1k", "inception_v3.tv_in1k",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in CARDS if name not in NAMES)]
)
def test_the_network_of_a_card_has_the_tensors_of_timm_s(name):
    """What timm makes for that checkpoint fits the card's model; without a head, all but the head."""
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    timm, card = torch_zoo.import_timm(), CARDS[name]
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False)
    source = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    classes = net.num_classes
    model = models.create(card.model, classes or 2)
    shapes = {p: leaf.shape for p, leaf in matcher.flatten(models.shapes(model, card.input_size)).items()}
    result = matcher.fit(source, lookalike.tables(card.model)["timm"], shapes, reset=() if classes else ("head",))
    assert result.problems == 0
