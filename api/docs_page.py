"""The page at `/docs`. All that it loads comes from here; FastAPI's own page needs a CDN, and so an open network."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, HTMLResponse

from api.problems import Problem

# Swagger UI as it is released, in a wheel; nothing else of the package is used.
FILES = Path(str(resources.files("fastapi_swagger") / "resources"))
NAMES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
# Its elements carry styles; its scripts need no exception.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Relative throughout, for whoever serves it under a path of their own.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Credit refresh</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});
"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def docs() -> HTMLResponse:
    """Every route, with a try-out."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/docs/{name}")
def docs_file(name: str) -> Response:
    """What the page loads."""
    if name == "start.js":
        return Response(START, media_type="text/javascript")
    if name not in NAMES:
        raise Problem("not-found", "there is nothing at this address")
    return FileResponse(FILES / name)
