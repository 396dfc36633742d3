"""Histograms of what was measured for each sample."""

from collections.abc import Mapping, Sequence
from pathlib import Path

BINS = 40
WIDE = 20  # largest over median from which values are drawn on a logarithmic axis

_COLOURS = ("#1f5fa8", "#b3261e", "#2a7f62", "#6a4c93")


def draw_histograms(panels: Mapping[str, Mapping[str, Sequence[float]]], what: str, path: Path) -> None:
    """Write a PNG: one panel under another, in each the named groups over one another, all on one axis.

    Args:
        panels: title -> name of a group -> its values; a panel without a title is "".
        what: the values' name and unit, below the last panel.
        path: of the file; replaced whole.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = np.concatenate([np.asarray(values) for groups in panels.values() for values in groups.values()])
    is_wide = bool(every.min() > 0) and every.max() > WIDE * np.median(every)
    low, high = (every.min(), every.max()) if is_wide or every.min() < 0 else (0.0, every.max())
    high = high if high > low else low + 1
    edges = np.geomspace(low, high, BINS + 1) if is_wide else np.linspace(low, high, BINS + 1)
    figure = Figure(figsize=(7, 0.8 + 2.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, groups) in zip(rows, panels.items(), strict=True):
        for colour, (name, values) in zip(_COLOURS, groups.items(), strict=False):
            share = np.full(len(values), 100 / max(1, len(values)))
            label = f"{name} ({len(values)}, median {np.median(values):.3g})"
            axes.hist(values, edges, weights=share, color=colour, alpha=0.5, label=label)
            axes.axvline(np.median(values), color=colour, linewidth=1.2)
        if is_wide:
            axes.set_xscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("% of samples")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    rows[-1].set_xlabel(what)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=150)
    draft.replace(path)
