"""The PyTorch references of the networks in levels (ConvNeXt, DenseNet, Swin), untrained."""

from torch_zoo import import_timm, import_torchvision

from tljax.models import convnext, densenet, swin


def model(name: str, classes: int, size: int, **fields):
    """The reference of our model `name`; skips where it is not installed."""
    torchvision, timm = import_torchvision(), import_timm()
    fields |= {"num_classes": classes}
    if name == "convnext_mini":
        variant = convnext.VARIANTS[name]
        return timm.models.ConvNeXt(depths=variant.depths, dims=variant.widths, **fields)
    if name.startswith("convnext"):
        return timm.create_model(name, **fields)
    if name == "densenet_mini":
        variant = densenet.VARIANTS[name]
        small = {"growth_rate": variant.growth, "block_config": variant.depths, "num_init_features": 2 * variant.growth}
        return torchvision.models.DenseNet(**small, **fields)
    if name.startswith("densenet"):
        return getattr(torchvision.models, name)(**fields)
    if name == "swin_mini":
        variant = swin.VARIANTS[name]
        small = {"embed_dim": variant.width, "depths": variant.depths, "num_heads": variant.heads}
        return timm.models.SwinTransformer(
            img_size=size, window_size=variant.window, drop_path_rate=0.0, **small, **fields
        )
    kind, _, window = name.partition("_window")
    full = f"{kind}_patch4_window{window}_384" if window else f"{kind}_patch4_window7_224"
    return timm.create_model(full, img_size=size, **fields)
