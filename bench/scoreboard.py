"""The scoreboard: every defence against attacks of growing strength and share of poison, beside the null hypotheses it must beat.

`python -m hftcore.bench.scoreboard --out DIR` trains and evaluates the grid cell by cell; what is there already is not done again. Requests
are used by index and shown nowhere.
"""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hftcore.bindings import datasets, embedded
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.demo.run import ADAPTERS
from hftcore.bindings.evaluation import judge
from hftcore.bindings.evaluation.scoreboard import DEFENCES, Data, Scoreboard, Setting, cells_of
from hftcore.bindings.evaluation.scoreboard_report import Board, draw, page, read
from hftcore.bindings.evaluation.suites import Suite, load_suite
from hftcore.bindings.models_io import load_model, merged, save_model
from hftcore.bindings.progress import Track
from hftcore.errors import HftcoreError
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


def aligned_model(out: Path) -> Path:
    """The embedded model with the demo's aligned adapter merged, in a folder of `out`."""
    target = out / "SmolLM2-135M-Instruct-aligned"
    if not target.exists():
        model, tokenizer = load_model(ADAPTERS / "aligned", dtype="float32", base=str(embedded.prepare()))
        save_model(merged(model), tokenizer, target)
    return target


def suite_of(limit: int, harmbench: bool) -> Suite:
    """What the board asks: requests and film reviews, `limit` of each."""
    quick = load_suite("quick").limited(limit)
    other = {"HS_harmbench": load_suite("full").harmful["HS_harmbench"][:limit]} if harmbench else {}
    return Suite(quick.harmful | other, tasks={"FA": quick.tasks["FA"]}, max_new_tokens=quick.max_new_tokens)


def run_until(deadline: float, out: Path) -> int:
    """Cells of the whole grid, in its order, until `time.monotonic()` passes `deadline`; then the page `out/scoreboard.md`.

    Returns:
        How many cells are measured, those of earlier runs among them.

    Raises:
        HftcoreError: data or the embedded model is not here, or no cell was reached.
    """
    board = Scoreboard(str(aligned_model(out)), default_data(), suite_of(60, harmbench=True), Setting(bf16=True), out)
    planned = cells_of(board.setting, list(DEFENCES))
    for cell in planned:
        if time.monotonic() > deadline:
            break
        board.run(cell)
    run_board(board, list(DEFENCES), out / "scoreboard.md", "hftcore-bench gpu", only_found=True)
    return sum(board.found(cell) is not None for cell in planned)


def run_board(
    board: Scoreboard, defences: Sequence[str], docs: Path, command: str, only_found: bool = False
) -> list[str]:
    """Run what is missing of the grid, write `docs` and the picture beside it; returns the sentences.

    Args:
        board: with its folder of results.
        defences: rows.
        docs: the page.
        command: what the page says it was written by.
        only_found: run nothing and write what is measured so far.

    Raises:
        HftcoreError: `only_found`, and nothing is measured.
    """
    planned = cells_of(board.setting, defences)
    results = ((cell, (board.found if only_found else board.run)(cell)) for cell in Track(planned, "scoreboard"))
    found: Board = {cell: items for cell, items in results if items is not None}
    if not found:
        raise HftcoreError(f"nothing of this grid is measured in {board.out}; leave --only-found out to run it")
    judged = judge.measure(datasets.load("labelled-replies"))
    draw(found, docs.with_suffix(".png"))
    text = page(found, planned, command, board.cells.about, judged)
    with whole_file(docs) as draft:
        draft.write_text(f"{text}\n![FA over HS]({docs.with_suffix('.png').name})\n", encoding="utf-8")
    return read(found)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results and trained models; continued where it stopped.")],
    docs: Annotated[Path, typer.Option(help="Page to write; the picture lies beside it.")] = Path("docs/scoreboard.md"),
    base: Annotated[str | None, typer.Option(help="Model before alignment. [default: the embedded one]")] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="Begin with the embedded model that the demo's adapter has aligned.")
    ] = False,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; repeat for more. SFT is always there.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    poison: Annotated[str, typer.Option(help="Poison ratios.")] = "0,0.05,0.1,0.2",
    strengths: Annotated[str, typer.Option(help="Epochs of the attack.")] = "1,2",
    trained: Annotated[
        str | None, typer.Option(help="Poison ratios of rows that train models of their own. [default: all]")
    ] = None,
    size: Annotated[int, typer.Option(help="Training items of the user.")] = 480,
    align_size: Annotated[int, typer.Option(help="Refusals that alignment learns from.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Of alignment and fine-tuning.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(help="Of alignment and fine-tuning.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="Of every adapter; the rest is the papers'.")] = 4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under autocast and evaluate in bfloat16.")] = False,
    limit: Annotated[int, typer.Option(help="Items of each part of the evaluation.")] = 60,
    harmbench: Annotated[
        bool, typer.Option("--harmbench", help="Ask as many HarmBench requests, too, which are less alike.")
    ] = False,
    only_found: Annotated[bool, typer.Option("--only-found", help="Run nothing: write what is measured.")] = False,
) -> None:
    """Run the scoreboard's grid."""
    if base is not None and aligned:
        raise typer.BadParameter("--base and --aligned both say where to begin; give one of them")
    unknown = [name for name in row or [] if name not in DEFENCES]
    if unknown:
        raise typer.BadParameter(f"--row must be one of {', '.join(DEFENCES)}; got {unknown[0]!r}")
    setting = Setting(
        tuple(float(part) for part in poison.split(",")),
        tuple(int(part) for part in strengths.split(",")),
        tuple(range(seeds)),
        tuple(float(part) for part in trained.split(",")) if trained is not None else None,
        size,
        align_size,
        learning_rate=learning_rate,
        batch_size=batch_size,
        lora_alpha=lora_alpha,
        bf16=bf16,
    )
    start = base or str(aligned_model(out) if aligned else embedded.prepare())
    board = Scoreboard(start, default_data(), suite_of(limit, harmbench), setting, out)
    names = list(dict.fromkeys(["SFT", *row])) if row else list(DEFENCES)
    options = f"--seeds {seeds} --poison {poison} --strengths {strengths}"
    options += f" --trained {trained}" if trained is not None else ""
    options += f" --size {size} --align-size {align_size} --learning-rate {learning_rate:g} --batch-size {batch_size}"
    options += f" --lora-alpha {lora_alpha}"
    options += f"{' --bf16' if bf16 else ''} --limit {limit}{' --harmbench' if harmbench else ''}"
    options += "".join(f" --row {shlex.quote(name)}" for name in row or [])
    options += f" --base {Path(base).name}" if base is not None else " --aligned" if aligned else ""
    options += " --only-found" if only_found else ""
    command = f"python -m hftcore.bench.scoreboard {options} --out DIR"
    for sentence in run_board(board, names, docs, command, only_found):
        typer.echo(sentence)


if __name__ == "__main__":
    typer.run(main)
