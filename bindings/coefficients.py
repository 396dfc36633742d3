"""A picture of Panacea's safety coefficients."""

from collections.abc import Mapping
from pathlib import Path


def draw_coefficients(coefficients: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Write a PNG: one line for each named edit, its coefficients over the decoder blocks.

    Args:
        coefficients: name -> what `hftcore.defenses.panacea_perturb.safety_coefficients` found.
        path: of the file; replaced whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in coefficients.items():
        axes.plot(list(values), list(values.values()), "o-", label=name)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("Σ |ε|")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=150)
    draft.replace(path)
