"""The native CPU ops give the bits of kernels/reference.py, on every instruction set this machine has."""

import itertools
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hftcore.kernels import eager, native, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 1), (5, 7), (2, 63), (3, 64), (7, 200), (2, 1025), (3, 2500)]

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.fixture(params=native.simds()[:3])  # the fourth differs in products alone
def simd(request):
    with native.use_simd(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def normal(M, N, seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


def with_outlier(M, N):
    weight = normal(M, N)
    weight[:, N // 2] = 6e4
    return weight


def half_zeros(M, N):
    weight = normal(M, N)
    weight[:, ::2] = 0
    weight[:, ::4] = -0.0
    return weight


def shifting_rows(M, N):
    """Rows whose thresholds say nothing about each other's, also relative to their means."""
    weight = normal(M, N)
    weight[::2] = weight[::2].abs() ** 6
    return (weight * (1 + 30 * torch.arange(M)[:, None])).clamp(-6e4, 6e4)


INPUTS = {
    "normal": normal,
    "all equal": lambda M, N: torch.full((M, N), -0.75),
    "zeros": torch.zeros,
    "minus zeros": lambda M, N: torch.full((M, N), -0.0),
    "half zeros": half_zeros,
    "one outlier": with_outlier,
    "three values": lambda M, N: torch.randint(-1, 2, (M, N), generator=torch.Generator().manual_seed(1)) * 0.5,
    "shifting rows": shifting_rows,
    "small": lambda M, N: normal(M, N) * 1e-7,
    "ascending": lambda M, N: torch.arange(M * N).view(M, N) / (M * N) + 1e-3,
}


def norms(N, tiny=False):
    norm = torch.rand(N, generator=torch.Generator().manual_seed(7)) + 0.25
    norm[::5] = 1.0
    norm[3::11] = 0.0
    # products with these are denormal numbers
    return norm * 1e-38 if tiny else norm


def strided(weight, layout):
    """The same values in another memory layout."""
    if layout == "transposed":
        return weight.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((weight.shape[0] * 2, weight.shape[1] * 3 + 5), 9.0, dtype=weight.dtype)
        view = wide[::2, 2 : 2 + 3 * weight.shape[1] : 3]
        view.copy_(weight)
        return view
    return weight.clone()


def bits(tensor):
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)


def assert_same_bits(got, wanted):
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(bits(got), bits(wanted))


def counts_of(N):
    return sorted({0, 1, N // 2, N - N // 10, N})


def removed(weight, mask, other):
    out = weight.clone()
    out[mask] = 0 if other is None else other[mask]
    return out


def poisoned_mask(M, N):
    return torch.full((M, -(-N // 8)), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize("data", INPUTS)
def test_prune_rows_removes_what_the_sort_removes(simd, dtype, data):
    for M, N in SHAPES:
        norm = norms(N)
        weight = INPUTS[data](M, N).to(dtype)
        for other in (None, normal(M, N, 3).to(dtype)):
            for count in counts_of(N):
                for invert in (False, True):
                    wanted = reference.row_mask(weight, norm, other, count, invert)
                    mask = poisoned_mask(M, N)
                    before = weight.clone()
                    assert native.prune_rows(weight, norm, other, count, invert, mask) == 0
                    assert torch.equal(mask, reference.pack(wanted))
                    assert_same_bits(weight, before)
                    pruned = weight.clone()
                    assert native.prune_rows(pruned, norm, other, count, invert, None) == 0
                    assert_same_bits(pruned, removed(weight, wanted, other))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides_give_the_same_bits(simd, dtype, layout):
    for M, N in [(1, 1), (3, 1), (1, 9), (37, 70), (20, 300)]:
        norm = norms(N)
        weight, other = normal(M, N).to(dtype), normal(M, N, 3).to(dtype)
        for ref in (None, strided(other, layout), other):
            view = strided(weight, layout)
            plain = None if ref is None else other
            wanted = reference.row_mask(weight, norm, plain, N // 2, False)
            assert native.prune_rows(view, norm, ref, N // 2, False, None) == 0
            assert_same_bits(view, removed(weight, wanted, plain))

            view = strided(weight, layout)
            quota = torch.ones(M, dtype=torch.int64)
            key = int(reference.keys(weight, norm, plain)[0, 0])
            wanted = reference.cut_mask(weight, norm, plain, key, quota, True)
            native.cut(view, norm, ref, key, quota, True, None)
            assert_same_bits(view, removed(weight, wanted, plain))

            view = strided(weight, layout)
            assert native.nonfinite(view, norm, ref) == 0
            assert torch.equal(
                native.score_histogram(view, norm, ref, 0, 20, 2048),
                reference.score_histogram(weight, norm, plain, 0, 20, 2048),
            )
        view = strided(weight, layout)
        mask = reference.pack(weight > 0)
        assert_same_bits(native.masked_take(view, mask), weight[weight > 0])
        native.masked_put(view, mask, None)
        assert_same_bits(view, removed(weight, weight > 0, None))
        assert_same_bits(
            native.block_scores(weight, norm, None, 1, N), reference.block_scores(weight, norm, None, 1, N)
        )


def test_elements_between_the_rows_of_a_slice_are_not_touched(simd, dtype):
    wide = torch.full((8, 200), 9.0, dtype=dtype)
    wide[::2, 3:70] = normal(4, 67).to(dtype)
    before = wide.clone()
    native.prune_rows(wide[::2, 3:70], norms(67), None, 67, False, None)
    before[::2, 3:70] = 0
    assert_same_bits(wide, before)


def test_denormal_scores_count_even_where_the_caller_flushes_them(simd, dtype):
    M, N = 3, 333
    weight, norm = normal(M, N).to(dtype), norms(N, tiny=True)
    wanted = reference.row_mask(weight, norm, None, N // 2, False)
    mask = poisoned_mask(M, N)
    try:
        torch.set_flush_denormal(True)
        native.prune_rows(weight, norm, None, N // 2, False, mask)
        keys = [native.row_keys(weight, norm, None, count) for count in (N // 2, N)]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(mask, reference.pack(wanted))
    for key, count in zip(keys, (N // 2, N), strict=True):
        assert torch.equal(key, reference.row_keys(weight, norm, None, count))
    tiny = (torch.arange(-N, 0).abs() * 1.0).to(torch.int16).view(1, N)
    tiny = tiny.view(dtype) if dtype.itemsize == 2 else tiny.int().view(torch.float32)
    native.prune_rows(tiny, torch.ones(N), None, 10, False, None)
    assert int((tiny == 0).sum()) == 10
    assert bool((tiny[0, -10:] == 0).all())


def test_every_float16_and_bfloat16_value_has_its_own_key(simd):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        finite = every.view(dtype)[every.view(dtype).isfinite()].view(4, -1)
        norm = torch.full((finite.shape[1],), 0.7)
        wanted = reference.keys(finite, norm, None)
        for row in range(4):
            for count in (1, 777, finite.shape[1] // 2, finite.shape[1] - 5):
                mask = reference.lowest(wanted[row : row + 1], count)
                got = torch.zeros_like(reference.pack(mask))
                native.prune_rows(finite[row : row + 1], norm, None, count, False, got)
                assert torch.equal(got, reference.pack(mask))


def test_rows_and_groups_with_a_non_finite_score_are_counted_and_stop_a_change_in_place(simd, dtype):
    for N in (8, 72, 200, 2100):
        weight, norm = normal(6, N).to(dtype), norms(N)
        norm[:] += 0.5
        weight[1, N - 1] = torch.nan
        weight[3, 0] = torch.inf
        weight[4, N // 2] = -torch.nan
        bad = [1, 3, 4]
        assert native.nonfinite(weight, norm, None) == 3
        wanted = reference.row_mask(weight, norm, None, N // 2, True)
        wanted[bad] = False
        pruned, mask = weight.clone(), poisoned_mask(6, N)
        assert native.prune_rows(pruned, norm, None, N // 2, True, None) == 3
        assert_same_bits(pruned, weight)
        assert native.prune_rows(weight, norm, None, N // 2, True, mask) == 3
        assert torch.equal(mask, reference.pack(wanted))

        wanted = reference.group_mask(weight, norm, None, 2, 4, False)
        for row, column in ((1, N - 4), (3, 0), (4, N // 8 * 4)):
            wanted[row, column : column + 4] = False
        pruned, mask = weight.clone(), poisoned_mask(6, N)
        assert native.prune_groups(pruned, norm, None, 2, 4, False, None) == 3
        assert_same_bits(pruned, weight)
        assert native.prune_groups(weight, norm, None, 2, 4, False, mask) == 3
        assert torch.equal(mask, reference.pack(wanted))

        counts = native.score_histogram(weight, norm, None, 0x3F000000, 18, 64)
        assert counts[-1] == 3
        assert counts.sum() == weight.numel()


def test_a_product_that_overflows_is_a_non_finite_score(simd):
    weight, norm = torch.full((2, 70), 1e30), torch.ones(70)
    norm[69] = 1e10
    assert native.nonfinite(weight, norm, None) == 2
    assert native.nonfinite(weight, norm, weight) == 0
    # infinity times zero is not a number, whatever its sign
    norm[69] = 0
    weight[0, 69] = torch.inf
    assert native.nonfinite(weight, norm, None) == 1
    assert native.prune_rows(weight, norm, None, 35, False, None) == 1


@pytest.mark.parametrize("data", ["normal", "all equal", "half zeros", "three values"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (0, 4), (4, 4), (3, 5), (13, 40), (31, 64), (63, 64)])
def test_prune_groups_removes_n_of_every_m(simd, dtype, data, n, m):
    for M, groups in [(3, 2), (2, 17), (1, 130)]:
        N = m * groups
        weight, norm = INPUTS[data](M, N).to(dtype), norms(N)
        for other in (None, normal(M, N, 3).to(dtype)):
            for invert in (False, True):
                wanted = reference.group_mask(weight, norm, other, n, m, invert)
                mask, pruned = poisoned_mask(M, N), weight.clone()
                assert native.prune_groups(weight, norm, other, n, m, invert, mask) == 0
                assert torch.equal(mask, reference.pack(wanted))
                assert native.prune_groups(pruned, norm, other, n, m, invert, None) == 0
                assert_same_bits(pruned, removed(weight, wanted, other))


WINDOWS = [
    (0, 20, 2048),
    (0, 13, 1 << 18),
    (0x3E800000, 12, 1024),
    (0x3F000000, 0, 4),
    (0x7F000000, 20, 64),
    (0x7F800000, 3, 8),
    (1, 31, 1),
    (0x3F800000, 40, 2),
]


@pytest.mark.parametrize("data", ["normal", "all equal", "half zeros", "shifting rows"])
def test_score_histogram_counts_every_key_once(simd, dtype, data):
    for M, N in [(5, 7), (3, 65), (2, 2100)]:
        weight, norm = INPUTS[data](M, N).to(dtype), norms(N)
        for other in (None, normal(M, N, 3).to(dtype)):
            for window in WINDOWS:
                counts = native.score_histogram(weight, norm, other, *window)
                assert torch.equal(counts, reference.score_histogram(weight, norm, other, *window)), window
                assert counts.sum() == M * N


def test_a_sample_of_keys_is_every_step_th_key(simd, dtype):
    weight, near = normal(60, 41).to(dtype)[3:38:2, 1:], normal(40, 20, 3).to(dtype).t()[:, ::2][:18]
    view, other, norm = weight[:, : near.shape[1]], near, norms(near.shape[1])
    for first, step in [(0, 1), (5, 7), (view.numel() - 1, 3), (view.numel(), 3)]:
        for ref in (None, other):
            wanted = reference.sampled_keys(view, norm, ref, first, step)
            for module in (native, eager):
                assert torch.equal(module.sampled_keys(view, norm, ref, first, step), wanted)


def runs(found, out):
    """What `keys_between` told, with each row's keys in place of where they begin."""
    below, spoiled, starts, counts = found
    return below, spoiled, [out[a : a + n].tolist() for a, n in zip(starts.tolist(), counts.tolist(), strict=True)]


@pytest.mark.parametrize("data", INPUTS)
def test_keys_between_two_are_those_of_the_reference(simd, dtype, data):
    for M, N in [(1, 1), (7, 200), (2, 4500)]:
        weight, norm = INPUTS[data](N, M).to(dtype).t(), norms(N)
        for other in (None, normal(M, N, 3).to(dtype)):
            every = reference.keys(weight, norm, other)
            middle = min(int(every.flatten().median()), reference.FINITE - 1)
            for low, high in [(0, reference.FINITE), (middle, middle + 1), (middle // 2, middle), (middle, middle)]:
                out = torch.empty(M * N, dtype=torch.int32)
                wanted = runs(reference.keys_between(weight, norm, other, low, high, out), out)
                for module in (native, eager):
                    out = torch.empty(M * N, dtype=torch.int32)
                    assert runs(module.keys_between(weight, norm, other, low, high, out), out) == wanted


@pytest.mark.parametrize("data", INPUTS)
def test_keys_counts_and_cuts_of_each_row_are_those_of_the_reference(simd, dtype, data):
    for M, N in [(1, 1), (7, 200), (3, 64), (2, 4500)]:
        weight, norm = INPUTS[data](N, M).to(dtype).t(), norms(N)
        for other in (None, normal(M, N, 3).to(dtype)):
            every = reference.keys(weight, norm, other)
            if (every >= reference.FINITE).any():
                continue
            for count in {1, (N + 1) // 2, max(1, N - 1), N}:
                key = reference.row_keys(weight, norm, other, count)
                assert torch.equal(key, every.sort(dim=1).values[:, count - 1])
                for module in (native, eager):
                    assert torch.equal(module.row_keys(weight, norm, other, count), key), count
                quota = torch.arange(M) * N // 2
                wanted = reference.cut_mask(weight, norm, other, key[:, None], quota, count % 2 == 0)
                for low, high in [(key, key + 1), (key // 2, key), (key, key)]:
                    out = torch.empty(M * N, dtype=torch.int32)
                    below, starts, counts = reference.row_counts(weight, norm, other, low, high, out)
                    told = runs((below.tolist(), 0, starts, counts), out)
                    assert below.tolist() == [int((row < end).sum()) for row, end in zip(every, low, strict=True)]
                    for module in (native, eager):
                        out = torch.empty(M * N, dtype=torch.int32)
                        below, starts, counts = module.row_counts(weight, norm, other, low, high, out)
                        assert runs((below.tolist(), 0, starts, counts), out) == told
                        mask = poisoned_mask(M, N)
                        module.row_cut(weight, norm, other, key, quota, count % 2 == 0, mask)
                        assert torch.equal(mask, reference.pack(wanted))


@settings(max_examples=100)
@given(st.data())
def test_keys_of_several_processes_are_merged_as_the_reference_does(data):
    """The plain form also where it takes the rows a few at a time."""
    key = st.sampled_from([0, 1, 0x3F800000, 0x7F7FFFFF]) | st.integers(0, 0x7F7FFFFF)
    processes, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    most = data.draw(st.sampled_from([1, 3, 90]))
    runs = [[data.draw(st.lists(key, max_size=most)) for _ in range(rows)] for _ in range(processes)]
    for row in range(rows):
        if not any(own[row] for own in runs):
            runs[0][row].append(data.draw(key))
    counts = torch.tensor([[len(run) for run in own] for own in runs], dtype=torch.int64).view(processes, rows)
    keys = torch.full((processes, int(counts.sum(1).max()) + 1), -1, dtype=torch.int32)
    for line, own in zip(keys, runs, strict=True):
        told = [one for run in own for one in run]
        line[: len(told)] = torch.tensor(told, dtype=torch.int32)
    need = torch.tensor([data.draw(st.integers(1, size)) for size in counts.sum(0).tolist()], dtype=torch.int64)
    for place in range(processes + 1):
        wanted, found = reference.row_merge(keys, counts, need, place), []
        for band in (1, 1 << 20):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(eager, "BAND", band)
                found.append(eager.row_merge(keys, counts, need, place))
        for name in native.simds():
            with native.use_simd(name):
                found.append(native.row_merge(keys.t().contiguous().t(), counts, need, place))
        for key, left in found:
            assert torch.equal(key, wanted[0])
            assert torch.equal(left, wanted[1])


def test_keys_that_do_not_fit_are_counted_and_nothing_is_written_past_the_end(simd, dtype):
    weight, norm = normal(40, 300).to(dtype), norms(300)
    out = torch.full((600,), -1, dtype=torch.int32)
    for module in (native, eager, reference):
        below, spoiled, _, counts = module.keys_between(weight, norm, None, 0, reference.FINITE, out[:100])
        assert (below, spoiled, counts.tolist()) == (0, 0, [300] * 40)
        assert out[100:].eq(-1).all()
        ends = torch.full((40,), reference.FINITE, dtype=torch.int32)
        below, _, counts = module.row_counts(weight, norm, None, 0 * ends, ends, out[:100])
        assert (below.tolist(), counts.tolist()) == ([0] * 40, [300] * 40)
        assert out[100:].eq(-1).all()


@pytest.mark.parametrize("data", INPUTS)
def test_tie_counts_and_cut_agree_with_the_reference(simd, dtype, data):
    for M, N in [(1, 1), (7, 200), (2, 2500)]:
        weight, norm = INPUTS[data](M, N).to(dtype), norms(N)
        for other in (None, normal(M, N, 3).to(dtype)):
            every = reference.keys(weight, norm, other)
            for key in {0, int(every.max()), int(every.flatten().median()), int(every.flatten().median()) + 1}:
                ties = reference.tie_counts(weight, norm, other, key)
                assert torch.equal(native.tie_counts(weight, norm, other, key), ties)
                for quota in (ties, ties // 2, torch.zeros_like(ties)):
                    for invert in (False, True):
                        wanted = reference.cut_mask(weight, norm, other, key, quota, invert)
                        mask, pruned = poisoned_mask(M, N), weight.clone()
                        native.cut(weight, norm, other, key, quota, invert, mask)
                        assert torch.equal(mask, reference.pack(wanted))
                        native.cut(pruned, norm, other, key, quota, invert, None)
                        assert_same_bits(pruned, removed(weight, wanted, other))


@pytest.mark.parametrize(("bm", "bn"), [(1, 1), (2, 5), (3, 64), (6, 20), (1, 320), (6, 320)])
def test_block_scores_sum_in_row_major_order(simd, dtype, bm, bn):
    weight, norm = normal(6, 320).to(dtype), norms(320)
    for other in (None, normal(6, 320, 3).to(dtype)):
        got = native.block_scores(weight, norm, other, bm, bn)
        assert_same_bits(got, reference.block_scores(weight, norm, other, bm, bn))


def test_masked_take_and_put_are_each_others_inverse(simd, dtype):
    for M, N in SHAPES:
        weight = normal(M, N).to(dtype)
        for marked in (weight > 0, weight > -9, weight > 9, torch.arange(N).expand(M, N) % 7 == 3):
            mask = reference.pack(marked)
            values = native.masked_take(weight, mask)
            assert_same_bits(values, reference.masked_take(weight, mask))
            changed = weight.clone()
            native.masked_put(changed, mask, None)
            assert_same_bits(changed, removed(weight, marked, None))
            native.masked_put(changed, mask, values)
            assert_same_bits(changed, weight)


def test_masked_put_refuses_values_that_do_not_fit():
    weight, mask = torch.ones(2, 8), torch.full((2, 1), 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"values must be .* \(4,\)"):
        native.masked_put(weight, mask, torch.zeros(5))
    with pytest.raises(ValueError, match="values must be"):
        native.masked_put(weight, mask, torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(weight, torch.ones(2, 8))


@pytest.mark.parametrize("width", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_fingerprint_is_the_sum_of_mixed_elements(simd, width):
    info = torch.iinfo(width)
    for size in (0, 1, 7, 1000):
        values = torch.randint(max(info.min, -(2**62)), min(info.max, 2**62), (size,), dtype=torch.int64).to(width)
        assert native.fingerprint(values) == reference.fingerprint(values)


def test_column_energy_is_close_to_float64(simd, dtype):
    for T, N in [(1, 1), (63, 5), (65, 1030), (1500, 7)]:
        x = normal(T, N).to(dtype)
        for keep in (
            None,
            torch.rand(T, generator=torch.Generator().manual_seed(2)) < 0.6,
            torch.zeros(T, dtype=torch.bool),
        ):
            wanted = reference.column_energy(x, keep)
            for layout in ("plain", "transposed", "sliced"):
                got = native.column_energy(strided(x, layout), keep)
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, wanted, rtol=4e-6, atol=0)


def test_column_energy_adds_token_after_token_in_groups_of_64(simd, dtype):
    for tokens, columns, layout in (
        (1, 5, "plain"),
        (200, 70, "plain"),
        (1300, 1030, "plain"),
        (150, 40, "transposed"),
    ):
        x = strided(normal(tokens, columns).to(dtype), layout)
        keep = torch.arange(tokens) % 5 != 2
        total = torch.zeros(columns, dtype=torch.float64)
        for slab in range(0, tokens, 1024):
            kept = x[slab : slab + 1024][keep[slab : slab + 1024]].float()
            part = torch.zeros(columns, dtype=torch.float64)
            for start in range(0, len(kept), 64):
                group = torch.zeros(columns)
                for row in kept[start : start + 64]:
                    group += row * row
                part += group
            total += part
        assert_same_bits(native.column_energy(x, keep), total.float())


def test_column_energy_skips_tokens_that_are_not_kept(simd, dtype):
    x = torch.full((70, 3), torch.nan, dtype=dtype)
    x[::7] = 2
    keep = torch.zeros(70, dtype=torch.bool)
    keep[::7] = True
    assert native.column_energy(x, keep).tolist() == [40.0] * 3


def test_neither_how_many_threads_nor_whose_they_are_changes_a_result(simd):
    M, N = 700, 1536
    weight = shifting_rows(M, N)
    weight[5] = 0.5
    norm, x = norms(N), normal(9000, 300)
    quota = torch.arange(M) % 3
    before = torch.get_num_threads()
    results = []
    try:
        # there is work for five: more must leave at once
        for threads, whose in itertools.product((1, 2, 5, 16), (nullcontext, native.use_own_threads)):
            torch.set_num_threads(threads)
            with whose():
                pruned, grouped = weight.clone(), weight.clone()
                native.prune_rows(pruned, norm, None, N // 2, False, None)
                native.prune_groups(grouped, norm, None, 2, 4, False, None)
                mask = poisoned_mask(M, N)
                native.cut(weight, norm, None, 0x3F000000, quota, False, mask)
                results.append(
                    [
                        pruned,
                        grouped,
                        mask.int(),
                        native.column_energy(x, None),
                        native.score_histogram(weight, norm, None, 0x3F000000, 16, 128),
                        native.block_scores(weight, norm, None, 7, 16),
                        native.masked_take(weight, mask),
                        torch.tensor(native.fingerprint(weight.view(torch.int32)) % 2**62),
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


def test_a_fork_does_not_wait_for_threads_it_does_not_have():
    code = """
import os, signal, numpy, torch
from hftcore.kernels import native
torch.set_num_threads(2)
weight, norm = torch.randn(1024, 1024), torch.ones(1024)
native.prune_rows(weight, norm, None, 512, False, None)
child = os.fork()
signal.alarm(60)
if not child:
    native.prune_rows(weight, norm, None, 600, False, None)
    os._exit(int(numpy.count_nonzero(weight.numpy()) != 1024 * 424))  # PyTorch would wait
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "0\n", told.stderr


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 700),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    st.sampled_from([2, 30, 10**6]),
    st.sampled_from(DTYPES),
)
def test_rows_of_any_shape_and_tail_keep_exactly_the_right_weights(M, N, seed, share, tail, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(M, N, generator=generator)
    weight = weight.sign() * weight.abs() ** (1 + tail / 4)
    weight = ((weight * levels).round() / levels).clamp(-6e4, 6e4).to(dtype)
    norm = torch.rand(N, generator=generator) ** (1 + tail)
    count = int(N * share)
    wanted = reference.pack(reference.row_mask(weight, norm, None, count, False))
    for name in native.simds():
        with native.use_simd(name):
            mask = poisoned_mask(M, N)
            native.prune_rows(weight, norm, None, count, False, mask)
            assert torch.equal(mask, wanted)


def test_values_chosen_to_defeat_the_samples_are_still_selected_exactly(simd):
    N = 4096
    weight = torch.rand(6, N, generator=torch.Generator().manual_seed(4)) + 1
    weight[:, :: N // 64] = 1e-20
    weight[1, 1 :: N // 64] = 1e20
    weight[2] = torch.exp2(torch.arange(N) % 250 - 125.0)
    weight[3] = torch.arange(1, N + 1).to(torch.int32).view(torch.float32)
    weight[4] = (0x3F800000 + torch.arange(N)).to(torch.int32).view(torch.float32).flip(0)
    norm = torch.ones(N)
    for count in (1, 2, 63, 64, 65, 1000, N // 2, N - 2, N - 1):
        wanted = reference.row_mask(weight, norm, None, count, False)
        mask = poisoned_mask(6, N)
        native.prune_rows(weight, norm, None, count, False, mask)
        assert torch.equal(mask, reference.pack(wanted))


def test_first_columns_that_mislead_about_a_row_change_nothing(simd, dtype):
    M, N, head = 8, 5000, 2048  # the columns from which a row's threshold is guessed
    alike = normal(M, N)
    cases = {
        name: alike.clone() for name in ("alike", "zero", "small", "by turns", "huge", "huge behind", "flat behind")
    }
    cases["zero"][:, :head] = 0
    cases["small"][:, :head] *= 1e-3
    cases["by turns"][1::2, :head] *= 20
    cases["huge"] = (alike.sign() * (1 + alike.abs())) * (1e37 if dtype != torch.float16 else 1e3)  # sums to infinity
    cases["huge behind"][:, head:] = cases["huge"][:, head:]
    cases["flat behind"][:, head:] = 0.5
    for weight in cases.values():
        weight = weight.to(dtype)
        for count in (0, 1, N // 10, N // 2, N - 1, N):
            wanted = reference.row_mask(weight, torch.ones(N), None, count, False)
            mask, pruned = poisoned_mask(M, N), weight.clone()
            assert native.prune_rows(weight, torch.ones(N), None, count, False, mask) == 0
            assert torch.equal(mask, reference.pack(wanted))
            assert native.prune_rows(pruned, torch.ones(N), None, count, False, None) == 0
            assert_same_bits(pruned, removed(weight, wanted, None))
        weight[M - 2, N - 1] = torch.nan  # where a guess from the rows before is at work
        before = weight.clone()
        assert native.prune_rows(weight, torch.ones(N), None, N // 2, False, None) == 1
        assert_same_bits(weight, before)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_many_short_rows_are_pruned_in_one_pass_or_left_alone(monkeypatch, simd, dtype, layout):
    monkeypatch.setattr(native, "MANY_ROWS", 500)
    for N in (32, 100, 2100):
        weight, other = strided(normal(700, N).to(dtype), layout), normal(700, N, 3).to(dtype)
        for reference_weight in (None, other):
            for invert in (False, True):
                wanted = reference.row_mask(weight, norms(N), reference_weight, N // 3, invert)
                pruned = strided(weight, layout)
                assert native.prune_rows(pruned, norms(N), reference_weight, N // 3, invert, None) == 0
                assert_same_bits(pruned, removed(weight, wanted, reference_weight))
        weight[[3, 698], N - 1] = torch.inf
        before = weight.clone()
        assert native.prune_rows(weight, norms(N) + 1, None, N // 3, False, None) == 2
        assert_same_bits(weight, before)


def test_very_wide_and_empty_matrices(simd):
    N = 70001
    weight, norm = normal(2, N), norms(N)
    wanted = reference.row_mask(weight, norm, None, 35000, False)
    for view in (weight.clone(), strided(weight, "transposed")):
        native.prune_rows(view, norm, None, 35000, False, None)
        assert_same_bits(view, removed(weight, wanted, None))
    for shape in ((0, 5), (5, 0), (0, 0)):
        empty, one = torch.empty(shape), torch.ones(shape[1])
        mask = torch.empty(shape[0], -(-shape[1] // 8), dtype=torch.uint8)
        assert native.prune_rows(empty, one, None, 0, False, None) == 0
        assert native.prune_rows(empty, one, None, 0, False, mask) == 0
        assert native.nonfinite(empty, one, None) == 0
        assert native.score_histogram(empty, one, None, 0, 20, 4).tolist() == [0] * 7
        assert native.tie_counts(empty, one, None, 0).tolist() == [0] * shape[0]
        assert native.masked_take(empty, mask).shape == (0,)
        native.masked_put(empty, mask, None)
        native.cut(empty, one, None, 0, torch.zeros(shape[0], dtype=torch.int64), False, None)
        assert native.column_energy(empty, None).tolist() == [0.0] * shape[1]


def test_autograd_notices_an_edit_of_a_saved_tensor():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    loss = weight.square().sum()
    with torch.no_grad():
        native.prune_rows(weight, torch.ones(8), None, 4, False, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unknown_paths_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="name must be one of portable"), native.use_simd("mmx"):
        pass
    monkeypatch.setenv("HFTCORE_SIMD", "mmx")
    with pytest.raises(ValueError, match="HFTCORE_SIMD must be one of portable"):
        native.simd()
    monkeypatch.setenv("HFTCORE_SIMD", "portable")
    assert native.simd() == "portable"


def test_an_install_without_a_compiler_still_succeeds(tmp_path):
    root = Path(__file__).resolve().parents[1]
    for name in ("setup.py", "kernels/native/native.cpp"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target)
    for name in ("hftcore", "kernels", "bindings", "bench"):
        (tmp_path / name).mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"],
        cwd=tmp_path,
        env={"PATH": "/nonexistent", "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
