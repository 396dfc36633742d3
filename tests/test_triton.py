"""The Triton kernels against the reference, bit for bit: in Triton's interpreter on the CPU, and on a GPU where there is one."""

import os
from functools import partial

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from inputs import DTYPES, KINDS, energies, weights

pytest.importorskip("triton")

from hftcore.kernels import launch, reference, triton_blocks, triton_energy, triton_matrix, triton_rows

# the interpreter computes with numpy, which remarks on the infinities and NaNs these tests put in on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

HAS_GPU = torch.cuda.is_available()
# where a GPU is, Triton compiles for it and nothing runs on CPU tensors
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def pruned(weight, other, removed):
    """By the contract: zero or the reference's value where removed, untouched bits elsewhere."""
    return torch.where(removed, torch.zeros_like(weight) if other is None else other, weight)


def case(kind, M, N, dtype, device=DEVICE, other=False):
    weight = weights(kind, M, N, dtype).to(device)
    near = (weights("few_values", M, N, dtype, seed=7).to(device) + weight) if other else None
    return weight, energies(N).sqrt().to(device), near


def check_removal(op, weight, other, want):
    """`op(weight, mask)` run both ways gives `want`; a mask leaves the weight alone, and so does a refusal."""
    before = bits(weight).clone()
    packed = torch.full((weight.shape[0], -(-weight.shape[1] // 8)), 255, dtype=torch.uint8, device=weight.device)
    result = op(weight, packed)
    assert torch.equal(packed, reference.pack(want))
    assert torch.equal(bits(weight), before)
    expected = weight.clone() if result else pruned(weight, other, want)
    assert op(weight, None) == result
    assert torch.equal(bits(weight), bits(expected))
    return result


def check_rows(weight, norm, other, count, invert):
    want = reference.row_mask(weight, norm, other, count, invert)

    def op(w, mask):
        return triton_rows.prune_rows(w, norm, other, count, invert, mask)

    assert check_removal(op, weight, other, want) == 0


def check_groups(weight, norm, other, n, m, invert):
    want = reference.group_mask(weight, norm, other, n, m, invert)

    def op(w, mask):
        return triton_rows.prune_groups(w, norm, other, n, m, invert, mask)

    assert check_removal(op, weight, other, want) == 0


def check_cut(weight, norm, other, count, invert):
    key = reference.keys(weight, norm, other)
    threshold = int(key.flatten().sort().values[count - 1])
    ties = triton_matrix.tie_counts(weight, norm, other, threshold)
    assert torch.equal(ties, reference.tie_counts(weight, norm, other, threshold))
    room = count - int((key < threshold).sum())
    quota = torch.minimum(ties, (room - (ties.cumsum(0) - ties)).clamp_min(0))
    want = reference.matrix_mask(weight, norm, other, count, invert)

    def op(w, mask):
        return triton_matrix.cut(w, norm, other, threshold, quota, invert, mask)

    check_removal(op, weight, other, want)


def test_rows_by_hand():
    """Scores 3, 2, 8, 2: the first of the two ties goes first; kept weights keep their sign and value."""
    weight = torch.tensor([[-3.0, 1.0, 2.0, 2.0]], device=DEVICE)
    norm = torch.tensor([1.0, 2.0, 4.0, 1.0], device=DEVICE)
    assert triton_rows.prune_rows(weight, norm, None, 1, False, None) == 0
    assert weight.tolist() == [[-3.0, 0.0, 2.0, 2.0]]
    mask = torch.zeros(1, 1, dtype=torch.uint8, device=DEVICE)
    assert triton_rows.prune_rows(weight, norm, None, 2, True, mask) == 0
    assert mask.tolist() == [[0b0101]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_remove_what_a_stable_sort_would(kind, dtype):
    M, N = 5, 67
    for count in (0, 1, 33, 67) if dtype == torch.bfloat16 else (33,):
        check_rows(*case(kind, M, N, dtype), count, invert=count % 2 == 0)
    check_rows(*case(kind, M, N, dtype, other=True), 20, invert=False)


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (3, 2), (1, 16), (2, 17), (70, 8), (4, 256), (3, 1025)], ids=str)
def test_rows_of_every_width(shape):
    for invert in (False, True):
        check_rows(*case("normal", *shape, torch.bfloat16), (shape[1] + 1) // 2, invert)


@pytest.mark.parametrize("tile", [(1, 32, 1), (4, 64, 2), (8, 128, 4), (2, 256, 8)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "few_values", "half_zeros", "outlier"])
def test_no_launch_number_changes_a_row(tile, kind, monkeypatch):
    """Tiles narrower than the row take the looped form, the others keep it in registers."""
    monkeypatch.setattr(launch, "row_tile", lambda *_: launch.Tile(*tile))
    check_rows(*case(kind, 7, 130, torch.bfloat16, other=kind == "normal"), 61, invert=True)
    check_rows(*case(kind, 7, 130, torch.float32), 13, invert=False)


def test_strides_do_not_matter():
    """A transposed weight, a slice of columns and every second row; their neighbours are not touched."""
    for take in (lambda w: w.t(), lambda w: w[:, 3:40], lambda w: w[::2], lambda w: w.t()[1:, ::3]):
        whole = weights("few_values", 48, 56, torch.bfloat16).to(DEVICE)
        expected = whole.clone()
        view, want = take(whole), take(expected)
        norm = energies(view.shape[1]).sqrt().to(DEVICE)
        other = weights("normal", view.shape[1], view.shape[0], torch.bfloat16).to(DEVICE).t()
        want.copy_(pruned(want, other, reference.row_mask(want, norm, other, 9, False)))
        assert triton_rows.prune_rows(view, norm, other, 9, False, None) == 0
        assert torch.equal(bits(whole), bits(expected))
        columns = view.shape[1] // 4 * 4
        check_groups(view[:, :columns], norm[:columns], None, 2, 4, False)
        check_cut(view, norm, None, view.numel() // 3, True)
        got = triton_energy.column_energy(view, None)
        torch.testing.assert_close(got, reference.column_energy(view, None), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_spoiled_rows_and_groups_are_counted_and_stop_a_change_in_place(bad, monkeypatch):
    for tile in (None, (2, 32, 1)):
        if tile:
            monkeypatch.setattr(launch, "row_tile", lambda *_: launch.Tile(2, 32, 1))
        weight, norm, _ = case("normal", 5, 72, torch.float32)
        norm[17] = norm[70] = 1
        weight[1, 17] = weight[4, 70] = weight[4, 17] = bad
        want = reference.row_mask(weight.nan_to_num(), norm, None, 30, False)
        want[[1, 4]] = False
        prune = partial(triton_rows.prune_rows, norm=norm, reference=None, count=30, invert=False)
        assert check_removal(lambda w, mask, prune=prune: prune(w, mask=mask), weight.clone(), None, want) == 2
    want = reference.group_mask(weight.nan_to_num(), norm, None, 2, 4, True)
    for row, column in ((1, 16), (4, 68), (4, 16)):
        want[row, column : column + 4] = False

    def op(w, mask):
        return triton_rows.prune_groups(w, norm, None, 2, 4, True, mask)

    assert check_removal(op, weight.clone(), None, want) == 3


@pytest.mark.parametrize(("bm", "bn"), [(1, 1), (2, 3), (16, 16), (3, 20), (1, 60)])
def test_block_scores_sum_in_row_major_order(bm, bn):
    for dtype in (torch.float32, torch.bfloat16):
        weight, norm, other = case("normal", min(48, 6 * bm), 240, dtype, other=True)
        for view, near in ((weight, None), (weight, other), (weight.t().contiguous().t(), other)):
            got = triton_blocks.block_scores(view, norm, near, bm, bn)
            assert torch.equal(got, reference.block_scores(view, norm, near, bm, bn))


def test_a_product_that_overflows_spoils_its_row():
    weight = torch.full((2, 8), 1.0, device=DEVICE)
    weight[1, 3] = 3e38
    norm = torch.full((8,), 2.0, device=DEVICE)
    mask = torch.empty(2, 1, dtype=torch.uint8, device=DEVICE)
    assert triton_rows.prune_rows(weight, norm, None, 4, False, mask) == 1
    assert mask.flatten().tolist() == [0b1111, 0]
    assert triton_rows.prune_rows(weight, norm, None, 4, False, None) == 1
    assert weight.count_nonzero() == 16


def test_denormal_scores_keep_their_order():
    """Products below the smallest normal float32, all different: flushing them to zero would make them ties."""
    weight = torch.arange(64, 0, -1, device=DEVICE)[None].float() * 2.0**-140
    norm = torch.full((64,), 0.5, device=DEVICE)
    assert triton_rows.prune_rows(weight, norm, None, 32, False, None) == 0
    assert (weight[0] == 0).tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize(
    ("n", "m", "N"), [(2, 4, 72), (1, 2, 66), (4, 8, 64), (3, 7, 70), (10, 20, 100), (16, 64, 128)]
)
def test_groups_remove_what_a_stable_sort_would(n, m, N):
    for dtype, kind in ((torch.bfloat16, "few_values"), (torch.float32, "denormal"), (torch.float16, "normal")):
        for invert in (False, True):
            check_groups(*case(kind, 3, N, dtype, other=kind == "normal"), n, m, invert)


def test_histograms_count_every_key():
    for kind, dtype in (("normal", torch.bfloat16), ("few_values", torch.float32), ("denormal", torch.float16)):
        weight, norm, other = case(kind, 7, 131, dtype, other=kind == "normal")
        weight[2, 5], weight[6, 130] = float("nan"), float("inf")
        middle = int(reference.keys(weight, norm, other).flatten().median())
        for low, shift, bins in ((0, 20, 2048), (middle - 5000, 6, 256), (middle, 0, 1), (0x7F000000, 22, 8)):
            got = triton_matrix.score_histogram(weight, norm, other, low, shift, bins)
            assert got.dtype == torch.int64
            key = reference.keys(weight, norm, other).flatten().long()
            finite = key[key < reference.FINITE]
            want = torch.bincount((((finite - low) >> shift) + 1).clamp(0, bins + 1), minlength=bins + 3)
            want[bins + 2] = len(key) - len(finite)
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_removes_what_a_stable_sort_of_the_matrix_would(kind):
    for dtype, invert in ((torch.bfloat16, False), (torch.float32, True)):
        for count in (1, 200, 5 * 67):
            check_cut(*case(kind, 5, 67, dtype, other=dtype == torch.float32), count, invert)


def test_energy_is_the_sum_of_squares_of_kept_tokens():
    for dtype in DTYPES:
        x = weights("heavy_tails", 333, 70, dtype).to(DEVICE)
        keep = torch.rand(333, device=DEVICE) < 0.6
        x[~keep] = float("nan")
        got = triton_energy.column_energy(x, keep)
        # at most 64 float32 additions of positive terms: half a unit in the last place each
        torch.testing.assert_close(got.double(), x[keep].double().square().sum(0), rtol=64 * 2.0**-24, atol=1e-37)
        assert torch.equal(got, triton_energy.column_energy(x, keep))
    assert triton_energy.column_energy(x, torch.zeros_like(keep)).tolist() == [0.0] * 70


def test_empty_tensors_launch_nothing():
    for M, N in ((0, 4), (3, 0)):
        weight, norm = torch.empty(M, N, device=DEVICE), torch.empty(N, device=DEVICE)
        mask = torch.zeros(M, -(-N // 8), dtype=torch.uint8, device=DEVICE)
        assert triton_rows.prune_rows(weight, norm, None, 0, False, mask) == 0
        assert triton_rows.prune_groups(weight, norm, None, 2, 4, False, None) == 0
        assert triton_matrix.score_histogram(weight, norm, None, 0, 0, 4).tolist() == [0] * 7
        assert triton_matrix.tie_counts(weight, norm, None, 5).tolist() == [0] * M
        quota = torch.zeros(M, dtype=torch.int64, device=DEVICE)
        assert triton_matrix.cut(weight, norm, None, 5, quota, False, None) is None
        assert triton_energy.column_energy(weight, None).tolist() == [0.0] * N


@pytest.mark.gpu
@needs_gpu
class TestOnADevice:
    """What the interpreter cannot show: races, real launch numbers, large matrices."""

    @pytest.mark.parametrize(
        "shape", [(4096, 256), (300, 4096), (256, 4097), (128, 11008), (64, 28672), (9, 65536)], ids=str
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_rows(self, shape, dtype):
        for kind in KINDS:
            check_rows(*case(kind, *shape, dtype, "cuda", other=kind == "normal"), shape[1] // 2, invert=False)
        check_rows(*case("few_values", *shape, dtype, "cuda"), shape[1] // 10, invert=True)

    def test_transposed_rows(self):
        weight, _, _ = case("normal", 4096, 1030, torch.bfloat16, "cuda")
        check_rows(weight.t(), energies(4096).sqrt().cuda(), None, 2048, invert=False)

    @pytest.mark.parametrize("m", [2, 4, 8, 16, 64])
    def test_large_groups(self, m):
        check_groups(*case("few_values", 1000, 4096, torch.bfloat16, "cuda"), m // 2, m, invert=False)

    @pytest.mark.parametrize("kind", KINDS)
    def test_large_matrices(self, kind):
        check_cut(*case(kind, 515, 11008, torch.bfloat16, "cuda", other=kind == "normal"), 2_000_003, invert=False)
        weight, norm, _ = case(kind, 515, 11008, torch.bfloat16, "cuda")
        for low, shift, bins in ((0, 13, 1 << 18), (0x3F000000, 8, 1 << 12)):
            got = triton_matrix.score_histogram(weight, norm, None, low, shift, bins)
            assert torch.equal(got, reference.score_histogram(weight, norm, None, low, shift, bins))

    def test_more_than_2_to_the_31_weights(self):
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("needs 24 GiB of free device memory")
        M, N = (1 << 19) + 8, 4096
        weight = torch.ones(M, N, dtype=torch.bfloat16, device="cuda")
        norm = torch.ones(N, device="cuda")
        assert triton_rows.prune_rows(weight, norm, None, N // 2, False, None) == 0
        assert bool((weight[:, : N // 2] == 0).all())
        assert bool((weight[:, N // 2 :] == 1).all())
        assert int(triton_matrix.tie_counts(weight, norm, None, 0).sum()) == M * N // 2

    def test_energy_of_many_tokens(self):
        x = torch.randn(20_000, 4096, dtype=torch.bfloat16, device="cuda")
        got = triton_energy.column_energy(x, None)
        torch.testing.assert_close(got.double(), x.double().square().sum(0), rtol=64 * 2.0**-24, atol=0)
        assert torch.equal(got, triton_energy.column_energy(x, None))
