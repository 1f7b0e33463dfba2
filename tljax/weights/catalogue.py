"""Well-known checkpoints on the Hugging Face hub, as timm publishes them: one a line.

Size, mean and std, interpolation, crop and licence are those of timm's registry (1.0.31), with which a test compares
them; top-1 is that of timm's results-imagenet.csv at that size and crop, where it has one.
"""

# name | model | pixels | mean and std, ImageNet-1k's or a half | interpolation | crop | licence | top-1, percent
TABLE = """
resnet18.a1_in1k                               resnet18                      224 in1k bicubic  0.95  Apache-2.0   71.504
resnet18.tv_in1k                               resnet18                      224 in1k bilinear 0.875 BSD-3-Clause 69.752
resnet34.a1_in1k                               resnet34                      224 in1k bicubic  0.95  Apache-2.0   76.420
resnet34.tv_in1k                               resnet34                      224 in1k bilinear 0.875 BSD-3-Clause 73.298
resnet50.a1_in1k                               resnet50                      224 in1k bicubic  0.95  Apache-2.0   80.382
resnet50.tv_in1k                               resnet50                      224 in1k bilinear 0.875 BSD-3-Clause 76.156
resnet50.tv2_in1k                              resnet50                      176 in1k bilinear 0.875 BSD-3-Clause 79.434
resnet101.a1_in1k                              resnet101                     224 in1k bicubic  0.95  Apache-2.0   81.494
resnet101.tv_in1k                              resnet101                     224 in1k bilinear 0.875 BSD-3-Clause 77.404
resnet152.a1_in1k                              resnet152                     224 in1k bicubic  0.95  Apache-2.0   81.998
resnet152.tv_in1k                              resnet152                     224 in1k bilinear 0.875 BSD-3-Clause 78.330
resnext50_32x4d.a1_in1k                        resnext50_32x4d               224 in1k bicubic  0.95  Apache-2.0   80.526
resnext50_32x4d.tv_in1k                        resnext50_32x4d               224 in1k bilinear 0.875 BSD-3-Clause 77.632
resnext101_32x8d.tv_in1k                       resnext101_32x8d              224 in1k bilinear 0.875 BSD-3-Clause 79.308
resnext101_64x4d.tv_in1k                       resnext101_64x4d              224 in1k bilinear 0.875 BSD-3-Clause 82.978
wide_resnet50_2.tv_in1k                        wide_resnet50_2               224 in1k bilinear 0.875 BSD-3-Clause 78.486
wide_resnet101_2.tv_in1k                       wide_resnet101_2              224 in1k bilinear 0.875 BSD-3-Clause 78.862
resnetv2_50x1_bit.goog_in21k                   resnetv2_50x1_bit             224 half bilinear 0.875 Apache-2.0   -
resnetv2_50x1_bit.goog_in21k_ft_in1k           resnetv2_50x1_bit             448 half bilinear 1     Apache-2.0   80.386
resnetv2_50x3_bit.goog_in21k                   resnetv2_50x3_bit             224 half bilinear 0.875 Apache-2.0   -
resnetv2_101x1_bit.goog_in21k                  resnetv2_101x1_bit            224 half bilinear 0.875 Apache-2.0   -
resnetv2_101x1_bit.goog_in21k_ft_in1k          resnetv2_101x1_bit            448 half bilinear 1     Apache-2.0   82.332
resnetv2_101x3_bit.goog_in21k                  resnetv2_101x3_bit            224 half bilinear 0.875 Apache-2.0   -
resnetv2_152x2_bit.goog_in21k                  resnetv2_152x2_bit            224 half bilinear 0.875 Apache-2.0   -
resnetv2_152x4_bit.goog_in21k                  resnetv2_152x4_bit            224 half bilinear 0.875 Apache-2.0   -
vit_tiny_patch16_224.augreg_in21k              vit_tiny_patch16              224 half bicubic  0.9   Apache-2.0   -
vit_tiny_patch16_224.augreg_in21k_ft_in1k      vit_tiny_patch16              224 half bicubic  0.9   Apache-2.0   75.452
vit_small_patch16_224.augreg_in21k             vit_small_patch16             224 half bicubic  0.9   Apache-2.0   -
vit_small_patch16_224.augreg_in21k_ft_in1k     vit_small_patch16             224 half bicubic  0.9   Apache-2.0   81.402
vit_base_patch16_224.augreg_in21k              vit_base_patch16              224 half bicubic  0.9   Apache-2.0   -
vit_base_patch16_224.augreg_in21k_ft_in1k      vit_base_patch16              224 half bicubic  0.9   Apache-2.0   84.534
vit_base_patch16_384.augreg_in21k_ft_in1k      vit_base_patch16              384 half bicubic  1     Apache-2.0   86.010
vit_large_patch16_224.augreg_in21k             vit_large_patch16             224 half bicubic  0.9   Apache-2.0   -
vit_large_patch16_224.augreg_in21k_ft_in1k     vit_large_patch16             224 half bicubic  0.9   Apache-2.0   85.856
vit_small_patch32_224.augreg_in21k             vit_small_patch32             224 half bicubic  0.9   Apache-2.0   -
vit_small_patch32_224.augreg_in21k_ft_in1k     vit_small_patch32             224 half bicubic  0.9   Apache-2.0   76.010
vit_base_patch32_224.augreg_in21k              vit_base_patch32              224 half bicubic  0.9   Apache-2.0   -
vit_base_patch32_224.augreg_in21k_ft_in1k      vit_base_patch32              224 half bicubic  0.9   Apache-2.0   80.732
deit_tiny_patch16_224.fb_in1k                  vit_tiny_patch16              224 in1k bicubic  0.9   Apache-2.0   72.190
deit_small_patch16_224.fb_in1k                 vit_small_patch16             224 in1k bicubic  0.9   Apache-2.0   79.856
deit_base_patch16_224.fb_in1k                  vit_base_patch16              224 in1k bicubic  0.9   Apache-2.0   81.980
vit_base_patch16_224.mae                       vit_base_patch16              224 in1k bicubic  0.9   CC-BY-NC-4.0 -
vit_large_patch16_224.mae                      vit_large_patch16             224 in1k bicubic  0.9   CC-BY-NC-4.0 -
vit_huge_patch14_224.mae                       vit_huge_patch14              224 in1k bicubic  0.9   CC-BY-NC-4.0 -
vit_small_patch16_224.dino                     vit_small_patch16             224 in1k bicubic  0.9   Apache-2.0   -
vit_base_patch16_224.dino                      vit_base_patch16              224 in1k bicubic  0.9   Apache-2.0   -
vit_small_patch14_dinov2.lvd142m               vit_small_patch14_dinov2      518 in1k bicubic  1     Apache-2.0   -
vit_base_patch14_dinov2.lvd142m                vit_base_patch14_dinov2       518 in1k bicubic  1     Apache-2.0   -
vit_large_patch14_dinov2.lvd142m               vit_large_patch14_dinov2      518 in1k bicubic  1     Apache-2.0   -
vit_small_patch14_reg4_dinov2.lvd142m          vit_small_patch14_reg4_dinov2 518 in1k bicubic  1     Apache-2.0   -
vit_base_patch14_reg4_dinov2.lvd142m           vit_base_patch14_reg4_dinov2  518 in1k bicubic  1     Apache-2.0   -
vit_large_patch14_reg4_dinov2.lvd142m          vit_large_patch14_reg4_dinov2 518 in1k bicubic  1     Apache-2.0   -
vit_medium_patch16_gap_256.sw_in12k_ft_in1k    vit_medium_patch16_gap        256 half bicubic  0.95  Apache-2.0   84.442
convnext_tiny.fb_in1k                          convnext_tiny                 224 in1k bicubic  0.875 Apache-2.0   82.066
convnext_small.fb_in1k                         convnext_small                224 in1k bicubic  0.875 Apache-2.0   83.144
convnext_base.fb_in1k                          convnext_base                 224 in1k bicubic  0.875 Apache-2.0   83.838
convnext_large.fb_in1k                         convnext_large                224 in1k bicubic  0.875 Apache-2.0   84.304
convnext_tiny.fb_in22k                         convnext_tiny                 224 in1k bicubic  0.875 Apache-2.0   -
convnext_tiny.fb_in22k_ft_in1k                 convnext_tiny                 224 in1k bicubic  0.875 Apache-2.0   82.900
convnext_small.fb_in22k_ft_in1k                convnext_small                224 in1k bicubic  0.875 Apache-2.0   84.582
convnext_base.fb_in22k                         convnext_base                 224 in1k bicubic  0.875 Apache-2.0   -
convnext_base.fb_in22k_ft_in1k                 convnext_base                 224 in1k bicubic  0.875 Apache-2.0   85.814
swin_tiny_patch4_window7_224.ms_in1k           swin_tiny                     224 in1k bicubic  0.9   MIT          81.388
swin_small_patch4_window7_224.ms_in1k          swin_small                    224 in1k bicubic  0.9   MIT          83.228
swin_base_patch4_window7_224.ms_in22k          swin_base                     224 in1k bicubic  0.9   MIT          -
swin_base_patch4_window7_224.ms_in22k_ft_in1k  swin_base                     224 in1k bicubic  0.9   MIT          85.276
swin_base_patch4_window12_384.ms_in22k_ft_in1k swin_base_window12            384 in1k bicubic  1     MIT          86.442
swin_large_patch4_window7_224.ms_in22k         swin_large                    224 in1k bicubic  0.9   MIT          -
efficientnet_b0.ra_in1k                        timm_efficientnet_b0          224 in1k bicubic  0.875 Apache-2.0   77.698
efficientnet_b1.ft_in1k                        timm_efficientnet_b1          224 in1k bicubic  0.875 Apache-2.0   77.592
efficientnet_b2.ra_in1k                        timm_efficientnet_b2          256 in1k bicubic  0.875 Apache-2.0   79.324
efficientnet_b3.ra2_in1k                       timm_efficientnet_b3          288 in1k bicubic  0.875 Apache-2.0   81.472
efficientnet_b4.ra2_in1k                       timm_efficientnet_b4          320 in1k bicubic  0.875 Apache-2.0   82.658
tf_efficientnet_b0.ns_jft_in1k                 tf_efficientnet_b0            224 in1k bicubic  0.875 Apache-2.0   78.680
tf_efficientnet_b0.in1k                        tf_efficientnet_b0            224 in1k bicubic  0.875 Apache-2.0   76.542
tf_efficientnet_b4.ns_jft_in1k                 tf_efficientnet_b4            380 in1k bicubic  0.922 Apache-2.0   85.156
tf_efficientnet_b7.ns_jft_in1k                 tf_efficientnet_b7            600 in1k bicubic  0.949 Apache-2.0   86.850
tf_efficientnet_lite0.in1k                     tf_efficientnet_lite0         224 half bicubic  0.875 Apache-2.0   74.846
tf_efficientnet_lite4.in1k                     tf_efficientnet_lite4         380 half bilinear 0.92  Apache-2.0   81.540
tf_efficientnetv2_s.in21k_ft_in1k              tf_efficientnetv2_s           300 half bicubic  1     Apache-2.0   83.348
tf_efficientnetv2_s.in21k                      tf_efficientnetv2_s           300 half bicubic  1     Apache-2.0   -
tf_efficientnetv2_m.in21k_ft_in1k              tf_efficientnetv2_m           384 half bicubic  1     Apache-2.0   84.768
tf_efficientnetv2_l.in21k_ft_in1k              tf_efficientnetv2_l           384 half bicubic  1     Apache-2.0   85.846
mobilenetv2_100.ra_in1k                        mobilenet_v2                  224 in1k bicubic  0.875 Apache-2.0   72.910
mobilenetv3_large_100.ra_in1k                  mobilenetv3_large_100         224 in1k bicubic  0.875 Apache-2.0   75.784
mobilenetv3_small_100.lamb_in1k                mobilenetv3_small_100         224 in1k bicubic  0.875 Apache-2.0   67.636
densenet121.ra_in1k                            densenet121                   224 in1k bicubic  0.875 Apache-2.0   75.574
densenet121.tv_in1k                            densenet121                   224 in1k bicubic  0.875 Apache-2.0   74.750
densenet161.tv_in1k                            densenet161                   224 in1k bicubic  0.875 Apache-2.0   77.384
densenet169.tv_in1k                            densenet169                   224 in1k bicubic  0.875 Apache-2.0   75.922
densenet201.tv_in1k                            densenet201                   224 in1k bicubic  0.875 Apache-2.0   77.284
vgg11.tv_in1k                                  vgg11                         224 in1k bilinear 0.875 BSD-3-Clause 69.050
vgg13.tv_in1k                                  vgg13                         224 in1k bilinear 0.875 BSD-3-Clause 69.950
vgg16.tv_in1k                                  vgg16                         224 in1k bilinear 0.875 BSD-3-Clause 71.594
vgg19.tv_in1k                                  vgg19                         224 in1k bilinear 0.875 BSD-3-Clause 72.400
vgg11_bn.tv_in1k                               vgg11_bn                      224 in1k bilinear 0.875 BSD-3-Clause 70.374
vgg13_bn.tv_in1k                               vgg13_bn                      224 in1k bilinear 0.875 BSD-3-Clause 71.560
vgg16_bn.tv_in1k                               vgg16_bn                      224 in1k bilinear 0.875 BSD-3-Clause 73.354
vgg19_bn.tv_in1k                               vgg19_bn                      224 in1k bilinear 0.875 BSD-3-Clause 74.230
inception_v3.tv_in1k                           inception_v3                  299 half bicubic  0.875 Apache-2.0   77.472
inception_v3.tf_in1k                           inception_v3                  299 half bicubic  0.875 Apache-2.0   77.866
inception_v3.gluon_in1k                        inception_v3                  299 in1k bicubic  0.875 Apache-2.0   78.806
"""

_HALF = (0.5, 0.5, 0.5)
SEEN = {"in1k": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": (_HALF, _HALF)}

# By the end of a name. What is no ImageNet has no labels, or photographs that are not public.
_TRAINED_ON = {
    "in21k_ft_in1k": "ImageNet-21k, then ImageNet-1k",
    "in22k_ft_in1k": "ImageNet-22k, then ImageNet-1k",
    "in12k_ft_in1k": "ImageNet-12k, then ImageNet-1k",
    "jft_in1k": "ImageNet-1k and, by its own guesses, JFT-300M",
    "in1k": "ImageNet-1k (ILSVRC 2012)",
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "lvd142m": "LVD-142M, without labels",
    "mae": "ImageNet-1k, without labels",
    "dino": "ImageNet-1k, without labels",
}


def rows() -> list[dict]:
    """The fields of each card that the table tells."""
    found = []
    for line in TABLE.strip().splitlines():
        name, model, size, seen, interpolation, crop, licence, *top1 = line.split()
        mean, std = SEEN[seen]
        found.append(
            {
                "name": name,
                "model": model,
                "source": f"hf:timm/{name}",
                "naming": "timm",
                "input_size": int(size),
                "mean": mean,
                "std": std,
                "interpolation": interpolation,
                "crop": float(crop),
                "licence": licence,
                "origin": "timm's copy on the Hugging Face hub",
                "trained_on": next(text for end, text in _TRAINED_ON.items() if name.endswith(end)),
                "top1": None if top1 == ["-"] else float(top1[0]),
                "note": "not for commercial use" if "-NC-" in licence else "",
            }
        )
    return found
