"""Bytes to values and back: DICOM headers, DICOM JSON, multipart bodies. No sockets, no files of its own, no index.

pydicom is imported only here (and by the test kit's samples).
"""
