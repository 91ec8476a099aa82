"""The outside technologies, one module each, behind the promises of `ports`."""
