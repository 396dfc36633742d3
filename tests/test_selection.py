"""The cut of a group of matrices is that of one stable sort, by whichever passes it is found."""

import numpy as np
import pytest
import torch
from in_step import in_step
from inputs import energies, weights

import hftcore
from hftcore import collected, selection
from hftcore.kernels import reference
from hftcore.parts import Part, Place
from hftcore.selection import find_cut, search_cut

KINDS = ("normal", "few_values", "zeros", "half_zeros", "outlier", "denormal")
SHAPES = ((5, 40), (1, 64), (0, 7), (30, 33))
SIZE = sum(rows * columns for rows, columns in SHAPES)


def parts(kind, dtype, is_turned=False):
    """One matrix of each shape, every second one with a reference."""
    made = []
    for index, (rows, columns) in enumerate(SHAPES):
        weight = weights(kind, rows, columns, dtype, seed=index)
        if is_turned:
            weight = weight.t().contiguous().t()
        other = weights("normal", rows, columns, dtype, seed=9) if index % 2 else None
        made.append(Part(weight, energies(columns, index).sqrt(), other))
    return made


def cut_of_a_sort(made, count):
    """(key, quotas) by sorting all keys at once."""
    every = [reference.keys(part.weight, part.norm, part.reference) for part in made]
    flat = torch.cat([keys.flatten() for keys in every])
    key = int(flat.sort(stable=True).values[count - 1])
    need = count - int((flat < key).sum())
    quotas = []
    for keys in every:
        ties = [int(row.eq(key).sum()) for row in keys]
        taken = []
        for number in ties:
            taken.append(min(need, number))
            need -= taken[-1]
        quotas.append(taken)
    return key, quotas, [keys.eq(key).sum(dim=1).tolist() for keys in every]


def same(cut, wanted):
    key, quotas, ties = wanted
    found = [
        [min(quota, most) for quota, most in zip(mine.tolist(), row, strict=True)]
        for mine, row in zip(cut.quotas, ties, strict=True)
    ]
    return cut.key == key and found == quotas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 1, 40, 600, 1 << 20])
@pytest.mark.parametrize("sample", [8, 200, 1 << 16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_cut_is_that_of_a_sort_whatever_room_and_sample_there_are(monkeypatch, kind, room, sample, backend):
    """Without room, as on a GPU, where keys are only counted; with the largest sample, of groups so small that none is drawn."""
    monkeypatch.setattr(selection, "SMALL", SIZE if sample > SIZE else 0)
    monkeypatch.setattr(selection, "ROOM", room or 1)
    monkeypatch.setattr(selection, "ONE_IN", 3 if room == 1 else SIZE)
    monkeypatch.setattr(selection, "SAMPLE", sample)
    monkeypatch.setattr(selection, "LARGEST_SAMPLE", 2 * sample)
    if room == 0:
        monkeypatch.setattr(selection, "_can_collect", lambda part: False)
    made = parts(kind, torch.bfloat16, is_turned=room == 40)
    with hftcore.use_backend(backend):
        for count in (1, 2, SIZE // 10, SIZE // 2, SIZE - 1):
            cut = find_cut([lambda part=part: part for part in made], SHAPES, count)
            assert same(cut, cut_of_a_sort(made, count)), count


def test_nothing_and_everything_need_no_key():
    made = parts("normal", torch.float32)
    makers = [lambda part=part: part for part in made]
    for count, key in ((0, 0), (SIZE, reference.FINITE)):
        cut = find_cut(makers, SHAPES, count)
        assert cut.key == key
        assert not any(quota.any() for quota in cut.quotas)


def test_a_matrix_whose_window_fits_is_read_once(monkeypatch):
    calls = []
    call = Part.call
    monkeypatch.setattr(Part, "call", lambda part, op, *args: calls.append(op) or call(part, op, *args))
    part = Part(weights("normal", 50, 60, torch.float32), torch.ones(60))
    with hftcore.use_backend("torch"):
        find_cut([lambda: part], [(50, 60)], 1500)
        assert calls == ["keys_between"]
        monkeypatch.setattr(selection, "SMALL", 2999)
        calls.clear()
        find_cut([lambda: part], [(50, 60)], 1500)
        assert calls == ["sampled_keys", "keys_between"]
        monkeypatch.setattr(selection, "ROOM", 100)
        monkeypatch.setattr(selection, "LARGEST_SAMPLE", 0)
        monkeypatch.setattr(selection, "SAMPLE", 300)
        calls.clear()
        find_cut([lambda: part], [(50, 60)], 1500)
        assert calls == ["sampled_keys", "score_histogram", "keys_between"]


def test_several_matrices_have_more_room_than_one(monkeypatch):
    calls = []
    call = Part.call
    monkeypatch.setattr(Part, "call", lambda part, op, *args: calls.append(op) or call(part, op, *args))
    for name, value in {"SMALL": 0, "ROOM": 100, "ONE_IN": 4, "SAMPLE": 300, "LARGEST_SAMPLE": 300}.items():
        monkeypatch.setattr(selection, name, value)
    part = Part(weights("normal", 50, 60, torch.float32), torch.ones(60))
    with hftcore.use_backend("torch"):
        find_cut([lambda: part] * 2, [(50, 60)] * 2, 3000)
        assert calls == ["sampled_keys"] * 2 + ["keys_between"] * 2
        calls.clear()
        find_cut([lambda: part], [(50, 60)], 1500)
        assert calls == ["sampled_keys", "score_histogram", "keys_between"]


@pytest.mark.parametrize("room", [1, 1 << 20])
def test_scores_that_are_not_finite_are_refused_on_every_way(monkeypatch, room):
    monkeypatch.setattr(selection, "ROOM", room)
    made = parts("normal", torch.float32)
    made[3].weight[29, 32] = float("nan")
    made[0].weight[0, 0] = float("-inf")
    with pytest.raises(hftcore.NonFiniteError, match="2 scores"):
        find_cut([lambda part=part: part for part in made], SHAPES, SIZE // 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [0, 150, 1 << 14])
def test_the_cut_of_several_processes_is_that_of_a_sort(monkeypatch, kind, listed):
    """Rows dealt out to three processes, and a fourth that repeats what the first has.

    Where few enough keys are left they travel with their rows: two rounds for the sample, one for the keys, one for the list.
    """
    monkeypatch.setattr(collected, "LISTED", listed)
    monkeypatch.setattr(selection, "ROOM", 1 << 20)
    made = parts(kind, torch.bfloat16)
    *starts, end = np.cumsum([0, *(rows for rows, _ in SHAPES)]).tolist()
    for count in (1, SIZE // 10, SIZE // 2, SIZE - 1):
        wanted, searches = cut_of_a_sort(made, count), []
        for rank in range(4):
            held, places = [], []
            for part, start, (rows, columns) in zip(made, starts, SHAPES, strict=True):
                own = slice(*((rows * third + 1) // 3 for third in (rank % 3, rank % 3 + 1)))
                other = None if part.reference is None else part.reference[own]
                held.append(lambda part=part, own=own, other=other: Part(part.weight[own], part.norm, other))
                places.append(Place(own.stop - own.start, columns, start + own.start, 0, columns, is_counted=rank < 3))
            searches.append(search_cut(held, places, count, SIZE, end, rank, 4))
        found, took = in_step(searches)
        whole = [torch.cat([cut.quotas[index] for cut in found[:3]]) for index in range(len(SHAPES))]
        assert all(cut.key == found[0].key for cut in found)
        assert all(torch.equal(one, again) for one, again in zip(found[0].quotas, found[3].quotas, strict=True))
        assert same(selection.Cut(found[0].key, whole), wanted), count
        assert took == 4 if listed == 1 << 14 else 3 <= took <= 6, count


def test_collected_rows_are_put_in_order_whatever_order_threads_left():
    starts = [torch.tensor([4, 0, 0, 1]), torch.tensor([8, 7])]
    counts = [torch.tensor([3, 1, 0, 3]), torch.tensor([2, 1])]
    rows, begins = collected._runs([10, 20], starts, counts)
    assert rows.tolist() == [11, 13, 10, 21, 20]
    assert begins.tolist() == [0, 1, 4, 7, 8]
