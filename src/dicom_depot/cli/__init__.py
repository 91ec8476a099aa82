"""The command line. Each command is a module; this one only puts them together."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from dicom_depot.cli import (
    check_command,
    demo_command,
    export_command,
    identity_command,
    import_command,
    operations_command,
    serve_command,
    settings_command,
)

app = typer.Typer(
    name="dicom-depot",
    help="A DICOM service that exports medical images in bulk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _name, _command in (
    ("serve", serve_command.serve),
    ("import", import_command.import_files),
    ("export", export_command.export),
    ("check", check_command.check),
    ("settings", settings_command.show_settings),
    ("migrate", settings_command.migrate),
):
    app.command(_name)(settings_command.with_setting_flags(_command))
app.command("demo")(demo_command.demo)
app.add_typer(identity_command.app, name="identity")
app.add_typer(operations_command.app, name="operations")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(importlib.metadata.version("dicom-depot"))
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    context.ensure_object(dict)
