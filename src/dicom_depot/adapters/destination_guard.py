"""Where data may go: endpoints by their names, then by the addresses that the names resolve to. Nothing is sent here.

Allowed are hosts below the configured endings, over HTTPS on port 443, and endpoints that the operator listed to the
letter. A listed endpoint is taken as it is. For the others a second look at the addresses keeps requests off this
machine and its neighbours; against a name that changes its address after that look, TLS verification is the defence.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from dicom_depot.config import CLOUD_SUFFIXES
from dicom_depot.domain.errors import DestinationRefused

_RESOLVE_SECONDS = 5.0
_HOST_LENGTH_MAX = 253
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ENDPOINT = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?P<path>(?:/[a-z0-9_-]+)?)/?",
    re.ASCII | re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PLATFORM_ADDRESSES = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Azure's own services for virtual machines: a public address that every virtual machine reaches."""

Resolver = Callable[[str], Sequence[str]]


class Endpoint(NamedTuple):
    """A storage endpoint in the one way that it is written here: lower case, no default port, no trailing slash."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.path}"


def parse_endpoint(text: str) -> Endpoint | None:
    """`scheme://host[:port][/account]`, and None for everything else that a URL may hold."""
    found = _ENDPOINT.fullmatch(text)
    if found is None:
        return None
    scheme, host = found["scheme"].lower(), found["host"].lower()
    port = int(found["port"] or _DEFAULT_PORTS[scheme])
    if not 0 < port <= 65535 or len(host) > _HOST_LENGTH_MAX:
        return None
    if host.startswith("["):
        try:
            host = f"[{IPv6Address(host[1:-1])}]"
        except ValueError:
            return None
    return Endpoint(scheme, host, port, found["path"])


def resolve(host: str) -> Sequence[str]:
    """The host's addresses; none when it has none, or when that is not known in time. The later proof tells which."""
    found: SimpleQueue[list[str]] = SimpleQueue()

    def look_up() -> None:
        try:
            found.put([str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError):
            found.put([])

    Thread(target=look_up, name="resolve", daemon=True).start()
    try:
        return found.get(timeout=_RESOLVE_SECONDS)
    except Empty:
        return []


@dataclass(frozen=True, slots=True)
class DestinationGuard:
    """Decides where exports may go. Every refusal is a DestinationRefused before anything is sent."""

    allowed_endpoints: Sequence[str]
    allowed_hosts: Sequence[str]
    resolve: Resolver = resolve

    def check_name(self, endpoint: Endpoint, member: str, *, carries_token: bool) -> None:
        """Look at the name alone. member: of the destination's settings. carries_token: of the managed identity."""
        if carries_token and endpoint.scheme != "https":
            raise DestinationRefused(
                "The managed identity's token goes over HTTPS only; give an https:// URL.",
                code="IdentityNeedsHttps",
                target=f"destination.settings.{member}",
            )
        if not self._is_listed(endpoint) and self._suffix(endpoint) is None:
            raise DestinationRefused(
                "The service may not send data to this endpoint. An operator can allow it by adding its "
                "scheme://host[:port][/account] to DICOM_DEPOT_EXPORT_ALLOWED_ENDPOINTS.",
                code="EndpointNotAllowed",
                target=f"destination.settings.{member}",
            )

    def check_address(self, endpoint: Endpoint) -> None:
        """Look at the addresses, too. A name that does not resolve is left to the proof that the export makes."""
        if self._is_listed(endpoint):
            return
        suffix = self._suffix(endpoint)
        if suffix is None:
            raise DestinationRefused(
                "The service may not send data to this endpoint any more: the settings changed.",
                code="EndpointNotAllowed",
                target="destination.settings",
            )
        for address in self.resolve(endpoint.host):
            kind = forbidden_kind(address, may_be_private=suffix in CLOUD_SUFFIXES)
            if kind is not None:
                raise DestinationRefused(
                    f"The name {endpoint.host} leads to {kind} address, where the service may not send data. "
                    "Correct the name's DNS entry; an operator can allow the endpoint as it is by listing it in "
                    "DICOM_DEPOT_EXPORT_ALLOWED_ENDPOINTS.",
                    code="AddressNotAllowed",
                    target="destination.settings",
                )

    def _is_listed(self, endpoint: Endpoint) -> bool:
        return endpoint in map(parse_endpoint, self.allowed_endpoints)

    def _suffix(self, endpoint: Endpoint) -> str | None:
        """The configured ending that allows this endpoint."""
        if endpoint.scheme != "https" or endpoint.port != 443 or endpoint.path:
            return None
        if not all(_LABEL.fullmatch(label) for label in endpoint.host.split(".")):
            return None
        return next((suffix for suffix in self.allowed_hosts if endpoint.host.endswith(suffix)), None)


def forbidden_kind(text: str, *, may_be_private: bool) -> str | None:
    """What is wrong with an address, with its article; None when requests may go there."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "an unknown kind of"
    judged: Sequence[IPv4Address | IPv6Address] = _embedded(address) or [address]
    for each in judged:
        if each.is_loopback:
            return "a loopback"
        if each.is_link_local:
            return "a link-local"
        if each.is_multicast:
            return "a multicast"
        if each.is_unspecified or each.is_reserved or each in _PLATFORM_ADDRESSES or _is_this_network(each):
            return "a reserved"
        if not may_be_private and not each.is_global:
            return "a private"
    return None


def _embedded(address: IPv4Address | IPv6Address) -> Sequence[IPv4Address]:
    """The IPv4 addresses that an IPv6 address stands for: where its packets end up."""
    if isinstance(address, IPv4Address):
        return []
    found: list[IPv4Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64 or 1 < int(address) < 1 << 32:  # the second: IPv4-compatible, ::a.b.c.d
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def _is_this_network(address: IPv4Address | IPv6Address) -> bool:
    return isinstance(address, IPv4Address) and int(address) >> 24 == 0
