"""The HTML pages of all profiles, served beside Dagster's UI: a browser doesn't follow a link from there to a file.

Only GET, only 127.0.0.1, only var/PROFILE/reports/NAME.html; names are checked before they become a path.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from puzzle_dag.config import ConfigError, check_name

PORT_VARIABLE = "PUZZLE_DAG_PAGES_PORT"
DEFAULT_PORT = 3001


def pages_port() -> int:
    """Return the port of the pages: $PUZZLE_DAG_PAGES_PORT, or 3001. Raises ConfigError where that is no port."""
    text = os.environ.get(PORT_VARIABLE) or str(DEFAULT_PORT)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"${PORT_VARIABLE} is {text!r}; give a port, 1 to 65535")
    return int(text)


def page_url(profile: str, page: str) -> str:
    """Return where `serve_pages` shows var/PROFILE/reports/PAGE.html."""
    return f"http://127.0.0.1:{pages_port()}/{check_name(profile)}/{check_name(page)}.html"


def find_page(var: Path, address: str) -> Path | None:
    """Return the file that an address of the form /PROFILE/PAGE.html means, or None where there is none."""
    profile, _, page = unquote(urlsplit(address).path).lstrip("/").partition("/")
    try:
        path = var / check_name(profile) / "reports" / f"{check_name(page.removesuffix('.html'))}.html"
    except ConfigError:
        return None
    return path if path.is_file() else None


def list_pages(var: Path) -> list[str]:
    """Return the addresses of the profiles that have pages."""
    return [f"/{path.parent.parent.name}/index.html" for path in sorted(var.glob("*/reports/index.html"))]


@contextmanager
def serve_pages(var: Path) -> Iterator[str]:
    """Serve the pages on 127.0.0.1 while the context lasts; yields the address.

    Raises:
        ConfigError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = find_page(var, self.path)
            links = "".join(f'<li><a href="{a}">{a}</a></li>' for a in list_pages(var))
            is_root = self.path == "/"
            content = path.read_bytes() if path else f"<!doctype html><title>puzzle_dag</title><ul>{links}</ul>".encode()
            self.send_response(HTTPStatus.OK if path or is_root else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Security-Policy", "default-src 'none'; img-src data:; style-src 'unsafe-inline'")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet: Dagster writes to the same terminal."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", pages_port()), Handler)
    except OSError as error:
        raise ConfigError(f"port {pages_port()} for the HTML pages: {error.strerror}; set ${PORT_VARIABLE} to a free one") from error
    thread = threading.Thread(target=server.serve_forever, name="pages", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{pages_port()}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
