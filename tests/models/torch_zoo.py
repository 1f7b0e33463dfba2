"""The networks of torchvision and timm that our convolutional models equal, and where in them our stages end."""

import importlib
import re

import numpy as np
import pytest

EXTRA = "the PyTorch references are not installed: pip install -e '.[parity]'"

# torchvision's compiled operators. Its wheels on PyPI are built for another torch and fail to load, and
# without them its import fails. No model here uses them: declaring them is enough.
_OPERATORS = """
nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
roi_align(Tensor x) -> Tensor
_roi_align_backward(Tensor x) -> Tensor
ps_roi_align(Tensor x) -> Tensor
_ps_roi_align_backward(Tensor x) -> Tensor
roi_pool(Tensor x) -> Tensor
_roi_pool_backward(Tensor x) -> Tensor
ps_roi_pool(Tensor x) -> Tensor
_ps_roi_pool_backward(Tensor x) -> Tensor
qroi_align(Tensor x) -> Tensor
deform_conv2d(Tensor x) -> Tensor
_deform_conv2d_backward(Tensor x) -> Tensor
"""
# Of these a smaller sibling is tested in the fast suite.
_LARGE = re.compile(
    r"^tf_efficientnet_|efficientnet.*v2_[ml]$|vgg1[39]|resnetv2_(?!50x1)|(resnext|wide_resnet)101|^clip_vit_[lh]|_laion$"
    r"|^keras_(?!.*tiny)"
)
_declared = []  # the declarations last as long as the library object


def import_torchvision():
    """torchvision, or skips the test where it is not installed."""
    torch = pytest.importorskip("torch", reason=EXTRA)
    try:
        return pytest.importorskip("torchvision", reason=EXTRA)
    except RuntimeError:
        _declared.append(torch.library.Library("torchvision", "DEF"))
        for operator in filter(None, _OPERATORS.splitlines()):
            _declared[0].define(operator)
        return importlib.import_module("torchvision")


def cases(names):
    """The names, or tuples that begin with one, as pytest's parameters: large networks marked slow."""
    is_large = lambda case: bool(_LARGE.search(case if isinstance(case, str) else case[0]))
    every = [(case, case if isinstance(case, tuple) else (case,)) for case in names]
    return [pytest.param(*values, marks=pytest.mark.slow) if is_large(case) else case for case, values in every]


def import_timm():
    """timm, or skips the test where it is not installed."""
    import_torchvision()
    return pytest.importorskip("timm", reason=EXTRA)


def published(name: str, classes: int, naming: str):
    """The library's network that is our model `name`."""
    if name.startswith("inception"):
        return import_torchvision().models.inception_v3(
            num_classes=classes, init_weights=False, aux_logits=name.endswith("_aux")
        )
    if naming == "torchvision":
        return getattr(import_torchvision().models, name)(num_classes=classes)
    return import_timm().create_model("mobilenetv2_100" if name == "mobilenet_v2" else name, num_classes=classes)


def tiny(name: str, classes: int, naming: str):
    """The same architecture from the library's own modules, as small as our model `name`."""
    return {"torchvision": _tiny_torchvision, "timm": _tiny_timm}[naming](name, classes)


def _tiny_torchvision(name: str, classes: int):
    vision = import_torchvision().models
    if name == "mobilenet_v2_tiny":
        groups = [[1, 32, 1, 1], [2, 64, 2, 2], [2, 96, 1, 1]]
        return vision.MobileNetV2(classes, width_mult=0.25, inverted_residual_setting=groups)
    if name == "mobilenet_v3_tiny":
        block = vision.mobilenetv3.InvertedResidualConfig
        blocks = [
            block(8, 3, 8, 8, True, "RE", 1, 1, 1.0),
            block(8, 3, 24, 16, False, "RE", 2, 1, 1.0),
            block(16, 5, 32, 16, True, "HS", 1, 1, 1.0),
        ]
        return vision.MobileNetV3(blocks, 48, classes)
    if name == "efficientnetv2_tiny":
        from functools import partial

        from torch.nn import BatchNorm2d

        effnet = vision.efficientnet
        groups = [
            effnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
            effnet.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
            effnet.MBConvConfig(2, 3, 2, 16, 24, 2),
        ]
        norm = partial(BatchNorm2d, eps=1e-3, momentum=0.01)
        return vision.EfficientNet(groups, 0.2, num_classes=classes, norm_layer=norm, last_channel=32)
    if name == "inception_tiny":
        from functools import partial

        from torch.nn import Linear

        inception = vision.inception
        narrow = lambda n, out, **fields: inception.BasicConv2d(n if n == 3 else n // 16, out // 16, **fields)
        blocks = [partial(getattr(inception, f"Inception{letter}"), conv_block=narrow) for letter in "ABCDE"]
        net = vision.Inception3(classes, False, inception_blocks=[narrow, *blocks, None], init_weights=False)
        net.fc = Linear(2048 // 16, classes)
        return net
    if name == "resnext_tiny":
        from torch import nn

        # Its layers have 64, 128, ... channels whatever it is told: made anew, an eighth as wide.
        net = vision.ResNet(vision.resnet.Bottleneck, [1, 1, 1, 1], classes, groups=4, width_per_group=2 * 64 // 4)
        net.conv1, net.bn1, net.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
        for i, (planes, stride) in enumerate(((8, 1), (16, 2), (32, 2)), 1):
            setattr(net, f"layer{i}", net._make_layer(vision.resnet.Bottleneck, planes, 1, stride))
        net.layer4, net.fc = nn.Sequential(), nn.Linear(128, classes)
        return net
    if name.startswith("vgg"):
        from torch import device, nn

        with device("meta"):  # its dense layers have 4096 channels whatever the blocks have
            net = vision.VGG(nn.Sequential(), classes)
        net.features = vision.vgg.make_layers([8, "M", 8, 16, "M"], batch_norm="bn" in name)
        for i, (features, out) in {0: (16 * 7 * 7, 32), 3: (32, 32), 6: (32, classes)}.items():
            net.classifier[i] = nn.Linear(features, out)
        return net
    raise KeyError(name)


def _tiny_timm(name: str, classes: int):
    timm = import_timm()
    if name == "resnetv2_tiny":
        from functools import partial

        norm = partial(timm.layers.GroupNormAct, num_groups=4)
        conv = partial(timm.layers.StdConv2d, eps=1e-8)
        fields = {"stem_type": "fixed", "conv_layer": conv, "norm_layer": norm}
        return timm.models.ResNetV2([1, 2], (32, 64), classes, stem_chs=8, **fields)
    vgg = timm.models.vgg
    if name.startswith("vgg"):
        from torch import device, nn

        norm = nn.BatchNorm2d if "bn" in name else None
        with device("meta"):
            net = vgg.VGG([8, "M", 8, 16, "M"], classes, norm_layer=norm)
        net.pre_logits, net.head.fc = vgg.ConvMlp(16, 32, 7), nn.Linear(32, classes)
        return net.to_empty(device="cpu")
    raise KeyError(name)


def stages(net, name: str, naming: str) -> dict[str, str]:
    """{our stage: the module of the network that ends it}."""
    if naming == "torchvision":
        return _torchvision_stages(net, name)
    return _timm_stages(net, name)


def _numbered(paths, first: str, *last: tuple[str, str]) -> dict[str, str]:
    return {"stem": first, **{f"block{i}": path for i, path in enumerate(paths, 1)}, **dict(last)}


def _torchvision_stages(net, name: str) -> dict[str, str]:
    if name.startswith(("resne", "wide")):
        blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in range(len(getattr(net, f"layer{i}")))]
        return _numbered(blocks, "maxpool", ("head", "fc"))
    if name.startswith("inception"):
        blocks = [path for path, _ in net.named_children() if path.startswith("Mixed")]
        return _numbered(blocks, "maxpool2", ("head", "fc"))
    if name.startswith("vgg"):
        return _vgg_stages(net, "classifier.1", "classifier.4", "classifier.6")
    last = len(net.features) - 1
    if name.startswith("mobilenet"):
        hidden = [("hidden", "classifier.1")] if "v3" in name else []
        top, head = ("top", f"features.{last}"), ("head", f"classifier.{len(net.classifier) - 1}")
        return _numbered([f"features.{i}" for i in range(1, last)], "features.0", top, *hidden, head)
    blocks = [f"features.{i}.{j}" for i in range(1, last) for j in range(len(net.features[i]))]
    return _numbered(blocks, "features.0", ("top", f"features.{last}"), ("head", "classifier.1"))


def _vgg_stages(net, *last: str) -> dict[str, str]:
    pools = [f"features.{i}" for i, module in enumerate(net.features) if type(module).__name__ == "MaxPool2d"]
    blocks = {f"block{i}": path for i, path in enumerate(pools, 1)}
    return {**blocks, **dict(zip(("hidden1", "hidden2", "head"), last))}


def _timm_stages(net, name: str) -> dict[str, str]:
    if name.startswith("vgg"):
        return _vgg_stages(net, "pre_logits.act1", "pre_logits.act2", "head")
    if name.startswith("resnetv2"):
        blocks = [f"stages.{i}.blocks.{j}" for i, group in enumerate(net.stages) for j in range(len(group.blocks))]
        return _numbered(blocks, "stem", ("norm", "norm"), ("head", "head"))
    blocks = [f"blocks.{i}.{j}" for i, group in enumerate(net.blocks) for j in range(len(group))]
    if "v3" in name:
        return _numbered(blocks[:-1], "bn1", ("top", blocks[-1]), ("hidden", "act2"), ("head", "classifier"))
    return _numbered(blocks, "bn1", ("top", "bn2"), ("head", "classifier"))


def outputs(net, ends: dict[str, str], x) -> dict[str, np.ndarray]:
    """What the modules give, channels last, in the order of `ends`."""
    found, handles = {}, []
    for stage, path in ends.items():

        def keep(module, inputs, output, stage=stage):
            found[stage] = output.detach().clone().numpy()  # cloned: the next layer may work in place

        handles.append(net.get_submodule(path).register_forward_hook(keep))
    net(x)
    for handle in handles:
        handle.remove()
    return {stage: found[stage].transpose(0, 2, 3, 1) if found[stage].ndim == 4 else found[stage] for stage in ends}
