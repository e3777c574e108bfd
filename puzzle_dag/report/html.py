"""Self-contained HTML pages: inline style, pictures as `data:` images, no script, nothing fetched from anywhere."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de }
p.subtitle, figcaption, caption { color: #57606a }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
caption { text-align: left; font-size: .85rem } th, td { padding: .25rem .7rem; border-bottom: 1px solid #e6e9ec; text-align: left }
th { font-size: .85rem } figure { margin: 1rem 0 } img { max-width: 100%; height: auto } figcaption { font-size: .85rem }
nav a { margin-right: 1rem } footer { margin-top: 3rem; font-size: .8rem; color: #57606a }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and what it shows."""

    png: bytes
    """PNG bytes, as puzzle_dag/report/pictures.py makes them."""
    caption: str
    """What it shows, for the eye and for screen readers."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text and numbers."""

    header: Sequence[str]
    """Names of the columns, units included."""
    rows: Sequence[Sequence[object]]
    """Cells, turned into text as they are."""
    caption: str = ""
    """What it shows."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    """The heading."""
    paragraphs: Sequence[str] = ()
    """Plain text; HTML in it is escaped."""
    tables: Sequence[Table] = ()
    """Tables, after the text."""
    pictures: Sequence[Picture] = ()
    """Pictures, after the tables."""
    links: Sequence[tuple[str, str]] = ()
    """(text, relative address) of further pages, last."""


def data_image(png: bytes) -> str:
    """Return PNG bytes as a `data:` address, which HTML and Dagster's Markdown both show."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def markdown_image(png: bytes, caption: str) -> str:
    """Return a picture as Markdown that carries it along."""
    return f"![{caption.replace('[', '(').replace(']', ')')}]({data_image(png)})"


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = "") -> str:
    """Return a whole HTML page.

    Args:
        title: the page's heading and title.
        sections: what stands on it, in order.
        subtitle: one line under the heading.
        footer: one line at the end: commit, machine, time.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if subtitle:
        body.append(f'<p class="subtitle">{escape(subtitle)}</p>')
    body += [_section(s) for s in sections]
    if footer:
        body.append(f"<footer>{escape(footer)}</footer>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(p)}</p>" for p in section.paragraphs]
    parts += [_table(t) for t in section.tables]
    for picture in section.pictures:
        caption = escape(picture.caption)
        parts.append(f'<figure><img alt="{caption}" src="{data_image(picture.png)}"><figcaption>{caption}</figcaption></figure>')
    if section.links:
        parts.append("<nav>" + "".join(f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in section.links) + "</nav>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th>{escape(str(c))}</th>" for c in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in table.rows)
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
