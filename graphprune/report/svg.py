"""A matplotlib figure as SVG text: the same bytes for the same figure, legible on light and on dark."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, LINE, FILL, PAPER = "#1f2328", "#646c75", "#c4cad1", "#f1f3f5", "#ffffff"
_DARK = {INK: "#e6edf3", MUTED: "#9aa3ad", LINE: "#4a525c", FILL: "#232a32", PAPER: "#12161b"}

# Middle tones that keep their contrast on white and on near black; neighbours also differ in lightness.
_PALETTE = ("#2f6fbd", "#c2701c", "#2f8f66", "#8a5fb8", "#b8474b", "#1f8f99", "#857820", "#b05c94")

_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


@contextmanager
def drawing(name: str, *, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure under the style of the report's pictures.

    Args:
        name: Seeds the identifiers in the SVG, so that equal figures have equal bytes.
        width: In inches.
        height: In inches.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        yield Figure(figsize=(width, height))


def to_svg(figure: Figure, *, name: str, description: str) -> str:
    """Return `figure` as a standalone ``<svg>`` element; call it inside `drawing`.

    Args:
        figure: A figure from `drawing`.
        name: Prefix of all identifiers, so that several pictures can stand in one page.
        description: What the picture shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        # Text stays text: the reader's own fonts draw what the one for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(">*{", ">.graphprune-picture *{", 1)
    for mark in ('id="', 'xlink:href="#', "url(#"):
        text = text.replace(mark, f"{mark}{name}-")
    text = text.replace(
        "<svg", f'<svg class="graphprune-picture" role="img" aria-labelledby="{name}-title"', 1
    )
    start = text.index(">") + 1
    title = (
        f'\n <title id="{name}-title">{escape(legible(description))}</title>\n <style>{_dark_style()}</style>'
    )
    return text[:start] + title + text[start:]


def colours(kinds: list[str]) -> dict[str, str]:
    """Return a colour for each kind, in the order of their first appearance."""
    distinct = list(dict.fromkeys(kinds))
    return {kind: _PALETTE[index % len(_PALETTE)] for index, kind in enumerate(distinct)}


def legible(text: str, most: int | None = None) -> str:
    """Return `text` without characters that XML forbids or nobody sees, its middle left out if too long."""
    clean = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    if most is None or len(clean) <= most:
        return clean
    head = (most - 1) // 2
    return f"{clean[:head]}…{clean[len(clean) - (most - 1 - head) :]}"


def _dark_style() -> str:
    """Return the rules that repaint the neutral colours for readers who prefer dark pages."""
    rules = " ".join(
        f'.graphprune-picture [style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{ {rules} }}"
