"""Decoding, crops, resizing and the colour operations, against PIL and against arithmetic by hand."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from tljax.data import augment, transforms
from tljax.data.images import BadImage, decode

RNG = np.random.default_rng(0)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without sharp edges: JPEG changes it little."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


PHOTO = smooth(60, 80)


def encoded(image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


# ---- decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_lossless_files_of_all_modes(kind, mode):
    image = Image.fromarray(PHOTO).convert(mode)
    try:
        data = encoded(image, kind)
    except OSError:
        pytest.skip(f"PIL writes no {mode} {kind}")
    if kind == "GIF":
        image = Image.open(io.BytesIO(data))
    found = decode(data)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_as_pil_decodes_it(mode):
    data = encoded(Image.fromarray(PHOTO).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(decode(data) - expected).max() <= 2
    assert abs(decode(data) - PHOTO.astype(int)).mean() < (90 if mode == "L" else 12)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_keep_their_high_byte(kind):
    grey = RNG.integers(0, 65536, (7, 9)).astype(np.uint16)
    found = decode(encoded(grey, kind))
    np.testing.assert_array_equal(found, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2))


# How a camera stores an upright picture `a` under each EXIF orientation, from the standard's table.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {}
    data = encoded(np.ascontiguousarray(STORED[orientation](PHOTO)), kind, exif=exif, **options)
    found = decode(data)
    assert found.shape == PHOTO.shape
    assert abs(found - PHOTO.astype(int)).mean() < (2 if kind == "JPEG" else 1e-9)
    # A part is chosen on the upright picture.
    part = decode(data, box=lambda height, width: (10, 20, height - 15, width - 30))
    np.testing.assert_array_equal(part, found[10:55, 20:70])


def test_arrays():
    grey = PHOTO[..., 0]
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(decode(array), np.stack([grey] * 3, -1))
    rgba = np.concatenate([PHOTO, PHOTO[..., :1]], -1)
    np.testing.assert_array_equal(decode(rgba), PHOTO)
    np.testing.assert_array_equal(decode(PHOTO, box=lambda h, w: (1, 2, 3, 4)), PHOTO[1:4, 2:6])
    for wrong in (PHOTO.astype(np.float32), PHOTO[None], PHOTO[..., :2]):
        with pytest.raises(BadImage, match="expected uint8"):
            decode(wrong)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), share=st.floats(0, 0.9))
@example("JPEG", 0.999)
@example("JPEG", 0.5)
def test_a_cut_file_is_refused(kind, share):
    data = encoded(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    with pytest.raises(BadImage) as caught:
        decode(data[: int(share * len(data))])
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xff\xd8\xff\xe0" + b"\0" * 40 + b"\xff\xd9")
@example(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
@example(b"GIF89a" + b"\0" * 40)
def test_bytes_that_are_no_image_are_refused(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImage):
            decode(data)


def test_several_jpegs_in_one_file():
    first, second = Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert abs(decode(data) - PHOTO.astype(int)).mean() < 2


def test_trailing_bytes_after_a_jpeg_do_not_matter():
    data = encoded(PHOTO, "JPEG")
    np.testing.assert_array_equal(decode(data + b"trailer of a phone"), decode(data))


def test_floating_point_images_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode(encoded(np.ones((3, 3), np.float32), "TIFF"))


# ---- crops


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    scale=st.floats(0.01, 0.99),
)
def test_random_boxes_lie_inside(seed, height, width, scale):
    top, left, h, w = transforms.random_box(np.random.default_rng(seed), height, width, scale, (3 / 4, 4 / 3))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1


def test_random_boxes_have_the_area_and_aspect_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_box(rng, 1000, 1000, 0.2, (3 / 4, 4 / 3)) for _ in range(4000)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert 0.199 < area.min() < area.max() < 1.001
    assert 0.749 < aspect.min() < aspect.max() < 1.335
    # Uniform area: its quarters hold a quarter each. (A little less at the top, where long boxes do not fit.)
    share = np.histogram(area, bins=[0.2, 0.4, 0.6, 0.8])[0] / (area < 0.8).sum()
    np.testing.assert_allclose(share, 1 / 3, atol=0.04)
    assert abs(np.log(aspect).mean()) < 0.01
    # A panorama: no box fits, so the centre with the widest admissible aspect.
    assert transforms.random_box(rng, 30, 3000, 0.9, (3 / 4, 4 / 3)) == (0, 1480, 30, 40)


@pytest.mark.parametrize("size", [40, 100, 200])
def test_a_jpeg_decoded_at_reduced_size_shows_the_same_part(size):
    photo = smooth(900, 1201)
    data = encoded(photo, "JPEG", quality=95)
    for seed in range(3):
        small, full = (
            transforms.random_resized_crop(
                np.random.default_rng(seed), image, size, 0.3, (3 / 4, 4 / 3), "bilinear"
            ).astype(int)
            for image in (data, photo)
        )
        assert abs(small - full).mean() < 3
    decoded = decode(data, size, lambda h, w: (100, 200, 640, 640))
    assert min(decoded.shape[:2]) == 640 // max(s for s in (1, 2, 4, 8) if s * size <= 640)


@pytest.mark.parametrize("shape", [(348, 348), (348, 464), (464, 348), (500, 333), (28, 28), (20, 90), (257, 300)])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (32, 0.875), (33, 1.0), (64, 0.95)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_crop_equals_pil(shape, size, crop, interpolation):
    photo = smooth(*shape)
    # The steps of torchvision's Resize(round(size / crop)) and CenterCrop(size), written out.
    height, width = shape
    short = round(size / crop)
    if height < width:
        new_height, new_width = short, int(short * width / height)
    else:
        new_height, new_width = int(short * height / width), short
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    resized = np.asarray(Image.fromarray(photo).resize((new_width, new_height), method))
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    expected = resized[top : top + size, left : left + size]
    found = transforms.resize_and_centre_crop(encoded(photo, "PNG"), size, crop, interpolation)
    assert found.shape == (size, size, 3)
    np.testing.assert_array_equal(found, expected)


def test_flip():
    flipped = transforms.flip(PHOTO)
    for x in (0, 5, 79):
        np.testing.assert_array_equal(flipped[:, x], PHOTO[:, 79 - x])


# ---- colour and RandAugment


def test_color_jitter_stays_within_its_strength():
    assert (augment.color_jitter(np.random.default_rng(0), PHOTO, 0.0) == PHOTO).all()
    grey = np.full((6, 6, 3), 100, np.uint8)  # only brightness moves a uniform grey
    means = [augment.color_jitter(np.random.default_rng(s), grey, 0.3).mean() for s in range(200)]
    assert 69 <= min(means) < 75
    assert 125 < max(means) <= 130


def operation(name: str):
    """An operation by its place in the list of the paper's fourteen."""
    order = ["identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast"]
    order += ["brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"]
    assert len(order) == len(augment.OPERATIONS) == 14
    apply = augment.OPERATIONS[order.index(name)]
    return lambda level, sign=1: np.asarray(apply(Image.fromarray(PHOTO), level, sign)).astype(int)


def test_operations_by_hand():
    photo = PHOTO.astype(int)
    np.testing.assert_array_equal(operation("identity")(1.0), photo)
    np.testing.assert_array_equal(operation("solarize")(0.5), np.where(photo < 128, photo, 255 - photo))
    np.testing.assert_array_equal(operation("posterize")(1.0), photo & 0b11110000)
    assert abs(operation("brightness")(1.0, -1) - 0.1 * photo).max() <= 1
    assert abs(operation("color")(1.0, -1) - Image.fromarray(PHOTO).convert("L").convert("RGB")).max() <= 26
    np.testing.assert_array_equal(
        operation("contrast")(0.5), np.asarray(ImageEnhance.Contrast(Image.fromarray(PHOTO)).enhance(1.45))
    )
    spread = operation("autocontrast")(0.0)
    assert (spread.min((0, 1)) == 0).all()
    assert (spread.max((0, 1)) == 255).all()
    # 10/10 of 150/331 of 80 columns: 36.25 to the left, grey behind.
    moved = operation("translate_x")(1.0)
    assert (moved[:, 45:] == 128).all()
    assert abs(moved[:, :40] - photo[:, 36:76]).max() < 16
    sheared = operation("shear_y")(1.0)
    assert abs(sheared[:55, :3] - photo[:55, :3]).max() < 20
    assert (sheared[45:, 79] == 128).all()
    turned = operation("rotate")(1.0)
    assert (turned[0, 0] == 128).all()
    assert abs(turned[30, 40] - photo[30, 40]).max() < 8


@pytest.mark.parametrize("name", ["rotate", "solarize", "color", "posterize", "contrast", "brightness", "shear_x"])
def test_magnitude_zero_is_the_identity(name):
    np.testing.assert_array_equal(operation(name)(0.0), PHOTO)


def test_randaugment_is_a_function_of_its_generator():
    run = lambda seed, n=2: augment.randaugment(np.random.default_rng(seed), PHOTO, n, 9.0)
    np.testing.assert_array_equal(run(3), run(3))
    results = [run(seed) for seed in range(30)]
    assert all(r.shape == PHOTO.shape and r.dtype == np.uint8 for r in results)
    assert len({r.tobytes() for r in results}) > 20
    np.testing.assert_array_equal(run(0, 0), PHOTO)
