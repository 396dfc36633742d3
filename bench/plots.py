"""Pictures of a result file: share of the ceiling, speed-up over each peer, memory, scaling."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftcore.bench.cases import in_order
from hftcore.bench.ceiling import share
from hftcore.bench.measure import OURS
from hftcore.bench.scaling import bend, curves, exponent
from hftcore.bench.timing import paired_ratio
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[dict[str, Any]]
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
TITLES = {
    "share": "Share of what the machine allows",
    "speedup": "Times faster than each peer",
    "memory": "Memory above the start",
    "scaling": "Cost against one size",
}


def draw(lines: Lines, folder: Path) -> list[tuple[str, Path]]:
    """Write the PNGs that the measurements suffice for.

    Args:
        lines: as `results.load` gives.
        folder: made if need be.

    Returns:
        (title, file) of each.

    Raises:
        HftcoreError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise HftcoreError("the plots need matplotlib: pip install 'hftcore[plots]'") from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    lines = in_order(lines)
    made = []
    for name, plot in (("share", _share), ("speedup", _speedup), ("memory", _memory), ("scaling", _scaling)):
        figure = plot(lines)
        if figure is not None:
            first = lines[0]
            where = first["machine"].get("gpu") or f"{first['machine']['cpu']}, {first['threads']} threads"
            versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
            commits = ", ".join(sorted({str(line["commit"]) for line in lines}))
            figure.suptitle(f"{TITLES[name]}\n{where}; {versions}; commit {commits}", x=0.01, ha="left", fontsize=8)
            figure.savefig(folder / f"{name}.png", dpi=110)
            made.append((TITLES[name], folder / f"{name}.png"))
    return made


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bars(count: int) -> Any:
    figure = _figure(9, 1.2 + 0.2 * count)
    return figure, figure.subplots()


def _label(line: dict[str, Any]) -> str:
    return f"{line['case']} {line['shape']} {line['dtype'].replace('float', 'fp').replace('bfp', 'bf')}"


def _of_case(lines: Lines, ours: dict[str, Any]) -> Callable[[str], dict[str, Any] | None]:
    where = tuple(ours[key] for key in ("case", "shape", "dtype"))
    return {
        line["variant"]: line for line in lines if tuple(line[key] for key in ("case", "shape", "dtype")) == where
    }.get


def _ours(lines: Lines) -> Lines:
    # the tiny shapes are for tests, and dispatch is not about rates
    scaled = curves()
    return [
        line
        for line in lines
        if line["variant"] == OURS and not line["shape"].startswith(("tiny", "dispatch")) and line["case"] not in scaled
    ]


def _share(lines: Lines) -> Any:
    found = [(line, share(line, _of_case(lines, line))) for line in _ours(lines)]
    rows = [(line, part) for line, part in found if part is not None][::-1]
    if not rows:
        return None
    figure, axes = _bars(len(rows))
    colours = [BLUE if line["dtype"] == "float32" else ORANGE for line, _ in rows]
    axes.barh([_label(line) for line, _ in rows], [100 * part for _, part in rows], color=colours)
    axes.set_xlabel(
        "% of the measured ceiling, by the ideal kernel's bytes and products (blue float32, orange bfloat16)",
        fontsize=8,
    )
    _finish(axes)
    return figure


def _speedup(lines: Lines) -> Any:
    rows: list[tuple[str, dict[str, float]]] = []
    for ours in _ours(lines):
        other = _of_case(lines, ours)
        peers = [line for line in lines if line["kind"] == "peer" and other(line["variant"]) is line]
        if peers:
            ratios = {line["variant"]: paired_ratio(line["times_ms"], ours["times_ms"]) for line in peers}
            rows.append((_label(ours), ratios))
    if not rows:
        return None
    from matplotlib import colormaps

    rows = rows[::-1]
    names = list(dict.fromkeys(name for _, ratios in rows[::-1] for name in ratios))
    figure, axes = _bars(len(rows) + len(names) // 2)
    for number, name in enumerate(names):
        points = [(ratios[name], place) for place, (_, ratios) in enumerate(rows) if name in ratios]
        shape = "osD^v"[number // 10 % 5]
        axes.plot(*zip(*points, strict=True), shape, color=colormaps["tab10"](number % 10), markersize=5, label=name)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("the peer's time over ours (right of 1: we are faster)", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=6, frameon=False)
    _finish(axes)
    return figure


def _memory(lines: Lines) -> Any:
    rows = []
    for ours in _ours(lines):
        other = _of_case(lines, ours)
        peers = [line["extra_bytes"] for line in lines if line["kind"] == "peer" and other(line["variant"]) is line]
        taken = [extra for extra in peers if extra]
        if taken and ours["extra_bytes"] is not None:
            rows.append((_label(ours), max(ours["extra_bytes"], 1e4) / 1e6, [extra / 1e6 for extra in taken]))
    if not rows:
        return None
    rows = rows[::-1]
    figure, axes = _bars(len(rows))
    for place, (_, mine, theirs) in enumerate(rows):
        axes.plot([min(mine, *theirs), max(mine, *theirs)], [place, place], color=GREY, linewidth=1)
        axes.plot(theirs, [place] * len(theirs), "o", color=ORANGE, markersize=5)
        axes.plot([mine], [place], "s", color=BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_xscale("log")
    axes.set_xlabel(
        "MB at the peak above the start; blue squares ours, orange circles the peers (0.01: nothing seen)", fontsize=8
    )
    _finish(axes)
    return figure


def _scaling(lines: Lines) -> Any:
    known = curves()
    ours = {name: [line for line in lines if line["case"] == name and line["kind"] == "ours"] for name in known}
    drawn = {
        name: sorted(found, key=lambda line: float(line["shape"])) for name, found in ours.items() if len(found) > 1
    }
    if not drawn:
        return None
    rows = -(-len(drawn) // 3)
    figure = _figure(10, 0.6 + 2.5 * rows)
    grid = figure.subplots(rows, 3, squeeze=False).flat
    for (name, found), axes in zip(drawn.items(), grid, strict=False):
        xs, ys = [float(line["shape"]) for line in found], [line["median_ms"] for line in found]
        axes.fill_between(
            xs, [line["p20_ms"] for line in found], [line["p80_ms"] for line in found], color=GREY, alpha=0.5
        )
        axes.loglog(xs, ys, "o-", color=BLUE, markersize=3, linewidth=1)
        points = list(zip(xs, ys, strict=True))
        change = bend(points)
        if change is not None:
            axes.axvline(change.at, color=ORANGE, linewidth=1, linestyle="--")
            fitted = f"exponent {change.before:.2f}, then {change.after:.2f}"
        else:
            fitted = f"exponent {exponent(points):.2f}"
        axes.set_title(f"{known[name].about}\n{fitted}", fontsize=8)
        axes.set_xlabel(known[name].axis, fontsize=7)
        axes.set_ylabel("ms", fontsize=7)
        axes.tick_params(labelsize=6, which="both")
        axes.grid(alpha=0.3)
    for axes in list(grid):
        axes.set_axis_off()
    return figure


def _finish(axes: "Axes") -> None:
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
