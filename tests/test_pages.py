"""The HTML pages beside the UI: only pages, only by plain names, only on the loopback address."""

import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from puzzle_dag.config import ConfigError
from resources.pages import find_page, page_url, serve_pages


@pytest.fixture
def var(tmp_path: Path) -> Path:
    for name in ("index", "fast"):
        (tmp_path / "var" / "tiny" / "reports").mkdir(parents=True, exist_ok=True)
        (tmp_path / "var" / "tiny" / "reports" / f"{name}.html").write_text(f"<h1>{name}</h1>")
    (tmp_path / "var" / "tiny" / "reports" / "stamp").write_text("secret")
    (tmp_path / "secret.html").write_text("secret")
    return tmp_path / "var"


@pytest.mark.parametrize(
    "address",
    [
        "/tiny/../../secret.html",
        "/tiny/%2e%2e/secret.html",
        "/../secret.html",
        "/tiny/stamp",
        "/tiny/none.html",
        "/tiny/",
        "//",
        "/tiny/a/b.html",
    ],
)
def test_nothing_but_pages_is_found(var: Path, address: str) -> None:
    assert find_page(var, address) is None


def test_pages_are_served_where_their_links_say(var: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PUZZLE_DAG_PAGES_PORT", str(free.getsockname()[1]))
    with serve_pages(var) as address:
        with urllib.request.urlopen(page_url("tiny", "fast")) as answer:
            assert answer.read() == b"<h1>fast</h1>" and "default-src 'none'" in answer.headers["Content-Security-Policy"]
        with urllib.request.urlopen(address) as answer:
            assert b'href="/tiny/index.html"' in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(page_url("tiny", "none"))
        with pytest.raises(ConfigError, match=r"set \$PUZZLE_DAG_PAGES_PORT"), serve_pages(var):
            pass


def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_DAG_PAGES_PORT", "a")
    with pytest.raises(ConfigError, match="give a port"):
        page_url("tiny", "index")
    monkeypatch.delenv("PUZZLE_DAG_PAGES_PORT")
    with pytest.raises(ConfigError, match="lower-case letters"):
        page_url("tiny", "../x")
