"""One image file as 8-bit RGB, whatever it is stored as: 16 bits, a palette, CMYK, turned by EXIF."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, first_line

if TYPE_CHECKING:  # PIL is imported only where images are read
    from PIL.Image import Image


class UndecodableImage(DataError):
    """A file is damaged, cut off, or of a kind that has no place on a scale of 8 bits."""


def open_image(path: Path) -> Image:
    """Decode one image as RGB, upright; of several frames the first.

    16-bit values v become round(v / 257), floats from 0 to 1 become round(255 v); transparency is dropped, as
    torchvision's ImageFolder does. Raises UndecodableImage naming the file and the reason.
    """
    from PIL import Image as images
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about odd metadata
            with images.open(path) as image:
                image.load()
                upright: Image = image
                with contextlib.suppress(Exception):  # broken EXIF turns nothing; the pixels are whole
                    upright = ImageOps.exif_transpose(image)
                return _eight_bits(upright).convert("RGB")
    except (
        Exception
    ) as error:  # decoders of damaged files raise what they like, struct.error and IndexError included
        raise UndecodableImage(f"{path}: cannot be decoded ({first_line(error)})") from error


def _eight_bits(image: Image) -> Image:
    """Grey levels of more than 8 bits on a scale of 8; PIL's own conversion cuts them off at 255."""
    from PIL import Image as images

    if not (image.mode == "F" or image.mode.startswith("I")):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    most = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= most):
        kind = "floats" if image.mode == "F" else "whole numbers"
        raise ValueError(
            f"it holds {kind} from {low:g} to {high:g}, only 0 to {most:g} can be scaled; save it as 8 bits"
        )
    return images.fromarray((values * (255 / most)).round().astype(np.uint8))
