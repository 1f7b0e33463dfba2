"""transformers' CLIP as the reference: a whole one, and its image tower with the head that ours has."""

import numpy as np
import pytest
from torch_zoo import EXTRA, import_torchvision

from tljax.models import clip


def transformers_clip(name: str, end: int | None = None, **fields):
    """transformers' CLIPModel that is our `name`, untrained; `end`: its eos_token_id, by default the oldest files'."""
    import_torchvision()
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    variant = clip.VARIANTS[name]
    image, text = variant.image, variant.text

    def tower(part):
        return {
            "hidden_size": part.width, "intermediate_size": 4 * part.width, "num_hidden_layers": part.depth,
            "num_attention_heads": part.heads, "hidden_act": image.activation, "projection_dim": variant.dim,
        }  # fmt: skip

    of_text = {"vocab_size": text.vocabulary, "max_position_embeddings": text.context, "eos_token_id": end or 2}
    of_image = {"image_size": image.size, "patch_size": image.patch, **fields}
    config = transformers.CLIPConfig(
        text_config=tower(text) | of_text, vision_config=tower(image) | of_image, projection_dim=variant.dim
    )
    return transformers.CLIPModel(config).eval()


def classifier(name: str, classes: int, **fields):
    """The image tower of `transformers_clip`, a head of so many classes on its vectors of length one."""
    from torch import nn

    whole = transformers_clip(name, **fields)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model, self.visual_projection = whole.vision_model, whole.visual_projection
            self.head = nn.Linear(whole.projection_dim, classes)

        def embed(self, x):
            x = self.visual_projection(self.vision_model(pixel_values=x).pooler_output)
            return x / x.norm(dim=-1, keepdim=True)

        def forward(self, x):
            return self.head(self.embed(x))

    return Classifier()


def openai_names(state: dict) -> dict:
    """A state dict of transformers' CLIPModel (numpy) in the names of OpenAI's and open_clip's files."""
    places = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm.": "visual.ln_pre.",
        "vision_model.post_layernorm.": "visual.ln_post.",
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "text_model.embeddings.token_embedding.": "token_embedding.",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.": "ln_final.",
        "text_model.encoder.layers.": "transformer.resblocks.",
        ".self_attn.out_proj.": ".attn.out_proj.",
        ".layer_norm": ".ln_",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    }
    found = {}
    for key, value in state.items():
        for old, new in places.items():
            key = key.replace(old, new)
        found[key] = value
    joined = {}
    for key, value in found.items():
        if ".self_attn." not in key:
            joined[key] = value
        elif ".q_proj." in key:
            parts = [found[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            name = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
            joined[name] = np.concatenate(parts)
    for ours, theirs in (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection")):
        joined[theirs] = np.ascontiguousarray(joined.pop(ours).T)
    return joined
