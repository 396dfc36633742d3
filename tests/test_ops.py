"""The public ops: meaning by hand, every backend against the reference, edges, refusals, registration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, energies, weights

import hftcore
from hftcore import Pattern, ops
from hftcore.backend import BACKENDS, why_not
from hftcore.errors import HftcoreError
from hftcore.kernels import reference as meaning

HERE = [name for name in BACKENDS if why_not(name, "cpu") is None]
SHAPES = [(1, 1), (7, 1), (3, 33), (16, 64), (5, 130)]
PATTERNS = [
    Pattern("50%"),
    Pattern("10%", remove="highest"),
    Pattern("30%", scope="matrix"),
    Pattern("10%", scope="matrix", remove="highest"),
]


@pytest.fixture(params=HERE)
def backend(request):
    with hftcore.use_backend(request.param):
        yield request.param


def wanted(weight, energy, pattern, reference=None):
    """The mask by sorting, as booleans."""
    norm = energy.sqrt()
    rows, columns = weight.shape
    if pattern.scope == "matrix":
        return meaning.matrix_mask(weight, norm, reference, *pattern.low_count(rows * columns))
    if pattern.group:
        count, invert = pattern.low_count(pattern.group[1])
        return meaning.group_mask(weight, norm, reference, count, pattern.group[1], invert)
    return meaning.row_mask(weight, norm, reference, *pattern.low_count(columns))


def test_row_scope_by_hand(backend):
    """Scores 1 4 2 2 and 4 2 0 6: of the equal 2s the lower column goes first."""
    weight = torch.tensor([[1.0, 2.0, -2.0, 2.0], [4.0, 1.0, 0.0, 6.0]])
    energy = torch.tensor([1.0, 4.0, 1.0, 1.0])
    mask = ops.unpack_mask(ops.prune_mask(weight, energy, Pattern("50%")), 4)
    assert mask.tolist() == [[True, False, True, False], [False, True, True, False]]


def test_highest_removes_the_last_of_the_same_order(backend):
    """Of the equal scores 2 the higher column is the later one."""
    weight = torch.tensor([[2.0, -2.0, 1.0, 2.0]])
    mask = ops.unpack_mask(ops.prune_mask(weight, torch.ones(4), Pattern("50%", remove="highest")), 4)
    assert mask.tolist() == [[False, True, False, True]]


def test_matrix_scope_breaks_ties_in_row_major_order(backend):
    weight = torch.tensor([[5.0, 1.0], [1.0, 1.0]])
    mask = ops.unpack_mask(ops.prune_mask(weight, torch.ones(2), Pattern("50%", scope="matrix")), 2)
    assert mask.tolist() == [[False, True], [True, False]]


def test_blocks_by_hand(backend):
    """Sums of squares 4, 16 | 8, 2: the lowest half of the matrix's blocks, then of each row of blocks."""
    weight = torch.tensor([[2.0, 0.0, 4.0, 0.0], [2.0, 2.0, 1.0, 1.0]])
    matrix = ops.prune_mask(weight, torch.ones(4), Pattern("50%", scope="matrix", block=(1, 2)))
    assert ops.unpack_mask(matrix, 4).tolist() == [[True, True, False, False], [False, False, True, True]]
    rows = ops.prune_mask(weight, torch.ones(4), Pattern("50%", block=(2, 2)))
    assert ops.unpack_mask(rows, 4).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_gives_the_same_mask(backend, dtype, kind, pattern):
    rows, columns = (9, 37) if backend == "triton" else (33, 131)
    weight, energy = weights(kind, rows, columns, dtype), energies(columns)
    mask = ops.unpack_mask(ops.prune_mask(weight, energy, pattern), columns)
    assert torch.equal(mask, wanted(weight, energy, pattern))
    pruned = ops.prune_(weight.clone(), energy, pattern)
    assert torch.equal(pruned, weight.masked_fill(mask, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("remove", ["lowest", "highest"])
def test_counts_are_exact_at_the_edges(backend, shape, ratio, scope, remove):
    weight, energy = weights("few_values", *shape, torch.float32), energies(shape[1])
    pattern = Pattern(ratio, scope=scope, remove=remove)
    mask = ops.prune_mask(weight, energy, pattern)
    size = shape[0] * shape[1]
    assert ops.count_mask(mask) == (
        pattern.removed(size) if scope == "matrix" else shape[0] * pattern.removed(shape[1])
    )
    assert torch.equal(ops.unpack_mask(mask, shape[1]), wanted(weight, energy, pattern))


@pytest.mark.parametrize(
    "pattern", [Pattern("2:4"), Pattern("1:4", remove="highest"), Pattern("4:8"), Pattern("1:3")], ids=str
)
def test_groups_match_the_reference(backend, pattern):
    columns = 24 * 2
    weight, energy = weights("few_values", 5, columns, torch.bfloat16), energies(columns)
    mask = ops.unpack_mask(ops.prune_mask(weight, energy, pattern), columns)
    assert torch.equal(mask, wanted(weight, energy, pattern))
    assert torch.equal(ops.prune_(weight.clone(), energy, pattern), weight.masked_fill(mask, 0))


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern("2:4")], ids=str)
def test_strides_do_not_matter(backend, pattern):
    stored = weights("normal", 40, 24, torch.bfloat16)
    for weight in (stored.t(), stored[::2, ::3], stored.flip(0)):
        weight = weight[:, : weight.shape[1] // 4 * 4]
        energy = energies(weight.shape[1])
        mask = ops.prune_mask(weight, energy, pattern)
        assert torch.equal(mask, ops.prune_mask(weight.contiguous(), energy, pattern))
    view = stored.clone().t()
    energy = energies(40)
    expected = ops.prune_(view.contiguous(), energy, pattern)
    assert torch.equal(ops.prune_(view, energy, pattern), expected)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern("2:4"), Pattern("50%", block=(2, 4))], ids=str)
def test_removed_weights_take_the_value_of_the_reference(backend, pattern):
    aligned = weights("normal", 10, 16, torch.float32, seed=3)
    weight = aligned + weights("few_values", 10, 16, torch.float32)
    energy = energies(16)
    mask = ops.unpack_mask(ops.prune_mask(weight, energy, pattern, aligned), 16)
    pruned = ops.prune_(weight.clone(), energy, pattern, aligned)
    assert torch.equal(pruned, torch.where(mask, aligned, weight))
    if pattern.block is None:
        assert torch.equal(mask, wanted(weight, energy, pattern, aligned))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["row", "matrix"]),
    st.sampled_from(["lowest", "highest"]),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
)
def test_any_pattern_on_any_shape_matches_the_sort(rows, columns, ratio, scope, remove, kind, seed):
    weight, energy = weights(kind, rows, columns, torch.float32, seed), energies(columns, seed)
    pattern = Pattern(ratio, scope=scope, remove=remove)
    for name in HERE:
        if name != "triton":
            with hftcore.use_backend(name):
                mask = ops.unpack_mask(ops.prune_mask(weight, energy, pattern), columns)
            assert torch.equal(mask, wanted(weight, energy, pattern)), name


def test_a_misleading_sample_costs_passes_not_exactness(backend, monkeypatch):
    """The sample is told that all weights are tiny; the answer stays right."""
    from hftcore import selection

    def propose(*_):
        yield torch.zeros(1)
        return (1, 2), 600, True, False

    monkeypatch.setattr(selection, "_propose", propose)
    weight, energy = weights("normal", 20, 30, torch.float32), energies(30)
    pattern = Pattern("40%", scope="matrix")
    mask = ops.unpack_mask(ops.prune_mask(weight, energy, pattern), 30)
    assert torch.equal(mask, wanted(weight, energy, pattern))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern("2:4")], ids=str)
def test_empty_weights_are_left_alone(backend, shape, pattern):
    weight = torch.zeros(shape)
    assert ops.prune_(weight, torch.ones(shape[1]), pattern).shape == shape
    assert ops.count_mask(ops.prune_mask(weight, torch.ones(shape[1]), pattern)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern("2:4"), Pattern("50%", block=(2, 2))], ids=str)
def test_non_finite_weights_are_named_and_nothing_changes(backend, bad, pattern):
    weight = torch.ones(4, 8)
    weight[2, 5] = bad
    before = weight.clone()
    for op in (ops.prune_mask, ops.prune_):
        with pytest.raises(hftcore.NonFiniteError, match=r"weight\[2, 5\]"):
            op(weight, torch.ones(8), pattern)
        assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's notice inside Triton's interpreter
def test_an_overflowing_score_is_refused(backend):
    with pytest.raises(hftcore.NonFiniteError, match=r"weight\[0, 1\]"):
        ops.prune_mask(torch.tensor([[1.0, 3e38]]), torch.tensor([1.0, 1e4]), Pattern("50%"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(3), Pattern(0.5)), r"weight must be \[out_features, in_features\]"),
        ((torch.ones(2, 3), torch.ones(4), Pattern(0.5)), r"energy must be float32 of shape \(3,\).*got .*\(4,\)"),
        (
            (torch.ones(2, 3).double(), torch.ones(3), Pattern(0.5)),
            "weight must be float32, bfloat16 or float16, got torch.float64",
        ),
        ((torch.ones(2, 3), -torch.ones(3), Pattern(0.5)), "energy must be finite and not negative"),
        ((torch.ones(2, 3), torch.full((3,), float("nan")), Pattern(0.5)), "energy must be finite"),
        ((torch.ones(2, 6), torch.ones(6), Pattern("2:4")), "groups of 4, weight has 6"),
        ((torch.ones(2, 6), torch.ones(6), Pattern(0.5, block=(2, 4))), r"block \(2, 4\) does not divide"),
        ((torch.ones(2, 6), torch.ones(6), Pattern(0.5, scope="model")), "hftcore.prune"),
        ((torch.ones(2, 6), torch.ones(6), Pattern(0.5), torch.ones(2, 5)), "reference must have the shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(hftcore.HftcoreError, match=message):
        ops.prune_mask(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (300, 7), (2, 3, 64), (4, 100, 33)], ids=str)
def test_column_energy_matches_float64(backend, dtype, shape):
    x = torch.randn(shape).to(dtype)
    # at most 64 squares are added in float32 before the sum goes on in float64: 64 roundings of 2**-24
    torch.testing.assert_close(
        ops.column_energy(x).double(),
        x.double().square().flatten(0, -2).sum(0) if x.dim() > 1 else x.double().square(),
        rtol=64 * 2**-24,
        atol=0,
    )


def test_column_energy_skips_masked_tokens_whatever_they_hold(backend):
    x = torch.randn(3, 5, 8)
    mask = torch.rand(3, 5) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    x[0, 1] = float("nan")
    want = x.double()[mask].square().sum(0)
    torch.testing.assert_close(ops.column_energy(x, mask).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 3, 200])
def test_column_energy_has_the_same_bits_on_any_number_of_threads(backend, columns):
    if backend == "triton":
        pytest.skip("the interpreter uses no threads of ours")
    x = torch.randn(40_000 // columns, columns)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.column_energy(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_column_energy_refuses_what_it_cannot_read():
    with pytest.raises(hftcore.HftcoreError, match="x must be"):
        ops.column_energy(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(hftcore.HftcoreError, match=r"mask must be bool of shape \(2,\)"):
        ops.column_energy(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_masks_pack_and_unpack(backend):
    mask = torch.rand(5, 21) < 0.5
    packed = ops.pack_mask(mask)
    assert torch.equal(ops.unpack_mask(packed, 21), mask)
    assert ops.count_mask(packed) == int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_and_put_restore_every_bit(backend, dtype):
    stored = weights("normal", 21, 13, dtype)
    for weight in (stored, stored.t()):
        before = weight.clone()
        mask = ops.pack_mask(torch.rand(weight.shape) < 0.4)
        values = ops.masked_take(weight, mask)
        assert torch.equal(values, before[ops.unpack_mask(mask, weight.shape[1])])
        ops.masked_put_(weight, mask)
        assert not weight[ops.unpack_mask(mask, weight.shape[1])].any()
        ops.masked_put_(weight, mask, values)
        assert torch.equal(weight, before)


def test_the_strides_of_a_mask_do_not_matter(backend):
    weight = torch.randn(6, 21)
    packed = ops.pack_mask(torch.rand(6, 21) < 0.5)
    apart = torch.zeros(6, 7, dtype=torch.uint8)
    apart[:, 2:5] = packed
    for mask in (packed.t().contiguous().t(), apart[:, 2:5]):
        assert torch.equal(ops.masked_take(weight, mask), ops.masked_take(weight, packed))
        assert torch.equal(ops.masked_put_(weight.clone(), mask), ops.masked_put_(weight.clone(), packed))


def test_put_refuses_the_wrong_number_of_values():
    weight = torch.ones(2, 3)
    with pytest.raises(hftcore.HftcoreError, match=r"values must be .* of shape \(2,\)"):
        ops.masked_put_(weight, torch.tensor([[1], [1]], dtype=torch.uint8), torch.ones(3))
    assert torch.equal(weight, torch.ones(2, 3))


def test_fingerprints_agree_and_see_every_bit(backend):
    for tensor in (
        torch.randn(7, 9),
        torch.randn(7, 9).bfloat16(),
        torch.randn(3).double(),
        torch.empty(0),
        torch.tensor([200], dtype=torch.uint8),
    ):
        bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        assert ops.fingerprint(tensor).endswith(f":{meaning.fingerprint(bits):016x}")
    tensor = torch.randn(6, 6)
    first = ops.fingerprint(tensor)
    assert ops.fingerprint(tensor.t()) != first
    tensor[3, 3] = -tensor[3, 3]
    assert ops.fingerprint(tensor) != first


def test_registered_ops_pass_opcheck():
    x, weight, energy = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    torch.library.opcheck(torch.ops.hftcore.column_energy.default, (x, None))
    torch.library.opcheck(torch.ops.hftcore.prune_mask.default, (weight, energy, "0.5 row lowest", None))
    torch.library.opcheck(torch.ops.hftcore.prune_.default, (weight, energy, "2:4 row lowest", None))


def test_ops_work_inside_a_compiled_function():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, weight):
        energy = ops.column_energy(x)
        ops.prune_(weight, energy, "0.5 row lowest")
        return ops.prune_mask(weight * 2, energy, "0.25 matrix highest")

    x, weight = torch.randn(16, 8), torch.randn(4, 8)
    expected = ops.prune_(weight.clone(), ops.column_energy(x), Pattern(0.5))
    mask = step(x, weight)
    assert torch.equal(weight, expected)
    assert torch.equal(
        mask, ops.prune_mask(expected * 2, ops.column_energy(x), Pattern(0.25, scope="matrix", remove="highest"))
    )


def test_an_unknown_backend_lists_the_known_ones(monkeypatch):
    with pytest.raises(hftcore.HftcoreError, match="triton, native, torch"), hftcore.use_backend("cuda"):
        pass
    monkeypatch.setenv("HFTCORE_BACKEND", "fast")
    with pytest.raises(hftcore.HftcoreError, match="HFTCORE_BACKEND"):
        ops.column_energy(torch.ones(2, 2))


def test_an_expanded_weight_is_refused_in_place():
    weight = torch.randn(1, 8).expand(4, 8)
    with pytest.raises(HftcoreError, match=r"weight must have a place of its own.*strides \(0, 1\)"):
        ops.prune_(weight, torch.ones(8), "50%")
