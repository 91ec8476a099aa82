"""What tests and demos need, shipped: doubles for every port, contracts, faults, synthetic DICOM.

May import ports and what lies below them; nothing in the service imports it.
"""
