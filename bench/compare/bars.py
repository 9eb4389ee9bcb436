"""Horizontal bars as SVG, readable on a dark page and on a light one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

_WIDTH: Final = 760
_LABELS: Final = 250
_BARS: Final = 330
_ROW: Final = 26
_TOP: Final = 44
# each has a contrast of 3 or more both on white and on #0d1117
_TEXT: Final = "#767f89"
_COLOURS: Final = {"ours": "#1f7fd6", "other": "#8a8f98", "second": "#c9761a"}
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Part(NamedTuple):
    """A piece of a bar; `colour` is one of ours, other, second."""

    value: float
    colour: str


class Bar(NamedTuple):
    """A line: what it is, its pieces from left to right, what is written behind them."""

    label: str
    parts: tuple[Part, ...]
    text: str

    @property
    def total(self) -> float:
        """Its length."""
        return sum(part.value for part in self.parts)


def svg(title: str, bars: Sequence[Bar], legend: Sequence[tuple[str, str]] = ()) -> str:
    """The chart; `legend`: colour and what it stands for. The longest bar fills the width."""
    scale = _BARS / max(*(bar.total for bar in bars), 1e-9)
    height = _TOP + _ROW * len(bars) + (30 if legend else 10)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="{_FONT}" font-size="13" fill="{_TEXT}">',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="22" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    for row, bar in enumerate(bars):
        y = _TOP + row * _ROW
        lines.append(f'<text x="{_LABELS}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>')
        x = float(_LABELS + 8)
        for part in bar.parts:
            # what is there is seen, if only as a line
            width = max(1.0, part.value * scale)
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" rx="2" fill="{_COLOURS[part.colour]}"/>'
            )
            x += width
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 14}">{escape(bar.text)}</text>')
    x = float(_LABELS + 8)
    for colour, text in legend:
        y = _TOP + _ROW * len(bars) + 6
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="{_COLOURS[colour]}"/>')
        lines.append(f'<text x="{x + 18:.1f}" y="{y + 11}">{escape(text)}</text>')
        x += 36 + 7.5 * len(text)
    return "\n".join((*lines, "</svg>", ""))
