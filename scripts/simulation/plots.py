"""Plots of reports, as SVG files that are readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scripts.simulation.policies import BY_NAME
from scripts.simulation.tables import report_name, swept

INK = "#808891"
"""Text and axes: readable on white and on black."""
COLOURS = ("#2f81f7", "#e3652b", "#2da44e", "#a371f7", "#bf8700", "#1b9e9e")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and searchable
    "svg.hashsalt": "tallystick",  # the same input gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "axes.titlesize": 9,
}
Report = Mapping[str, Any]


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Writes the plots that a report has data for. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = _policy_plots(report) if "sweep" not in report else _sweep_plots(report)
    return [_write(folder / f"{name}.svg", draw, panels) for name, (panels, draw) in plots.items()]


def _write(path: Path, draw: Callable[[list[Axes]], None], panels: int) -> Path:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * panels, 2.8), layout="constrained")
        FigureCanvasSVG(figure)
        draw([figure.add_subplot(1, panels, panel + 1) for panel in range(panels)])
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    return path


Plots = dict[str, tuple[int, Callable[[list[Axes]], None]]]


def _policy_plots(report: Report) -> Plots:
    runs: Mapping[str, Report] = report["runs"]

    def waits(axes: list[Axes]) -> None:
        for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
            percents = [percent for percent, _ in run["wait_percentiles"]]
            seconds = [max(wait, 0.1) for _, wait in run["wait_percentiles"]]
            axes[0].plot(seconds, percents, color=colour, label=BY_NAME[name].title)
            axes[1].plot(run["wait_p95_by_slice"], color=colour)
        axes[0].set(xscale="log", xlabel="wait for a slot (s)", ylabel="% of requests that wait no longer", ylim=(70, 100.5))
        axes[0].legend(fontsize=8)
        axes[1].set(xlabel="hour of the day", ylabel="95th percentile of the wait (s)")

    def providers(axes: list[Axes]) -> None:
        for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
            incomes = [income for _, income in run["income_percentiles"]]
            axes[0].plot([percent for percent, _ in run["income_percentiles"]], incomes, color=colour, label=BY_NAME[name].title)
            axes[1].plot(run["utilisation_by_slice"], color=colour)
        axes[0].set(xlabel="percentile of providers", ylabel="income of a slot")
        axes[0].legend(fontsize=8)
        axes[1].set(xlabel="hour of the day", ylabel="share of slots in use", ylim=(0, 1))

    return {f"{report_name(report)}-waits": (2, waits), f"{report_name(report)}-providers": (2, providers)}


_SWEEP_PANELS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "wait": ("longest wait (s)", (("answered_share", "answered"), ("wait_s_p99", "99th percentile of the wait (s)"))),
    "shortlist_size": (
        "size of a shortlist",
        (("wait_s_p95", "95th percentile of the wait (s)"), ("answered_share", "answered")),
    ),
}


def _sweep_plots(report: Report) -> Plots:
    def draw_one(constant: str) -> Callable[[list[Axes]], None]:
        label, keys = _SWEEP_PANELS[constant]

        def draw(axes: list[Axes]) -> None:
            runs = list(swept(report, constant))
            for panel, colour, (key, title) in zip(axes, COLOURS, keys, strict=False):
                panel.plot([value for value, _ in runs], [figures[key] for _, figures in runs], "o-", color=colour)
                panel.set(xlabel=label, ylabel=title)

        return draw

    return {
        f"sweep-{constant.replace('_', '-')}": (2, draw_one(constant))
        for constant in _SWEEP_PANELS
        if any(swept(report, constant))
    }
