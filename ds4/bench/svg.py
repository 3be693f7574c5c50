"""Plots as SVG, drawn by hand: axes with units, and colours that a stylesheet may change.

Series are told apart by colour and by the shape of their marks, so that neither eyes that see few
colours nor a printer loses any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 20, 16, 52
SERIES = 8  # classes s0 to s7 of the stylesheet

Scale = Literal["linear", "log2"]


@dataclass
class Series:
    """Points (x, y), with a label beside a mark where there is one."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    labels: Sequence[str] = ()
    marks: bool = True


@dataclass
class Axis:
    """From `low` to `high`; a title has its unit."""

    title: str
    low: float = 0.0
    high: float = 1.0
    scale: Scale = "linear"

    @classmethod
    def over(cls, title: str, values: Sequence[float], scale: Scale = "linear") -> "Axis":
        """One that holds all values; a linear one starts at 0."""
        if scale == "log2":
            low, high = min(values, default=1.0), max(values, default=2.0)
            return cls(
                title, 2 ** math.floor(math.log2(low)), 2 ** math.ceil(math.log2(high)), scale
            )
        return cls(title, 0.0, max([*values, 1e-9]) * 1.08, scale)

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high = self.low, self.high
        if self.scale == "log2":
            low, high, value = math.log2(low), math.log2(high), math.log2(value)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        if self.scale == "log2":
            first, last = round(math.log2(self.low)), round(math.log2(self.high))
            return [2.0**i for i in range(first, last + 1)]
        step = nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """The next step of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * (1 - 1e-9))


def tick_text(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{round(value, 6):,.10g}"


@dataclass
class Chart:
    """Lines or points over two axes. `bands` are (from, to, class) behind them."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    bands: Sequence[tuple[float, float, str]] = field(default_factory=list)

    def svg(self) -> str:
        parts = [_open(self.title, HEIGHT), *self._bands(), *self._axes()]
        for one in self.series:
            parts += self._draw(one)
        return "\n".join([*parts, "</svg>"])

    def _at(self, x: float, y: float) -> tuple[float, float]:
        across, up = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * self.x.at(x), HEIGHT - _BOTTOM - up * self.y.at(y)

    def _bands(self) -> list[str]:
        parts = []
        for start, end, kind in self.bands:
            left, right = self._at(start, 0)[0], self._at(end, 0)[0]
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{_TOP}" '
                f'width="{max(right - left, 1):.1f}" height="{HEIGHT - _TOP - _BOTTOM}"/>'
            )
        return parts

    def _axes(self) -> list[str]:
        base = HEIGHT - _BOTTOM
        parts = []
        for value in self.y.ticks():
            y = self._at(self.x.low, value)[1]
            parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "grid"))
            parts.append(_text(_LEFT - 8, y + 4, tick_text(value), "end"))
        for value in self.x.ticks():
            x = self._at(value, self.y.low)[0]
            parts.append(_line(x, base, x, base + 5, "axis"))
            parts.append(_text(x, base + 20, tick_text(value), "middle"))
        parts.append(_line(_LEFT, base, WIDTH - _RIGHT, base, "axis"))
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 10, self.x.title, "middle", "title"))
        upright = f'transform="rotate(-90 16 {(_TOP + base) / 2:.0f})"'
        parts.append(_text(16, (_TOP + base) / 2, self.y.title, "middle", "title", upright))
        return parts

    def _draw(self, one: Series) -> list[str]:
        places = [self._at(x, y) for x, y in one.points]
        kind = f"s{one.style % SERIES}"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts = [f'<g class="{kind}"><title>{escape(one.name)}</title>']
        if len(places) > 1:
            parts.append(f'<polyline class="line" points="{line}"/>')
        if one.marks:
            parts += [mark(x, y, one.style) for x, y in places]
        for (x, y), label in zip(places, one.labels, strict=False):
            side, place = ("end", x - 9) if x > WIDTH - 90 else ("start", x + 9)
            parts.append(_text(place, y - 7, label, side, "label"))
        return [*parts, "</g>"]


@dataclass
class Bars:
    """Horizontal bars, each of parts that add up; a part unknown is left out and said."""

    title: str
    axis: Axis
    rows: Sequence[tuple[str, Sequence[float | None], str]]  # name, parts, what to write behind

    def svg(self) -> str:
        height = 62 + 46 * len(self.rows)
        parts, base = [_open(self.title, height)], height - 46
        across = WIDTH - _LEFT - 130
        for value in self.axis.ticks():
            x = _LEFT + across * self.axis.at(value)
            parts.append(_line(x, 8, x, base, "grid"))
            parts.append(_text(x, base + 18, tick_text(value), "middle"))
        for i, (name, values, said) in enumerate(self.rows):
            y, x = 10 + 46 * i, float(_LEFT)
            parts.append(_text(_LEFT, y + 11, name, "start", "label"))
            for part, share in enumerate(values):
                width = across * self.axis.at(share or 0.0)
                parts.append(
                    f'<rect class="p{part}" x="{x:.1f}" y="{y + 16}" '
                    f'width="{width:.1f}" height="18"/>'
                )
                x += width
            parts.append(_text(x + 8, y + 30, said, "start", "label"))
        parts.append(_text(_LEFT + across / 2, height - 8, self.axis.title, "middle", "title"))
        return "\n".join([*parts, "</svg>"])


def mark(x: float, y: float, style: int) -> str:
    """A shape of its own for each style."""
    shape = style % 4
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    points = [(0, -6), (5.5, 4.5), (-5.5, 4.5)] if shape == 2 else [(0, -6.5), (6.5, 0), (0, 6.5)]
    points = points if shape == 2 else [*points, (-6.5, 0)]
    return f'<polygon class="mark" points="{_points(x, y, points)}"/>'


def _points(x: float, y: float, offsets: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in offsets)


def _open(title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="{escape(title)}">'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick", more: str = "") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>'
        f"{escape(text)}</text>"
    )
