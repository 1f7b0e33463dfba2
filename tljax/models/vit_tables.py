"""Conversion tables of the Vision Transformer: what its leaves are called by who publishes such weights."""

from typing import TYPE_CHECKING

from tljax.models import naming

if TYPE_CHECKING:
    from tljax.models.vit import Variant

_QKV = tuple(f"block{{}}/attn/{name}" for name in ("query", "key", "value"))
_OUT, _FC1, _FC2 = "block{}/attn/out", "block{}/mlp/fc1", "block{}/mlp/fc2"


def tables(variant: "Variant") -> dict[str, naming.Table]:
    """The conversion tables of a variant; only timm has a norm behind the pooling."""
    rows = {"timm": _timm("fc_norm" if variant.fc_norm else "norm")}
    if not variant.fc_norm:
        rows |= {"transformers": _transformers(variant), "torchvision": _torchvision(), "google": _google(variant)}
    return {source: naming.table(found, number=lambda match: int(match[1]) + 1) for source, found in rows.items()}


def _embed(patch: str, class_token: str, position: str) -> list[naming.Row]:
    return [
        (rf"{patch}\.weight", "params/embed/patch/kernel", "conv"),
        (rf"{patch}\.bias", "params/embed/patch/bias", "same"),
        (class_token, "params/embed/class_token", "squeezed"),
        (position, "params/embed/position", "squeezed"),
    ]


def _timm(norm: str) -> list[naming.Row]:
    block = r"blocks\.(\d+)\."
    rows = [
        *_embed(r"patch_embed\.proj", "cls_token", "pos_embed"),
        ("reg_token", "params/embed/registers", "squeezed"),
        *naming.dense(rf"{block}attn\.qkv", *_QKV),
        *naming.dense(rf"{block}attn\.proj", _OUT),
        *naming.dense(rf"{block}mlp\.fc1", _FC1),
        *naming.dense(rf"{block}mlp\.fc2", _FC2),
        *naming.affine(norm, "norm"),
        *naming.dense("head", "head"),
    ]
    for i in (1, 2):
        rows += naming.affine(rf"{block}norm{i}", f"block{{}}/norm{i}")
        rows.append((rf"{block}ls{i}\.gamma", f"params/block{{}}/layer_scale{i}/gamma", "same"))
    return rows


def _transformers(variant: "Variant") -> list[naming.Row]:
    """Of ViT and of DINOv2, as its files have it (in memory, newer versions use other names)."""
    either = lambda vit, dinov2: rf"(?:{dinov2}|{vit})" if variant.layer_scale else rf"(?:{vit}|{dinov2})"
    model = either(r"vit\.", r"dinov2\.") + "?"
    embeddings, block = rf"{model}embeddings\.", rf"{model}encoder\.layer\.(\d+)\."
    rows = [
        *_embed(
            rf"{embeddings}patch_embeddings\.projection", rf"{embeddings}cls_token", rf"{embeddings}position_embeddings"
        ),
        (rf"{embeddings}mask_token", None, "mask_token" if variant.layer_scale else "same"),
        (rf"{model}pooler\..*", None, "same"),
        *naming.dense(rf"{block}attention\.output\.dense", _OUT),
        *naming.dense(block + either(r"intermediate\.dense", r"mlp\.fc1"), _FC1),
        *naming.dense(block + either(r"output\.dense", r"mlp\.fc2"), _FC2),
        *naming.affine(rf"{model}layernorm", "norm"),
        *naming.dense("classifier", "head"),
    ]
    for target in _QKV:
        rows += naming.dense(rf"{block}attention\.attention\.{target.split('/')[-1]}", target)
    for i, where in ((1, "before"), (2, "after")):
        rows += naming.affine(block + either(f"layernorm_{where}", f"norm{i}"), f"block{{}}/norm{i}")
        rows.append((rf"{block}layer_scale{i}\.lambda1", f"params/block{{}}/layer_scale{i}/gamma", "same"))
    return rows


def _torchvision() -> list[naming.Row]:
    block = r"encoder\.layers\.encoder_layer_(\d+)\."
    rows = [
        *_embed("conv_proj", "class_token", r"encoder\.pos_embedding"),
        *naming.dense(rf"{block}self_attention\.in_proj", *_QKV, weight="_weight", bias="_bias"),
        *naming.dense(rf"{block}self_attention\.out_proj", _OUT),
        # Older files call the layers linear_1 and linear_2.
        *naming.dense(rf"{block}mlp\.(?:0|linear_1)", _FC1),
        *naming.dense(rf"{block}mlp\.(?:3|linear_2)", _FC2),
        *naming.affine(r"encoder\.ln", "norm"),
        *naming.dense(r"heads\.head", "head"),
    ]
    for i in (1, 2):
        rows += naming.affine(rf"{block}ln_{i}", f"block{{}}/norm{i}")
    return rows


def _google(variant: "Variant") -> list[naming.Row]:
    """Of the .npz files of vision_transformer and, where there is a choice the second, of big_vision."""
    root = r"(?:opt/target/|params/(?:img/)?)??"
    block = rf"{root}Transformer/encoderblock_(\d+)/"
    attention, mlp = rf"{block}MultiHeadDotProductAttention_(?:1|0)/", rf"{block}MlpBlock_(?:3|0)/Dense_"

    def rows(source, target, how="same", names=("kernel", "bias")):
        return [(f"{source}/{name}", f"params/{target}/{name}", how) for name in names]

    found = [
        (f"{root}cls", "params/embed/class_token", "squeezed"),
        (rf"{root}(?:Transformer/posembed_input/)?pos_embedding", "params/embed/position", "squeezed"),
        *rows(f"{root}embedding", "embed/patch"),
        *rows(f"{block}LayerNorm_0", "block{}/norm1", names=("scale", "bias")),
        *rows(f"{block}LayerNorm_(?:2|1)", "block{}/norm2", names=("scale", "bias")),
        *rows(f"{mlp}0", _FC1),
        *rows(f"{mlp}1", _FC2),
        *rows(f"{attention}out", _OUT, f"from_heads:{variant.heads}", ("kernel",)),
        *rows(f"{attention}out", _OUT, names=("bias",)),
        *rows(f"{root}Transformer/encoder_norm", "norm", names=("scale", "bias")),
        *rows(f"{root}head", "head"),
        # The layer between in the oldest files, which no network here has: left out with a head that is reset.
        *rows(f"{root}pre_logits", "head/pre_logits"),
    ]
    for target in _QKV:
        name = f"{attention}{target.split('/')[-1]}"
        found += rows(name, target, f"into_heads:{variant.heads}", ("kernel",))
        found += rows(name, target, f"heads:{variant.heads}", ("bias",))
    return found
