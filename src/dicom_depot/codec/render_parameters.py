"""How a frame is to be rendered: the query parameters of PS3.18 section 8.3.5, from text to values.

What the parameters say is checked here; whether a region lies within a picture is known once that is read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from dicom_depot.domain.errors import InvalidRequest

SIDE_MAX = 4096
"""How many pixels a side of a scaled picture may have, so that a request cannot eat the memory."""

THUMBNAIL_SIDE = 128
QUALITY_DEFAULT = 100

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)


class WindowFunction(StrEnum):
    """VOI LUT Function (0028,1056); PS3.3 section C.11.2.1.3."""

    LINEAR = "LINEAR"
    LINEAR_EXACT = "LINEAR_EXACT"
    SIGMOID = "SIGMOID"


@dataclass(frozen=True, slots=True)
class Window:
    """In units of what comes out of the modality LUT. `width` is more than 0, and at least 1 for LINEAR."""

    center: float
    width: float
    function: WindowFunction = WindowFunction.LINEAR


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the source picture in pixels, from its top left corner; sizes None: up to the edge."""

    left: float = 0
    top: float = 0
    width: float | None = None
    height: float | None = None


@dataclass(frozen=True, slots=True)
class Viewport:
    """The size that the picture, or a region of it, is scaled to fit into; `enlarges`: also when it is smaller."""

    width: int
    height: int
    region: Region = Region()
    flips_horizontally: bool = False
    flips_vertically: bool = False
    enlarges: bool = True


@dataclass(frozen=True, slots=True)
class Rendition:
    """What is wanted of one frame. `window` None: as the object says; `viewport` None: pixel for pixel."""

    media_type: str
    quality: int = QUALITY_DEFAULT
    window: Window | None = None
    viewport: Viewport | None = None


DEFAULT_THUMBNAIL = Viewport(THUMBNAIL_SIDE, THUMBNAIL_SIDE, enlarges=False)


def parse_quality(text: str) -> int:
    """1 to 100. Raises InvalidRequest, as all of these, with the parameter as its target."""
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= 100:
        raise InvalidRequest("quality is a whole number from 1 (smallest) to 100 (best).", target="quality")
    return int(text)


def parse_window(text: str) -> Window:
    """`center,width,function`; without a function it is LINEAR, which may be spelled as in DICOM or as in PS3.18."""
    parts = [part.strip() for part in text.split(",", 3)]
    if len(parts) not in (2, 3):
        raise _window("it has two or three values")
    center, width = _number(parts[0]), _number(parts[1])
    if center is None or width is None:
        raise _window("center and width are decimal numbers")
    try:
        function = WindowFunction(parts[2].upper().replace("-", "_")) if len(parts) == 3 else WindowFunction.LINEAR
    except ValueError:
        raise _window("the function is LINEAR, LINEAR_EXACT or SIGMOID") from None
    if width <= 0:
        raise _window("the width must be more than 0")
    if width < 1 and function is WindowFunction.LINEAR:
        raise _window("the width must be at least 1 for LINEAR; LINEAR_EXACT takes less")
    return Window(center, width, function)


def parse_viewport(text: str, *, has_region: bool = True) -> Viewport:
    """`vw,vh[,sx,sy,sw,sh]`, where the last four may be empty; negative sw and sh flip. Thumbnails have no region."""
    parts = [part.strip() for part in text.split(",", 6)]
    if not has_region and len(parts) != 2:
        raise InvalidRequest("viewport of a thumbnail: give its width and height alone, as 64,64.", target="viewport")
    if not 2 <= len(parts) <= 6:
        raise _viewport("it has two to six values")
    wide, high = (int(part) if _WHOLE.fullmatch(part) else 0 for part in parts[:2])
    if not (1 <= wide <= SIDE_MAX and 1 <= high <= SIDE_MAX):
        raise _viewport(f"width and height are whole numbers from 1 to {SIDE_MAX}")
    numbers = [_number(part) if part else None for part in parts[2:]]
    if any(number is None and part for number, part in zip(numbers, parts[2:], strict=True)):
        raise _viewport("the source region consists of decimal numbers")
    left, top, width, height = [*numbers, None, None, None, None][:4]
    if width == 0 or height == 0:
        raise _viewport("the source region must not be empty")
    return Viewport(
        wide,
        high,
        # The standard takes absolute values of the corner too.
        region=Region(abs(left or 0), abs(top or 0), width and abs(width), height and abs(height)),
        flips_horizontally=(width or 0) < 0,
        flips_vertically=(height or 0) < 0,
    )


def _number(text: str) -> float | None:
    number = float(text) if len(text) <= 64 and _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def _window(reason: str) -> InvalidRequest:
    return InvalidRequest(f"window is center,width,function, as 40,400,LINEAR: {reason}.", target="window")


def _viewport(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"viewport is width,height or width,height,left,top,width,height of the source: {reason}.", target="viewport"
    )
