"""The chat page at `/`: one file, and a policy by which the browser runs nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def policy(html: str) -> str:
    """The Content-Security-Policy of a page: its own script and style, requests to its own server.

    Scripts and styles are named by their SHA-256, so an edited file keeps working and anything
    that is put into the document later does not run. `require-trusted-types-for` makes
    interpreting a string as HTML an error of the page's own script.
    """

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()) for code in found]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashes('script')}",
            f"style-src {hashes('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, UTF-8, and the headers to send with it."""
    html = FILE.read_text("utf-8")
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.encode(), headers


def page_response() -> Response:
    """The answer to `GET /`. It holds nothing secret: a browser must get it before it has a key."""
    html, headers = page()
    return Response(html, media_type="text/html", headers=headers)
