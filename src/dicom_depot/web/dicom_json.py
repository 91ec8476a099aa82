"""Answers as DICOM JSON (PS3.18 annex F)."""

from __future__ import annotations

from starlette.responses import JSONResponse

DICOM_JSON = "application/dicom+json"


class DicomJsonResponse(JSONResponse):
    media_type = DICOM_JSON
