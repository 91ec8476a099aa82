"""`python -m dicom_depot` is the `dicom-depot` command."""

import gc


def main() -> None:
    """Entry point of the `dicom-depot` command."""
    gc.disable()  # nothing that is loaded goes again: looking at it over and over takes an eighth of the start
    from dicom_depot.cli import app  # noqa: PLC0415  (this is the loading)

    gc.enable()
    app()


if __name__ == "__main__":
    main()
