"""The files that pages load: styles and scripts, by names that change with their contents, so that browsers may keep them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

STATIC_PATH = "/static"
_FOLDER = Path(__file__).parent / "static"
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FOREVER = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}


@cache
def _files() -> dict[str, tuple[str, bytes, str]]:
    """The name with a digest, the contents and the type of each file, by its name."""
    files = {}
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _TYPES:
            contents = file.read_bytes()
            digest = hashlib.sha256(contents).hexdigest()[:12]
            files[file.name] = (f"{file.stem}.{digest}{file.suffix}", contents, _TYPES[file.suffix])
    return files


def versioned(name: str) -> str:
    """Returns the name under which a static file is served. Raises KeyError."""
    return _files()[name][0]


async def serve_static(request: Request) -> Response:
    """Serves `STATIC_PATH/{name}`. A name of an earlier version is not found: its page is of that version, too."""
    wanted = request.path_params["name"]
    for name, contents, kind in _files().values():
        if name == wanted:
            return Response(contents, media_type=kind, headers=dict(_FOREVER))
    return PlainTextResponse("no such file", 404)
