"""The scoreboard: every defence against attacks of growing strength and share of poison, beside the null hypotheses it must beat.

`python -m hftcore.bench.scoreboard --out DIR` trains and evaluates the grid cell by cell; what is there already is not done again. Requests
are used by index and shown nowhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings import datasets, embedded
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation import judge
from hftcore.bindings.evaluation.scoreboard import DEFENCES, Data, Scoreboard, Setting, cells_of
from hftcore.bindings.evaluation.scoreboard_report import Board, draw, page, read
from hftcore.bindings.evaluation.suites import load_suite
from hftcore.bindings.progress import Track
from hftcore.files import whole_file


def default_data() -> Data:
    """The demo's splits."""
    parts = demo_data.splits()
    return Data(
        parts.align_harmful,
        parts.align_benign,
        parts.attack_harmful,
        demo_data.sentiment_pairs(parts.attack_reviews),
        parts.defend_harmful,
        parts.defend_benign,
    )


def run_board(board: Scoreboard, defences: Sequence[str], docs: Path, command: str) -> list[str]:
    """Run what is missing of the grid, write `docs` and the picture beside it; returns the sentences."""
    found: Board = {cell: board.run(cell) for cell in Track(cells_of(board.setting, defences), "scoreboard")}
    judged = judge.measure(datasets.load("labelled-replies"))
    draw(found, docs.with_suffix(".png"))
    text = page(found, command, board.cells.about, judged)
    with whole_file(docs) as draft:
        draft.write_text(f"{text}\n![FA over HS]({docs.with_suffix('.png').name})\n", encoding="utf-8")
    return read(found)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results and trained models; continued where it stopped.")],
    docs: Annotated[Path, typer.Option(help="Page to write; the picture lies beside it.")] = Path("docs/scoreboard.md"),
    base: Annotated[str | None, typer.Option(help="Model before alignment. [default: the embedded one]")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; repeat for more. SFT is always there.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    poison: Annotated[str, typer.Option(help="Poison ratios.")] = "0,0.05,0.1,0.2",
    strengths: Annotated[str, typer.Option(help="Epochs of the attack.")] = "1,2",
    size: Annotated[int, typer.Option(help="Training items of the user.")] = 480,
    limit: Annotated[int, typer.Option(help="Items of each part of the evaluation.")] = 60,
) -> None:
    """Run the scoreboard's grid."""
    unknown = [name for name in row or [] if name not in DEFENCES]
    if unknown:
        raise typer.BadParameter(f"--row must be one of {', '.join(DEFENCES)}; got {unknown[0]!r}")
    setting = Setting(
        tuple(float(part) for part in poison.split(",")),
        tuple(int(part) for part in strengths.split(",")),
        tuple(range(seeds)),
        size,
    )
    suite = replace(load_suite("quick").limited(limit), documents=[], drift=[])
    suite = replace(suite, tasks={"FA": suite.tasks["FA"]})
    board = Scoreboard(base or str(embedded.prepare()), default_data(), suite, setting, out)
    names = list(dict.fromkeys(["SFT", *row])) if row else list(DEFENCES)
    options = f"--seeds {seeds} --poison {poison} --strengths {strengths} --size {size} --limit {limit}"
    for sentence in run_board(board, names, docs, f"python -m hftcore.bench.scoreboard {options} --out DIR"):
        typer.echo(sentence)


if __name__ == "__main__":
    typer.run(main)
