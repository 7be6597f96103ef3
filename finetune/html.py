"""Pieces of a page that needs nothing else: no network, no script, light and dark mode, fit for printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#5b636d;--line:#d9dde2;--page:#fff;--box:#f5f7f9;--mark:#2f7dc4;
--warn:#fff3d6;--warnline:#d99a00}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#9aa4af;--line:#363c44;--page:#14171a;
--box:#1d2125;--warn:#3a2e10}}
body{font:1rem/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:66rem;margin:2rem auto;
padding:0 1.25rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{margin:.4rem 0}.soft,.unit,figcaption,caption{color:var(--soft)}
.unit,figcaption,caption{font-size:.85rem;font-weight:normal}
table{border-collapse:collapse;margin:.5rem 0;font-variant-numeric:tabular-nums;font-size:.92rem}
.wide{overflow-x:auto}th,td{padding:.25rem .8rem .25rem 0;text-align:right;vertical-align:bottom}
th:first-child,td:first-child,.text{text-align:left}td{max-width:24rem;overflow-wrap:break-word}
thead th{border-bottom:1px solid var(--ink)}
tbody td{border-bottom:1px solid var(--line)}tbody tr:last-child td{border-bottom:1px solid var(--ink)}
caption{text-align:left;caption-side:bottom;padding-top:.3rem}
.bar{display:block;width:4.5rem;text-align:left}.bar i{display:block;height:.4rem;margin:.12rem 0;background:#a3a3a3}
.bar i.after{background:var(--mark)}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.tile{background:var(--box);padding:.7rem 1rem;min-width:9rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25}
.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:.5rem 0;flex:1 1 26rem;max-width:32rem}
figure:has(.double){max-width:66rem;flex-basis:100%}svg{width:100%;height:auto;fill:currentColor}
svg text{font-family:inherit!important}
.finding{background:var(--warn);border-left:4px solid var(--warnline);padding:.4rem .8rem;margin:.4rem 0}
pre{background:var(--box);padding:.8rem 1rem;overflow-x:auto;font-size:.88rem}code{overflow-wrap:anywhere}
.columns{display:flex;flex-wrap:wrap;gap:0 1rem}
@media print{:root{font-size:10px}body{margin:0;max-width:none}figure,table,.tiles,pre{break-inside:avoid}
h2,h3{break-after:avoid}
figure{max-width:48%}}
"""


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""


def document(title: str, body: Sequence[str]) -> str:
    """Return a page; the lines of the body are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    start = f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>'
    return "\n".join([start, f"<h1>{escape(title)}</h1>", *body, "</body></html>", ""])


def section(title: str, body: Sequence[str]) -> list[str]:
    """Return the body below its title; nothing for an empty one."""
    return [f"<h2>{escape(title)}</h2>", *body] if body else []


def figures(drawings: Mapping[str, str], captions: Mapping[str, str]) -> list[str]:
    """Return figures, `<svg>` elements by name, with their captions."""
    drawn = [
        f"<figure>{svg}<figcaption>{escape(captions[name])}</figcaption></figure>" for name, svg in drawings.items()
    ]
    return [f'<div class="plots">{"".join(drawn)}</div>'] if drawn else []


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """Return a table; a head is a name or (name, unit), and a column of text begins its name with `<`."""
    names = [one if isinstance(one, tuple) else (one, "") for one in head]
    left = [' class="text"' if name.startswith("<") else "" for name, _ in names]
    cells = [
        f'<th{side} scope="col">{escape(name.removeprefix("<"))}<br><span class="unit">{escape(unit)}</span></th>'
        for (name, unit), side in zip(names, left, strict=True)
    ]
    lines = ["".join(f"<td{side}>{_cell(one)}</td>" for one, side in zip(row, left, strict=True)) for row in rows]
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f'<div class="wide"><table>{below}<thead><tr>{"".join(cells)}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    return escape(number(value) if value is None or isinstance(value, float) else str(value))


def number(value: float | None) -> str:
    """Return an error as the tables show it; a dash for None."""
    return "-" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def change(before: float | None, after: float | None) -> str:
    """Return the relative change in per cent."""
    return "-" if not before or after is None else f"{100 * (after / before - 1):+.0f} %"
