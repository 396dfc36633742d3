"""Rows that several processes hold by columns have the low set of one stable sort, here without processes: searches in step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_step import in_step
from inputs import energies, weights

import hftcore
from hftcore import cut_rows
from hftcore.cut_rows import Columns, row_cuts
from hftcore.kernels import reference
from hftcore.parts import Part

KINDS = ("normal", "few_values", "zeros", "half_zeros", "outlier", "denormal")


def low_of(weight, norm, widths, count, repeats=None):
    """The low set put together from what each process finds; process `repeats` is there twice, but counts once."""
    left, parts, searches = 0, [], []
    for place, width in enumerate(widths):
        own = slice(left, left + width)
        for is_counted in (True, False) if place == repeats else (True,):
            parts.append(Part(weight[:, own], norm[own]))
            searches.append(row_cuts(parts[-1], Columns(widths, place, is_counted), count))
        left += width
    if not 0 < count < sum(widths):
        found, rounds = [end_of(search) for search in searches], 0
    else:
        found, rounds = in_step(searches)
    low = []
    for part, (key, quota) in zip(parts, found, strict=True):
        mask = torch.zeros(len(weight), -(-part.weight.shape[1] // 8), dtype=torch.uint8)
        part.call("row_cut", key, quota, False, mask)
        low.append(reference.unpack(mask, part.weight.shape[1]))
    if repeats is not None:
        twin = low.pop(repeats + 1)
        assert torch.equal(twin, low[repeats])
    return torch.cat(low, dim=1), rounds


def end_of(search):
    with pytest.raises(StopIteration) as end:
        next(search)
    return end.value.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 7, 64])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_low_set_is_that_of_a_sort(monkeypatch, kind, number, backend):
    monkeypatch.setattr(cut_rows, "ROOM", number)
    weight, norm = weights(kind, 9, 130, torch.bfloat16), energies(130).sqrt()
    keys = reference.keys(weight, norm, None)
    with hftcore.use_backend(backend):
        for widths in ([130], [65, 65], [1, 128, 1], [40, 3, 47, 40]):
            for count in (0, 1, 13, 65, 129, 130):
                low, _ = low_of(weight, norm, widths, count, repeats=len(widths) - 1)
                assert torch.equal(low, reference.lowest(keys, count)), (widths, count)


@settings(max_examples=60)
@given(st.data())
def test_the_low_set_is_that_of_a_sort_whatever_the_weights_and_the_cuts(data):
    widths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 2.0, 1e-45, 3e38])
    rows = data.draw(st.lists(st.lists(value, min_size=sum(widths), max_size=sum(widths)), max_size=3))
    weight, norm = torch.tensor(rows).reshape(-1, sum(widths)), torch.ones(sum(widths))
    count = data.draw(st.integers(0, sum(widths)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cut_rows, "ROOM", data.draw(st.integers(1, 10)))
        low, _ = low_of(weight, norm, widths, count)
    assert torch.equal(low, reference.lowest(reference.keys(weight, norm, None), count))


def test_rows_may_be_collected_in_any_order(monkeypatch):
    call = Part.call

    def turned(part, op, *args):
        """As threads may do it: the last row first."""
        found = call(part, op, *args)
        if op == "row_counts" and 0 < int(found[2].sum()) <= len(args[2]):
            below, starts, counts = found
            runs = [args[2][start : start + count].clone() for start, count in zip(starts, counts, strict=True)]
            args[2][: int(counts.sum())] = torch.cat(runs[::-1])
            found = below, counts.sum() - counts.cumsum(0), counts
        return found

    monkeypatch.setattr(Part, "call", turned)
    weight, norm = weights("normal", 9, 130, torch.float32), energies(130).sqrt()
    low, _ = low_of(weight, norm, [40, 90], 65)
    assert torch.equal(low, reference.lowest(reference.keys(weight, norm, None), 65))


def test_alike_columns_take_few_rounds_and_the_worst_ones_a_bit_each():
    weight, norm = weights("normal", 64, 2048, torch.float32), torch.ones(2048)
    assert low_of(weight, norm, [512] * 4, 1024)[1] == 3
    apart = torch.cat([torch.arange(2048), 0x7F000000 + torch.arange(2048)]).int()[None]
    low, rounds = low_of(apart.view(torch.float32), torch.ones(4096), [2048, 2048], 2048)
    assert torch.equal(low, reference.lowest(apart, 2048))
    assert 20 < rounds <= 33
