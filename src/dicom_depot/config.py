"""Every setting of the service: its unit, default and bounds. The only place that reads the environment.

A setting comes from, in this order: a command line flag, the environment (`DICOM_DEPOT_<NAME>`), a TOML file (named by
`DICOM_DEPOT_CONFIG` or `--config`), the default. An empty variable counts as unset; a list without entries is `,`.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import re
import tomllib
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from dicom_depot.domain.errors import ConfigurationError

PREFIX = "DICOM_DEPOT_"
CONFIG_VARIABLE = PREFIX + "CONFIG"

_MIB = 1024 * 1024
_SECRET_KEY_BYTES = 32
_OTHER_VARIABLES = frozenset({"CONFIG", "TOKEN", "EXPORT_TO"})
"""Variables that are no settings: a file of settings, and what single commands read."""
_ENDPOINT = re.compile(r"https?://(?:[a-z0-9.-]+|\[(?P<v6>[0-9a-f:.]+)\])(?::[0-9]+)?(?:/[A-Za-z0-9_-]+)?", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)

CLOUD_SUFFIXES = (
    ".blob.core.windows.net",
    ".blob.storage.azure.net",
    ".blob.core.usgovcloudapi.net",
    ".blob.core.chinacloudapi.cn",
)
"""The blob endpoints of Azure's public and sovereign clouds."""


def _default_concurrency() -> int:
    """Enough to hide latency, few enough for a laptop: 16 on 2 cores, 64 from 8 cores on."""
    return min(64, 8 * (os.cpu_count() or 1))


class Settings(BaseSettings):
    """The settings of one process. Frozen: they are read once, at the start."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    data_dir: Path = Field(
        default=Path("dicom-depot-data"),
        description="Folder of the embedded databases, the key file and the default store.",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address that the service listens on.")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port that the service listens on; 0 picks one.")
    public_url: str | None = Field(
        default=None,
        description="Base URL under which clients reach the service, for links; default: as each request came.",
    )
    database_url: str | None = Field(
        default=None, description="Index and operations; default: SQLite in the data folder (sqlite:///PATH)."
    )
    store_url: str | None = Field(
        default=None,
        description="Where instances are stored; default: a folder in the data folder (file:///PATH).",
    )
    secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys that seal secrets, comma separated, each base64 of 32 bytes: the first seals, all open. "
        "Default: a key file in the data folder.",
    )
    export_root: Path | None = Field(
        default=None, description="Folder below which `file` destinations lie; unset: no such destinations."
    )
    export_allowed_endpoints: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Storage endpoints allowed beside the cloud's own, comma separated, "
        "e.g. http://127.0.0.1:10000/devstoreaccount1.",
    )
    export_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=CLOUD_SUFFIXES,
        description="Host name endings of storage accounts that exports may go to over HTTPS, comma separated; "
        "each begins with a dot.",
    )
    export_allow_anonymous: bool = Field(default=False, description="Allow destinations without a SAS or an identity.")
    export_content_md5: bool = Field(
        default=False, description="Send Content-MD5 with each exported instance (slower, costs CPU)."
    )
    export_concurrency: int = Field(
        default_factory=_default_concurrency,
        ge=1,
        le=1024,
        description="Instances copied at the same time, at most; each export finds out how many make it faster.",
    )
    export_bytes_in_flight: int = Field(
        default=256 * _MIB,
        ge=_MIB,
        le=1 << 40,
        description="Bytes of instances held in memory by copies, at most.",
    )
    export_stream_bytes: int = Field(
        default=32 * _MIB,
        ge=_MIB,
        le=256 * _MIB,
        description="Instances larger than this are streamed in blocks instead of sent from memory, in bytes.",
    )
    export_request_seconds: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="Longest time for one request to the destination, in seconds.",
    )
    export_retry_seconds: float = Field(
        default=3600.0,
        ge=0,
        le=30 * 86400,
        description="How long transient faults are retried without any success before the operation fails, in seconds.",
    )
    chunk_instances: int = Field(default=5000, ge=1, le=100_000, description="Instances in one chunk of work, at most.")
    chunk_bytes: int = Field(
        default=512 * _MIB,
        ge=1,
        le=1 << 40,
        description="Bytes in one chunk of work (one instance may exceed it).",
    )
    max_identifiers: int = Field(
        default=100_000, ge=1, le=10_000_000, description="Identifiers in one export request, at most."
    )
    max_body_bytes: int = Field(default=32 * _MIB, ge=1024, le=1 << 40, description="Bytes of a request body, at most.")
    store_instance_bytes_max: int = Field(
        default=4 << 30,
        ge=1024,
        le=1 << 40,
        description="Bytes of one instance that is stored over DICOMweb, at most.",
    )
    store_instances_max: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Instances in one request to store, at most."
    )
    transcode_bytes_max: int = Field(
        default=100 * _MIB,
        ge=1024,
        le=2 << 30,
        description="Larger instances are not transcoded, only sent as they are stored, in bytes.",
    )
    operation_retention_days: float = Field(
        default=30.0, gt=0, le=36500, description="Days that an ended operation and its log lines are kept."
    )
    delete_delay_seconds: float = Field(
        default=3 * 86400.0,
        ge=0,
        le=365 * 86400,
        description="How long bytes of deleted instances are kept before they are swept, in seconds.",
    )
    min_free_bytes: int = Field(
        default=256 * _MIB,
        ge=0,
        le=1 << 50,
        description="Free space that the data folder must have at the start, and that storing leaves free, in bytes.",
    )
    identity_source: Literal["auto", "managed", "workload", "cli"] = Field(
        default="auto",
        description="Where the managed identity comes from: auto tells App Service, Arc, AKS workload identity and "
        "virtual machines apart; cli is the developer's own Azure CLI sign-in.",
    )
    identity_client_id: str | None = Field(
        default=None,
        description="Client id of a user-assigned managed identity; default: the system-assigned one.",
    )
    auth_issuers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Issuers whose bearer tokens are accepted, comma separated https:// URLs; none: no sign-in, and "
        "the service listens on loopback addresses only.",
    )
    auth_audiences: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Audiences that a bearer token may be meant for, comma separated; needed with issuers."
    )
    auth_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("RS256", "PS256", "ES256"),
        description="Signature algorithms that are accepted, comma separated; asymmetric ones only.",
    )
    auth_roles_claim: str = Field(default="roles", min_length=1, description="The claim that holds a caller's roles.")
    auth_leeway_seconds: float = Field(
        default=60.0, ge=0, le=600, description="Difference of clocks that is tolerated in tokens, in seconds."
    )
    roles_file: Path | None = Field(
        default=None, description="TOML file that says which role may do what; default: the built-in roles."
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve without sign-in also on addresses that others can reach: everybody may do everything.",
    )
    tls_cert: Path | None = Field(default=None, description="PEM file with the server's certificate chain.")
    tls_key: Path | None = Field(default=None, description="PEM file with the certificate's private key.")
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed, comma separated.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose web pages may call the service, comma separated."
    )
    viewer_dir: Path | None = Field(
        default=None,
        description="Folder with a build of the OHIF viewer that is served under /viewer/, open to everybody; "
        "unset: no viewer.",
    )
    audit_log: Path | None = Field(
        default=None, description="File that the audit trail is appended to; default: audit.log in the data folder."
    )
    operations_max: int = Field(
        default=100, ge=1, le=100_000, description="Operations that may be active at the same time, in all."
    )
    operations_max_per_caller: int = Field(
        default=20,
        ge=1,
        le=100_000,
        description="Operations that one caller may have active at the same time; does not hold without sign-in.",
    )
    max_header_bytes: int = Field(
        default=65_536, ge=8192, le=4 * _MIB, description="Bytes of a request's head, at most."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Time for a request's head to arrive, and for a connection to stay idle.",
    )
    body_idle_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="Longest pause between two pieces of a request's body."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log line that is written."
    )

    @field_validator(
        "secret_keys",
        "export_allowed_endpoints",
        "export_allowed_hosts",
        "auth_issuers",
        "auth_audiences",
        "auth_algorithms",
        "trusted_proxies",
        "cors_origins",
        mode="before",
    )
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("secret_keys")
    @classmethod
    def _keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(value, 1):
            try:
                size = len(base64.b64decode(key.get_secret_value(), validate=True))
            except (binascii.Error, ValueError):
                size = 0
            if size != _SECRET_KEY_BYTES:
                raise ValueError(
                    f"key {number} is not base64 of {_SECRET_KEY_BYTES} bytes; "
                    "make one with: head -c 32 /dev/urandom | base64"
                )
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("public_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return _http_address(value)
        except ValueError:
            raise ValueError("it must look like https://host[:port][/path]") from None

    @field_validator("export_allowed_endpoints")
    @classmethod
    def _endpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(_endpoint(text) for text in value)
        except ValueError:
            raise ValueError("each must look like http://host[:port][/account]") from None

    @field_validator("database_url")
    @classmethod
    def _sqlite(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("sqlite:///"):
            raise ValueError("only sqlite:///PATH is supported by this version")
        return value

    @field_validator("store_url")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("file:///"):
            raise ValueError("only file:///PATH is supported by this version")
        return value

    @model_validator(mode="after")
    def _streams_fit_memory(self) -> Settings:
        if self.export_stream_bytes > self.export_bytes_in_flight:
            raise ValueError(
                f"{PREFIX}EXPORT_STREAM_BYTES must not exceed {PREFIX}EXPORT_BYTES_IN_FLIGHT: "
                "one instance must fit into the bytes in flight"
            )
        return self

    @field_validator("export_allowed_hosts")
    @classmethod
    def _suffixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(suffix.startswith(".") and suffix.count(".") >= 2 for suffix in value):
            raise ValueError("each must begin with a dot and name a domain, as in .blob.core.windows.net")
        return tuple(suffix.lower() for suffix in value)

    @field_validator("auth_issuers")
    @classmethod
    def _issuers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for issuer in value:
            parts = urlsplit(issuer)
            is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
            if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_local)):
                raise ValueError("each must be an https:// URL (http:// only on the loopback address)")
        return value

    @field_validator("auth_algorithms")
    @classmethod
    def _algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = {f"{family}{bits}" for family in ("RS", "PS", "ES") for bits in (256, 384, 512)} | {"EdDSA"}
        if not value or not set(value) <= known:
            raise ValueError(f"each must be one of {', '.join(sorted(known))}")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ip_network(network, strict=False)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in value):
            raise ValueError(
                "each must look like https://host[:port], in lower case, without a path or a slash at the end"
            )
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> Settings:
        if self.auth_issuers and not self.auth_audiences:
            raise ValueError(f"{PREFIX}AUTH_AUDIENCES is needed with {PREFIX}AUTH_ISSUERS")
        if not self.auth_issuers:
            for name in ("auth_audiences", "roles_file"):
                if getattr(self, name):
                    raise ValueError(
                        f"{PREFIX}{name.upper()} is set without {PREFIX}AUTH_ISSUERS, and without that nobody signs in"
                    )
            if "*" in self.cors_origins:
                raise ValueError(
                    f"{PREFIX}CORS_ORIGINS may be * only with {PREFIX}AUTH_ISSUERS: without sign-in every web page "
                    "could read and change everything"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY belong together")
        return self

    @model_validator(mode="after")
    def _exports_lie_apart(self) -> Settings:
        if self.export_root is None:
            return self
        root = Path(os.path.realpath(self.export_root))
        for name, folder in (("the data folder", self.data_dir), ("the store", self.store_path)):
            other = Path(os.path.realpath(folder))
            if root.is_relative_to(other) or other.is_relative_to(root):
                raise ValueError(
                    f"{PREFIX}EXPORT_ROOT ({root}) and {name} ({other}) must lie apart, neither inside the other: "
                    "exports must not write where the service keeps its own files"
                )
        return self

    @model_validator(mode="after")
    def _viewer_lies_apart(self) -> Settings:
        if self.viewer_dir is None:
            return self
        viewer = Path(os.path.realpath(self.viewer_dir))
        folders = [("the data folder", self.data_dir), ("the store", self.store_path)]
        if self.export_root is not None:
            folders.append(("the export root", self.export_root))
        for name, folder in folders:
            other = Path(os.path.realpath(folder))
            if viewer.is_relative_to(other) or other.is_relative_to(viewer):
                raise ValueError(
                    f"{PREFIX}VIEWER_DIR ({viewer}) and {name} ({other}) must lie apart, neither inside the other: "
                    "everybody may read the viewer's files"
                )
        return self

    @property
    def audit_path(self) -> Path:
        return self.audit_log if self.audit_log is not None else self.data_dir / "audit.log"

    @property
    def database_path(self) -> Path:
        if self.database_url is not None:
            return Path(self.database_url.removeprefix("sqlite:///"))
        return self.data_dir / "depot.sqlite"

    @property
    def store_path(self) -> Path:
        if self.store_url is not None:
            return Path(unquote(urlsplit(self.store_url).path))
        return self.data_dir / "store"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)


def _http_address(text: str) -> str:
    """Scheme and host in lower case, port and path as given, no slash at the end. Raises ValueError."""
    parts = urlsplit(text)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or any(mark in text for mark in "?#\\"):
        raise ValueError
    address = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme}://{address}{port}{parts.path}".rstrip("/")


def _endpoint(text: str) -> str:
    """As `_http_address`, and nothing that no destination can be: one path part at most. Raises ValueError."""
    address = _http_address(text)
    found = _ENDPOINT.fullmatch(address)
    if found is None or urlsplit(address).port == 0:
        raise ValueError
    if found["v6"] is not None:
        IPv6Address(found["v6"])
    return address


Source = Literal["flag", "environment", "file", "default"]


def load(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> tuple[Settings, dict[str, Source]]:
    """Read the settings and where each came from.

    Raises ConfigurationError that names the setting, its bounds and the reason; never the value, it may be secret.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name, value in given.items():
        if value == "":
            raise ConfigurationError(f"{PREFIX}{name.upper()} (from flag): it is empty; leave it out, or give a value.")
    from_file = _read_file(config_file)
    in_environment = _read_environment()
    sources: dict[str, Source] = {}
    merged = dict(given)
    for name in Settings.model_fields:
        if name in given:
            sources[name] = "flag"
        elif name in in_environment:
            sources[name] = "environment"
        elif name in from_file:
            sources[name] = "file"
            merged[name] = from_file[name]
        else:
            sources[name] = "default"
    try:
        return Settings(**merged), sources
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explained(problem, sources) for problem in error.errors())) from None


def _read_environment() -> set[str]:
    """The names of the settings that variables give a value. Raises ConfigurationError for a variable of no setting."""
    named = {name.upper().removeprefix(PREFIX): name for name in os.environ if name.upper().startswith(PREFIX)}
    known = {name.upper() for name in Settings.model_fields}
    for suffix, name in sorted(named.items()):
        if suffix not in known | _OTHER_VARIABLES and not suffix.startswith("TEST_"):
            near = difflib.get_close_matches(suffix[:60], known | _OTHER_VARIABLES, n=1)
            hint = f"Did you mean {PREFIX}{near[0]}? " if near else ""
            raise ConfigurationError(
                f"The environment variable {name[:80]} is no setting. {hint}`dicom-depot settings` lists all."
            )
    return {suffix.lower() for suffix, name in named.items() if suffix in known and os.environ[name]}


def _read_file(config_file: Path | None) -> dict[str, Any]:
    named = os.environ.get(CONFIG_VARIABLE)
    path = config_file or (Path(named) if named else None)
    if path is None:
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The settings file {path} is not valid TOML: {error}") from None
    unknown = sorted(set(content) - set(Settings.model_fields))
    if unknown:
        raise ConfigurationError(
            f"The settings file {path} has unknown settings: {', '.join(unknown)}. `dicom-depot settings` lists all."
        )
    return content


def _explained(problem: Any, sources: dict[str, Source]) -> str:
    place = problem["loc"][0] if problem["loc"] else ""
    if not place:
        return f"Settings: {problem['msg'].removeprefix('Value error, ')}."
    field = Settings.model_fields.get(str(place))
    name = PREFIX + str(place).upper()
    reason = problem["msg"].removeprefix("Value error, ")
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return f"{name} (from {sources.get(str(place), 'flag')}): {reason}.{meaning}"
