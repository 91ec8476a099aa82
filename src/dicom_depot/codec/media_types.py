"""Media types (RFC 9110 section 8.3.1), and which of them an Accept header chooses (RFC 9110 section 12.5.1).

What each DICOMweb resource offers is a table (PS3.18 section 8.7); one function chooses from it. Whether an instance
can be brought into the chosen transfer syntax is found out elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dicom_depot.domain.errors import InvalidRequest, NotAcceptable

EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
"""What is sent when no transfer syntax is asked for (PS3.18 section 8.7.3.5.2)."""

_AS_STORED = "*"  # The value of `transfer-syntax` that asks for no change.
_ANYTHING = "*/*"
_RELATED = frozenset({"multipart/related", "multipart/*"})

_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_NAME = re.compile(rf"[ \t]*({_WORD}/{_WORD})[ \t]*")
# A value without quotes may hold what RFC 9110 wants quoted: clients send type=application/dicom, and odd boundaries.
_PARAMETER = re.compile(
    rf"""
    ;[ \t]*
    (?:
        (?P<name>{_WORD}) [ \t]*=[ \t]*
        (?: "(?P<quoted>(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*+)" [ \t]*
          | (?P<plain>[^";\x00-\x20\x7f][^";\x00-\x08\x0a-\x1f\x7f]*+) )
    )?+
    """,
    re.VERBOSE,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_MEMBER = re.compile(r'(?:[^,"]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))++', re.DOTALL)
_QUALITY = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?|\.[0-9]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class MediaType:
    """`name` is type/subtype in lower case; parameters have lower-case names, and their values as they were given."""

    name: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MediaRange:
    """A member of an Accept header; `name` may hold wildcards, `q` is no parameter but `quality`, from 0 to 1."""

    name: str
    parameters: Mapping[str, str]
    quality: float = 1.0


@dataclass(frozen=True, slots=True)
class RetrieveChoice:
    """How an answer is sent. `transfer_syntax_uid` None: every instance as it is stored."""

    transfer_syntax_uid: str | None
    is_multipart: bool = True


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a resource can be sent as: from media type to the transfer syntax when none is asked for; None: as stored.

    `related` are the values of the parameter `type` of multipart/related, the first of them when there is no `type`.
    """

    without_accept: MediaRange
    single: Mapping[str, str | None]
    related: Mapping[str, str | None]
    is_pixel_data: bool = False
    """The media type says how the pixel data is compressed; a transfer syntax must then be one of that type."""


_DICOM = "application/dicom"
_OCTETS = "application/octet-stream"
_RELATED_DICOM = {_DICOM: EXPLICIT_LITTLE_ENDIAN, "application/*": None, _ANYTHING: None}

_INSTANCES = _Offer(
    without_accept=MediaRange("multipart/related", {"type": _DICOM}),
    single={},
    related=_RELATED_DICOM,
)
_INSTANCE = _Offer(
    without_accept=MediaRange(_DICOM, {}),
    single={_DICOM: EXPLICIT_LITTLE_ENDIAN, "application/*": EXPLICIT_LITTLE_ENDIAN},
    related=_RELATED_DICOM,
)
_FRAMES = _Offer(
    without_accept=MediaRange("multipart/related", {"type": _OCTETS}),
    single={_OCTETS: EXPLICIT_LITTLE_ENDIAN},
    related={
        _OCTETS: EXPLICIT_LITTLE_ENDIAN,
        "image/jp2": "1.2.840.10008.1.2.4.90",
        "image/jls": "1.2.840.10008.1.2.4.80",
        "image/dicom-rle": "1.2.840.10008.1.2.5",
        _ANYTHING: None,
    },
    is_pixel_data=True,
)

JPEG, PNG = "image/jpeg", "image/png"
_RENDERED = {JPEG: JPEG, PNG: PNG, "image/*": JPEG, _ANYTHING: JPEG}

_DICOM_JSON = frozenset({"application/dicom+json", "application/json", "application/*", _ANYTHING})

_FRAME_MEDIA_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.92": "image/jpx",
    "1.2.840.10008.1.2.4.93": "image/jpx",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
    "1.2.840.10008.1.2.4.100": "video/mpeg2",
    "1.2.840.10008.1.2.4.101": "video/mpeg2",
    "1.2.840.10008.1.2.4.102": "video/mp4",
    "1.2.840.10008.1.2.4.103": "video/mp4",
    "1.2.840.10008.1.2.4.104": "video/mp4",
    "1.2.840.10008.1.2.4.105": "video/mp4",
    "1.2.840.10008.1.2.4.106": "video/mp4",
}


def parse_media_type(text: str) -> MediaType:
    """Read `type/subtype; name=value; ...`, as in Content-Type.

    Looser than RFC 9110 where clients are: values need no quotes for any character but `"` and `;`, white space may
    stand around `=`, parameters may be empty. Raises InvalidRequest that names the place where reading stopped.
    """
    name = _NAME.match(text)
    if name is None:
        raise InvalidRequest(f"{_shown(text)} is not a media type; the form is type/subtype; name=value.")
    parameters: dict[str, str] = {}
    position = name.end()
    while position < len(text):
        parameter = _PARAMETER.match(text, position)
        if parameter is None or parameter.end() == position:
            raise _stopped(text, position)
        if parameter["name"] is not None:
            key = parameter["name"].lower()
            if parameter["quoted"] is None:
                value = parameter["plain"].rstrip(" \t")
            else:
                value = _ESCAPED.sub(r"\1", parameter["quoted"])
            if parameters.setdefault(key, value) != value:
                raise InvalidRequest(f"The media type {_shown(text)} has two values of {key}; give one.")
        position = parameter.end()
    return MediaType(name[1].lower(), parameters)


def parse_accept(values: Sequence[str]) -> list[MediaRange]:
    """The media ranges of all Accept headers that are wanted, best first; equal ones as they came.

    Members with q=0 are left out, and so are malformed ones beside a good one. Without any member the list is empty.
    Raises InvalidRequest when all members are malformed.
    """
    ranges: list[MediaRange] = []
    refusal: InvalidRequest | None = None
    for member in (match[0] for value in values for match in _MEMBER.finditer(value)):
        if not member.strip(" \t"):
            continue
        try:
            ranges.append(_parse_range(member))
        except InvalidRequest as error:
            refusal = refusal or error
    if refusal is not None and not ranges:
        raise InvalidRequest(refusal.message, target="Accept")
    return sorted((wanted for wanted in ranges if wanted.quality > 0), key=lambda wanted: -wanted.quality)


def accepts_dicom_json(accept: Sequence[str]) -> None:
    """Return if application/dicom+json may be sent: it is accepted, or there is no Accept. Raises NotAcceptable."""
    if not _is_missing(accept) and all(wanted.name not in _DICOM_JSON for wanted in parse_accept(accept)):
        raise NotAcceptable(
            "Accept holds nothing that this resource can be sent as. Offered: application/dicom+json (also asked for "
            "as application/json, application/* or */*).",
            target="Accept",
        )


def choose_instances(accept: Sequence[str], offered: Collection[str]) -> RetrieveChoice:
    """How the instances of a study or series are sent: always multipart.

    `offered` are the UIDs of the transfer syntaxes that can be sent; a choice is one of them or as stored. Without
    EXPLICIT_LITTLE_ENDIAN in it, whoever asks for no transfer syntax is refused. Raises NotAcceptable; InvalidRequest
    when nothing in Accept can be read.
    """
    return _choose(_INSTANCES, accept, offered)


def choose_instance(accept: Sequence[str], offered: Collection[str]) -> RetrieveChoice:
    """How one instance is sent; `offered` and errors as for `choose_instances`."""
    return _choose(_INSTANCE, accept, offered)


def choose_frames(accept: Sequence[str], offered: Collection[str]) -> RetrieveChoice:
    """How frames are sent; `offered` and errors as for `choose_instances`.

    More than one frame does not fit a single part: that is for the caller to refuse. The media type of what is sent
    follows from its transfer syntax, see `frame_media_type`.
    """
    return _choose(_FRAMES, accept, offered)


def choose_rendered(accept: Sequence[str], *, takes_several: bool = False) -> str:
    """The media type of a rendered frame, JPEG or PNG; JPEG where nothing is asked for.

    One value is taken, as the service whose API we keep does; with `takes_several` the best of all. Raises
    NotAcceptable for whatever else there is, also when it cannot be read.
    """
    if _is_missing(accept):
        return JPEG
    offered = f"Offered: {JPEG} (also asked for as image/* or */*) and {PNG}."
    members = [match[0] for value in accept for match in _MEMBER.finditer(value) if match[0].strip(" \t")]
    if len(members) > 1 and not takes_several:
        raise NotAcceptable(f"Accept must hold one media type for this resource. {offered}", target="Accept")
    try:
        wanted = parse_accept(accept)
    except InvalidRequest as error:
        raise NotAcceptable(f"{error.message} {offered}", target="Accept") from None
    for each in wanted:
        if each.name in _RENDERED:
            return _RENDERED[each.name]
    raise NotAcceptable(f"Accept holds nothing that this resource can be sent as. {offered}", target="Accept")


def frame_media_type(transfer_syntax_uid: str) -> str:
    """The media type of frames in a transfer syntax (PS3.18 tables 8.7.3-2 to 8.7.3-5)."""
    return _FRAME_MEDIA_TYPES.get(transfer_syntax_uid, _OCTETS)


def _choose(offer: _Offer, accept: Sequence[str], offered: Collection[str]) -> RetrieveChoice:
    ranges = [offer.without_accept] if _is_missing(accept) else parse_accept(accept)
    # Of those wanted alike, one that needs no change is sent; Azure's service does so.
    ranges.sort(key=lambda wanted: (-wanted.quality, wanted.parameters.get("transfer-syntax") != _AS_STORED))
    for wanted in ranges:
        choice = _choice_for(offer, wanted, offered)
        if choice is not None:
            return choice
    raise NotAcceptable(_offered_text(offer, offered), target="Accept")


def _choice_for(offer: _Offer, wanted: MediaRange, offered: Collection[str]) -> RetrieveChoice | None:
    """What `wanted` gets, or None when it is not offered."""
    is_multipart = wanted.name == _ANYTHING or wanted.name in _RELATED
    if wanted.name in _RELATED:
        media_type = wanted.parameters.get("type", next(iter(offer.related))).lower()
    else:
        media_type = wanted.name
    defaults = offer.related if is_multipart else offer.single
    if media_type not in defaults:
        return None
    uid = wanted.parameters.get("transfer-syntax", defaults[media_type])
    if uid is None or uid == _AS_STORED:
        return RetrieveChoice(None, is_multipart)
    is_of_type = not offer.is_pixel_data or media_type in (_ANYTHING, frame_media_type(uid))
    return RetrieveChoice(uid, is_multipart) if uid in offered and is_of_type else None


def _offered_text(offer: _Offer, offered: Collection[str]) -> str:
    types = [*offer.single, *(f'multipart/related; type="{media_type}"' for media_type in offer.related)]
    plain = [media_type for media_type in types if "*" not in media_type]
    return (
        f"Accept holds nothing that this resource can be sent as. Offered: {', '.join([*plain, _ANYTHING])}; with "
        f"transfer-syntax * (as stored) or one of: {', '.join(sorted(offered))}."
    )


def _is_missing(accept: Sequence[str]) -> bool:
    """An Accept header without members says no more than none."""
    return not any(value.strip(" \t,") for value in accept)


def _parse_range(member: str) -> MediaRange:
    parsed = parse_media_type(member)
    parameters = dict(parsed.parameters)
    quality = parameters.pop("q", "1")
    if not _QUALITY.fullmatch(quality):
        raise InvalidRequest(f"q={_shown(quality)} in {_shown(member)} is not a number from 0 to 1.")
    return MediaRange(parsed.name, parameters, float(quality))


def _stopped(text: str, position: int) -> InvalidRequest:
    return InvalidRequest(
        f"The media type {_shown(text)} cannot be read from character {position + 1} on, {_shown(text[position:])}; "
        'parameters have the form ; name=value, or ; name="value" around quotes and semicolons.'
    )


def _shown(text: str) -> str:
    """Quote caller's text for a message: printable and short, so that it cannot flood or forge a log."""
    quoted = ascii(text[:81])
    return quoted if len(quoted) <= 82 else quoted[:78] + "...'"
