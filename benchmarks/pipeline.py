"""Augmented photographs a second: tljax's input pipeline against tf.data and PyTorch's DataLoader, on the same files.

    python benchmarks/pipeline.py          # extras `demo`, `prepare`, `parity`; two minutes; writes docs/speed.md
    python benchmarks/pipeline.py --torch-python=OTHER/bin/python      # where PyTorch is installed elsewhere

The JPEG files of the fruit's train split, from the page cache: decoded, cut by a random-resized crop (8 to 100 % of the
area, bilinear) to 224 pixels, flipped at random, in batches of 16 uint8 images; as many workers as there are cores.
Each pipeline is a process of its own and they take turns. Batches that were ready when its turn came are not counted.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import sections
import turns

BATCH, SIZE, SCALE, RATIO = 16, 224, (0.08, 1.0), (3 / 4, 4 / 3)
BATCHES, DRAINED = 40, 16
# By profiling: CPU milliseconds of one photograph, alone on a core.
REASON = """tf.data is ahead because it decodes only the part of a JPEG that the crop shows, which OpenCV cannot: of
tljax's 0.51 ms of CPU time a photograph, 0.33 are decoding. Tried: whole batches as the threads' tasks in place of
single photographs, and a plain thread pool in place of grain's; neither was faster."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ours(folder: Path):
    """Endless batches of tljax.data."""
    from tljax import data

    return data.train_batches(
        data.load(source(f"folder:{folder}")).train, batch_size=BATCH, seed=0, stop_step=10**6, size=SIZE,
        augment={"crop_min_scale": SCALE[0], "crop_ratio": RATIO}, interpolation="bilinear", threads=CORES,
    )  # fmt: skip


def source(name: str):
    """The config of a data source without a val split."""
    from tljax.config import base

    config = base()
    config.data.source, config.data.val = name, "none"
    return config.data


def tensorflow(folder: Path):
    """Endless batches of tf.data, as big_vision and others write it: only the crop is decoded."""
    import tensorflow as tf

    def example(file):
        data = tf.io.read_file(file)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data), tf.zeros([0, 0, 4]), area_range=SCALE, aspect_ratio_range=RATIO,
            min_object_covered=0, use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        (top, left, _), (height, width, _) = tf.unstack(begin), tf.unstack(extent)
        pixels = tf.image.decode_and_crop_jpeg(data, tf.stack([top, left, height, width]), channels=3)
        pixels = tf.image.random_flip_left_right(tf.image.resize(pixels, [SIZE, SIZE]))
        return tf.cast(tf.clip_by_value(pixels, 0, 255), tf.uint8), 0

    files = sorted(map(str, folder.rglob("*.jpg")))
    found = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    found = found.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    return found.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def torch(folder: Path):
    """Endless batches of PyTorch's DataLoader with torchvision's transforms on PIL images."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))
    from torch_zoo import import_torchvision

    import_torchvision()
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Photographs(Dataset):
        def __init__(self):
            self.files = sorted(folder.rglob("*.jpg"))
            crop = transforms.RandomResizedCrop(SIZE, SCALE, RATIO)
            self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])

        def __len__(self):
            return len(self.files)

        def __getitem__(self, i):
            return self.transform(Image.open(self.files[i]).convert("RGB")), 0

    loader = DataLoader(
        Photographs(), BATCH, shuffle=True, drop_last=True, num_workers=CORES, persistent_workers=True,
        prefetch_factor=4,
    )  # fmt: skip
    while True:
        yield from loader


SIDES = {"tljax": ours, "tf.data": tensorflow, "DataLoader": torch}


def serve(side: str, folder: Path) -> None:
    """Answers with the seconds of so many batches."""

    def functions():
        batches = SIDES[side](folder)

        def take():
            for _ in range(DRAINED):
                next(batches)
            begun = time.perf_counter()
            for _ in range(BATCHES):
                next(batches)
            return time.perf_counter() - begun

        return {"take": take}

    turns.serve(functions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--side", nargs=2, help="one pipeline on a folder, for the script's own use")
    given = parser.parse_args()
    if given.side:
        return serve(given.side[0], Path(given.side[1]))
    from tljax import data

    dataset = data.load(source("fruit"))
    train = dataset.train
    python = {name: given.torch_python if name == "DataLoader" else sys.executable for name in SIDES}
    if importlib.util.find_spec("tensorflow") is None:
        raise SystemExit("tensorflow is not installed: pip install -e '.[prepare]'")
    with tempfile.TemporaryDirectory(prefix="tljax-pipeline-") as folder:
        for i in range(len(train)):
            image, label = train[i]
            file = Path(folder) / "train" / dataset.classes[label] / f"{i:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
        start = lambda name: turns.Process(
            python[name], __file__, "--side", name, folder, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES=""
        )
        sides = {name: lambda name=name: start(name) for name in SIDES}
        found = turns.medians(sides, ("take",), given.repeats, together=True)["take"]
    speed = {name: BATCH * BATCHES / seconds for name, seconds in found.items()}
    rows = [(name, f"{images:.0f}", f"{speed['tljax'] / images:.2f}") for name, images in speed.items()]
    text = f"""## The input pipeline

By `python benchmarks/pipeline.py`: {len(train)} JPEG files of the fruit's train split, decoded, cut by a random-resized
crop to {SIZE} pixels (bilinear), flipped, in batches of {BATCH} uint8 images; {CORES} workers each, medians of
{given.repeats}. Machine: {sections.machine()}.

{sections.table(("pipeline", "images a second", "tljax to it"), rows)}
"""
    text += f"\n{REASON}\n" if speed["tljax"] < speed["tf.data"] else ""
    print(text)
    sections.write("pipeline", text)
    return None


if __name__ == "__main__":
    main()
