"""Colours of the plots and of the page, once for a light and once for a dark background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """A background with what is drawn on it. `full` and `moba` mean the same thing in every picture."""

    name: str
    paper: str  # of the figure: equal to the page's cards
    ink: str
    faint: str  # axes, secondary text
    grid: str
    bar: str  # the least important bar of a chart
    full: str
    moba: str
    accent: str
    bands: tuple[str, str]  # alternating stage backgrounds
    cells: str  # matplotlib colour map of heat maps
    ramp: tuple[float, float]  # part of a dark-to-light colour map that stands out from the background

    def of(self, plan: str) -> str:
        """Colour of a plan: `full`, `moba`, or the accent for anything else."""
        return {"full": self.full, "moba": self.moba}.get(plan, self.accent)

    def series(self, colours: str, number: int, count: int) -> Any:
        """Colour `number` of `count` along the matplotlib colour map `colours`."""
        from matplotlib import colormaps

        low, high = self.ramp
        return colormaps[colours](low + (high - low) * number / max(count - 1, 1))

    def settings(self) -> dict[str, Any]:
        """For `matplotlib.rc_context`."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.faint,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "font.size": 9.5,
            "font.family": "DejaVu Sans",
            "legend.frameon": True,
            "legend.facecolor": self.paper,
            "legend.edgecolor": "none",
            "legend.framealpha": 0.85,
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "text.parse_math": False,  # names are text, whatever they spell
        }


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1b2330",
    faint="#667085",
    grid="#e8ebf0",
    bar="#c5ccd8",
    full="#2563c9",
    moba="#d9601a",
    accent="#5b6472",
    bands=("#f4f6fa", "#ffffff"),
    cells="YlGnBu",
    ramp=(0.1, 0.72),
)
DARK = Theme(
    name="dark",
    paper="#171c26",
    ink="#e6eaf2",
    faint="#98a2b3",
    grid="#2a3140",
    bar="#475064",
    full="#6ea8ff",
    moba="#ff9a56",
    accent="#b4bcc9",
    bands=("#1e2532", "#171c26"),
    cells="viridis",
    ramp=(0.42, 0.95),
)
