"""Encoded bytes or arrays → RGB uint8 arrays, whatever the file is."""

import functools
import io

import numpy as np

# What a header may claim, before memory is taken for the pixels: photographs have some hundred pixels a byte at most.
# PIL itself refuses more than 179 million.
SMALL, DENSEST = 2**24, 1000
_ORIENTED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG can say how it is turned
JPEG = ("JPEG", "MPO")  # MPO: several JPEGs in one file, as some phones write; the first is the photograph


class BadImage(Exception):
    """Bytes that are no whole image. Its text says what is wrong; the caller knows the file's name."""


@functools.cache
def opencv():
    """OpenCV, quiet and single-threaded: the pipeline's threads work on different photographs."""
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def decode(image: bytes | np.ndarray, target: int = 0, box=None) -> np.ndarray:
    """The image as uint8 [height, width, 3], upright by its EXIF orientation; transparency is dropped.

    Arrays: uint8 [h, w] or [h, w, 1 | 3 | 4]. Grey values are repeated, 16-bit ones keep their high byte.
    `box(height, width)` → (top, left, h, w) selects a part. With `target`, a JPEG whose part is at least 2,
    4 or 8 times `target` pixels is decoded at 1/2, 1/4 or 1/8 of its size: the codec's own scaling, several
    times faster. Raises BadImage.
    """
    if not isinstance(image, np.ndarray):
        return _decode_bytes(image, target, box)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        raise BadImage(f"an array {image.dtype}{list(image.shape)}, expected uint8 [h, w] or [h, w, 1 | 3 | 4]")
    if image.ndim == 2:
        image = image[..., None]
    image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]
    return _part(image, box(*image.shape[:2]), 1) if box else image


def _decode_bytes(data: bytes, target: int, box) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        # Only the header is read here: 0.05 ms. It decides who decodes.
        header = Image.open(io.BytesIO(data))
        _check(header.size, len(data))
        turned = _turned(header, data)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{len(data):,} bytes that are no image of a known format" if data else "empty") from None
    except Exception as error:
        # PIL's readers raise struct.error, SyntaxError, DecompressionBombError, … on damaged headers.
        raise BadImage(_one_line(error)) from None
    where, shrink, pixels = None, 1, None
    if header.format in JPEG and box:
        # What is cut out decides how small it may be decoded, so the part is chosen before there are pixels.
        width, height = header.size if turned < 5 else header.size[::-1]
        where = box(height, width)
        if target:
            shrink = max(s for s in (1, 2, 4, 8) if s == 1 or min(where[2:]) >= s * target)
    if _opencv_reads(header, data, turned):
        cv2 = opencv()
        flags = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags.get(shrink, cv2.IMREAD_COLOR))
        except cv2.error:
            pixels = None
    if pixels is not None:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    else:
        # Formats that OpenCV does not know; and damaged files, where PIL says what is wrong.
        pixels, shrink = _pil(header), 1
    if not box:
        return pixels
    return _part(pixels, where or box(*pixels.shape[:2]), shrink)


def _turned(header, data: bytes) -> int:
    """The EXIF orientation; 1: upright."""
    # To look for what may stand behind a PNG's pixels, PIL would decode them all.
    if header.format == "PNG" and not any(mark in data for mark in _ORIENTED):
        return 1
    return header.getexif().get(0x0112, 1)


def _check(size: tuple[int, int], length: int) -> None:
    """Raises BadImage for a picture that so few bytes cannot be."""
    width, height = size
    if width * height > max(SMALL, length * DENSEST):
        raise BadImage(f"claims {width:,} × {height:,} pixels in {length:,} bytes: no photograph")


def _opencv_reads(header, data: bytes, turned: int) -> bool:
    if header.format in JPEG:
        # Some versions of OpenCV fill the missing part of a cut file with grey and say nothing: without its
        # end mark a JPEG goes to PIL, which is strict. CMYK needs PIL's knowledge of Adobe's inverted inks.
        return header.mode in ("RGB", "L") and data.rstrip(b"\0")[-2:] == b"\xff\xd9"
    return header.format in ("PNG", "BMP", "WEBP") and turned == 1


def _pil(image) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        image.load()
        if image.mode.startswith("I"):
            # PIL's own conversion clips 16-bit greys to white.
            grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
            exif = image.getexif().tobytes()
            image = Image.fromarray(grey)
            image.info["exif"] = exif
        elif image.mode == "F":
            raise BadImage("floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_one_line(error)) from None


def _part(pixels: np.ndarray, where: tuple[int, int, int, int], shrink: int) -> np.ndarray:
    top, left, height, width = where
    if shrink > 1:
        top, left, height, width = (round(side / shrink) for side in where)
    return pixels[top : top + height, left : left + width]


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
