"""The table of hostile destinations. `<PORT>` stands for a listener's port on the loopback address, where nothing may
arrive, `<LISTED>` for an endpoint that the operator listed, and `<LISTED-PORT>` for its port.
"""

from __future__ import annotations

URIS: dict[str, str] = {
    # This machine and its neighbours, in every spelling
    "loopback": "https://127.0.0.1:<PORT>/account/export",
    "loopback without encryption": "http://127.0.0.1:<PORT>/account/export",
    "loopback without an account": "https://127.0.0.1:<PORT>/export",
    "loopback by name": "https://localhost:<PORT>/account/export",
    "loopback by name in upper case": "HTTPS://LOCALHOST:<PORT>/account/export",
    "loopback by name with a trailing dot": "https://localhost.:<PORT>/account/export",
    "loopback, decimal": "https://2130706433:<PORT>/account/export",
    "loopback, hexadecimal": "https://0x7f000001:<PORT>/account/export",
    "loopback, hexadecimal parts": "https://0x7f.0x0.0x0.0x1:<PORT>/account/export",
    "loopback, octal": "https://017700000001:<PORT>/account/export",
    "loopback, octal parts": "https://0177.0.0.1:<PORT>/account/export",
    "loopback, short": "https://127.1:<PORT>/account/export",
    "loopback, less short": "https://127.0.1:<PORT>/account/export",
    "loopback, another address of it": "https://127.8.8.8:<PORT>/account/export",
    "loopback, percent-encoded": "https://%31%32%37.0.0.1:<PORT>/account/export",
    "loopback, full-width digits": "https://１２７.0.0.1:<PORT>/account/export",
    "loopback, circled letters": "https://ⓛocalhost:<PORT>/account/export",
    "loopback, ideographic full stops": "https://127。0。0。1:<PORT>/account/export",
    "loopback, version 6": "https://[::1]:<PORT>/account/export",
    "loopback, version 6 in full": "https://[0:0:0:0:0:0:0:1]:<PORT>/account/export",
    "loopback, mapped": "https://[::ffff:127.0.0.1]:<PORT>/account/export",
    "loopback, mapped in hexadecimal": "https://[::ffff:7f00:1]:<PORT>/account/export",
    "loopback, compatible": "https://[::127.0.0.1]:<PORT>/account/export",
    "loopback behind NAT64": "https://[64:ff9b::7f00:1]:<PORT>/account/export",
    "unspecified": "https://0.0.0.0:<PORT>/account/export",
    "unspecified, short": "https://0:<PORT>/account/export",
    "unspecified, version 6": "https://[::]:<PORT>/account/export",
    "metadata service": "https://169.254.169.254/metadata/export",
    "metadata service without encryption": "http://169.254.169.254/metadata/export",
    "metadata service, decimal": "http://2852039166/metadata/export",
    "metadata service, hexadecimal": "http://0xa9fea9fe/metadata/export",
    "metadata service, mapped": "http://[::ffff:169.254.169.254]/metadata/export",
    "metadata service by name": "http://metadata.google.internal/computeMetadata/export",
    "platform service": "https://168.63.129.16/metadata/export",
    "link-local, version 6, with a zone": "https://[fe80::1%25lo]:<PORT>/account/export",
    "private": "https://10.0.0.1/account/export",
    "multicast": "https://224.0.0.1/account/export",
    "broadcast": "https://255.255.255.255/account/export",
    # A friendly name with something else behind it
    "user that looks like a host": "https://dicomexport.blob.core.windows.net@127.0.0.1:<PORT>/account/export",
    "user and password": "https://dicomexport.blob.core.windows.net:443@127.0.0.1:<PORT>/account/export",
    "encoded user": "https://dicomexport.blob.core.windows.net%40127.0.0.1:<PORT>/account/export",
    "fragment": "https://127.0.0.1:<PORT>#.blob.core.windows.net/export",
    "query as a host": "https://127.0.0.1:<PORT>?.blob.core.windows.net/export",
    "backslash": "https://127.0.0.1:<PORT>\\.blob.core.windows.net/export",
    "backslash and user": "https://127.0.0.1:<PORT>\\@dicomexport.blob.core.windows.net/export",
    "suffix of somebody else": "https://dicomexport.blob.core.windows.net.attacker.example/export",
    "suffix without its dot": "https://evilblob.core.windows.net/export",
    "suffix alone": "https://blob.core.windows.net/export",
    "suffix with a trailing dot": "https://dicomexport.blob.core.windows.net./export",
    "empty label": "https://dicomexport..blob.core.windows.net/export",
    "label of a hyphen": "https://-.blob.core.windows.net/export",
    "label with an underscore": "https://dicom_export.blob.core.windows.net/export",
    "letters of another script": "https://dіcomexport.blob.core.windows.net/export",
    "soft hyphen": "https://dicom\u00adexport.blob.core.windows.net/export",
    "another service": "https://dicomexport.queue.core.windows.net/export",
    "the cloud on another port": "https://dicomexport.blob.core.windows.net:<PORT>/export",
    "the cloud without encryption": "http://dicomexport.blob.core.windows.net/export",
    "the cloud with an account": "https://dicomexport.blob.core.windows.net/account/export",
    "port zero": "https://dicomexport.blob.core.windows.net:0/export",
    "port out of range": "https://dicomexport.blob.core.windows.net:65979/export",
    "negative port": "https://dicomexport.blob.core.windows.net:-443/export",
    "two ports": "https://dicomexport.blob.core.windows.net:443:<PORT>/export",
    # Not a container
    "parent folder": "https://dicomexport.blob.core.windows.net/../export",
    "parent folder behind": "https://dicomexport.blob.core.windows.net/export/..",
    "encoded parent folder": "https://dicomexport.blob.core.windows.net/%2e%2e%2fexport",
    "two slashes": "https://dicomexport.blob.core.windows.net//127.0.0.1:<PORT>/export",
    "no scheme": "//127.0.0.1:<PORT>/account/export",
    "file": "file:///etc/export",
    "file on a host": "file://127.0.0.1:<PORT>/account/export",
    "file in upper case": "FILE:///etc/export",
    "ftp": "ftp://127.0.0.1:<PORT>/account/export",
    "gopher": "gopher://127.0.0.1:<PORT>/account/export",
    "data": "data:text/plain,export",
    "unix socket": "http+unix://%2frun%2fdocker.sock/account/export",
    "line end in the host": "https://127.0.0.1:<PORT>\r\n.blob.core.windows.net/export",
    "line end in the container": "https://dicomexport.blob.core.windows.net/export\r\nHost: 127.0.0.1",
    "tab in the host": "https://127.0.0.1:<PORT>\t.blob.core.windows.net/export",
    "tab in the scheme": "ht\ttps://127.0.0.1:<PORT>/account/export",
    "line end before the scheme": "\nhttps://127.0.0.1:<PORT>/account/export",
    "NUL in the host": "https://127.0.0.1:<PORT>\0.blob.core.windows.net/export",
    # Near to what is listed
    "listed endpoint, another account": "https://127.0.0.1:<LISTED-PORT>/other/export",
    "listed endpoint, a longer account": "https://127.0.0.1:<LISTED-PORT>/account2/export",
    "listed endpoint, no account": "https://127.0.0.1:<LISTED-PORT>/export",
    "listed endpoint, by another name": "https://localhost:<LISTED-PORT>/account/export",
    "listed endpoint, another scheme": "http://127.0.0.1:<LISTED-PORT>/account/export",
    "listed endpoint, a path behind it": "<LISTED>/export/../../other",
}

CONNECTION_STRINGS: dict[str, str] = {
    "endpoint elsewhere": "BlobEndpoint=https://127.0.0.1:<PORT>/account;SharedAccessSignature=sv=1&sig=x",
    "endpoint without encryption": "BlobEndpoint=http://127.0.0.1:<PORT>/account;SharedAccessSignature=sv=1&sig=x",
    "account of the cloud, endpoint elsewhere": (
        "AccountName=dicomexport;BlobEndpoint=https://127.0.0.1:<PORT>;SharedAccessSignature=sv=1&sig=x"
    ),
    "suffix elsewhere": "AccountName=dicomexport;EndpointSuffix=attacker.example;SharedAccessSignature=sv=1&sig=x",
    "suffix with a port": (
        "AccountName=dicomexport;EndpointSuffix=core.windows.net:<PORT>;SharedAccessSignature=sv=1&sig=x"
    ),
    "suffix with a user": (
        "AccountName=dicomexport;EndpointSuffix=core.windows.net@127.0.0.1:<PORT>;SharedAccessSignature=sv=1&sig=x"
    ),
    "suffix with a path": (
        "AccountName=dicomexport;EndpointSuffix=core.windows.net/..;SharedAccessSignature=sv=1&sig=x"
    ),
    "account name with a host": "AccountName=127.0.0.1:<PORT>/x?;SharedAccessSignature=sv=1&sig=x",
    "no encryption": ("DefaultEndpointsProtocol=http;AccountName=dicomexport;SharedAccessSignature=sv=1&sig=x"),
    "another protocol": "DefaultEndpointsProtocol=file;AccountName=dicomexport;SharedAccessSignature=sv=1&sig=x",
    "file": "BlobEndpoint=file:///etc;SharedAccessSignature=sv=1&sig=x",
    "emulator": "UseDevelopmentStorage=true",
    "emulator behind a proxy": "UseDevelopmentStorage=true;DevelopmentStorageProxyUri=http://127.0.0.1:<PORT>",
    "emulator elsewhere": (
        "AccountName=devstoreaccount1;AccountKey=c2VjcmV0;BlobEndpoint=http://127.0.0.1:<PORT>/devstoreaccount1"
    ),
    "account key": "AccountName=dicomexport;AccountKey=c2VjcmV0",
    "line end": "AccountName=dicomexport;EndpointSuffix=x\r\n.core.windows.net;SharedAccessSignature=sv=1&sig=x",
}

FOLDERS: dict[str, str] = {
    "parent": "..",
    "parent inside": "a/../../b",
    "absolute": "/etc",
    "backslash": "a\\..\\..\\b",
    "NUL": "a\0b",
    "link out of the root": "link",
    "below a link out of the root": "link/below",
    "link inside the root": "inner-link",
    "link to itself": "loop/below",
    "a file": "a-file/below",
    "absolute behind a dot": "/./etc",
}
"""The test lays links, a loop and a file below the root."""

RESOLVED: dict[str, str] = {
    "loopback": "127.0.0.1",
    "another loopback": "127.255.0.3",
    "loopback, version 6": "::1",
    "loopback, mapped": "::ffff:127.0.0.1",
    "loopback, compatible": "::127.0.0.1",
    "loopback behind 6to4": "2002:7f00:1::",
    "loopback behind NAT64": "64:ff9b::7f00:1",
    "metadata service": "169.254.169.254",
    "metadata service, mapped": "::ffff:169.254.169.254",
    "link-local, version 6": "fe80::1%eth0",
    "unspecified": "0.0.0.0",
    "unspecified, version 6": "::",
    "this network": "0.1.2.3",
    "multicast": "239.1.2.3",
    "multicast, version 6": "ff02::1",
    "broadcast": "255.255.255.255",
    "reserved": "240.0.0.1",
    "platform service": "168.63.129.16",
}
"""What a name of the cloud must not resolve to."""
