"""What is refused before the service listens: an address that lets strangers in, TLS files that do not work, a viewer
that is none.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from urllib.parse import urlsplit

from dicom_depot.config import PREFIX, Settings
from dicom_depot.domain.errors import ConfigurationError

_PUBLIC_PATH = re.compile(r"""PUBLIC_URL\s*=\s*["']([^"']*)["']""")


def check_exposure(settings: Settings, address: str | None = None) -> None:
    """Without sign-in only this machine may ask. address: what the host was resolved to.

    Raises ConfigurationError with the ways out.
    """
    if settings.auth_issuers or settings.allow_anonymous or is_loopback(address or settings.host):
        return
    raise ConfigurationError(
        f"Without sign-in the service listens on loopback addresses only, and {settings.host} is not one: everybody "
        f"who reaches it could do everything. Set {PREFIX}AUTH_ISSUERS and {PREFIX}AUTH_AUDIENCES to switch sign-in "
        "on, listen on 127.0.0.1, or say --allow-anonymous if nobody else can reach that address."
    )


def check_tls(settings: Settings) -> None:
    """Raises ConfigurationError when certificate and key cannot be used together."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    for name, path in (("TLS_CERT", settings.tls_cert), ("TLS_KEY", settings.tls_key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{PREFIX}{name}: the file {path} cannot be read: {error.strerror}.") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, _no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "not a PEM file that can be used"
        raise ConfigurationError(
            f"{PREFIX}TLS_CERT ({settings.tls_cert}) and {PREFIX}TLS_KEY ({settings.tls_key}) cannot be used: "
            f"{reason}. The first must hold the PEM certificate chain, the second its private key without a password."
        ) from None


def check_viewer(settings: Settings) -> None:
    """A build of OHIF holds the path that it is to lie under, in its first file and in others.

    Raises ConfigurationError when the folder has no build, or one for another path.
    """
    if settings.viewer_dir is None:
        return
    index = settings.viewer_dir / "index.html"
    try:
        text = index.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigurationError(
            f"{PREFIX}VIEWER_DIR: the folder {settings.viewer_dir} holds no viewer, its index.html cannot be read: "
            f"{error.strerror}."
        ) from None
    wanted = urlsplit(settings.public_url or "").path + "/viewer/"
    found = _PUBLIC_PATH.search(text)
    if found is None or found[1] != wanted:
        place = "is no page of OHIF" if found is None else f"expects to be served under {found[1]}"
        raise ConfigurationError(
            f"{PREFIX}VIEWER_DIR: {index} {place}. It must be a build of OHIF for {wanted}: made with "
            f"PUBLIC_URL={wanted}, or npm's build as `make viewer` prepares it."
        )


def resolve_host(host: str) -> str:
    """The one address that a host, given as address or name, is listened on. Raises ConfigurationError."""
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigurationError(
            f"{PREFIX}HOST: the name {host} leads to no address. Give an address of this machine, as 127.0.0.1."
        ) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def is_loopback(host: str) -> bool:
    """Whether a host, given as address or name, leads to this machine and nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[4][0]).partition("%")[0]).is_loopback for address in found)


def _no_password() -> str:
    raise ValueError("the private key is protected by a password")
