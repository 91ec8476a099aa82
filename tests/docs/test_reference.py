"""The generated reference pages equal what the code says. Renew them with UPDATE_SNAPSHOTS=1."""

from __future__ import annotations

import os
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt

from dicom_depot.config import PREFIX, Settings

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"

_HEAD = """# Settings

Each setting comes from a flag (`--data-dir`), the environment (`DICOM_DEPOT_DATA_DIR`), a TOML file (`data_dir`, the
file named by `--config` or `DICOM_DEPOT_CONFIG`) or its default, in this order. `dicom-depot settings` prints the
effective values and where each comes from. Keys for secrets have no flag: command lines can be read by others. An empty
variable counts as unset; a list without entries is `,`. A variable `DICOM_DEPOT_...` that nothing reads stops the
command. (Kubernetes makes such variables for a Service named `dicom-depot`: set `enableServiceLinks: false`.)

| setting | default | bounds | meaning |
|---|---|---|---|
"""
_COMPUTED = {"export_concurrency": "8 for each core, at most 64"}


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = _COMPUTED.get(name) or _shown(field.get_default())
        bounds = [_bound(limit) for limit in field.metadata if isinstance(limit, Ge | Gt | Le | Lt)]
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {', '.join(bounds)} | {meaning} |\n")
    return _HEAD + "".join(rows)


def _bound(limit: Ge | Gt | Le | Lt) -> str:
    match limit:
        case Ge(value):
            return f"≥ {value}"
        case Gt(value):
            return f"> {value}"
        case Le(value):
            return f"≤ {value}"
        case Lt(value):
            return f"< {value}"


def _shown(value: object) -> str:
    return "" if value in (None, ()) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_settings_page_says_what_the_code_says() -> None:
    page = REFERENCE / "settings.md"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        page.write_text(settings_page())
    assert page.read_text() == settings_page()
