"""Curves as SVG that stands inside an HTML page and takes its colours from the page's CSS.

matplotlib draws with placeholder colours, which become CSS variables: `--series-0`, `--series-1`
and so on, `--muted` for what is written and `--rule` for the grid. So a curve is right on a light
and on a dark page. Legends and titles are the page's; a curve has numbers and lines only.
"""

from __future__ import annotations

import io
import logging
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 8  # colours of the page
INCHES = 3.5, 2.1  # the page shows 72 units to the inch, a little enlarged
PLACEHOLDERS = {"#0102f0": "var(--muted)", "#0102f1": "var(--rule)"} | {
    f"#0102{i:02x}": f"var(--series-{i})" for i in range(SERIES)
}
MUTED, RULE, *COLOURS = PLACEHOLDERS


class Line(NamedTuple):
    """A line of a curve.

    Attributes:
      label: for the legend.
      x: float[n], iterations.
      y: float[n]; NaN where there is no number.
      colour: which of the page's SERIES colours.
      style: a key of STYLES.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: str = "solid"


STYLES: Mapping[str, Mapping[str, object]] = {
    "solid": {"linewidth": 1.4},
    "dashed": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
    "points": {"linewidth": 0.9, "linestyle": (0, (1, 2)), "marker": "o", "markersize": 3.6},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 2.6, "alpha": 0.45},
}


def lines(alt: str, drawn: Sequence[Line], top: float | None = None) -> str:
    """An SVG of lines over iterations; a style of "dots" makes it a scatter.

    Args:
      alt: what it shows, for those who do not see it.
      drawn: the lines; NaN leaves a gap.
      top: where the picture ends; None: above the highest.
    """

    def draw(axes: Axes) -> None:
        for line in reversed(drawn):  # the first one lies above
            single = line.style == "solid" and len(line.x) == 1
            style = STYLES["points" if single else line.style]
            colour = COLOURS[line.colour % SERIES]
            axes.plot(line.x, line.y, color=colour, markeredgewidth=0, **style)  # type: ignore
        if top is not None:
            axes.set_ylim(0, top)

    return _svg(alt, draw)


def stack(alt: str, x: Sequence[float], parts: Sequence[Line], top: float) -> str:
    """An SVG of parts, one on the other, cut off at the height `top`.

    Args:
      alt: what it shows, for those who do not see it.
      x: float[n], iterations.
      parts: of float[n], the lowest first.
      top: where the picture ends.
    """

    def draw(axes: Axes) -> None:
        below = np.zeros(len(x))
        for part in parts:
            above = below + np.nan_to_num(np.asarray(part.y, float))
            colour = COLOURS[part.colour % SERIES]
            axes.fill_between(x, below, above, step="mid", color=colour, linewidth=0, alpha=0.9)
            below = above
        axes.set_ylim(0, top)

    return _svg(alt, draw)


def _svg(alt: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` puts into axes, as an <svg> for a page."""
    for name in ("matplotlib", "matplotlib.font_manager"):  # it tells of its caches
        logging.getLogger(name).setLevel(logging.ERROR)
    import matplotlib  # takes most of a second, and is needed once, at the end of a run
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kvpo",  # ids that do not differ from one drawing to the next
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 8,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 5),
    }
    with matplotlib.rc_context(style):
        figure = Figure(INCHES)
        figure.subplots_adjust(left=0.13, right=0.98, bottom=0.12, top=0.93)  # the same for all
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.set_facecolor("none")
        axes.grid(True, axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=MUTED)
        axes.margins(x=0.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), alt)


def _for_page(svg: str, alt: str) -> str:
    """matplotlib's file as an element: no header, own ids, colours by name."""
    body = svg[svg.index("<svg") :].partition(">")[2]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?:\w+_\d+|matplotlib\.\w+)"', "", body)  # names of its groups
    own = f"c{zlib.crc32(f'{alt}{body}'.encode()):08x}"  # keeps the ids of a page's curves apart
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace("<g/>", "")
    body = re.sub("#0102[0-9a-f]{2}", lambda found: PLACEHOLDERS[found.group()], body)
    body = re.sub(r"\s*\n\s*", " ", body)
    width, height = (72 * inches for inches in INCHES)
    opening = f'<svg class="curve" viewBox="0 0 {width:g} {height:g}" role="img"'
    return f'{opening} aria-label="{escape(alt)}">{body}'
