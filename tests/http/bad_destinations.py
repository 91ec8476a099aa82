"""The table of bad export requests, continued: destinations that are malformed, not allowed or not writable."""

from __future__ import annotations

from typing import Any

from tests.http.bad_requests import Bad, Make, azure, connection, folder, to, uri

_URI = "destination.settings.blobContainerUri"
_STRING = "destination.settings.connectionString"
_NAME = "destination.settings.blobContainerName"
_IDENTITY = "destination.settings.useManagedIdentity"
_PLACE = "destination.settings"


def forms() -> dict[str, Bad]:
    """Refused for their form, before anything is reached."""

    def bad_uri(text: str, *says: str) -> Bad:
        return Bad(uri(text), "InvalidUri", _URI, says or ("blobContainerUri",))

    def bad_string(text: str, *says: str) -> Bad:
        return Bad(connection(text), "InvalidConnectionString", _STRING, says or ("connectionString",))

    def bad_name(name: str) -> dict[str, Bad]:
        says = ("3 to 63", "lower-case")
        both = {
            f"container name {name[:12]!r} in a uri": Bad(
                uri(f"<AZURITE>/{name}?<GOOD>"), "InvalidContainerName", _URI, says
            )
        }
        key = "BlobEndpoint=<AZURITE>;AccountName=devstoreaccount1;AccountKey=<KEY>"
        both[f"container name {name[:12]!r}"] = Bad(connection(key, name), "InvalidContainerName", _NAME, says)
        return both

    conflict = ("not both",)
    table = {
        "no azure settings": Bad(azure(), "MissingSettings", _URI, ("blobContainerUri", "connectionString")),
        "blank azure settings": Bad(azure(blobContainerUri=" "), "MissingSettings", _URI, ("blobContainerUri",)),
        "connection string alone": Bad(
            azure(connectionString="BlobEndpoint=<AZURITE>;SharedAccessSignature=<GOOD>"),
            "MissingSettings",
            _URI,
            ("blobContainerName",),
        ),
        "container name alone": Bad(azure(blobContainerName="abc"), "MissingSettings", _URI, ("connectionString",)),
        "uri and connection string": Bad(
            azure(blobContainerUri="<AZURITE>/<CONTAINER>?<GOOD>", connectionString="BlobEndpoint=x"),
            "ConflictingSettings",
            _URI,
            conflict,
        ),
        "uri and container name": Bad(
            azure(blobContainerUri="<AZURITE>/<CONTAINER>?<GOOD>", blobContainerName="<CONTAINER>"),
            "ConflictingSettings",
            _URI,
            conflict,
        ),
        "identity and connection string": Bad(
            azure(connectionString="BlobEndpoint=x", blobContainerName="abc", useManagedIdentity=True),
            "ConflictingSettings",
            _IDENTITY,
            ("managed identity",),
        ),
        "identity and signature": Bad(
            azure(blobContainerUri="<AZURITE>/<CONTAINER>?<GOOD>", useManagedIdentity=True),
            "ConflictingSettings",
            _IDENTITY,
            ("SAS",),
        ),
        "identity": Bad(
            azure(blobContainerUri="https://dicomexport.blob.core.windows.net/export", useManagedIdentity=True),
            "ManagedIdentityDisabled",
            _IDENTITY,
            ("switched off", "dicom-depot identity enable"),
        ),
        "no sign-in": Bad(
            uri("<AZURITE>/<CONTAINER>"), "AnonymousAccessDisabled", _URI, ("SAS", "DICOM_DEPOT_EXPORT_ALLOW_ANONYMOUS")
        ),
        "account key": Bad(
            connection("AccountName=prodaccount;AccountKey=<KEY>;EndpointSuffix=core.windows.net"),
            "AccountKeyRefused",
            _STRING,
            ("Account keys are not supported", "SAS"),
        ),
        "account key in other letters": Bad(
            connection("BlobEndpoint=<AZURITE>;ACCOUNTKEY = <KEY>"), "AccountKeyRefused", _STRING, ("SAS",)
        ),
        "the emulator's name with a cloud endpoint": Bad(
            connection("AccountName=devstoreaccount1;AccountKey=<KEY>;BlobEndpoint=https://prod.blob.core.windows.net"),
            "AccountKeyRefused",
            _STRING,
            ("SAS",),
        ),
        "no scheme": bad_uri("export", "https://"),
        "relative": bad_uri("/devstoreaccount1/export", "https://"),
        "ftp": bad_uri("ftp://127.0.0.1/devstoreaccount1/export?sig=x", "https://"),
        "no host": bad_uri("https:///export?sig=x", "https://"),
        "no container": bad_uri("https://dicomexport.blob.core.windows.net?sig=x", "one container"),
        "container in a container": bad_uri("<AZURITE>/<CONTAINER>/below?<GOOD>", "one container"),
        "user and password": bad_uri("https://user:hidden@dicomexport.blob.core.windows.net/export?sig=x", "password"),
        "another host behind an @": bad_uri("https://dicomexport.blob.core.windows.net@evil.example/export?sig=x"),
        "another host behind a backslash": bad_uri("https://evil.example\\.blob.core.windows.net/export?sig=x"),
        "fragment": bad_uri("<AZURITE>/<CONTAINER>?<GOOD>#x", "fragment"),
        "port out of range": bad_uri("https://127.0.0.1:99999/devstoreaccount1/export?sig=x"),
        "broken address": bad_uri("https://[::1/devstoreaccount1/export?sig=x"),
        "query without signature": bad_uri("<AZURITE>/<CONTAINER>?sv=2024", "not a SAS", "sig"),
        "connection string without values": bad_string("what", "Name=Value"),
        "connection string with an empty value": bad_string("BlobEndpoint=;SharedAccessSignature=x", "Name=Value"),
        "connection string without an endpoint": bad_string("SharedAccessSignature=sig=x", "BlobEndpoint"),
        "connection string with a bad account": bad_string("AccountName=A_B;SharedAccessSignature=x", "AccountName"),
        "connection string with a bad port": bad_string("BlobEndpoint=http://127.0.0.1:99999/x"),
        "connection string with a user": bad_string("BlobEndpoint=http://a@127.0.0.1/x;SharedAccessSignature=sig=x"),
        "suffix with a user": bad_string("AccountName=abc;EndpointSuffix=x@evil.example;SharedAccessSignature=sig=x"),
        "endpoint with a query": bad_string("BlobEndpoint=<AZURITE>?x;SharedAccessSignature=sig=x"),
        "endpoint with an empty query": bad_string("BlobEndpoint=<AZURITE>?;SharedAccessSignature=sig=x"),
    }
    for name in ("ab", "UPPER", "a--b", "-ab", "ab-", "a" * 64, "a_b", "a.b", "%61bc", "a b", "..."):
        table |= bad_name(name)
    return table


def endpoints() -> dict[str, Bad]:
    """Places that the service may not send to, and must not even reach."""

    def forbidden(make: Make, target: str) -> Bad:
        return Bad(make, "EndpointNotAllowed", target, ("DICOM_DEPOT_EXPORT_ALLOWED_ENDPOINTS",))

    uris = {
        "foreign host": "https://example.com/export?sig=x",
        "link-local address": "http://169.254.169.254/metadata/export?sig=x",
        "link-local address, version 6": "http://[fe80::1]/account/export?sig=x",
        "loopback on another port": "http://127.0.0.1:1/devstoreaccount1/export?sig=x",
        "an allowed address by another name": "http://localhost:<PORT>/devstoreaccount1/<CONTAINER>?<GOOD>",
        "an allowed address written shorter": "http://127.1:<PORT>/devstoreaccount1/<CONTAINER>?<GOOD>",
        "an allowed address as a number": "http://2130706433:<PORT>/devstoreaccount1/<CONTAINER>?<GOOD>",
        "an allowed host with another account": "http://127.0.0.1:<PORT>/account/<CONTAINER>?<GOOD>",
        "an allowed host without its account": "http://127.0.0.1:<PORT>/<CONTAINER>?<GOOD>",
        "an allowed host with another scheme": "https://127.0.0.1:<PORT>/devstoreaccount1/<CONTAINER>?<GOOD>",
        "the cloud without encryption": "http://dicomexport.blob.core.windows.net/export?sig=x",
        "the cloud on another port": "https://dicomexport.blob.core.windows.net:8443/export?sig=x",
        "the cloud without an account": "https://blob.core.windows.net/export?sig=x",
        "the cloud with a dot for an account": "https://.blob.core.windows.net/export?sig=x",
        "the cloud with a path": "https://dicomexport.blob.core.windows.net/account/export?sig=x",
        "a host that begins like the cloud": "https://dicomexport.blob.core.windows.net.evil.example/export?sig=x",
        "a host that ends like the cloud": "https://evilblob.core.windows.net/export?sig=x",
        "another service of the cloud": "https://dicomexport.queue.core.windows.net/export?sig=x",
    }
    strings = {
        "link-local address in a connection string": "BlobEndpoint=http://169.254.169.254/x;SharedAccessSignature=sig=x",
        "foreign suffix": "AccountName=abc;EndpointSuffix=evil.example;SharedAccessSignature=sig=x",
        "plain http in a connection string": "DefaultEndpointsProtocol=http;AccountName=ab1;SharedAccessSignature=x",
        "emulator where none is allowed": "UseDevelopmentStorage=true",
        "emulator by name where none is allowed": "AccountName=devstoreaccount1;AccountKey=<KEY>",
        "emulator elsewhere": "AccountName=devstoreaccount1;AccountKey=<KEY>;BlobEndpoint=http://10.0.0.1/x",
    }
    return {name: forbidden(uri(text), _URI) for name, text in uris.items()} | {
        name: forbidden(connection(text), _STRING) for name, text in strings.items()
    }


def rights() -> dict[str, Bad]:
    """Reached, and not writable. `code` is a regular expression; emulator and cloud differ in some."""

    def refused(make: Make, code: str, *says: str) -> Bad:
        return Bad(make, code, _PLACE, says)

    signature = ("<CONTAINER>", "devstoreaccount1", "create and write")
    denied = "Authorization|Authentication"
    container = "<AZURITE>/<CONTAINER>?"
    return {
        "container that is not there": refused(
            uri("<AZURITE>/not-there?<OTHERS>"), denied + "|ContainerNotFound", "not-there"
        ),
        "container that is not there, with a key": refused(
            connection("BlobEndpoint=<AZURITE>;AccountName=devstoreaccount1;AccountKey=<KEY>", "not-there"),
            "ContainerNotFound",
            "'not-there'",
            "does not exist",
            "Create it",
        ),
        "read-only signature": refused(uri(container + "<READ>"), denied, *signature),
        "delete-only signature": refused(uri(container + "<DELETE>"), denied, *signature),
        "expired signature": refused(uri(container + "<EXPIRED>"), denied, *signature),
        "another container's signature": refused(uri(container + "<OTHERS>"), denied, *signature),
        "changed signature": refused(uri(container + "<GOOD>x"), denied, *signature),
        "made-up signature": refused(uri(container + "sig=made-up"), ".", "<CONTAINER>"),
        "empty signature": refused(uri(container + "sv=2024-11-04&sig="), ".", "<CONTAINER>"),
        "broken escapes in the signature": refused(uri(container + "sv=2024-11-04&sig=%ZZ%"), ".", "<CONTAINER>"),
        "letters of other scripts in the signature": refused(uri(container + "sv=é&sig=日本"), ".", "<CONTAINER>"),
        "signature of a connection string": refused(
            connection("BlobEndpoint=<AZURITE>;SharedAccessSignature=<READ>"), denied, *signature
        ),
        "wrong emulator key": refused(
            connection("BlobEndpoint=<AZURITE>;AccountName=devstoreaccount1;AccountKey=d3Jvbmc="), denied, "<CONTAINER>"
        ),
        "emulator key that is no base64": refused(
            connection("BlobEndpoint=<AZURITE>;AccountName=devstoreaccount1;AccountKey=%%%"),
            "InvalidSignIn",
            "<CONTAINER>",
            "SAS",
        ),
        "host that does not resolve": refused(
            uri("https://nowhere-xyz.blob.core.windows.net/export?sig=x"), "NameNotResolved", "nowhere-xyz", "name"
        ),
        "port that refuses": refused(uri("<REFUSING>/export?sig=x"), "ConnectionFailed", "'export'", "port"),
        "port that never answers": refused(uri("<SILENT>/export?sig=x"), "TimedOut", "'export'", "network"),
    }


def folders() -> dict[str, Bad]:
    """Folder destinations. The tests lay a link, a file and a loop below the root first."""

    def bad(text: Any, *says: str) -> Bad:
        return Bad(folder(text), "DestinationRefused", f"{_PLACE}.folder", says)

    def reached(text: str) -> Bad:
        return Bad(folder(text), "DestinationNotFolder", _PLACE, (text.partition("/")[0],))

    below = "below the configured root"
    return {
        "parent folder": bad("..", "'..'", below),
        "parent folder inside": bad("a/../../b", "'..'", below),
        "absolute folder": bad("/etc", "absolute", below),
        "backslash in a folder": bad("a\\..\\b", "backslash"),
        "over-long folder": bad("a/" * 1000, "2000 characters"),
        "over-long component": bad("ä" * 200, "255 bytes"),
        "link out of the root": reached("link"),
        "folder below a link out of the root": reached("link/below/it"),
        "link to a folder below the root": reached("inner-link"),
        "link that leads nowhere": reached("dangling/x"),
        "link to itself": reached("loop"),
        "file where a folder must be": reached("a-file/below"),
        "folder type in other letters": Bad(
            to({"type": "FILE", "settings": {"FOLDER": "../x"}}), "DestinationRefused", f"{_PLACE}.folder", ("'..'",)
        ),
    }
