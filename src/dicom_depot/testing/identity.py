"""A double of the managed identity: switched on, with one token of any kind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from dicom_depot.domain.errors import IdentityDisabled
from dicom_depot.domain.identity import AccessToken, IdentityDescription


class FixedIdentity:
    """`ports.ManagedIdentity` that asks nobody. `discarded` holds the tokens that were said to be refused."""

    def __init__(self, token: str = "token", lifetime: timedelta = timedelta(hours=1)) -> None:  # noqa: S107  (no secret)
        self.access_token = AccessToken(token, datetime.now(UTC) + lifetime)
        self.discarded: list[AccessToken] = []
        self._is_on = True

    def is_enabled(self) -> bool:
        return self._is_on

    def set_enabled(self, *, on: bool) -> None:
        self._is_on = on

    def describe(self) -> IdentityDescription:
        return IdentityDescription("principal", "tenant", "client", "double", self.token().expires_at)

    def token(self) -> AccessToken:
        if not self._is_on:
            raise IdentityDisabled("The double is switched off.")
        return self.access_token

    def discard(self, token: AccessToken) -> None:
        self.discarded.append(token)
