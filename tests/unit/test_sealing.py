"""Sealed secrets: what opens them, what does not, and the key file."""

from __future__ import annotations

import base64
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_depot.adapters.sealing import AesSecretBox, key_file, parse_keys
from dicom_depot.domain.errors import ConfigurationError

SECRET = "sv=2024&sig=abc%2Bdef%3D ü"


def test_a_sealed_secret_opens_for_what_it_is_bound_to_only() -> None:
    box = AesSecretBox([os.urandom(32)])
    sealed = box.seal(SECRET, "operation")
    assert box.open(sealed, "operation") == SECRET
    assert "sig=abc" not in sealed
    assert "def%3D" not in sealed
    with pytest.raises(ConfigurationError, match="does not belong"):
        box.open(sealed, "another operation")


def test_sealing_twice_gives_different_texts() -> None:
    box = AesSecretBox([os.urandom(32)])
    assert box.seal(SECRET, "x") != box.seal(SECRET, "x")


def test_a_changed_sealed_secret_does_not_open() -> None:
    box = AesSecretBox([os.urandom(32)])
    head, text = box.seal(SECRET, "x").rsplit(":", 1)
    content = bytearray(base64.b64decode(text))
    for place in (0, 12, len(content) - 1):
        changed = content.copy()
        changed[place] ^= 1
        with pytest.raises(ConfigurationError, match="changed"):
            box.open(f"{head}:{base64.b64encode(changed).decode()}", "x")


def test_keys_are_rotated_by_putting_the_new_one_first() -> None:
    old, new = os.urandom(32), os.urandom(32)
    sealed = AesSecretBox([old]).seal(SECRET, "x")
    both = AesSecretBox([new, old])
    assert both.open(sealed, "x") == SECRET
    renewed = both.seal(SECRET, "x")
    assert AesSecretBox([new]).open(renewed, "x") == SECRET
    with pytest.raises(ConfigurationError, match="DICOM_DEPOT_SECRET_KEYS"):
        AesSecretBox([new]).open(sealed, "x")


@pytest.mark.parametrize("text", ["", "short", "c2hvcnQ=", "!" * 44, "é" * 44, base64.b64encode(bytes(33)).decode()])
def test_a_bad_key_is_refused_by_its_number_and_not_shown(text: str) -> None:
    good = base64.b64encode(bytes(32)).decode()
    with pytest.raises(ConfigurationError, match="key 2 is not base64 of 32 bytes") as caught:
        parse_keys([good, text])
    assert not text or text not in str(caught.value)


def test_the_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    before = os.umask(0)
    try:
        with ThreadPoolExecutor(4) as pool:
            keys = set(pool.map(key_file, [path] * 4))
    finally:
        os.umask(before)
    assert keys == {key_file(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_file_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    key_file(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        key_file(path)


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b"\xff" * 44])
def test_a_key_file_without_a_key_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"secret\.key does not hold"):
        key_file(path)
    assert path.read_bytes() == content
