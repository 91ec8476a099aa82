"""Rendering: one frame of an instance as a JPEG or PNG picture (PS3.18 section 8.7.4). Bytes in, bytes out.

`codec.transcode` decodes, `codec.greyscale` and `codec.colour` make 8 bits of what was decoded, and Pillow scales and
encodes. Overlays, graphics, shutters and colour profiles are left out: see docs/decisions/0016.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL.Image import Image as Picture
from PIL.Image import Resampling, Transpose, frombuffer

from dicom_depot.codec.attributes import Attributes, FrameAttributes
from dicom_depot.codec.colour import palette, rgb
from dicom_depot.codec.greyscale import Bytes, grey
from dicom_depot.codec.image import Cells, Image
from dicom_depot.codec.media_types import PNG
from dicom_depot.codec.render_parameters import Rendition, Viewport, Window
from dicom_depot.codec.transcode import decoded_frame
from dicom_depot.domain.errors import DepotError, InvalidRequest, NotTranscodable

BYTES_MAX = 512 << 20
"""How much a frame may be, decoded; and how much a deflated data set, inflated."""

JPEG_SIDE_MAX = 65_500
"""More rows or columns the encoder does not take."""

_CODE_STREAMS = "1.2.840.10008.1.2.4."
"""JPEG, JPEG-LS and JPEG 2000: how their transfer syntaxes begin."""
_PIXEL_MEASURES = 0x00289110
_ASPECT_RATIO = 0x00280034
_SPACINGS = (0x00280030, 0x00181164, 0x00182010)
"""Pixel Spacing, Imager Pixel Spacing, Nominal Scanned Pixel Spacing."""
_ASPECT_MAX = 20.0
"""Pixels are not that long; what says so is a mistake."""


def render(content: bytes, number: int, rendition: Rendition, *, bytes_max: int = BYTES_MAX) -> bytes:
    """Frame `number`, from 1, of the Part 10 file `content`.

    Raises FrameNotFound, InvalidRequest for a region that is not in the picture, and NotTranscodable for whatever
    cannot be shown: no decoder, broken data, an unknown kind of colour, too many pixels.
    """
    try:
        with np.errstate(all="ignore"):  # Infinite values and what is no number have their grey, see codec.greyscale.
            picture, aspect = _picture(content, number, rendition.window, bytes_max)
        if rendition.viewport is not None:
            picture = _fitted(picture, rendition.viewport, aspect)
        return _encoded(picture, rendition)
    except DepotError:
        raise
    except Exception:
        raise NotTranscodable("its pixel data or data set is broken") from None


def _picture(content: bytes, number: int, window: Window | None, bytes_max: int) -> tuple[Picture, float]:
    """The frame as it is shown, and how many times as high as wide its pixels are. What it was made of is released."""
    file, image, cells = decoded_frame(content, number, bytes_max=bytes_max)
    if file.syntax.startswith(_CODE_STREAMS):  # What comes from a code stream has no bits below it.
        image = replace(image, high_bit=image.bits_stored - 1)
    attributes = FrameAttributes(Attributes.of_file(file, is_signed=image.is_signed), number)
    shown = _shown(cells, image, attributes, window)
    del cells  # Pillow makes a copy of colours, of four bytes a pixel.
    mode = "L" if shown.ndim == 2 else "RGB"
    picture = frombuffer(mode, (image.columns, image.rows), shown, "raw", mode, 0, 1)
    return picture, _aspect(attributes)


def _shown(cells: Cells, image: Image, attributes: FrameAttributes, window: Window | None) -> Bytes:
    match image.photometric, image.samples:
        case (("MONOCHROME1" | "MONOCHROME2"), 1):
            return grey(cells, image, attributes, window)
        case "PALETTE COLOR", 1 if cells.dtype.kind != "f":
            return palette(cells, image, attributes.data_set)
        case (("RGB" | "YBR_FULL"), 3) if cells.dtype.kind != "f":
            return rgb(cells, image)
    raise NotTranscodable("its photometric interpretation is not one that is shown, or does not go with its samples")


def _aspect(attributes: FrameAttributes) -> float:
    data_set = attributes.data_set
    candidates = [data_set.numbers(_ASPECT_RATIO), attributes.macro(_PIXEL_MEASURES).numbers(_SPACINGS[0])]
    candidates += [data_set.numbers(tag) for tag in _SPACINGS]
    for pair in candidates:
        if len(pair) == 2 and min(pair) > 0:
            aspect = pair[0] / pair[1]
            return aspect if 1 / _ASPECT_MAX <= aspect <= _ASPECT_MAX else 1.0
    return 1.0


def _fitted(picture: Picture, viewport: Viewport, aspect: float) -> Picture:
    left, top = viewport.region.left, viewport.region.top
    width = picture.width - left if viewport.region.width is None else viewport.region.width
    height = picture.height - top if viewport.region.height is None else viewport.region.height
    if width <= 0 or height <= 0 or left + width > picture.width or top + height > picture.height:
        raise InvalidRequest(
            f"The source region lies outside of the picture, which has {picture.width} columns and {picture.height} "
            "rows. Choose left, top, width and height within it, or leave them out.",
            target="viewport",
        )
    size = fitted_size(width, height * aspect, viewport)
    box = (left, top, left + width, top + height)
    if size != picture.size or box != (0, 0, *size):
        # A filter whose support grows as the picture shrinks, so that no detail falls between two pixels.
        picture = picture.resize(size, Resampling.BILINEAR, box=box)
    if viewport.flips_horizontally:
        picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
    if viewport.flips_vertically:
        picture = picture.transpose(Transpose.FLIP_TOP_BOTTOM)
    return picture


def fitted_size(width: float, height: float, viewport: Viewport) -> tuple[int, int]:
    """As large as possible within the viewport, in the same proportions (PS3.18 section 8.3.5.1.3)."""
    scale = min(viewport.width / width, viewport.height / height)
    if not viewport.enlarges:
        scale = min(scale, 1.0)
    sides = zip((width, height), (viewport.width, viewport.height), strict=True)
    fitted_width, fitted_height = (min(max(1, round(side * scale)), most) for side, most in sides)
    return fitted_width, fitted_height


def _encoded(picture: Picture, rendition: Rendition) -> bytes:
    buffer = io.BytesIO()
    if rendition.media_type == PNG:
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    if max(picture.size) > JPEG_SIDE_MAX:
        raise NotTranscodable(f"JPEG holds at most {JPEG_SIDE_MAX} rows and columns; ask for image/png or a viewport")
    picture.save(buffer, "JPEG", quality=rendition.quality, subsampling=0)  # 0: every pixel keeps its own colour
    return buffer.getvalue()
