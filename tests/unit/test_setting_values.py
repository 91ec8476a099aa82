"""A bad setting stops the start with its name and the reason, and never shows a secret."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from dicom_depot import config
from dicom_depot.config import Settings
from dicom_depot.domain.errors import ConfigurationError
from tests.support.service import run_command

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SECRET_KEYS", "bm90MzI=", "key 1 is not base64 of 32 bytes"),
        ("SECRET_KEYS", f"{KEY},no-key-but-secret", "key 2 is not base64 of 32 bytes"),
        ("EXPORT_ALLOWED_ENDPOINTS", "127.0.0.1:10000", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://127.0.0.1:99999/x", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://user@127.0.0.1/x", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://127.0.0.1/x?sig=1", "http://host[:port][/account]"),
        ("PUBLIC_URL", "depot.example.org", "https://host[:port][/path]"),
        ("PUBLIC_URL", "https://depot.example.org:port", "https://host[:port][/path]"),
        ("PORT", "65536", "65535"),
        ("EXPORT_CONCURRENCY", "0", "greater than or equal to 1"),
        ("CHUNK_INSTANCES", "many", "integer"),
        ("MAX_BODY_BYTES", "1", "1024"),
        ("LOG_LEVEL", "LOUD", "'DEBUG'"),
        ("DATABASE_URL", "postgresql://host/db", "sqlite:///PATH"),
        ("STORE_URL", "s3://bucket", "file:///PATH"),
    ],
)
def test_a_bad_value_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(f"DICOM_DEPOT_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        config.load()
    assert f"DICOM_DEPOT_{name} (from environment)" in caught.value.message
    assert says in caught.value.message
    assert name != "SECRET_KEYS" or value.rpartition(",")[2] not in caught.value.message


def test_addresses_are_kept_in_one_spelling() -> None:
    settings = Settings(
        public_url="HTTPS://Depot.Example.org:8443/Path/",
        export_allowed_endpoints="HTTP://LocalHost:10000/Account/ , http://[::1]:90",  # type: ignore[arg-type]
    )
    assert settings.public_url == "https://depot.example.org:8443/Path"
    assert settings.export_allowed_endpoints == ("http://localhost:10000/Account", "http://[::1]:90")


def test_serve_does_not_start_with_a_bad_key(tmp_path: Path) -> None:
    done = run_command("serve", data_dir=tmp_path / "data", check=False, secret_keys="bm90MzI=", port=0)
    assert done.returncode == 2
    assert "DICOM_DEPOT_SECRET_KEYS" in done.stderr
    assert "bm90MzI" not in done.stdout + done.stderr
    assert not (tmp_path / "data").exists()
