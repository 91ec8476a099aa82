"""Bearer tokens: JSON Web Tokens (RFC 7519) of configured issuers, checked as RFC 8725 advises.

What a token says of itself decides nothing: its `alg` must be on our list and fit the key's kind, its `iss` selects
among issuers that we trust, and whatever else is wrong leads to one and the same kind of refusal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt

from dicom_depot.adapters.issuer_keys import IssuerKeys
from dicom_depot.domain.access import Caller, Roles, granted
from dicom_depot.domain.errors import ServiceUnavailable, Unauthenticated

_log = logging.getLogger(__name__)

TOKEN_LENGTH_MAX = 16_384
_KEY_LENGTH_MAX = 512
_ROLES_MAX = 200


@dataclass(slots=True)
class JwtVerifier:
    """`ports.TokenVerifier` for the tokens of these issuers."""

    issuers: Sequence[str]
    audiences: Sequence[str]
    algorithms: Sequence[str]
    roles_claim: str
    leeway_seconds: float
    roles: Roles
    keys: Mapping[str, IssuerKeys] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = self.keys or {issuer: IssuerKeys(issuer) for issuer in self.issuers}

    def verify(self, token: str) -> Caller:
        if len(token) > TOKEN_LENGTH_MAX:
            raise _refused("it is too long")
        try:
            return self._verify(token)
        except (Unauthenticated, ServiceUnavailable):
            raise
        except jwt.ExpiredSignatureError:
            raise _refused("it has expired") from None
        except (jwt.ImmatureSignatureError, jwt.InvalidIssuedAtError):
            raise _refused("it is not valid yet") from None
        except jwt.InvalidAudienceError:
            raise _refused("it is meant for another audience") from None
        except jwt.InvalidIssuerError:
            raise _refused("its issuer is not trusted here") from None
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"it has no claim '{error.claim}'") from None
        except jwt.InvalidSignatureError:
            raise _refused("its signature is wrong") from None
        except Exception as error:
            # Strangers choose these bytes: whatever a decoder makes of them is the token's fault, not ours.
            _log.debug("a token was refused: %s", type(error).__name__)
            raise _refused("it is malformed") from None

    def _verify(self, token: str) -> Caller:
        header = jwt.get_unverified_header(token)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self.algorithms:
            raise _refused(f"its algorithm is not one of {', '.join(self.algorithms)}")
        if "crit" in header or (key_id is not None and not isinstance(key_id, str)):
            raise _refused("it is malformed")
        claimed = jwt.decode(token, options={"verify_signature": False}).get("iss")
        keys = self.keys.get(claimed) if isinstance(claimed, str) else None
        if keys is None:
            raise _refused("its issuer is not trusted here")
        candidates = keys.candidates(key_id, algorithm)
        if not candidates:
            raise _refused("its issuer has no such key")
        claims = jwt.decode(
            token,
            candidates[0].public_key,
            algorithms=[algorithm],
            issuer=keys.issuer,
            audience=list(self.audiences),
            leeway=self.leeway_seconds,
            options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
        )
        return Caller(_key(keys.issuer, claims), granted(self.roles, _roles(claims.get(self.roles_claim))))


def _key(issuer: str, claims: Mapping[str, Any]) -> str:
    """Issuer and subject tell callers apart; Entra ID's object id where a token has no subject."""
    subject = claims.get("sub") or claims.get("oid")
    if not isinstance(subject, str):
        raise _refused("it has no claim 'sub'")
    key = f"{issuer}|{subject}"
    if len(key) > _KEY_LENGTH_MAX or not subject.isprintable():
        raise _refused("its claim 'sub' cannot be used")
    return key


def _roles(claim: Any) -> list[str]:
    """A list of names, or text with names between spaces, as `scope` has them."""
    names = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return [name for name in names if isinstance(name, str)][:_ROLES_MAX]


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(f"The bearer token is not accepted: {reason}.", target="Authorization")
