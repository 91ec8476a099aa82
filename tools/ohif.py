"""Brings the OHIF viewer's published build into .build/ohif, made ready to be served under /viewer/. Run by make.

npm's registry has the build as the package @ohif/app. It is not installed as a dependency: the package names versions
of others that do not exist, and the build needs none of them. The archive is fetched by npm and used only when its hash
is the one below.

The published build expects to lie at the root of a server; its absolute paths are moved. Its study list has a column
for the number of instances and does not ask for it: servers may tell it unasked (PS3.18 section 10.6.3.3), ours does
not, as the service whose API it keeps; so the build is made to ask. Each text to be changed must be found: a build that
says it in another way is refused here and not found out in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.support.node import PROJECT_ROOT, node_executable, npm_script

VERSION = "3.13.2"
INTEGRITY = "sha512-WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
"""As npm's lock files write it; `npm view @ohif/app@VERSION dist.integrity` prints it."""
BASE = "/viewer/"
FOLDER = PROJECT_ROOT / ".build" / "ohif"
FETCH_SECONDS_MAX = 600

_STAMP_NAME = ".installed"
_PREFIX = "package/dist/"
_CHANGES = {
    "index.html": ((rb'((?:href|src|content|PUBLIC_URL)=")/', rb"\1" + BASE.encode()),),
    "*.bundle.*.js": (
        (rb'(__webpack_require__\.p = ")/"', rb"\1" + BASE.encode() + b'"'),
        (rb"(browserImportFunction\(')/", rb"\1" + BASE.encode()),
        (rb"('00100030' // Patient's Birth Date)", rb"'00080030', '00080061', '00201208', \1"),
    ),
    "app.bundle.css": ((rb"(url\()/", rb"\1" + BASE.encode()),),
    "manifest.json": ((rb'("(?:src|start_url)": ")/', rb"\1" + BASE.encode()),),
}
"""What is changed in which files: a pattern, and what it is replaced by."""


def install(folder: Path = FOLDER) -> bool:
    """Returns whether anything had to be fetched. Raises RuntimeError for an archive or a build that is not the pinned
    one, subprocess.SubprocessError when npm fails.
    """
    wanted = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp = folder / _STAMP_NAME
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        content = place / "dist"
        _unpack(_fetch(place), content)
        _change(content)
        (content / _STAMP_NAME).write_text(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        content.rename(folder)
    return True


def _fetch(folder: Path) -> Path:
    node = node_executable()
    arguments = ("--pack-destination", str(folder), "--ignore-scripts", "--no-update-notifier", "--silent")
    subprocess.run(
        [str(node), str(npm_script()), "pack", f"@ohif/app@{VERSION}", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=FETCH_SECONDS_MAX,
    )
    (archive,) = folder.glob("*.tgz")
    with archive.open("rb") as stream:
        found = "sha512-" + base64.b64encode(hashlib.file_digest(stream, "sha512").digest()).decode()
    if found != INTEGRITY:
        raise RuntimeError(f"@ohif/app {VERSION} has the hash {found}, and {INTEGRITY} is expected")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Regular files of the build only; their names were pinned with the archive."""
    with tarfile.open(archive) as opened:
        for member in opened:
            stream = opened.extractfile(member) if member.isreg() and member.name.startswith(_PREFIX) else None
            if stream is not None:
                path = folder / member.name.removeprefix(_PREFIX)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    shutil.copyfileobj(stream, target)


def _change(folder: Path) -> None:
    for names, changes in _CHANGES.items():
        for pattern, replacement in changes:
            count = 0
            for path in sorted(folder.glob(names)):
                content, found = re.subn(pattern, replacement, path.read_bytes())
                if found:
                    path.write_bytes(content)
                    count += found
            if not count:
                raise RuntimeError(f"@ohif/app {VERSION}: nothing like {pattern.decode()} in {names}")


if __name__ == "__main__":
    try:
        print("OHIF viewer: installed" if install() else "OHIF viewer: up to date")
    except (subprocess.SubprocessError, OSError, RuntimeError) as error:
        sys.exit(f"The OHIF viewer could not be installed: {error}")
