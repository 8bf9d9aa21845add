"""The pieces of a static HTML page: everything that enters as text is escaped here and nowhere else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from eval.style import DARK, LIGHT

STYLE = f"""
:root {{ color-scheme: light dark; --page: #f3f5f9; --card: {LIGHT.paper}; --ink: {LIGHT.ink};
  --faint: {LIGHT.faint}; --line: #dfe4ec; --full: {LIGHT.full}; --moba: {LIGHT.moba}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #0f131b; --card: {DARK.paper}; --ink: {DARK.ink};
  --faint: {DARK.faint}; --line: #2b3342; --full: {DARK.full}; --moba: {DARK.moba}; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1060px; margin: 0 auto; padding: 28px 18px 60px; }}
header h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }}
header p {{ margin: 0 0 18px; color: var(--faint); }}
h2 {{ font-size: 1.15rem; margin: 0 0 6px; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 0 0 18px; }}
section > p {{ max-width: 74ch; margin: 6px 0 12px; }}
.note {{ color: var(--faint); font-size: 0.88rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 0 0 18px; }}
.tile {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }}
.tile b {{ display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }}
.tile span {{ color: var(--faint); font-size: 0.84rem; display: block; line-height: 1.35; }}
.scroll {{ overflow-x: auto; }}
.scroll + .scroll {{ margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
thead th {{ color: var(--faint); font-weight: 600; font-size: 0.84rem; }}
tbody tr:last-child td {{ border-bottom: 0; }}
td:nth-child(2):last-child {{ white-space: normal; overflow-wrap: anywhere; }}
figure {{ margin: 14px 0 4px; }}
figure img {{ width: 100%; height: auto; display: block; border-radius: 6px; }}
details {{ margin-top: 12px; }}
details summary {{ cursor: pointer; color: var(--faint); }}
pre {{ overflow-x: auto; font-size: 0.82rem; line-height: 1.45; }}
@media (max-width: 560px) {{ main {{ padding: 18px 10px 40px; }} section {{ padding: 14px 12px; }}
  th, td {{ padding: 5px 6px; }} header h1 {{ font-size: 1.35rem; }}
  figure {{ overflow-x: auto; }} figure img {{ width: 600px; }} }}
"""


@dataclass(frozen=True)
class Html:
    """Markup that is safe as it is. Made only by the functions of this file."""

    markup: str


def text(value: object) -> str:
    return value.markup if isinstance(value, Html) else escape(str(value), quote=True)


def join(parts: Iterable[Html | None]) -> Html:
    return Html("\n".join(part.markup for part in parts if part is not None))


def paragraph(content: object, note: bool = False) -> Html:
    return Html(f"<p{' class=' + chr(34) + 'note' + chr(34) if note else ''}>{text(content)}</p>")


def section(title: object, *content: Html | None) -> Html:
    return Html(f"<section>\n<h2>{text(title)}</h2>\n{join(content).markup}\n</section>")


def tiles(items: Sequence[tuple[object, object]]) -> Html:
    """Large numbers, each with a caption below: (number, caption)."""
    shown = "".join(
        f'<div class="tile"><b>{text(n)}</b><span>{text(caption)}</span></div>' for n, caption in items
    )
    return Html(f'<div class="tiles">{shown}</div>')


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls sideways where it does not fit. The first column is text, the others numbers."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>')


def picture(light: bytes, dark: bytes, description: object, caption: object) -> Html:
    """Two PNGs inside the page itself, of which the browser shows the one that suits its colour scheme."""
    return Html(
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{text(description)}"></picture>'
        f'</figure><p class="note">{text(caption)}</p>'
    )


def folded(title: object, content: Html) -> Html:
    """Content behind a line to click."""
    return Html(f"<details><summary>{text(title)}</summary>{content.markup}</details>")


def preformatted(content: str) -> Html:
    return Html(f"<pre>{escape(content)}</pre>")


def page(title: object, subtitle: object, *content: Html | None) -> str:
    """The whole document. It loads nothing: no script, no font, no image from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>\n{join(content).markup}\n"
        "</main></body></html>\n"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
