"""Contact sheets: a picture of every DICOM file below some folders, as `/rendered` would show it, to be looked at.

    python -m benchmarks.contact_sheet OUT FOLDER [FOLDER ...]

writes OUT/sheet-01.png and so on: 48 files on a sheet, first frames, each with its place, size and kind, or the reason
why it is refused; OUT/files.txt lists them by number. What is written holds patients' pictures wherever
the files do: OUT belongs outside of the repository.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from dicom_depot.codec.media_types import PNG
from dicom_depot.codec.render_parameters import Rendition, Viewport
from dicom_depot.domain.errors import DepotError
from dicom_depot.services.transcoding import Transcoding

COLUMNS, ROWS = 8, 6
SIDE, CAPTION, GAP = 150, 44, 6
_CELL_WIDTH, _CELL_HEIGHT = SIDE + GAP, SIDE + CAPTION + GAP
_FITTED = Rendition(PNG, viewport=Viewport(SIDE, SIDE))


class Shown(NamedTuple):
    """One file: the picture fitted into its cell, or why there is none; and the size that it has unfitted."""

    name: str
    picture: Image.Image | None
    text: str


def shown(path: Path, name: str, transcoding: Transcoding) -> Shown:
    content = path.read_bytes()
    try:
        full = Image.open(io.BytesIO(transcoding.render(content, 1, Rendition(PNG))))
        fitted = Image.open(io.BytesIO(transcoding.render(content, 1, _FITTED)))
    except DepotError as error:
        return Shown(name, None, error.message)
    return Shown(name, fitted.convert("RGB"), f"{full.width}x{full.height} {full.mode}")


def files_below(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".csv":
                yield path, path.relative_to(folder).as_posix()


def sheet(entries: Sequence[Shown], first_number: int) -> Image.Image:
    """All entries in rows; numbers, names and texts below the pictures. The ground is blue, which no file is."""
    result = Image.new("RGB", (COLUMNS * _CELL_WIDTH + GAP, ROWS * _CELL_HEIGHT + GAP), (24, 40, 90))
    draw = ImageDraw.Draw(result)
    for place, entry in enumerate(entries):
        left = GAP + place % COLUMNS * _CELL_WIDTH
        top = GAP + place // COLUMNS * _CELL_HEIGHT
        if entry.picture is not None:
            result.paste(entry.picture, (left, top))
        else:
            draw.text((left + 4, top + 20), "\n".join(textwrap.wrap(entry.text, 22)), fill=(255, 170, 120))
        folder, _, name = entry.name.rpartition("/")
        lines = [f"{first_number + place} {folder[:20]}", name[-25:], entry.text[:25] if entry.picture else "refused"]
        draw.text((left, top + SIDE + 1), "\n".join(lines), fill=(230, 230, 230), font_size=10)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Write contact sheets of the DICOM files below some folders.")
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    transcoding = Transcoding()
    entries = [shown(path, name, transcoding) for path, name in files_below(arguments.folders)]
    transcoding.close()
    size = COLUMNS * ROWS
    for number, start in enumerate(range(0, len(entries), size), 1):
        sheet(entries[start : start + size], start + 1).save(arguments.out / f"sheet-{number:02}.png")
    listed = [f"{number} {entry.name} {entry.text}\n" for number, entry in enumerate(entries, 1)]
    (arguments.out / "files.txt").write_text("".join(listed), encoding="utf-8")
    print(f"{len(entries)} files, {sum(entry.picture is not None for entry in entries)} shown: {arguments.out}")


if __name__ == "__main__":
    main()
