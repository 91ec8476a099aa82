"""Installs the locked Node packages of tests/node into .build/node. Run by make, before the tests.

Nothing here runs while tests run: a test that installs packages hides its own slowness and needs a network.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Run as a script, Python looks for modules in this folder only; the tests import from the project's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.node import (
    NODE_PACKAGES_ROOT,
    NODE_PACKAGES_SOURCE,
    node_executable,
    npm_script,
)

INPUT_NAMES = ("package.json", "package-lock.json", ".npmrc")
STAMP_NAME = ".installed"
INSTALL_SECONDS_MAX = 600


def inputs_hash() -> str:
    """Over every file that npm reads from us, and over Node's place, so that a new Node installs anew."""
    digest = hashlib.sha256(str(node_executable()).encode())
    for name in INPUT_NAMES:
        digest.update((NODE_PACKAGES_SOURCE / name).read_bytes())
    return digest.hexdigest()


def install() -> bool:
    """Returns whether anything had to be installed. Raises subprocess.CalledProcessError when npm fails."""
    stamp = NODE_PACKAGES_ROOT / STAMP_NAME
    wanted = inputs_hash()
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    NODE_PACKAGES_ROOT.mkdir(parents=True, exist_ok=True)
    # The stamp goes first: an install that is cut off half-way must not look complete to the next one.
    stamp.unlink(missing_ok=True)
    for name in INPUT_NAMES:
        shutil.copyfile(NODE_PACKAGES_SOURCE / name, NODE_PACKAGES_ROOT / name)
    node = node_executable()
    environment = {**os.environ, "PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    # Install scripts are code from the network that would run as the developer; no package here needs one.
    subprocess.run(
        [str(node), str(npm_script()), "ci", "--ignore-scripts", "--no-update-notifier"],
        cwd=NODE_PACKAGES_ROOT,
        env=environment,
        check=True,
        timeout=INSTALL_SECONDS_MAX,
    )
    stamp.write_text(wanted)
    return True


if __name__ == "__main__":
    try:
        print("Node packages: installed" if install() else "Node packages: up to date")
    except (subprocess.SubprocessError, OSError, RuntimeError) as error:
        sys.exit(f"Node packages could not be installed: {error}")
