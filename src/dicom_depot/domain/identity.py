"""The service's own identity in the cloud: what an operator sees of it, and a token for the storage service."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class IdentityDescription:
    """What a token says of the identity that it was made for. The token itself is never shown.

    `host` names what gives the identity: App Service, Azure Arc, AKS workload identity, virtual machine, Azure CLI.
    """

    principal_id: str
    tenant_id: str
    client_id: str
    host: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A bearer token for the storage service, and when it ends (UTC)."""

    token: str = field(repr=False)
    expires_at: datetime
