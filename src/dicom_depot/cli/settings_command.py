"""`settings` and `migrate`, and the flags that every setting has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from dicom_depot import wiring
from dicom_depot.cli.common import ExitCode, explained_errors, load_with_sources, out, print_json
from dicom_depot.config import CONFIG_VARIABLE, PREFIX, Settings

_PANEL = "Settings"
_PREFIX = "setting_"
_SECRET = frozenset({"secret_keys"})
"""Never a flag: command lines can be read by every user of a machine."""


def show_settings(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Print the effective settings and where each comes from; secrets are masked."""
    settings, sources = load_with_sources(context)
    rows = [
        {
            "name": PREFIX + name.upper(),
            "value": _shown(name, getattr(settings, name)),
            "source": sources[name],
            "description": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("source")
    for row in rows:
        table.add_row(row["name"], row["value"], row["source"])
    out.print(table)


def migrate(context: typer.Context) -> None:
    """Bring the database to the schema of this release. Back up first; there is no way back."""
    settings, _ = load_with_sources(context)
    with explained_errors(ExitCode.FAILED):
        wiring.migrate(settings)
    out.print("The database has the schema of this release.")


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with a flag for each setting (and `--config`), which `load_settings` finds in the context."""
    flags = [_flag("config", f"TOML file with settings (or {CONFIG_VARIABLE}).", "file")]
    for name, field in Settings.model_fields.items():
        if name not in _SECRET:
            is_switch = field.annotation is bool
            flags.append(_flag(name, field.description or "", PREFIX + name.upper(), is_switch=is_switch))

    @functools.wraps(command)
    def run(*, context: typer.Context, **arguments: Any) -> None:
        given = {flag.name.removeprefix(_PREFIX): arguments.pop(flag.name) for flag in flags}
        context.find_root().ensure_object(dict).update(
            {name: value for name, value in given.items() if value is not None}
        )
        command(context=context, **arguments)

    own = inspect.signature(command, eval_str=True)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.parameters.values()]
    run.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *flags]}
    return run


def _flag(name: str, description: str, origin: str, *, is_switch: bool = False) -> inspect.Parameter:
    flag = name.replace("_", "-")
    option = typer.Option(
        f"--{flag}/--no-{flag}" if is_switch else f"--{flag}",
        help=f"{description} [{origin}]",
        metavar=None if is_switch else "VALUE",
        rich_help_panel=_PANEL,
    )
    return inspect.Parameter(
        _PREFIX + name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[bool | None, option] if is_switch else Annotated[str | None, option],
    )


def _shown(name: str, value: Any) -> str:
    if name in _SECRET:
        return f"{len(value)} keys (masked)" if value else "(key file in the data folder)"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
