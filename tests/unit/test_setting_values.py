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
        ("EXPORT_ALLOWED_ENDPOINTS", "http://127.0.0.1/a/b", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://*.example.org", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://my_host", "http://host[:port][/account]"),
        ("EXPORT_ALLOWED_ENDPOINTS", "http://127.0.0.1:0", "http://host[:port][/account]"),
        ("CORS_ORIGINS", "https://viewer.example.org/", "https://host[:port]"),
        ("CORS_ORIGINS", "https://viewer.example.org/path", "https://host[:port]"),
        ("CORS_ORIGINS", "https://Viewer.example.org", "https://host[:port]"),
        ("CORS_ORIGINS", "viewer.example.org", "https://host[:port]"),
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"auth_audiences": "depot"}, "DICOM_DEPOT_AUTH_AUDIENCES is set without DICOM_DEPOT_AUTH_ISSUERS"),
        ({"roles_file": "roles.toml"}, "DICOM_DEPOT_ROLES_FILE is set without DICOM_DEPOT_AUTH_ISSUERS"),
        ({"cors_origins": "*"}, "only with DICOM_DEPOT_AUTH_ISSUERS"),
        ({"data_dir": "d", "export_root": "d"}, "must lie apart"),
        ({"data_dir": "d", "export_root": "d/store/x"}, "must lie apart"),
        ({"data_dir": "d/data", "export_root": "d/data/../../d"}, "must lie apart"),
        ({"data_dir": "d", "export_root": "/s/x", "store_url": "file:///s"}, "must lie apart"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.load(given)
    assert says in caught.value.message


def test_exports_may_lie_beside_the_data_also_by_a_similar_name() -> None:
    config.load({"data_dir": "d/data", "export_root": "d/data-exports"})


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EXPORT_ROOT", "PORT", "EXPORT_ALLOWED_HOSTS"):
        monkeypatch.setenv(f"DICOM_DEPOT_{name}", "")
    file = tmp_path / "depot.toml"
    file.write_text("port = 7\n")
    settings, sources = config.load(config_file=file)
    assert (settings.export_root, sources["export_root"]) == (None, "default")
    assert (settings.port, sources["port"]) == (7, "file")
    assert settings.export_allowed_hosts == config.CLOUD_SUFFIXES


def test_an_empty_flag_is_refused_because_it_would_be_lost_on_the_way_to_the_worker() -> None:
    with pytest.raises(ConfigurationError, match=r"DICOM_DEPOT_EXPORT_ALLOWED_HOSTS \(from flag\): it is empty"):
        config.load({"export_allowed_hosts": ""})
    assert config.load({"export_allowed_hosts": ","})[0].export_allowed_hosts == ()


def test_a_variable_of_no_setting_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "EXPORT_TO", "TEST_ANYTHING"):
        monkeypatch.setenv(f"DICOM_DEPOT_{name}", "x")
    config.load()
    monkeypatch.setenv("DICOM_DEPOT_AUTH_ISSUER", "https://secret.example")
    with pytest.raises(
        ConfigurationError, match=r"AUTH_ISSUER is no setting\. Did you mean DICOM_DEPOT_AUTH_ISSUERS"
    ) as e:
        config.load()
    assert "secret" not in e.value.message


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
