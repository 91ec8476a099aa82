"""DICOM Depot: a self-hosted DICOM service that exports medical images in bulk."""

__version__ = "0.1.0"
