"""A plain Python filter for searches, written from the words of PS3.4 section C.2.2.2 and of the DICOM service's facts,
and from nothing of ours: what is stored is a list, a search is a loop over it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

STUDY, SERIES, INSTANCE = "study", "series", "instance"
LEVELS = (STUDY, SERIES, INSTANCE)


class Known(NamedTuple):
    """A searchable attribute: its tag, VR and level."""

    tag: str
    vr: str
    level: str


ATTRIBUTES = {
    "StudyInstanceUID": Known("0020000D", "UI", STUDY),
    "StudyDate": Known("00080020", "DA", STUDY),
    "StudyTime": Known("00080030", "TM", STUDY),
    "AccessionNumber": Known("00080050", "SH", STUDY),
    "ModalitiesInStudy": Known("00080061", "CS", STUDY),
    "ReferringPhysicianName": Known("00080090", "PN", STUDY),
    "StudyDescription": Known("00081030", "LO", STUDY),
    "PatientName": Known("00100010", "PN", STUDY),
    "PatientID": Known("00100020", "LO", STUDY),
    "PatientBirthDate": Known("00100030", "DA", STUDY),
    "PatientSex": Known("00100040", "CS", STUDY),
    "StudyID": Known("00200010", "SH", STUDY),
    "SeriesInstanceUID": Known("0020000E", "UI", SERIES),
    "Modality": Known("00080060", "CS", SERIES),
    "SeriesDescription": Known("0008103E", "LO", SERIES),
    "ManufacturerModelName": Known("00081090", "LO", SERIES),
    "SeriesNumber": Known("00200011", "IS", SERIES),
    "PerformedProcedureStepStartDate": Known("00400244", "DA", SERIES),
    "PerformedProcedureStepStartTime": Known("00400245", "TM", SERIES),
    "RequestAttributesSequence.ScheduledProcedureStepID": Known("00400275.00400009", "SH", SERIES),
    "RequestAttributesSequence.RequestedProcedureID": Known("00400275.00401001", "SH", SERIES),
    "SOPInstanceUID": Known("00080018", "UI", INSTANCE),
    "SOPClassUID": Known("00080016", "UI", INSTANCE),
    "InstanceNumber": Known("00200013", "IS", INSTANCE),
}
REQUESTS = ("RequestAttributesSequence.ScheduledProcedureStepID", "RequestAttributesSequence.RequestedProcedureID")


@dataclass(frozen=True)
class Instance:
    """One instance: its UIDs, the text of its attributes as it stands in the file, and the items of its
    RequestAttributesSequence as pairs of scheduled procedure step and requested procedure.
    """

    study: str
    series: str
    sop: str
    values: Mapping[str, str] = field(default_factory=dict)
    requests: tuple[tuple[str, str], ...] = ()

    @property
    def uids(self) -> tuple[str, str, str]:
        return self.study, self.series, self.sop

    def texts(self, keyword: str) -> list[str]:
        """The values of an attribute."""
        if keyword in REQUESTS:
            return [text for item in self.requests for text in item[REQUESTS.index(keyword)].split("\\")] or [""]
        uids = dict(zip(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), self.uids, strict=True))
        text = uids.get(keyword, self.values.get(keyword, ""))
        if ATTRIBUTES[keyword].vr == "PN":
            return text.split("\\")
        return [text.split("\\")[0]]  # an attribute that may have one value has its first

    def told(self, keyword: str) -> str:
        """What an attribute says, as one text without padding."""
        if keyword == "ModalitiesInStudy":
            keyword = "Modality"
        return "\\".join(self.texts(keyword)).strip(" ")


class Row(NamedTuple):
    """What a search finds: the UIDs down to its level, what lies below, and its patient's id as it stands there."""

    uids: tuple[str, ...]
    series_in_study: int
    instances_in_study: int
    instances_in_series: int | None
    modalities: tuple[str, ...]
    patient_id: str


@dataclass
class Archive:
    """What is stored, in the order in which it was."""

    live: list[Instance] = field(default_factory=list)
    seen: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Studies and series by when they were first stored: a study that is stored again keeps its place."""
    _newest: dict[tuple[str, ...], Instance] = field(default_factory=dict)
    """The newest live instance of each study and series, while a search goes on."""

    def store(self, instance: Instance, *, may_replace: bool) -> bool:
        """Whether it changed anything."""
        known = next((each for each in self.live if each.uids == instance.uids), None)
        if known is not None:
            if known == instance or not may_replace:
                return False
            self.live.remove(known)
        self.live.append(instance)
        for key in ((instance.study,), (instance.study, instance.series)):
            self.seen.setdefault(key, len(self.seen))
        return True

    def delete(self, *uids: str) -> int:
        gone = [each for each in self.live if each.uids[: len(uids)] == uids]
        self.live = [each for each in self.live if each not in gone]
        return len(gone)

    def search(
        self, level: str, scope: Sequence[str], filters: Sequence[tuple[str, str]], *, is_fuzzy: bool = False
    ) -> list[Row]:
        """Everything that matches, newest first."""
        tests = [(keyword, matcher(keyword, value, is_fuzzy=is_fuzzy)) for keyword, value in filters]
        self._newest = {each.uids[:length]: each for each in self.live for length in (1, 2, 3)}
        return [
            self._row(level, each)
            for each in self._newest_first(level)
            if each.uids[: len(scope)] == tuple(scope)
            and all(any(map(test, self._texts(keyword, each, is_fuzzy=is_fuzzy))) for keyword, test in tests)
        ]

    def _newest_first(self, level: str) -> Iterator[Instance]:
        """The newest instance of each study or series, or each instance."""
        if level == INSTANCE:
            yield from reversed(self.live)
            return
        keys = [key for key in self._newest if len(key) == LEVELS.index(level) + 1]
        for key in sorted(keys, key=lambda key: self.seen[key], reverse=True):
            yield self._newest[key]

    def _texts(self, keyword: str, instance: Instance, *, is_fuzzy: bool) -> list[str]:
        """What an attribute says of an instance: those of its study and series say what the newest one there says.
        Fuzzy matching looks at the words of all names together.
        """
        if keyword == "ModalitiesInStudy":
            return [each.texts("Modality")[0] for each in self._series(instance.study)]
        length = LEVELS.index(ATTRIBUTES[keyword].level) + 1
        texts = self._newest[instance.uids[:length]].texts(keyword)
        return [" ".join(texts)] if is_fuzzy and ATTRIBUTES[keyword].vr == "PN" else texts

    def _series(self, study: str) -> list[Instance]:
        """The newest instance of each series of a study."""
        return [each for key, each in self._newest.items() if len(key) == 2 and key[0] == study]

    def _row(self, level: str, instance: Instance) -> Row:
        series = self._series(instance.study)
        modalities = {each.texts("Modality")[0].strip(" ").upper() for each in series}
        return Row(
            instance.uids[: LEVELS.index(level) + 1],
            len(series),
            sum(each.study == instance.study for each in self.live),
            sum(each.uids[:2] == instance.uids[:2] for each in self.live) if level != STUDY else None,
            tuple(sorted(modalities - {""})),
            self._newest[instance.uids[:1]].values.get("PatientID", "").rstrip(" "),
        )


# Matching one attribute


def matcher(keyword: str, value: str, *, is_fuzzy: bool) -> Callable[[str], bool]:
    """The test of one value that a query asks for."""
    match ATTRIBUTES[keyword].vr:
        case "UI":
            uids = {each.strip() for each in re.split(r"[,\\]", value)}
            return lambda text: text in uids
        case "IS":
            return lambda text: integer(text) == integer(value)
        case "DA":
            return _within(value, date, date)
        case "TM":
            return _within(value, moment, last_moment)
        case "PN" if is_fuzzy:
            wanted = words(without_accents(value))
            return lambda text: all(
                any(word.startswith(each) for word in words(without_accents(text))) for each in wanted
            )
        case "PN":
            return _is_name(value)
        case _:
            return _is_text(value)


def _is_text(value: str) -> Callable[[str], bool]:
    if set(value.strip(" ")) == {"*"}:
        return lambda text: True  # universal matching
    if "*" not in value and "?" not in value:
        wanted = {folded(each) for each in value.split("\\")}
        return lambda text: folded(text) in wanted - {""}
    pattern = wildcards(folded(value))
    return lambda text: folded(text) != "" and pattern.fullmatch(folded(text)) is not None


def _is_name(value: str) -> Callable[[str], bool]:
    """A name matches by itself or by one of its component groups."""
    if set(value.strip(" ")) == {"*"}:
        return lambda text: True
    if "*" in value or "?" in value:
        pattern = wildcards(name(value))
        return lambda text: any(each and pattern.fullmatch(each) for each in (name(text), *name(text).split("=")))
    wanted = {name(each) for each in value.split("\\")} - {""}
    return lambda text: not wanted.isdisjoint({name(text), *name(text).split("=")})


def _within(value: str, first: Callable[[str], str | None], last: Callable[[str], str | None]) -> Callable[[str], bool]:
    """From the first moment that the lower end stands for to the last one that the upper end stands for."""
    low, dash, high = value.partition("-")
    if not dash:
        high = low
    lowest = first(low) if low.strip() else ""
    highest = last(high) if high.strip() else "~"
    assert lowest is not None
    assert highest is not None
    return lambda text: (found := first(text)) is not None and lowest <= found <= highest


def wildcards(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(each) or re.escape(each) for each in text), re.DOTALL)


def folded(text: str) -> str:
    """Letter case and the way of composing characters mean nothing, nor does padding."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.strip(" ")).casefold())


def without_accents(text: str) -> str:
    """Letters without their accents; the sound marks of kana are no accents."""
    letters = unicodedata.normalize("NFD", text)
    bare = "".join(each for each in letters if unicodedata.category(each) != "Mn" or each in "\u3099\u309a")
    return folded(unicodedata.normalize("NFC", bare))


def name(text: str) -> str:
    groups = [re.sub(r"[ ^]+$", "", group) for group in without_accents(text).split("=")]
    while groups and not groups[-1]:
        groups.pop()
    return "=".join(groups)


def words(text: str) -> list[str]:
    return re.sub(r"[\W_]", " ", text).split()


def integer(text: str) -> int | None:
    found = re.fullmatch(r" *([+-]?[0-9]+) *", text)
    if found is None or not -(2**63) <= int(found[1]) < 2**63:
        return None
    return int(found[1])


def date(text: str) -> str | None:
    """A day of the calendar, also as old archives write it."""
    found = re.fullmatch(r" *(\d{4})(\.?)(\d\d)\2(\d\d) *", text)
    if found is None or not 1 <= int(found[3]) <= 12 or not 1 <= int(found[4]) <= 31:
        return None
    return found[1] + found[3] + found[4]


def moment(text: str, filler: str = "0") -> str | None:
    """Twelve digits from the hour to the microsecond; what a value leaves open is its first moment."""
    found = re.fullmatch(r" *(\d\d)(?::?(\d\d)(?::?(\d\d)(?:\.(\d{1,6}))?)?)? *", text)
    if found is None:
        return None
    parts = [part or "" for part in found.groups()]
    if int(parts[0]) > 23 or int(parts[1] or 0) > 59 or int(parts[2] or 0) > 60:
        return None
    return "".join(parts).ljust(12, filler)


def last_moment(text: str) -> str | None:
    return moment(text, "9")
