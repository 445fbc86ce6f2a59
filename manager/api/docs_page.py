"""The page that shows the OpenAPI document. All of it is served from here, so it works without the internet.

``static/`` holds the files of the npm package swagger-ui-dist 5.35.0 (Apache-2.0, licence and notice beside them) that the
page needs, unchanged. Nothing on the page may come from elsewhere, and its policy says so to the browser.
"""

from functools import cache
from importlib.resources import files
from typing import Final

from manager.api.exchange import Call, Headers, Reply
from manager.api.operations import PUBLIC, Operation
from manager.core.errors import NotFound

_ASSETS: Final = {
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
    "start.js": b"text/javascript; charset=utf-8",
    "page.css": b"text/css; charset=utf-8",
    "icon.svg": b"image/svg+xml",
}
# Pictures as data: URLs are what the style sheet of swagger-ui draws its arrows with.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CACHED: Final[Headers] = [(b"cache-control", b"public, max-age=3600"), (b"content-security-policy", _POLICY)]
_PAGE: Final = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rocyard API</title>
<link rel="icon" href="/docs/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="stylesheet" href="/docs/page.css">
</head>
<body>
<div id="page"></div>
<noscript>This page needs JavaScript. The document itself is at <a href="/openapi.json">/openapi.json</a>.</noscript>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""


class DocsRoutes:
    """The document and its page.

    Args:
        document: the OpenAPI document; set once all operations are known.
    """

    def __init__(self) -> None:
        self.document = b"{}"

    async def openapi(self, _call: Call) -> Reply:
        """The document."""
        return Reply(200, self.document)

    async def page(self, _call: Call) -> Reply:
        """The page."""
        return Reply(200, _PAGE, [(b"content-security-policy", _POLICY)], b"text/html; charset=utf-8")

    async def asset(self, call: Call) -> Reply:
        """A file of the page."""
        name = call.params["file"]
        content_type = _ASSETS.get(name)
        if content_type is None:
            raise NotFound
        return Reply(200, _asset(name), _CACHED, content_type)

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="openapi", method="GET", path="/openapi.json", access=PUBLIC, handler=self.openapi,
                summary="This document.", listed=False,
            ),
            Operation(
                name="docs", method="GET", path="/docs", access=PUBLIC, handler=self.page,
                summary="A page that shows it.", answer_type="text/html", listed=False,
            ),
            Operation(
                name="docs_file", method="GET", path="/docs/{file}", access=PUBLIC, handler=self.asset,
                summary="A file of that page.", answer_type="text/javascript", listed=False,
            ),
        )  # fmt: skip


@cache
def _asset(name: str) -> bytes:
    return files("manager.api").joinpath("static", name).read_bytes()
