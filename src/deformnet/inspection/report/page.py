"""Pictures, tables and captions as one page that lies beside the pictures."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deformnet._files import replacing

STYLE = """\
  body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; color: #1b1b1b;
         background: #fff; font: 1rem/1.55 system-ui, sans-serif; }
  h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
  h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
  p { max-width: 46rem; }
  table { border-collapse: collapse; margin: 1.25rem 0 .75rem;
          font-variant-numeric: tabular-nums; }
  th, td { padding: .35rem 1.1rem; text-align: right; border-bottom: 1px solid #ddd; }
  th { font-weight: 600; border-bottom: 2px solid #1b1b1b; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  img { display: block; width: 100%; height: auto; }
  .note { color: #555; font-size: .9rem; }
  figure { margin: 1rem 0; }
  figcaption { color: #555; font-size: .9rem; max-width: 46rem; }
  .wide { overflow-x: auto; }
  .wide table { font-size: .9rem; }
  .wide th, .wide td { padding: .2rem .7rem; }
"""
"""Of all pages."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether it is to be opened by a click."""


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the page, as name.png and name.svg.

    Attributes:
        caption: what is to be seen.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page; its texts are plain."""

    title: str
    text: str
    content: Sequence[Table | Picture]


def write_page(path: Path, title: str, facts: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes a page.

    Args:
        facts: paragraphs at its beginning.
        sections: all else.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(fact)}</p>" for fact in facts]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{html.escape(section.text)}</p>")
        body += [
            _table(item) if isinstance(item, Table) else _picture(item) for item in section.content
        ]
    page = _PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(body))
    with replacing(path) as file:
        file.write(page.encode())


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    text = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    text = f'<div class="wide">{text}</div>'
    if table.folded:
        return f"<details><summary>{len(table.rows)} layers</summary>\n{text}\n</details>"
    return text


def _picture(picture: Picture) -> str:
    name, caption = html.escape(picture.name), html.escape(picture.caption)
    return (
        f'<figure><a href="{name}.svg"><img src="{name}.png" alt="{caption}"></a>\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
