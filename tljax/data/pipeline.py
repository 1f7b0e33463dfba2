"""Batches from a split, on grain's threads. An example is a pure function of the seed and its place.

The stream of training examples is endless: example j belongs to epoch j // n, and takes the place j % n of
that epoch's own permutation. Batch k is the examples k·B … (k+1)·B − 1, whatever the number of threads and
processes, so a run resumes exactly at any step, and nothing of the pipeline's state needs to be stored.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tljax.data import augment as augmentations
from tljax.data import transforms
from tljax.data.dataset import Split
from tljax.data.images import BadImage, opencv
from tljax.errors import UserError

PART = 16  # examples, at most, that a thread makes in one go
ORDER, PIXELS, VIEW = 0, 1, 2  # independent streams of random numbers under one seed


@dataclass(frozen=True)
class Augment:
    """What `train_batches` does to photographs. Other fields of `config.augment` belong to the device.

    crop_min_scale: smallest area of the random-resized crop, 1.0 = the evaluation crop instead. color_jitter:
    strength, 0 = off. randaugment: (operations, magnitude of 10) or ().
    """

    crop_min_scale: float = 0.08
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: float = 0.0
    randaugment: tuple = ()

    @property
    def random(self) -> bool:
        """Whether two looks at a photograph differ."""
        return self.crop_min_scale < 1 or self.flip or self.color_jitter > 0 or bool(self.randaugment)

    @classmethod
    def of(cls, config: "Mapping | Augment | None") -> "Augment":
        """From `config.augment`; raises UserError for values that make no sense."""
        if not isinstance(config, cls):
            names = {f.name for f in fields(cls)}
            config = cls(**{name: value for name, value in dict(config or {}).items() if name in names})
        if not 0 < config.crop_min_scale <= 1:
            raise UserError(f"augment.crop_min_scale is {config.crop_min_scale}, expected a part of the area, 0 to 1")
        ratio, randaugment = tuple(config.crop_ratio), tuple(config.randaugment)
        numbers = all(isinstance(value, int | float) for value in ratio)
        if len(ratio) != 2 or not numbers or not 0 < ratio[0] <= ratio[1]:
            raise UserError(
                f"augment.crop_ratio is {tuple(config.crop_ratio)}, expected (smallest, largest) width / height"
            )
        if config.color_jitter < 0:
            raise UserError(f"augment.color_jitter is {config.color_jitter}, expected 0 or more")
        kinds = [isinstance(value, kind) for value, kind in zip(randaugment, (int, int | float))]
        if randaugment and (
            len(randaugment) != 2 or not all(kinds) or randaugment[0] < 1 or not 0 <= randaugment[1] <= 10
        ):
            raise UserError(
                f"augment.randaugment is {tuple(config.randaugment)}, expected (operations, magnitude 0 to 10) or ()"
            )
        return config


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    stop_step: int,
    size: int,
    augment: Mapping | Augment | None = None,
    interpolation: str = "bicubic",
    crop: float = 0.875,
    views: int = 0,
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Batches start_step … stop_step − 1: {"image": uint8 [b, size, size, 3], "label": int32 [b]}.

    b = batch_size // number of processes; `process` = (index, count), each gets its own consecutive part of
    the global batch. Every photograph comes once an epoch, batches run across the ends of epochs. With `views`
    there are so many augmented views of each photograph (`view_batches`), and epoch e shows view e mod views;
    with 0 each epoch draws anew. `crop` is used only where augment.crop_min_scale is 1. Raises UserError, also
    (with the file's name) while iterating.
    """
    augment = Augment.of(augment)
    transforms.check_interpolation(interpolation)
    index, local = _share(batch_size, process)
    place = order(len(split), seed)

    def example(i: int) -> dict:
        step, within = divmod(i, local)
        j = step * batch_size + index * local + within
        epoch, at = place(j)
        rng = _view(epoch % views, split.rows[at]) if views else np.random.default_rng((seed, PIXELS, j))
        return _example(split, at, lambda image: _augmented(rng, image, size, augment, interpolation, crop))

    return _batches(example, start_step * local, stop_step * local, local, threads)


def order(n: int, seed: int) -> Callable[[int], tuple[int, int]]:
    """Returns the function from an example's number in the stream to (epoch, place in the split of n).

    Raises UserError where n is 0.
    """
    if not n:
        raise UserError("the train split is empty")

    # Two, as threads work on both sides of an epoch's end.
    of = functools.lru_cache(maxsize=2)(functools.partial(permutation, n, seed))
    return lambda j: (j // n, int(of(j // n)[j % n]))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The places in the split of n in the order in which an epoch shows them, int64 [n]."""
    return np.random.default_rng((seed, ORDER, epoch)).permutation(n)


def stream(n: int, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, place in the split of n) of the first `count` examples of the stream, int32 [count] each."""
    epochs = -(-count // n)
    places = np.concatenate([permutation(n, seed, epoch) for epoch in range(epochs)])
    return (np.arange(count) // n).astype(np.int32), places[:count].astype(np.int32)


def feature_batches(
    features: Callable[[int], Sequence],
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    stop_step: int,
    views: int,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """What `train_batches` with so many views gives, each photograph replaced by its features.

    `features(view)[place]` are those of one photograph; batches are {"features": [b, …],
    "label": int32 [b]}.
    """
    index, local = _share(batch_size, process)
    place = order(len(labels), seed)
    for step in range(start_step, stop_step):
        first = step * batch_size + index * local
        places = [place(j) for j in range(first, first + local)]
        found = np.stack([features(epoch % views)[at] for epoch, at in places])
        yield {"features": found, "label": labels[[at for _, at in places]]}


def slices(features: np.ndarray, batch_size: int, process: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
    """Features in order, as `eval_batches` gives images: {"features": [b, …]}, the last batch filled up with 0."""
    index, local = _share(batch_size, process)
    for first in range(index * local, index * local + len(features), batch_size):
        part = features[first : first + local]
        fill = np.zeros((local - len(part), *features.shape[1:]), features.dtype)
        yield {"features": np.concatenate([part, fill]) if len(fill) else np.asarray(part)}


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    size: int,
    crop: float = 0.875,
    interpolation: str = "bicubic",
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """The whole split once, in order: {"image", "label", "mask": float32 [b], "index": int32 [b]}.

    index is the place in the split (image and label as in `train_batches`). Every process gets the same
    number of batches; what fills up the last ones has mask 0, index −1, label 0 and a black image. Raises
    UserError, also (with the file's name) while iterating.
    """
    transforms.check_interpolation(interpolation)
    if not 0 < crop <= 1:
        raise UserError(f"crop is {crop}, expected a fraction of the shorter side, 0 to 1")
    transform = lambda at, image: transforms.resize_and_centre_crop(image, size, crop, interpolation)
    return _once(split, transform, batch_size, size, threads, process)


def view_batches(
    split: Split,
    view: int,
    *,
    batch_size: int,
    size: int,
    augment: Mapping | Augment | None = None,
    crop: float = 0.875,
    interpolation: str = "bicubic",
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
    order: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One augmented view of the whole split, as `eval_batches` gives the evaluation crop, in order or in the `order`.

    A view is a function of its number and of the photograph's row in the data's table, and neither of the run's seed
    nor of the split: runs can share it.
    """
    augment = Augment.of(augment)
    transforms.check_interpolation(interpolation)
    transform = lambda at, image: _augmented(_view(view, split.rows[at]), image, size, augment, interpolation, crop)
    return _once(split, transform, batch_size, size, threads, process, order)


def _view(view: int, row: int) -> np.random.Generator:
    """The randomness of an augmented view of the photograph in a row."""
    return np.random.default_rng((0, VIEW, view, int(row)))


def _once(split: Split, transform, batch_size: int, size: int, threads: int, process: tuple[int, int], order=None):
    """Batches of the whole split once, in order or in the `order`; `transform(place, image)` makes the pixels."""
    index, local = _share(batch_size, process)
    blank = np.zeros((size, size, 3), np.uint8)

    def example(place: int) -> dict:
        step, within = divmod(place, local)
        at = step * batch_size + index * local + within
        if at >= len(split):
            return {"image": blank, "label": np.int32(0), "mask": np.float32(0), "index": np.int32(-1)}
        at = at if order is None else int(order[at])
        found = _example(split, at, functools.partial(transform, at))
        return {**found, "mask": np.float32(1), "index": np.int32(at)}

    steps = -(-len(split) // batch_size)
    return _batches(example, 0, steps * local, local, threads)


def _share(batch_size: int, process: tuple[int, int]) -> tuple[int, int]:
    index, count = process
    if batch_size < 1 or batch_size % count:
        raise UserError(f"batch size {batch_size} cannot be divided among {count} processes")
    return index, batch_size // count


def _example(split: Split, at: int, transform) -> dict:
    image, label = split[at]
    try:
        return {"image": transform(image), "label": np.int32(label)}
    except BadImage as error:
        raise UserError(f"{split.name(at)}: {error}; data.on_bad='skip' leaves such files out") from None


def _augmented(rng, image, size: int, augment: Augment, interpolation: str, crop: float) -> np.ndarray:
    if augment.crop_min_scale < 1:
        pixels = transforms.random_resized_crop(
            rng, image, size, augment.crop_min_scale, augment.crop_ratio, interpolation
        )
    else:
        pixels = transforms.resize_and_centre_crop(image, size, crop, interpolation)
    if augment.flip and rng.random() < 0.5:
        pixels = transforms.flip(pixels)
    if augment.color_jitter:
        pixels = augmentations.color_jitter(rng, pixels, augment.color_jitter)
    if augment.randaugment:
        pixels = augmentations.randaugment(rng, pixels, *augment.randaugment)
    return pixels


def _batches(example, start: int, stop: int, batch: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Examples start … stop − 1 in order, in batches. The generator's end or closing stops the threads."""
    if stop <= start:
        return
    import grain

    opencv()  # imported here, before several threads want to
    # A thread makes a part of a batch at a time: to hand over each example for itself takes a fifth of its time.
    parts = -(-batch // PART)
    bounds = [batch * part // parts for part in range(parts + 1)]

    def made(i: int) -> list[dict]:
        step, part = divmod(i, parts)
        return [example(start + step * batch + at) for at in range(bounds[part], bounds[part + 1])]

    # Two batches ahead: the device never waits, and the buffer stays small beside the model.
    ahead = 2 * parts + threads if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    iterator = iter(grain.MapDataset.range((stop - start) // batch * parts).map(made).to_iter_dataset(options))
    try:
        while found := [one for part in itertools.islice(iterator, parts) for one in part]:
            yield {name: np.stack([one[name] for one in found]) for name in found[0]}
    finally:
        iterator.close()
