"""Likelihoods of labels without their logits: the meaning, the gradients, the memory, the refusals, and the fused kernel."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hftcore import ops, use_backend
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.kernels import launch, likelihood, native, native_likelihood
from hftcore.ops.likelihood import sequence_logprobs, weighted_cross_entropy

# Of one log-likelihood. float32 inputs are exact, and logits of size z lose about z * sqrt(D) * 2**-24 in their sums. bfloat16 inputs
# are exact in float32 too (8 bits times 8 bits), so nothing wider is needed for them: the logits are never rounded to bfloat16.
TOLERANCE = 2e-5


@pytest.fixture
def small_tiles(monkeypatch):
    """Several bands of the vocabulary and several blocks of tokens, the last of each a short one, in plain PyTorch."""
    monkeypatch.setattr(likelihood, "TOKENS", 3)
    monkeypatch.setattr(likelihood, "scratch", lambda *_: 21)
    with use_backend("torch"):
        yield


def inputs(B=3, T=6, D=5, V=17, dtype=torch.float64, seed=0, labelled=0.6):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (B, T), generator=draw)
    labels[torch.rand(B, T, generator=draw) > labelled] = -100
    hidden = torch.randn(B, T, D, generator=draw).to(dtype)
    return hidden, torch.randn(V, D, generator=draw).to(dtype), labels, torch.randn(V, generator=draw).to(dtype)


def slowly(hidden, head, labels, bias=None, soft_cap=None, shift=True):
    """One token at a time, in float64 Python sums."""
    sums, counts = [], []
    for states, row in zip(hidden.double().tolist(), labels.tolist(), strict=True):
        total, count = 0.0, 0
        for state, label in zip(states, row[1:], strict=False) if shift else zip(states, row, strict=True):
            if label == -100:
                continue
            logits = [math.fsum(a * b for a, b in zip(state, w, strict=True)) for w in head.double().tolist()]
            if bias is not None:
                logits = [z + b for z, b in zip(logits, bias.tolist(), strict=True)]
            if soft_cap is not None:
                logits = [soft_cap * math.tanh(z / soft_cap) for z in logits]
            total += logits[label] - math.log(math.fsum(math.exp(z) for z in logits))
            count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def plain_loss(hidden, head, labels, weights, bias, soft_cap, denominator):
    """What a Trainer would write, in the dtype of its arguments."""
    logits = hidden[:, :-1] @ head.T
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return (weights * each.sum(1)).sum() / denominator


def test_hand_computed_numbers():
    """Logits (0, ln 3) give likelihoods 1/4 and 3/4."""
    hidden = torch.tensor([[[1.0], [1.0], [7.0]], [[1.0], [1.0], [7.0]]])
    head = torch.tensor([[0.0], [math.log(3.0)]])
    sums, counts = sequence_logprobs(hidden, head, torch.tensor([[0, 1, 0], [1, -100, 1]]))
    torch.testing.assert_close(sums, torch.tensor([3 / 16, 3 / 4]).log())
    assert counts.tolist() == [2, 1]
    assert sums.dtype == torch.float32
    assert counts.dtype == torch.int64


def test_soft_cap_and_bias_by_hand():
    hidden, head, bias = torch.ones(1, 1, 1), torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 1.0])
    sums, _ = sequence_logprobs(hidden, head, torch.tensor([[1]]), bias, soft_cap=2.0, shift=False)
    capped = 2 * math.tanh(1.5)
    assert sums.item() == pytest.approx(capped - math.log(1 + math.exp(capped)), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_one_token_at_a_time(small_tiles, shift, soft_cap, with_bias):
    hidden, head, labels, bias = inputs()
    bias = bias if with_bias else None
    sums, counts = sequence_logprobs(hidden, head, labels, bias, soft_cap, shift)
    expected, expected_counts = slowly(hidden, head, labels, bias, soft_cap, shift)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-12)
    assert counts.tolist() == expected_counts


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 7),
    D=st.integers(1, 9),
    V=st.integers(1, 40),
    labelled=st.sampled_from([0.0, 0.3, 1.0]),
    tokens=st.integers(1, 9),
    scratch=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_shape_give_the_reference(B, T, D, V, labelled, tokens, scratch, seed):
    hidden, head, labels, bias = inputs(B, T, D, V, seed=seed, labelled=labelled)
    rows, target = hidden.reshape(-1, D), labels.reshape(-1).clamp(min=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "TOKENS", tokens)
        patch.setattr(likelihood, "scratch", lambda *_: scratch)
        logprobs, lse = likelihood.token_logprobs(rows, head, target, bias, 3.0)
        sums, counts = sequence_logprobs(hidden, head, labels, bias, 3.0)
    expected = likelihood.reference_logprobs(rows, head, target, bias, 3.0)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, likelihood.reference_logits(rows, head, bias, 3.0).logsumexp(1))
    kept = (labels != -100)[:, 1:]
    torch.testing.assert_close(sums, masked_sum(hidden, head, labels, bias, 3.0))
    assert counts.tolist() == kept.sum(1).tolist()


def masked_sum(hidden, head, labels, bias, soft_cap):
    logits = likelihood.reference_logits(hidden[:, :-1].flatten(0, 1), head, bias, soft_cap)
    every = logits.log_softmax(-1).view(*labels[:, 1:].shape, head.shape[0])
    chosen = every.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels[:, 1:] == -100, 0).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_lose_nothing_before_the_logarithm(small_tiles, dtype):
    hidden, head, labels, bias = inputs(B=2, T=20, D=64, V=300, dtype=dtype)
    sums, counts = sequence_logprobs(hidden, head, labels, bias, soft_cap=30.0)
    expected, _ = slowly(hidden, head, labels, bias, 30.0)
    assert sums.dtype == torch.float32
    assert ((sums - torch.tensor(expected)).abs() / counts).max() < TOLERANCE


def test_a_reordered_vocabulary_changes_nothing(small_tiles):
    hidden, head, labels, bias = inputs(dtype=torch.float32)
    order = torch.randperm(17)
    moved = torch.where(labels == -100, -100, order.argsort()[labels.clamp(min=0)])
    torch.testing.assert_close(
        sequence_logprobs(hidden, head, labels, bias)[0], sequence_logprobs(hidden, head[order], moved, bias[order])[0]
    )


def test_large_logits_do_not_overflow():
    hidden, head = torch.full((1, 2, 1), 1e4), torch.tensor([[1.0], [0.999], [-1.0]])
    sums, _ = sequence_logprobs(hidden, head, torch.tensor([[-100, 1]]))
    assert sums.item() == pytest.approx(-10.0, abs=1e-2)


def test_a_bias_may_mask_whole_parts_of_the_vocabulary(small_tiles):
    hidden, head, labels, bias = inputs(V=30)
    bias[:16] = -math.inf
    labels = torch.where(labels == -100, -100, 16 + labels % 14)
    masked = sequence_logprobs(hidden, head, labels, bias)[0]
    alone = sequence_logprobs(hidden, head[16:], torch.where(labels == -100, -100, labels - 16), bias[16:])[0]
    torch.testing.assert_close(masked, alone)


def test_a_sample_without_labels_counts_zero_and_what_it_holds_is_not_looked_at():
    hidden, head, labels, _ = inputs(dtype=torch.float32, labelled=1.0)
    labels[1] = -100
    hidden[1] = math.nan
    sums, counts = sequence_logprobs(hidden, head, labels)
    assert sums[1].item() == 0
    assert counts.tolist() == [5, 0, 5]
    assert sums.isfinite().all()


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0), (2, 1)])
def test_nothing_to_predict_gives_zeros_and_zero_gradients(B, T):
    hidden, head = torch.zeros(B, T, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    sums, counts = sequence_logprobs(hidden, head, torch.zeros(B, T, dtype=torch.int64))
    assert sums.tolist() == [0.0] * B
    assert counts.tolist() == [0] * B
    weighted_cross_entropy(hidden, head, torch.zeros(B, T, dtype=torch.int64), torch.ones(B)).backward()
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_any_strides_are_welcome(small_tiles):
    hidden, head, labels, _ = inputs(dtype=torch.float32)
    other = sequence_logprobs(hidden.transpose(0, 1).contiguous().transpose(0, 1), head.T.contiguous().T, labels)
    torch.testing.assert_close(other[0], sequence_logprobs(hidden, head, labels)[0])


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_finite_differences(small_tiles, soft_cap, with_bias):
    hidden, head, labels, bias = inputs(B=2, T=4, D=3, V=8)
    free = [hidden.requires_grad_(), head.requires_grad_()] + ([bias.requires_grad_()] if with_bias else [])
    weights = torch.tensor([0.3, -1.7], dtype=torch.float64)

    def loss(hidden, head, bias=None):
        return weighted_cross_entropy(hidden, head, labels, weights, bias, soft_cap, normalize=0.7)

    def sums(hidden, head, bias=None):
        return sequence_logprobs(hidden, head, labels, bias, soft_cap)[0]

    assert torch.autograd.gradcheck(loss, free)
    assert torch.autograd.gradcheck(sums, free)


# Of the largest entry of a gradient. float32: sums of some hundred terms. bfloat16: the gradient is rounded to 8 bits when it is stored
# and when a logit's gradient is multiplied; twice 2**-9, and a little for sums.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_loss_and_gradients_equal_the_plain_computation(small_tiles, dtype, soft_cap):
    hidden, head, labels, bias = inputs(B=4, T=9, D=32, V=100, dtype=dtype)
    weights = torch.tensor([0.1, 0.5, 0.0, 0.4])
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, head, bias)]
    loss = weighted_cross_entropy(*ours[:2], labels, weights, ours[2], soft_cap)
    loss.backward()
    truth = [tensor.double().requires_grad_() for tensor in (hidden, head, bias)]
    denominator = (weights * (labels[:, 1:] != -100).sum(1)).sum().clamp(min=1)
    expected = plain_loss(*truth[:2], labels, weights, truth[2], soft_cap, denominator)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, right in zip(ours, truth, strict=True):
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - right.grad).abs().max() < GRADIENT_TOLERANCE[dtype] * right.grad.abs().max()


@pytest.fixture(params=native.simds())
def simd(request):
    with native.use_simd(request.param):
        yield request.param


# S, V, D: one of each; less than a block; a tile of tokens, a band of the vocabulary, a chunk of features, and a bit more of each;
# as many as there are in a tile and in two bands; an odd number of features over several vectors
NATIVE_SHAPES = [(1, 1, 1), (3, 5, 2), (97, 193, 513), (96, 384, 32), (33, 1000, 1031)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_native_likelihoods_match_the_reference(shape, dtype, with_bias, simd):
    S, V, D = shape
    hidden, head, target, bias = inputs(1, S, D, V, dtype, labelled=1.0)
    rows, target, bias = 3 * hidden[0], target[0], bias.float() if with_bias else None
    found, lse = native_likelihood.token_logprobs(rows, head, target, bias)
    want = likelihood.reference_logprobs(rows, head, target, bias, None)
    top = likelihood.reference_logits(rows, head, bias, None)
    assert found.dtype == lse.dtype == torch.float64
    # sums of up to 1031 products in float32, of logits up to 300
    torch.testing.assert_close(found, want, rtol=2e-6, atol=2e-6 * float(top.abs().max()))
    torch.testing.assert_close(lse, top.logsumexp(1), rtol=2e-6, atol=2e-6)


def test_native_exponentials_are_right_to_two_units_in_the_last_place(simd):
    """log(1 + exp(-x)) of x in steps over all fractions of a power of two, and where exp(-x) vanishes."""
    x = torch.cat((torch.linspace(0, 3, 400), torch.linspace(3, 200, 100)))
    _, lse = native_likelihood.token_logprobs(x[:, None], torch.tensor([[0.0], [-1.0]]), torch.zeros(500).long(), None)
    torch.testing.assert_close(lse, x.double().neg().exp().log1p(), rtol=0, atol=2 * 2**-23)


def test_native_likelihoods_read_strided_rows_and_are_the_same_on_any_number_of_threads(simd):
    hidden, head, labels, bias = inputs(1, 300, 65, 700, torch.float32, labelled=1.0)
    wide = torch.zeros(2 * 700, 70)[::2, 3:68]
    wide.copy_(head)
    before, found = torch.get_num_threads(), []
    try:
        for threads, of in ((1, head), (2, wide), (3, head)):
            torch.set_num_threads(threads)
            found.append(native_likelihood.token_logprobs(hidden[0], of, labels[0], bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in found for one, other in zip(found[0], result, strict=True))


def test_native_likelihoods_of_masked_bands_infinity_and_nan(simd):
    """NaN and infinity come out as such; what a bias masks counts nothing, also a whole band."""
    hidden, head, labels, bias = inputs(1, 5, 7, 500, torch.float32, labelled=1.0)
    rows, target = hidden[0], 400 + labels[0] % 100
    bias[:400] = -math.inf
    found, _ = native_likelihood.token_logprobs(rows, head, target, bias)
    alone, _ = native_likelihood.token_logprobs(rows, head[400:], target - 400, bias[400:])
    torch.testing.assert_close(found, alone)
    masked, _ = native_likelihood.token_logprobs(rows, head, target, torch.full((500,), -math.inf))
    assert not masked.isfinite().any()
    low, _ = native_likelihood.token_logprobs(
        torch.ones(1, 1), torch.tensor([[-500.0], [-501.0]]), torch.tensor([1]), None
    )
    assert low.item() == pytest.approx(-1 - math.log1p(math.exp(-1)), rel=1e-6)
    for odd in (math.nan, math.inf):
        spoiled = rows.clone()
        spoiled[2, 3] = odd
        found, lse = native_likelihood.token_logprobs(spoiled, head, target, None)
        assert found.isfinite().tolist() == lse.isfinite().tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native_gradients_match_those_of_the_reference(shape, dtype, simd, monkeypatch):
    S, V, D = shape
    hidden, head, labels, bias = inputs(1, S, D, V, dtype, labelled=1.0)
    coefficient = torch.linspace(-1, 2, S)
    free = [tensor.double().requires_grad_() for tensor in (hidden[0], head, bias)]
    (coefficient * likelihood.reference_logprobs(*free[:2], labels[0], free[2], None)).sum().backward()
    monkeypatch.setattr(native_likelihood, "scratch", lambda *_: 200 * S)  # several products
    _, lse = native_likelihood.token_logprobs(hidden[0], head, labels[0], bias)
    given = hidden[0], head, labels[0], bias, None, lse, coefficient
    found = native_likelihood.token_gradients(*given, (True, True, True))
    # as above; float16 is stored with 10 bits
    close = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for got, want, like in zip(found, free, (hidden, head, bias), strict=True):
        assert got.dtype == like.dtype
        torch.testing.assert_close(got.double(), want.grad, rtol=0, atol=close * float(want.grad.abs().max()) + 1e-7)
    for alone in range(3):
        wanted = tuple(place == alone for place in range(3))
        again = native_likelihood.token_gradients(*given, wanted)
        assert [one is not None for one in again] == list(wanted)
        assert torch.equal(again[alone], found[alone])


def test_native_likelihoods_are_taken_where_they_are_faster(monkeypatch):
    if native.simd() == "portable":
        pytest.skip("no native library, or a processor without AVX2")
    taken = []
    compute = native_likelihood.token_logprobs
    monkeypatch.setattr(native_likelihood, "token_logprobs", lambda *a: taken.append(1) or compute(*a))
    for dtype, soft_cap, transposed, backend, expected in (
        (torch.float32, None, False, "native", 1),
        (torch.float64, None, False, "native", 0),
        (torch.float32, 3.0, False, "native", 0),
        (torch.float32, None, True, "native", 0),
        (torch.float32, None, False, "torch", 0),
    ):
        hidden, head, labels, _ = inputs(dtype=dtype)
        head = head.T.contiguous().T if transposed else head
        taken.clear()
        with use_backend(backend):
            sequence_logprobs(hidden, head, labels, soft_cap=soft_cap)
        assert len(taken) == expected, (dtype, soft_cap, transposed, backend)


def test_unit_weights_give_the_token_mean_of_transformers():
    hidden, head, labels, _ = inputs(dtype=torch.float32)
    logits = (hidden @ head.T)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(weighted_cross_entropy(hidden, head, labels, torch.ones(3)), expected)


def test_denominators():
    hidden, head, labels, _ = inputs(dtype=torch.float32)
    weights = torch.tensor([0.01, 0.02, 0.03])
    sums, counts = sequence_logprobs(hidden, head, labels)
    total = -(weights * sums).sum()
    assert (weights * counts).sum() < 1

    def loss(normalize):
        return weighted_cross_entropy(hidden, head, labels, weights, normalize=normalize)

    torch.testing.assert_close(loss("sum"), total)
    torch.testing.assert_close(loss("weighted-tokens"), total)  # the published code never divides by less than 1
    torch.testing.assert_close(loss(4), total / 4)
    torch.testing.assert_close(loss(torch.tensor(4)), total / 4)
    torch.testing.assert_close(
        weighted_cross_entropy(hidden, head, labels, 100 * weights), total / (weights * counts).sum()
    )


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch):
    hidden, head, labels, bias = inputs()
    asked = []
    compute = likelihood.token_gradients
    monkeypatch.setattr(likelihood, "token_gradients", lambda *a: asked.append(a[-1]) or compute(*a))
    sums, _ = sequence_logprobs(hidden.requires_grad_(), head, labels, bias)
    sums.sum().backward()
    assert asked == [(True, False, False)]
    assert head.grad is None


def test_second_derivatives_are_refused():
    """Autograd would go on with the gradients as constants, and a penalty on them would have none."""
    hidden, head, labels, _ = inputs()
    sums, _ = sequence_logprobs(hidden.requires_grad_(), head, labels)
    with pytest.raises(HftcoreError, match="likelihoods have no second derivatives; leave create_graph out"):
        torch.autograd.grad(sums.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_labels_may_be_int32_and_the_bias_of_any_float_dtype(backend):
    if backend == "native" and not native.available():
        pytest.skip(native.reason())
    hidden, head, labels, bias = inputs(dtype=torch.float32)
    strided = labels.int().T.contiguous().T
    with use_backend(backend):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            narrow = bias.to(dtype).requires_grad_()
            sums, _ = sequence_logprobs(hidden, head, strided, narrow)
            torch.testing.assert_close(
                sums.double(), masked_sum(hidden, head, labels, narrow.detach(), None), rtol=1e-5, atol=1e-5
            )
            (gradient,) = torch.autograd.grad(sums.sum(), narrow)
            assert gradient.dtype == dtype
            assert gradient.any()


def test_the_default_dtype_is_no_part_of_it():
    hidden, head, labels, _ = inputs(dtype=torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        free = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        torch.set_default_dtype(dtype)
        try:
            loss = weighted_cross_entropy(*free, labels, torch.ones(3, dtype=torch.float32))
            found.append((loss, *torch.autograd.grad(loss, free)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_are_constants():
    hidden, head, labels, _ = inputs()
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    weighted_cross_entropy(hidden.requires_grad_(), head, labels, weights).backward()
    assert weights.grad is None


def test_autocast_does_not_reach_inside():
    hidden, head, labels, _ = inputs(D=64, V=100, dtype=torch.float32)
    hidden.requires_grad_()
    outside = sequence_logprobs(hidden, head, labels)[0]
    (gradient,) = torch.autograd.grad(outside.sum(), hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sequence_logprobs(hidden, head, labels)[0]
        (gradient_inside,) = torch.autograd.grad(inside.sum(), hidden)
    assert torch.equal(inside, outside)
    assert torch.equal(gradient_inside, gradient)


def test_the_precision_setting_of_the_process_is_put_back(monkeypatch):
    hidden, head, labels, _ = inputs(dtype=torch.bfloat16)
    before = torch.backends.mkldnn.matmul.fp32_precision

    def fail(*args):
        raise RuntimeError("no more memory")

    with use_backend("torch"):
        sequence_logprobs(hidden, head, labels)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    monkeypatch.setattr(likelihood, "multiply", fail)
    with use_backend("torch"), pytest.raises(RuntimeError, match="no more memory"):
        sequence_logprobs(hidden, head, labels)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_scratch_allows(dtype):
    """The largest allocation at V = 49,152 against that of the logits; a hook sees every output of every torch operation."""
    B, T, D, V = 1, 65, 16, 49152
    hidden, head, labels, _ = inputs(B, T, D, V, dtype, labelled=1.0)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != head.untyped_storage().data_ptr():
                self.size = max(self.size, out.untyped_storage().nbytes())
            return out

    with Largest() as largest, torch.no_grad():
        sequence_logprobs(hidden, head, labels)
    assert 0 < largest.size <= 4 * likelihood.SCRATCH[0] < (T - 1) * V * 4 / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"hidden must be \[B, T, D\] in a float dtype, got torch.float32 \(2, 4\)"),
        ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)}, "hidden must be .* got torch.int64"),
        ({"head_weight": torch.zeros(9, 5)}, r"head_weight must be \[V, 4\] .* got \(9, 5\)"),
        ({"head_weight": torch.zeros(0, 4)}, r"head_weight must be \[V, 4\] .* got \(0, 4\)"),
        ({"head_weight": torch.zeros(9, 4).bfloat16()}, "dtype of hidden, torch.float32, got torch.bfloat16; cast"),
        (
            {"labels": torch.zeros(2, 4, dtype=torch.int64)},
            r"labels must be int64 or int32 of shape \(2, 3\).*\(2, 4\)",
        ),
        ({"labels": torch.zeros(2, 3)}, "labels must be int64 or int32.*torch.float32"),
        ({"labels": torch.tensor([[0, 1, 2], [3, 9, 5]])}, r"labels\[1, 1\] must be in 0..8 or -100 .* got 9"),
        ({"labels": torch.tensor([[0, 1, -1], [3, 0, 5]])}, r"labels\[0, 2\] must be in 0..8 or -100 .* got -1"),
        ({"bias": torch.zeros(8)}, r"bias must be float of shape \(9,\) .* \(8,\)"),
        ({"soft_cap": 0.0}, "soft_cap must be a positive number or None, got 0.0"),
        ({"soft_cap": math.nan}, "soft_cap must be a positive number or None, got nan"),
        (
            {"labels": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            "labels must be on cpu with hidden, got meta",
        ),
        ({"weights": torch.ones(3)}, r"weights must be float of shape \(2,\)"),
        ({"weights": torch.ones(2, dtype=torch.int64)}, "weights must be float.*torch.int64"),
        ({"weights": torch.tensor([1.0, math.nan])}, r"weights must be finite, got \[1.0, nan\]"),
        ({"normalize": "mean"}, "normalize must be .* got 'mean'"),
        ({"normalize": 0}, "normalize must be a positive number, got 0"),
        ({"normalize": math.inf}, "normalize must be a positive number, got inf"),
        ({"normalize": torch.ones(2)}, "normalize must be"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change, message):
    good = {
        "hidden": torch.zeros(2, 3, 4),
        "head_weight": torch.zeros(9, 4),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "weights": torch.ones(2),
    }
    with pytest.raises(HftcoreError, match=message) as refusal:
        weighted_cross_entropy(**(good | change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_numbers_are_refused_by_name(bad):
    hidden, head, labels, bias = inputs(dtype=torch.float32, labelled=1.0)
    spoiled = hidden.clone()
    spoiled[1, 2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"hidden\[1, 2\] holds NaN or infinity"):
        sequence_logprobs(spoiled, head, labels, bias)
    spoiled = head.clone()
    spoiled[4, 1] = bad
    with pytest.raises(NonFiniteError, match="head_weight holds NaN or infinity"):
        sequence_logprobs(hidden, spoiled, labels, bias)
    spoiled = bias.clone()
    spoiled[0] = bad
    with pytest.raises(NonFiniteError, match="bias holds NaN or infinity"):
        sequence_logprobs(hidden, head, labels, spoiled)
    with pytest.raises(NonFiniteError, match=r"the logits of hidden\[0, 0\] overflow float32"):
        sequence_logprobs(hidden * 1e30, head * 1e30, labels)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_stripes(monkeypatch):
    """Two tiles a stripe and a short last stripe at the sizes an interpreter can bear."""
    fused = pytest.importorskip("hftcore.kernels.triton_likelihood")
    monkeypatch.setattr(launch, "logit_tile", lambda _: launch.ProductTile(16, 16, 16, 8))
    monkeypatch.setattr(launch, "logit_gradient_tile", launch.logit_tile)
    monkeypatch.setattr(launch, "STRIPE", 32)
    return fused


# tl.dot of bfloat16 and float16 has exact products and float32 sums, on a device and in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S", "V", "D"), [(19, 75, 20), (3, 32, 16), (1, 1, 1), (16, 97, 33), (0, 40, 5)])
def test_the_fused_kernel_gives_the_reference(small_stripes, dtype, S, V, D):
    rows, head, target, bias = inputs(1, S, D, V, dtype, labelled=1.0)
    for soft_cap, added in ((None, None), (2.0, bias)):
        moved = [None if x is None else x.to(DEVICE) for x in (rows[0], head, target[0], added)]
        logprobs, lse = small_stripes.token_logprobs(*moved, soft_cap)
        expected = likelihood.reference_logprobs(rows[0], head, target[0], added, soft_cap)
        torch.testing.assert_close(logprobs.cpu(), expected, rtol=0, atol=TOLERANCE)
        logits = likelihood.reference_logits(rows[0], head, added, soft_cap)
        torch.testing.assert_close(lse.cpu(), logits.logsumexp(1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(("S", "V", "D"), [(9, 45, 20), (1, 1, 1)])
def test_the_fused_backward_gives_the_gradients_of_the_reference(small_stripes, monkeypatch, dtype, soft_cap, S, V, D):
    monkeypatch.setattr(likelihood, "TOKENS", 7)
    monkeypatch.setattr(
        likelihood, "scratch", lambda *_: 7 * (30 + D)
    )  # several bands and blocks, the last of each short
    hidden, head, labels, bias = inputs(1, S, D, V, dtype, labelled=1.0)
    coefficient = torch.linspace(-1, 2, S)
    free = [tensor.double().requires_grad_() for tensor in (hidden[0], head, bias)]
    (coefficient * likelihood.reference_logprobs(*free[:2], labels[0], free[2], soft_cap)).sum().backward()
    moved = [tensor.to(DEVICE) for tensor in (hidden[0], head.T.contiguous().T, labels[0], bias)]
    _, lse = small_stripes.token_logprobs(*moved, soft_cap)
    found = small_stripes.token_gradients(*moved, soft_cap, lse, coefficient.to(DEVICE), (True, True, True))
    for got, want in zip(found, free, strict=True):
        assert got.dtype == dtype
        close = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}[dtype]
        assert (got.cpu().double() - want.grad).abs().max() <= close * want.grad.abs().max() + 1e-7


def test_the_fused_kernel_takes_a_transposed_head_and_masked_stripes(small_stripes):
    rows, head, target, bias = inputs(1, 5, 8, 80, torch.float32, labelled=1.0)
    bias[:40] = -math.inf
    target = 40 + target[0] % 40
    moved = (rows[0].to(DEVICE), head.T.contiguous().T.to(DEVICE), target.to(DEVICE), bias.to(DEVICE))
    logprobs, _ = small_stripes.token_logprobs(*moved, 50.0)
    logits = likelihood.reference_logits(rows[0], head, bias, 50.0)
    torch.testing.assert_close(
        logprobs.cpu(), logits.log_softmax(1).gather(1, target[:, None])[:, 0], rtol=0, atol=TOLERANCE
    )
    logprobs, _ = small_stripes.token_logprobs(*moved, None)
    expected = likelihood.reference_logprobs(rows[0], head, target, bias, None)
    torch.testing.assert_close(logprobs.cpu(), expected, rtol=0, atol=TOLERANCE)


def test_the_triton_backend_serves_the_op_and_its_gradient(small_stripes):
    hidden, head, labels, bias = (x.to(DEVICE) for x in inputs(B=2, T=5, D=8, V=40, dtype=torch.float32))
    results = []
    for backend in ("triton", "torch"):
        free = [x.clone().requires_grad_() for x in (hidden, head, bias)]
        with use_backend(backend):
            sums, _ = sequence_logprobs(free[0], free[1], labels, free[2], 4.0)
            results.append([sums, *torch.autograd.grad(sums.square().sum(), free)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_the_triton_backend_refuses_nan(small_stripes):
    hidden, head, labels, _ = (x.to(DEVICE) for x in inputs(B=2, T=5, D=8, V=40, dtype=torch.float32, labelled=1.0))
    head[33, 0] = math.nan
    with use_backend("triton"), pytest.raises(NonFiniteError, match="head_weight holds NaN"):
        sequence_logprobs(hidden, head, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_reference_at_real_sizes(dtype):
    hidden, head, labels, _ = (x.cuda() for x in inputs(2, 100, 576, 49152, dtype))
    head *= 0.05
    free, truth = ([x.to(kind).requires_grad_() for x in (hidden, head)] for kind in (dtype, torch.float64))
    sums, counts = sequence_logprobs(*free, labels)
    expected = masked_sum(*truth, labels, None, None)
    assert ((sums - expected).abs() / counts).max() < TOLERANCE
    sums.sum().backward()
    expected.sum().backward()
    for mine, right in zip(free, truth, strict=True):
        tolerance = GRADIENT_TOLERANCE.get(dtype, 2**-9)  # float16 keeps three bits more than bfloat16
        assert (mine.grad.double() - right.grad).abs().max() < tolerance * right.grad.abs().max()


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device, which on a machine of several is not always that of the tensors."""
    entered = []

    @contextmanager
    def device(tensor):
        entered.append(tuple(tensor.shape))
        yield

    for module in (ops.likelihood, ops.gradients):
        monkeypatch.setattr(module, "device_of", device)
    hidden, head, labels, _ = inputs(dtype=torch.float32)
    hidden.requires_grad_()
    sequence_logprobs(hidden, head, labels)[0].sum().backward()
    ops.grad_norms_sq(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    assert entered == [(3, 6, 5), (3, 6, 5), (2, 3, 4)]
