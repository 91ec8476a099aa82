"""The table of bad export requests: what is sent, and which error must come back. Checked by test_bad_input.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tests.support.azurite import ACCOUNT_KEY
from tests.support.depot import Depot

Make = Callable[["Place"], "str | bytes"]


@dataclass(slots=True)
class Place:
    """Where a bad request points to: a container and a folder of its own."""

    depot: Depot
    container: str

    def fill(self, text: str) -> str:
        """Put addresses and signatures into a template."""
        azurite, sas = self.depot.azurite, self.depot.azurite.container_sas
        known: dict[str, Callable[[], str]] = {
            "AZURITE": lambda: azurite.account_url,
            "PORT": lambda: azurite.account_url.split(":")[2].split("/")[0],
            "REFUSING": lambda: self.depot.bad.refusing,
            "SILENT": lambda: self.depot.bad.silent,
            "CONTAINER": lambda: self.container,
            "GOOD": lambda: sas(self.container, "cw"),
            "READ": lambda: sas(self.container, "rl"),
            "DELETE": lambda: sas(self.container, "d"),
            "CREATE": lambda: sas(self.container, "c"),
            "EXPIRED": lambda: sas(self.container, "cw", expires_in=timedelta(hours=-1)),
            "OTHERS": lambda: sas("another-container", "cw"),
            "KEY": lambda: ACCOUNT_KEY,
        }
        for name, value in known.items():
            if f"<{name}>" in text:
                text = text.replace(f"<{name}>", value())
        return text

    @property
    def good_destination(self) -> dict[str, Any]:
        return {"type": "azureBlob", "settings": {"blobContainerUri": self.fill("<AZURITE>/<CONTAINER>?<GOOD>")}}


@dataclass(frozen=True, slots=True)
class Bad:
    """`says` are parts that the message must have: the place, the reason, the remedy."""

    make: Make
    code: str
    target: str | None
    says: tuple[str, ...]
    status: int = 400


GOOD_SOURCE = {"type": "identifiers", "settings": {"values": ["1.2.3"]}}


def raw(content: str | bytes) -> Make:
    return lambda _: content


def whole(content: Any) -> Make:
    return lambda _: json.dumps(content)


def source(value: Any, **others: Any) -> Make:
    return lambda place: json.dumps({"source": value, "destination": place.good_destination} | others)


def settings_of_source(value: Any) -> Make:
    return source({"type": "identifiers", "settings": value})


def values(*given: Any) -> Make:
    return settings_of_source({"values": list(given)})


def to(value: Any) -> Make:
    return lambda place: place.fill(json.dumps({"source": GOOD_SOURCE, "destination": value}))


def azure(**given: Any) -> Make:
    return to({"type": "azureblob", "settings": given})


def uri(text: str) -> Make:
    return azure(blobContainerUri=text)


def connection(text: str, container: str = "<CONTAINER>") -> Make:
    return azure(connectionString=text, blobContainerName=container)


def folder(text: Any) -> Make:
    return to({"type": "file", "settings": {"folder": text}})


def member(make: Make, **changed: str) -> Make:
    """The request of `make` with text replaced: for what a JSON library would not write."""

    def replaced(place: Place) -> str:
        content = make(place)
        assert isinstance(content, str)
        for old, new in changed.items():
            assert f'"{old}"' in content
            content = content.replace(f'"{old}"', new, 1)
        return content

    return replaced


def bodies() -> dict[str, Bad]:
    """What is wrong with the body as JSON."""
    nested = "[" * 10_000 + "]" * 10_000
    objects = '{"source":' * 10_000 + "1" + "}" * 10_000

    def body(content: str | bytes, *says: str) -> Bad:
        return Bad(raw(content), "InvalidRequest", "body", says)

    return {
        "empty body": body("", "not valid JSON", "line 1"),
        "only white space": body(" \n ", "not valid JSON", "line 2"),
        "cut off": body('{"source":', "not valid JSON", "line 1, column 11"),
        "second line": body('{"source": {},\n}', "line 2"),
        "comment": body('{"source": {} /* all */}', "not valid JSON"),
        "two documents": body("{} {}", "not valid JSON", "column 4"),
        "not json at all": body("source=1.2.3", "not valid JSON"),
        "null body": body("null", "must be an object", "null"),
        "list body": body("[]", "must be an object", "list"),
        "text body": body('"1.2.3"', "must be an object", "a string"),
        "number body": body("12", "must be an object", "number"),
        "boolean body": body("true", "must be an object"),
        "lists 10,000 deep": body(nested, "nested too deeply"),
        "objects 10,000 deep": body(objects, "nested too deeply"),
        "values 10,000 deep": Bad(
            lambda _: '{"source":{"type":"identifiers","settings":{"values":' + nested + "}}}",
            "InvalidRequest",
            "body",
            ("nested too deeply",),
        ),
        "not a number": body('{"source": NaN}', "NaN"),
        "infinity": body('{"source": -Infinity}', "Infinity"),
        "5,000 digits": body('{"source": ' + "9" * 5000 + "}", "digits"),
        "not utf-8": body(b'{"source": "\xff\xfe"}', "UTF-8"),
        "utf-16": body('{"source": {}}'.encode("utf-16"), "UTF-8"),
        "member twice": body('{"destination": {}, "destination": {}}', "'destination'", "twice"),
        "member twice but for case": body('{"destination": {}, "Destination": {}}', "'Destination'", "twice"),
        "values twice but for case": Bad(
            member(values("1.2.3"), values='"Values": ["1"], "values"'), "InvalidRequest", "body", ("twice",)
        ),
        "uri twice but for case": Bad(
            member(azure(blobContainerUri="x"), blobContainerUri='"BLOBCONTAINERURI": "", "blobContainerUri"'),
            "InvalidRequest",
            "body",
            ("'blobContainerUri'", "twice"),
        ),
        "half a surrogate pair as a name": body('{"\\ud800": 1}', "surrogate"),
        "NUL in a name": body('{"a\\u0000": 1}', "control character"),
    }


def members() -> dict[str, Bad]:
    """Members that are unknown, missing or of the wrong type, at every level."""

    def wrong(make: Make, target: str, *says: str) -> Bad:
        return Bad(make, "InvalidRequest", target, says)

    rest = {"destination": {"type": "azureBlob", "settings": {}}}
    place = "destination.settings"
    return {
        "sources": wrong(whole({"sources": GOOD_SOURCE} | rest), "sources", "'sources'", "Did you mean 'source'?"),
        "unlike anything": wrong(whole({"x": 1} | rest), "x", "'x'", "source, destination"),
        "unknown beside a good source": wrong(source(GOOD_SOURCE, dryRun=True), "dryRun", "'dryRun'"),
        "unknown in source": wrong(source(GOOD_SOURCE | {"setting": {}}), "source.setting", "Did you mean 'settings'?"),
        "unknown in its settings": wrong(
            settings_of_source({"value": ["1"]}), "source.settings.value", "source.settings", "Did you mean 'values'?"
        ),
        "unknown in destination": wrong(to({"kind": "file"}), "destination.kind", "type, settings"),
        "unknown azure setting": wrong(
            azure(blobContainerUrl="https://x"), f"{place}.blobContainerUrl", "Did you mean 'blobContainerUri'?"
        ),
        "secret of the original": wrong(azure(secret="x"), f"{place}.secret", "'secret'", "blobContainerUri"),
        "azure setting for a folder": wrong(
            to({"type": "file", "settings": {"blobContainerUri": "x"}}), f"{place}.blobContainerUri", "folder"
        ),
        "250 characters of name": wrong(whole({"n" * 250: 1}), "n" * 200, "nnn..."),
        "5,000 characters of name": wrong(whole({"n" * 5000: 1}), "body", "5000 characters", "256"),
        "null source": wrong(source(None), "source", "must be an object", "null"),
        "text as source": wrong(source("1.2.3"), "source", "a string"),
        "list as source": wrong(source(["1.2.3"]), "source", "a list"),
        "empty source": wrong(source({}), "source.type", "required"),
        "null type": wrong(source(GOOD_SOURCE | {"type": None}), "source.type", "required"),
        "number as type": wrong(source(GOOD_SOURCE | {"type": 1}), "source.type", "must be a string"),
        "unknown type": wrong(source(GOOD_SOURCE | {"type": "dataset"}), "source.type", "identifiers, query"),
        "identifiers of a query": wrong(source(GOOD_SOURCE | {"type": "query"}), "source.settings.values", "level"),
        "type unknown": wrong(source(GOOD_SOURCE | {"type": "unknown"}), "source.type", "identifiers"),
        "number in a text as type": wrong(source(GOOD_SOURCE | {"type": "1"}), "source.type", "identifiers"),
        "no source settings": wrong(source({"type": "identifiers"}), "source.settings", "required"),
        "null source settings": wrong(settings_of_source(None), "source.settings", "required"),
        "list as source settings": wrong(settings_of_source(["1"]), "source.settings", "must be an object"),
        "no values": wrong(settings_of_source({}), "source.settings.values", "required"),
        "null values": wrong(settings_of_source({"values": None}), "source.settings.values", "required"),
        "text as values": wrong(settings_of_source({"values": "1.2"}), "source.settings.values", "must be a list"),
        "object as values": wrong(settings_of_source({"values": {}}), "source.settings.values", "must be a list"),
        "no value": wrong(values(), "source.settings.values", "empty", "at least one", "leave `source` out"),
        "no destination": wrong(whole({"source": GOOD_SOURCE}), "destination", "required"),
        "nothing": wrong(whole({}), "destination", "required"),
        "null destination": wrong(to(None), "destination", "required"),
        "text as destination": wrong(to("https://x"), "destination", "must be an object"),
        "no destination type": wrong(to({"settings": {}}), "destination.type", "required"),
        "number as destination type": wrong(to({"type": 0, "settings": {}}), "destination.type", "must be a string"),
        "unknown destination type": wrong(to({"type": "s3", "settings": {}}), "destination.type", "azureBlob, file"),
        "no destination settings": wrong(to({"type": "azureBlob"}), place, "required"),
        "list as destination settings": wrong(to({"type": "file", "settings": []}), place, "must be an object"),
        "number as uri": wrong(azure(blobContainerUri=1), f"{place}.blobContainerUri", "must be a string", "a number"),
        "object as uri": wrong(azure(blobContainerUri={}), f"{place}.blobContainerUri", "must be a string"),
        "text as flag": wrong(azure(useManagedIdentity="true"), f"{place}.useManagedIdentity", "true or false"),
        "number as flag": wrong(azure(useManagedIdentity=1), f"{place}.useManagedIdentity", "true or false"),
        "number as folder": wrong(folder(7), f"{place}.folder", "must be a string"),
        "over-long uri": wrong(uri("https://x/" + "c" * 9000), f"{place}.blobContainerUri", "8192"),
        "line end in uri": wrong(uri("<AZURITE>/<CONTAINER>\r\n?<GOOD>"), f"{place}.blobContainerUri", "control"),
        "NUL in folder": wrong(folder("a\0b"), f"{place}.folder", "control character"),
        "half a surrogate pair in uri": wrong(uri("<AZURITE>/c?sig=\ud800"), f"{place}.blobContainerUri", "surrogate"),
    }


def identifiers() -> dict[str, Bad]:
    """Identifiers that are none; the second of three is the bad one."""
    texts = {
        "empty": ("", "empty"),
        "space": ("  ", "empty"),
        "slash": ("/", "empty"),
        "empty first part": ("/1", "empty"),
        "empty second part": ("1.2/", "empty"),
        "empty middle part": ("1//2", "empty"),
        "empty third part": ("1/2/", "empty"),
        "letters": ("1.2.abc", "digits and dots"),
        "letters in the second part": ("1.2/x", "'x'"),
        "letters in the third part": ("1.2/3/1e3", "'1e3'"),
        "four parts": ("1/2/3/4", "more than three parts"),
        "five parts": ("1/2/3/4/5", "more than three parts"),
        "10,000 parts": ("1/" * 10_000, "more than three parts"),
        "trailing dot": ("1.2.", "ends in a dot"),
        "dot": (".", "end in a digit"),
        "minus": ("1.-2", "digits and dots"),
        "wild card": ("1.2.*", "digits and dots"),
        "parent folder": ("../1", "digit"),
        "backslash": ("1\\2", "digits and dots"),
        "inner space": ("1. 2", "digits and dots"),
        "inner line end": ("1.2\n.3", "digits and dots"),
        "inner NUL": ("1.2\0.3", "digits and dots"),
        "other digits": ("1.\u0662", "digits and dots"),
        "65 characters": ("1." * 32 + "1", "65 characters; 64"),
        "65 characters in the third part": ("1/2/" + "9" * 65, "65 characters; 64"),
        "a megabyte": ("1" * 1_000_000, "1000000 characters"),
        "null": (None, "must be a string, not null"),
        "number": (1.2, "must be a string, not a number"),
        "boolean": (True, "must be a string"),
        "list": (["1.2.3"], "must be a string, not a list"),
        "object": ({"study": "1"}, "must be a string, not an object"),
    }
    where = "source.settings.values[1]"
    return {
        f"identifier: {name}": Bad(values("1.2.3", value, "9"), "InvalidIdentifier", where, (where, reason))
        for name, (value, reason) in texts.items()
    }
