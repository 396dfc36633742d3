"""Pattern: counts by hand, the text form, refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hftcore import HftcoreError, Pattern


@pytest.mark.parametrize(
    ("ratio", "columns", "removed"),
    [
        (0.01, 256, 3),
        (0.05, 256, 13),
        (0.1, 256, 26),
        (0.2, 256, 52),
        (0.1, 4096, 410),
        (1e-5, 4096, 1),
        (0.0, 256, 0),
        (1.0, 7, 7),
    ],
)
def test_antidote_counts_are_the_published_ones(ratio, columns, removed):
    assert Pattern(ratio, remove="highest").removed(columns) == removed


@pytest.mark.parametrize(("ratio", "columns", "removed"), [(0.5, 7, 3), (0.29, 100, 28), (0.1, 4096, 409), (1.0, 7, 7)])
def test_wanda_counts_are_the_published_ones(ratio, columns, removed):
    """int(100 * 0.29) is 28 in double precision, and so it stays."""
    assert Pattern(ratio).removed(columns) == removed


@pytest.mark.parametrize("text", ["33.3%", "33.3 %", " 0.333 "])
def test_a_percentage_is_the_nearest_double(text):
    assert Pattern(text.replace(" %", "%")).ratio == 0.333


@given(st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(["lowest", "highest"]))
def test_the_count_lies_in_the_group(ratio, size, remove):
    assert 0 <= Pattern(ratio, remove=remove).removed(size) <= size


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern("50%"),
        Pattern(0.1, "matrix", "highest"),
        Pattern("2:4"),
        Pattern("0:4", remove="highest"),
        Pattern(0.25, block=(16, 8)),
    ],
)
def test_the_text_form_comes_back(pattern):
    again = Pattern.parse(str(pattern))
    assert (again.ratio, again.group, again.scope, again.remove, again.block) == (
        pattern.ratio,
        pattern.group,
        pattern.scope,
        pattern.remove,
        pattern.block,
    )


@pytest.mark.parametrize(
    "sparsity", ["3:2", "2:1", "1:1", "1:65", "-1%", "101%", 1.5, -0.1, float("nan"), "half", "", None, True]
)
def test_nonsense_is_refused_with_what_was_got(sparsity):
    with pytest.raises(HftcoreError, match="sparsity"):
        Pattern(sparsity)


def test_a_block_may_be_a_list():
    assert Pattern(0.5, block=[16, 8]) == Pattern(0.5, block=(16, 8))


@pytest.mark.parametrize("pattern", [0.5, None, 2])
def test_what_is_no_pattern_is_refused_as_one(pattern):
    with pytest.raises(HftcoreError, match=f'pattern must be a Pattern or its text such as "50%", got {pattern}'):
        Pattern.of(pattern)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scope": "layer"},
        {"remove": "middle"},
        {"block": (0, 4)},
        {"block": (4,)},
        {"block": 4},
        {"block": (True, 4)},
        {"block": (4, 4), "scope": "model"},
        {"sparsity": "2:4", "scope": "matrix"},
        {"sparsity": "2:4", "block": (4, 4)},
    ],
)
def test_combinations_without_meaning_are_refused(arguments):
    with pytest.raises(HftcoreError):
        Pattern(**{"sparsity": 0.5, **arguments})
