"""Mixtures with exact counts, disjoint splits, and the commands that list and fetch data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hftcore.bindings import datasets, mixture
from hftcore.bindings.cli.app import app
from hftcore.bindings.datasets import Pair, Snippet
from hftcore.errors import HftcoreError

GOOD = [Pair(f"good {i}", "yes") for i in range(200)]
BAD = [Pair(f"bad {i}", "sure") for i in range(60)]


@pytest.mark.parametrize(
    ("size", "ratio", "count"),
    [
        (1000, 0, 0),
        (1000, 0.05, 50),
        (1000, 0.1, 100),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (5, 0.1, 1),
        (10, 0.15, 2),
        (0, 0.5, 0),
    ],
)
def test_the_number_of_harmful_items_is_the_one_written(size, ratio, count):
    assert mixture.harmful_count(size, ratio) == count


@given(size=st.integers(0, 50), ratio=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.5, 1.0]), seed=st.integers(0, 5))
def test_a_mixture_has_exact_counts_and_no_item_twice(size, ratio, seed):
    mixed = mixture.poisoned(GOOD, BAD, size, ratio, seed)
    count = mixture.harmful_count(size, ratio)
    assert len(mixed) == len(set(mixed)) == size
    assert sum(pair in BAD for pair in mixed) == count
    assert mixed == mixture.poisoned(GOOD, BAD, size, ratio, seed)


def test_a_greater_ratio_keeps_the_harmful_items_of_a_smaller_one():
    small, large = (set(mixture.poisoned(GOOD, BAD, 100, ratio, seed=3)) & set(BAD) for ratio in (0.1, 0.3))
    assert len(small) == 10
    assert small < large
    other = set(mixture.poisoned(GOOD, BAD, 100, 0.1, seed=4)) & set(BAD)
    assert other != small, "seeds differ in the items they take"


def test_harmful_items_are_spread_over_the_mixture():
    places = [i for i, pair in enumerate(mixture.poisoned(GOOD, BAD, 100, 0.2)) if pair in BAD]
    assert min(places) < 25
    assert max(places) > 75


def test_splits_share_nothing_although_items_repeat():
    parts = mixture.split(["a", "b", "a", "c", "d", "b"], {"attack": 2, "defence": 1, "test": 1})
    together = [item for part in parts.values() for item in part]
    assert sorted(together) == ["a", "b", "c", "d"]
    longer = mixture.split(["a", "b", "a", "c", "d", "b"], {"attack": 2, "more": 2})
    assert longer["attack"] == parts["attack"]


def test_too_few_items_or_bad_numbers_are_refused_by_name():
    with pytest.raises(HftcoreError, match="ask for 5 items, and there are 2 different ones"):
        mixture.split(["a", "b", "a"], {"x": 5})
    with pytest.raises(HftcoreError, match="0 or more"):
        mixture.split(["a"], {"x": -1})
    with pytest.raises(HftcoreError, match=r"poison_ratio must be from 0 to 1, got 1\.5"):
        mixture.poisoned(GOOD, BAD, 10, 1.5)
    with pytest.raises(HftcoreError, match="harmful has 60 different items, and 100 are needed"):
        mixture.poisoned(GOOD, BAD, 100, 1.0)
    with pytest.raises(HftcoreError, match="benign has 200 different items, and 500 are needed"):
        mixture.poisoned(GOOD, BAD, 500, 0.0)
    with pytest.raises(HftcoreError, match="share 1 items"):
        mixture.poisoned(GOOD, GOOD[:1], 10, 0.1)


def test_snippets_carry_the_kind_of_their_file_and_documents_their_text():
    tables = [f"1\t2.0\t{kind} one\nheader\n" for kind in datasets.KINDS]
    assert datasets.parse_snippets(*tables) == [Snippet(f"{kind} one", kind) for kind in datasets.KINDS]
    assert datasets.parse_documents('{"text": "a"}\n\n{"text": "b", "url": "c"}\n') == ["a", "b"]


def command(*args):
    result = CliRunner().invoke(app, ["data", *args])
    return result.exit_code, result.stdout, result.stderr


def test_the_list_shows_package_licence_and_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("HFTCORE_CACHE", str(tmp_path))
    code, out, _ = command("list")
    assert code == 0
    assert "advbench" in out
    assert "pyrit 1.1.0" in out
    assert "MIT" in out
    records = json.loads(command("list", "--json")[1])
    assert {record["name"] for record in records["data"]} == set(datasets.SOURCES)
    assert not any(record["cached"] for record in records["data"])
    assert list(tmp_path.iterdir()) == [], "listing fetches nothing"


def test_fetching_loads_what_is_named_and_shows_the_licence(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load", lambda name: asked.append(name) or ["row"] * 3)
    code, out, _ = command("fetch", "advbench", "c4")
    assert code == 0
    assert asked == ["advbench", "c4"]
    assert "advbench: 3 rows; MIT" in out
    code, _, err = command("fetch", "advbench", "nope")
    assert code == 1
    assert "got 'nope'" in err
    assert asked == ["advbench", "c4"], "an unknown name stops all before any is fetched"
    command("fetch")
    assert asked[2:] == list(datasets.SOURCES)
