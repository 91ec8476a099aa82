"""What a reverse proxy says of the request that it passes on: believed from configured addresses only."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_Address = IPv4Address | IPv6Address
_HOPS_MAX = 50


class ProxyMiddleware:
    """Puts the client's address and scheme, as trusted proxies tell them, in place of the proxy's."""

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self._app = app
        self._trusted = tuple(ip_network(network, strict=False) for network in trusted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._trusted:
            peer = _address(str((scope.get("client") or ("", 0))[0]))
            if peer is not None and self._is_trusted(peer):
                headers = Headers(scope=scope)
                scheme = ",".join(headers.getlist("x-forwarded-proto")).rpartition(",")[2].strip().lower()
                client = self._client(peer, ",".join(headers.getlist("x-forwarded-for")))
                scope = {**scope, "client": (str(client), 0)}
                if scheme in _SCHEMES:
                    scope["scheme"] = scheme
        await self._app(scope, receive, send)

    def _client(self, peer: _Address, forwarded_for: str) -> _Address:
        """The last address that no trusted proxy stands for. What stands further left, the client may have written."""
        client = peer
        for text in reversed(forwarded_for.split(",")[-_HOPS_MAX:]):
            hop = _address(text)
            if hop is None:
                break
            client = hop
            if not self._is_trusted(hop):
                break
        return client

    def _is_trusted(self, address: _Address) -> bool:
        return any(_contains(network, address) for network in self._trusted)


_SCHEMES = ("http", "https")


def _contains(network: IPv4Network | IPv6Network, address: _Address) -> bool:
    return network.version == address.version and address in network


def _address(text: str) -> _Address | None:
    """An address as proxies write it: `192.0.2.1`, `192.0.2.1:4711`, `[2001:db8::1]:4711`, `2001:db8::1`."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
