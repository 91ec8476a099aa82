"""A web viewer's files under /viewer/, for browsers on the service's own origin. Open to everybody: they hold no data.

The viewer is OHIF, in a folder that the setting names; the service has no viewer of its own. What is served is listed
at the start and looked up in that list, so no path leads out of the folder. The viewer's configuration comes from here.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, RedirectResponse, Response

from dicom_depot.web.access import OPEN

INDEX = "index.html"
CONFIGURATION = "app-config.js"

_TEXT = "; charset=utf-8"
_CONTENT_TYPES = {
    ".css": "text/css" + _TEXT,
    ".html": "text/html" + _TEXT,
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript" + _TEXT,
    ".json": "application/json",
    ".jsonc": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript" + _TEXT,
    ".onnx": "application/octet-stream",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
    ".wasm": "application/wasm",
    ".webapp": "application/manifest+json",
    ".webmanifest": "application/manifest+json",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xml": "application/xml",
}
"""What a viewer's build is made of. Other files are not served: a folder may hold what was not meant for browsers."""

# OHIF's first file holds scripts, and its decoders, compiled to WebAssembly, make functions from text.
_POLICY = (
    "default-src 'self'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; "
    "font-src 'self' data:; "
    "connect-src 'self' data: blob:; "
    "media-src 'self' blob:; "
    "worker-src 'self' blob:; "
    "frame-src 'self' blob:; "
    "object-src 'self' blob:; "
    "base-uri 'none'; "
    "form-action 'none'; "
    "frame-ancestors 'self'"
)
"""The page fetches nothing from elsewhere and sends nothing there, whatever the viewer's code tries."""

# Kept by browsers, and asked for again each time: a file that did not change is not sent again.
_HEADERS = {"Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}

# OHIF's configuration is a script. Where it comes from says where the service is, below which path of a proxy too.
_SCRIPT = """\
const root = new URL("../v2", document.currentScript.src).href;
window.config = %s;
for (const source of window.config.dataSources) {
  Object.assign(source.configuration, { qidoRoot: root, wadoRoot: root, wadoUriRoot: root });
}
"""
_CONFIGURATION = {
    "name": "dicom-depot",
    "routerBasename": None,
    "extensions": [],
    "modes": [],
    "customizationService": {},
    "showStudyList": True,
    "maxNumberOfWebWorkers": 3,
    "showWarningMessageForCrossOrigin": False,
    "showCPUFallbackMessage": True,
    "showLoadingIndicator": True,
    "strictZSpacingForVolumeViewport": True,
    "groupEnabledModesFirst": True,
    # What a browser opens at once to one HTTP/1.1 server is six connections.
    "maxNumRequests": {"interaction": 100, "thumbnail": 5, "prefetch": 10},
    "defaultDataSourceName": "depot",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "depot",
            "configuration": {
                "friendlyName": "DICOM Depot",
                "name": "depot",
                "qidoSupportsIncludeField": True,
                "supportsReject": False,
                "supportsFuzzyMatching": False,
                "supportsWildcard": True,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",  # drawn by the browser from the frames
                "enableStudyLazyLoad": True,
                "singlepart": "bulkdata,video",
                "bulkDataURI": {"enabled": True},
            },
        }
    ],
}


def viewer_router(folder: Path) -> APIRouter:
    """Routes for the files that are in `folder` now; what is put there later is found after a restart."""
    files = dict(_files(folder))
    configuration = (_SCRIPT % json.dumps(_CONFIGURATION, indent=2)).encode()
    router = APIRouter(prefix="/viewer", dependencies=[OPEN], include_in_schema=False)

    @router.api_route("", methods=["GET", "HEAD"])
    def redirect_to_viewer(request: Request) -> Response:
        """Relative, so that it holds below a proxy's path too."""
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"viewer/{query}", 308)

    @router.api_route("/{path:path}", methods=["GET", "HEAD"])
    def retrieve_viewer_file(request: Request, path: str) -> Response:
        """A file, or for a page of the viewer, whose paths exist in the browser only, the first file."""
        if path == CONFIGURATION:
            return Response(configuration, media_type="text/javascript", headers=_HEADERS)
        if path not in files and "." not in path.rpartition("/")[2]:
            path = INDEX
        return _answer(request, files.get(path))

    return router


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Regular files below the folder by their paths in it. Links are left out, and what begins with a dot."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            is_wanted = not name.startswith(".") and path.suffix.lower() in _CONTENT_TYPES
            if is_wanted and stat.S_ISREG(path.lstat().st_mode):
                found.append((path.relative_to(folder).as_posix(), path))
    return found


def _answer(request: Request, path: Path | None) -> Response:
    try:
        status = None if path is None else path.lstat()
    except OSError:
        status = None
    if path is None or status is None or not stat.S_ISREG(status.st_mode):
        raise HTTPException(404)
    # Packages write all files with one old date, so neither dates nor sizes tell two versions of a file apart.
    etag = f'"{status.st_ino:x}-{status.st_ctime_ns:x}-{status.st_size:x}"'
    headers = {"ETag": etag, **_HEADERS}
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    answer = FileResponse(path, media_type=_CONTENT_TYPES[path.suffix.lower()], headers=headers, stat_result=status)
    del answer.headers["Last-Modified"]
    return answer
