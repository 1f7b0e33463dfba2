"""The networks of Keras that ours equal, with random weights and statistics, on its JAX backend."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
EXTRA = "Keras is not installed: pip install -e '.[parity]'"

# Our model: (Keras' network, its module with preprocess_input, pixels).
PUBLISHED = {
    "keras_resnet50": ("ResNet50", "resnet", 64),
    "keras_resnet101": ("ResNet101", "resnet", 64),
    "keras_resnet152": ("ResNet152", "resnet", 64),
    "keras_vgg16": ("VGG16", "vgg16", 224),
    "keras_vgg19": ("VGG19", "vgg19", 224),
    "keras_mobilenet_v2": ("MobileNetV2", "mobilenet_v2", 75),
    "keras_mobilenet_v3_large": ("MobileNetV3Large", "mobilenet_v3", 75),
    "keras_mobilenet_v3_small": ("MobileNetV3Small", "mobilenet_v3", 75),
    **{f"efficientnet_b{i}": (f"EfficientNetB{i}", "efficientnet", 75) for i in range(8)},
    **{f"tf_efficientnetv2_{s.lower()}": (f"EfficientNetV2{s}", "efficientnet_v2", 75) for s in "SML"},
    "keras_inception_v3": ("InceptionV3", "inception_v3", 75),
    "keras_densenet121": ("DenseNet121", "densenet", 64),
    "keras_densenet169": ("DenseNet169", "densenet", 64),
    "keras_densenet201": ("DenseNet201", "densenet", 64),
    **{f"convnext_{s.lower()}": (f"ConvNeXt{s}", "convnext", 64) for s in ("Tiny", "Small", "Base", "Large")},
}
TINY = {"keras_resnet_tiny": (None, "resnet", 33), "convnext_mini": (None, "convnext", 32)}


def network(name: str, classes: int):
    """(Keras' network that is our model `name`, the function that prepares its images, pixels)."""
    keras = pytest.importorskip("keras", reason=EXTRA)
    keras.utils.clear_session()  # layers without a name are counted from there
    applications = keras.applications
    function, module, size = (PUBLISHED | TINY)[name]
    fields = {"weights": None, "input_shape": (size, size, 3), "classes": classes, "classifier_activation": None}
    if module == "efficientnet_v2":  # it would divide by 128, the card by 127.5
        net = getattr(applications, function)(**fields, include_preprocessing=False)
        return net, lambda x: x / 127.5 - 1, size
    if function:
        net = getattr(applications, function)(**fields)
    else:
        net = _tiny(name, fields)
    return net, getattr(applications, module).preprocess_input, size


def _tiny(name: str, fields: dict):
    from keras.src.applications import convnext, resnet

    if name == "convnext_mini":
        return convnext.ConvNeXt((1, 1, 2, 1), (8, 16, 24, 32), name=name, **fields)

    def stacks(x):
        x = resnet.stack_residual_blocks_v1(x, 64, 1, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 128, 1, name="conv3")

    return resnet.ResNet(stacks, False, True, name="resnet", weights_name="", **fields)


def randomise(net, images: np.ndarray, seed: int = 0):
    """Random weights, norms and layer scales; statistics near those of the images; what prepares these is ImageNet's.

    With statistics of nothing values grow or vanish from block to block, until gates are open or shut and rounding
    decides; so it does where a channel hardly varies and its norm magnifies that.
    """
    rng = np.random.default_rng(seed)
    for layer in net.layers:
        if layer.name.startswith("normalization") and layer.weights:
            layer.adapt_mean.assign([0.485, 0.456, 0.406])
            layer.adapt_variance.assign(np.square([0.229, 0.224, 0.225]))
            layer.finalize_state()
            continue
        for variable in layer.weights:
            shape, name = variable.shape, variable.path.rsplit("/", 1)[-1]
            if name in ("gamma", "moving_variance") or "layer_scale" in layer.name:
                # A branch adds less than what it is added to.
                value = rng.uniform(0.5, 1.5, shape) * (0.3 if "project" in layer.name and name == "gamma" else 1)
            elif len(shape) == 1:
                value = rng.normal(0, 0.1, shape)
            else:
                depthwise = len(shape) == 4 and shape[3] == 1
                inputs = np.prod(shape[: 2 if depthwise else -1])
                # Gates that follow their input closely make a deep network chaotic: EfficientNetV2-S of Keras itself
                # then differs by more than 1e-3 when its input does by 1e-7.
                value = rng.normal(0, ((0.1 if "_se_" in layer.name else 1.5) / inputs) ** 0.5, shape)
            variable.assign(value)
    norms = [layer for layer in net.layers if hasattr(layer, "moving_mean")]
    for layer in norms:
        layer.momentum = 0.0
    for layer in net.layers:
        if hasattr(layer, "rate"):  # stochastic depth: the statistics are those of evaluation
            layer.rate = 0.0
    if norms:
        net(images, training=True)
    for layer in norms:
        mean, var = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
        layer.moving_mean.assign(mean + 0.1 * rng.normal(0, 1, mean.shape) * np.sqrt(var))
        layer.moving_variance.assign(np.maximum(var, 0.1) * rng.uniform(0.7, 1.4, var.shape))


def photographs(size: int) -> np.ndarray:
    """Two unlike images of 0 to 255, [2, size, size, 3]: noise, and colours that run across."""
    rng, along = np.random.default_rng(1), np.linspace(0, 255, size)
    noise = rng.integers(0, 256, (size, size, 3))
    colours = np.stack(np.broadcast_arrays(along[:, None], 255 - along[None], 40.0), axis=-1)
    return np.stack([noise, colours]).astype(np.float32)
