"""The two libraries' clients for one container, signed in and bounded alike.

Both read settings of their own from the environment, and on Azure's hosts there are some: obstore would take a
workload identity for what a SAS shall do. So every sign-in is handed over explicitly.

Neither may follow a redirect: a Referer carries the SAS, a repeated body the data. Azure's library has a switch for
that. obstore has none: it follows a 303, and takes the other side's 200 for a success. A proxy that does not exist
keeps it from every other host; another port of the same host is all that a 303 can reach.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from azure.core.credentials import AccessToken as AzureAccessToken
from azure.storage.blob import ContainerClient
from obstore.store import AzureStore

from dicom_depot.adapters.azure_faults import DEAD_PROXY
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.domain.identity import AccessToken
from dicom_depot.ports import ManagedIdentity

if TYPE_CHECKING:
    from obstore.store import AzureCredential, AzureCredentialProvider, ClientConfig  # exist for type checkers only

_CONNECT_SECONDS = 5.0
_HANDED_OUT_SECONDS = 60.0
"""Life that obstore is told of a token: so little that it asks again, every tenth of a second, and keeps none."""


class IdentitySignIn:
    """Gives the managed identity's token to both libraries."""

    def __init__(self, identity: ManagedIdentity) -> None:
        self._identity = identity

    def token(self) -> AccessToken:
        """Raises IdentityUnavailable."""
        return self._identity.token()

    def discard(self, token: AccessToken) -> None:
        self._identity.discard(token)

    def __call__(self) -> AzureCredential:
        """As obstore asks."""
        soon = datetime.now(UTC) + timedelta(seconds=_HANDED_OUT_SECONDS)
        return {"token": self._identity.token().token, "expires_at": soon}

    def get_token(self, *scopes: str, **options: Any) -> AzureAccessToken:
        """As azure-storage-blob asks."""
        token = self._identity.token()
        return AzureAccessToken(token.token, int(token.expires_at.timestamp()))


def open_store(
    spec: DestinationSpec, account: str, sign_in: IdentitySignIn | None, request_seconds: float
) -> AzureStore:
    """The client of obstore. Raises ValueError when the secret cannot be used."""
    endpoint = spec.public["endpoint"]
    provider = sign_in or _secret_provider(spec)
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "allow_invalid_certificates": False,
        "timeout": timedelta(seconds=request_seconds),
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, request_seconds)),
        "pool_max_idle_per_host": "1024",
    }
    return AzureStore(
        spec.public["container"],
        account_name=account,
        endpoint=endpoint,
        client_options=client | _no_other_host(endpoint),
        retry_config={"max_retries": 0},
        skip_signature=provider is None,
        use_emulator=False,
        use_fabric_endpoint=False,
        credential_provider=provider,
    )


def open_container_client(
    spec: DestinationSpec, sign_in: IdentitySignIn | None, request_seconds: float
) -> ContainerClient:
    """Azure's own client. Raises AzureError or ValueError when the secret cannot be used."""
    secret = _secret(spec)
    url = f"{spec.public['endpoint']}/{spec.public['container']}"
    return ContainerClient.from_container_url(
        f"{url}?{secret['sas']}" if "sas" in secret else url,
        credential=sign_in or secret.get("account_key"),
        retry_total=0,
        connection_timeout=min(_CONNECT_SECONDS, request_seconds),
        read_timeout=request_seconds,
        permit_redirects=False,
    )


def _secret(spec: DestinationSpec) -> dict[str, str]:
    return {} if spec.secret is None else json.loads(spec.secret)


def _secret_provider(spec: DestinationSpec) -> AzureCredentialProvider | None:
    """What signs requests in with the caller's secret; None where there is none."""
    secret = _secret(spec)
    if "sas" in secret:
        sas: AzureCredential = {"sas_token": secret["sas"], "expires_at": None}
        return lambda: sas
    if "account_key" in secret:
        try:
            base64.b64decode(secret["account_key"], validate=True)
        except binascii.Error:
            raise ValueError("the account key is not base64") from None
        key: AzureCredential = {"access_key": secret["account_key"], "expires_at": None}
        return lambda: key
    return None


def _no_other_host(endpoint: str) -> ClientConfig:
    """Let requests reach this host only. Where the environment names a real proxy, requests must go through that one,
    and where they go from there is the proxy's to decide.
    """
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    proxies = getproxies()
    if (proxies.get(parts.scheme) or proxies.get("all")) and not proxy_bypass(host):
        return {}
    return {"proxy_url": DEAD_PROXY, "proxy_excludes": host}
