"""`python -m dicom_depot` is the `dicom-depot` command."""

from dicom_depot.cli import main

if __name__ == "__main__":
    main()
