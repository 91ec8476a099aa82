"""Seals secrets with AES-256-GCM. A sealed value is `v1:<key id>:<base64 of nonce and ciphertext>`; what it is bound
to (the operation's id) is authenticated with it, so that a sealed secret cannot be moved to another operation.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dicom_depot.domain.errors import ConfigurationError

_KEY_BYTES = 32
_NONCE_BYTES = 12


class AesSecretBox:
    """`ports.SecretBox`. The first key seals, all of them open."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}
        self._first = _key_id(keys[0])

    def seal(self, secret: str, bound_to: str) -> str:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._ciphers[self._first].encrypt(nonce, secret.encode(), bound_to.encode())
        return f"v1:{self._first}:{base64.b64encode(sealed).decode()}"

    def open(self, sealed: str, bound_to: str) -> str:
        _, key_id, text = sealed.split(":", 2)
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise ConfigurationError(
                f"A secret was sealed with the key {key_id}, which is not configured. "
                "Add that key to DICOM_DEPOT_SECRET_KEYS, or put the key file back into the data folder."
            )
        content = base64.b64decode(text)
        try:
            opened = cipher.decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], bound_to.encode())
        except InvalidTag:
            raise ConfigurationError("A sealed secret does not belong to its operation, or was changed.") from None
        return opened.decode()


def parse_keys(texts: Sequence[str]) -> list[bytes]:
    """Keys from the settings, each base64 of 32 bytes. Raises ConfigurationError, without the value."""
    keys = []
    for number, text in enumerate(texts, 1):
        key = _decoded(text)
        if key is None:
            raise ConfigurationError(
                f"DICOM_DEPOT_SECRET_KEYS: key {number} is not base64 of {_KEY_BYTES} bytes. "
                "Make one with: head -c 32 /dev/urandom | base64"
            )
        keys.append(key)
    return keys


def key_file(path: Path) -> bytes:
    """The key in a file that only this user can read; made at the first call.

    Raises ConfigurationError when others can read the file or its content is not a key.
    """
    if not path.exists():
        _make_key_file(path)
    if path.stat().st_mode & 0o077:
        raise ConfigurationError(f"The key file {path} can be read by others. Run: chmod 600 {path}")
    key = _decoded(path.read_text(encoding="ascii", errors="replace").strip())
    if key is None:
        raise ConfigurationError(
            f"The key file {path} does not hold base64 of {_KEY_BYTES} bytes. Put the right one back; without it, the "
            "exports that run with a secret cannot go on. Removing the file makes a new key at the next start."
        )
    return key


def _make_key_file(path: Path) -> None:
    """Whole or not at all, whenever the process dies; of several that make it at once the first wins."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _decoded(text: str) -> bytes | None:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        return None
    return key if len(key) == _KEY_BYTES else None


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"dicom-depot key id" + key).hexdigest()[:8]
