"""A Histogram as SVG: bars, two counts on the y axis, round numbers on the x axis; colours come from the page."""

from __future__ import annotations

from html import escape

import numpy as np

from rung.data.report.result import Histogram

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 12, 44  # margins
STYLE = """
svg { width: 100%; height: auto; display: block; }
svg .bars { fill: var(--bar); }
svg .axis { stroke: var(--quiet); fill: none; stroke-width: 1; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
svg .label { fill: var(--quiet); }
"""


def histogram_svg(histogram: Histogram, x_label: str, y_label: str, *, log: bool = False) -> str:
    """Return an SVG element; with `log` the edges, all positive, are drawn in equal ratios."""
    edges = np.log10(histogram.edges) if log else np.array(histogram.edges)
    most = max(*histogram.counts, 1)
    x = _LEFT + (edges - edges[0]) / (edges[-1] - edges[0]) * (_WIDTH - _LEFT - _RIGHT)
    base = _HEIGHT - _BOTTOM
    tops = base - np.array(histogram.counts) / most * (base - _TOP)
    bars = "".join(
        f"M{x[i]:.1f} {base}V{top:.1f}H{x[i + 1]:.1f}V{base}z" for i, top in enumerate(tops) if histogram.counts[i]
    )
    parts = [
        f'<path class="bars" d="{bars}"/>',
        f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}"/>',
        *(_x_tick(*tick, base) for tick in _x_ticks(edges, x, log)),
        *_y_tick(_TOP, most),
        *_y_tick(base, 0),
        _text(f"{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}", _HEIGHT - 8, x_label, "middle", "label"),
        _text(-(_TOP + base) // 2, 14, y_label, "middle", "label", ' transform="rotate(-90)"'),
    ]
    title = f"<title>{escape(y_label)} by {escape(x_label)}</title>"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{title}{"".join(parts)}</svg>'


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten within low..high, about so many."""
    raw = (high - low) / about
    power = 10.0 ** np.floor(np.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(step - raw))
    return [step * i for i in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]


def _x_ticks(edges: np.ndarray, x: np.ndarray, log: bool) -> list[tuple[float, str]]:
    values = round_ticks(edges[0], edges[-1])
    if log:
        values = [value for value in values if abs(value - round(value)) < 1e-9]
    return [(float(np.interp(v, edges, x)), f"{10**v:g}" if log else f"{v:.6g}") for v in values]


def _x_tick(x: float, text: str, base: int) -> str:
    return f'<path class="axis" d="M{x:.1f} {base}v4"/>' + _text(f"{x:.1f}", base + 16, text, "middle")


def _y_tick(y: int, count: int) -> list[str]:
    return [f'<path class="axis" d="M{_LEFT} {y}h-4"/>', _text(_LEFT - 7, y + 4, _short(count), "end")]


def _short(count: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= limit:
            return f"{count / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return str(count)


def _text(x: object, y: object, text: str, anchor: str, kind: str = "", more: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{named}{more}>{escape(text)}</text>'
