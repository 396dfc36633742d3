"""grad_norms_sq and embedding_grad_norms_sq: meaning by hand, every form against the float64 reference, edges, refusals."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hftcore import use_backend
from hftcore.errors import HftcoreError
from hftcore.kernels import gradients, native, native_gradients
from hftcore.ops.gradients import embedding_grad_norms_sq, grad_norms_sq, host_kernels, input_gram

# products of bfloat16 and float16 values are exact in float32, so only the rounding of float32 sums is left in every dtype
RTOL = 2e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, T, N, M: one element; a prime of each; one tile and one more; more than a block of tokens; wide and narrow
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 5, 11),
    (2, 64, 32, 16),
    (2, 65, 33, 17),
    (1, 513, 3, 4),
    (2, 3, 200, 130),
    (2, 70, 150, 4),
]


def pair(B, T, N, M, dtype=torch.float32):
    return torch.randn(B, T, N).to(dtype), torch.randn(B, T, M).to(dtype)


def assert_right(got, x, g):
    want = gradients.reference_grad_norms_sq(x.double(), g.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=RTOL, atol=0)


def test_meaning_by_hand():
    """Sample 0: g^T x = 2 [3, 4] + 1 [1, 0] = [7, 8]; sample 1: zero gradients."""
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[1.0, 1.0], [5.0, 5.0]]])
    g = torch.tensor([[[2.0], [1.0]], [[0.0], [0.0]]])
    assert grad_norms_sq(x, g).tolist() == [113.0, 0.0]


def test_meaning_of_an_embedding_by_hand():
    """Token 5 twice: (1 + 2)^2; token 7 once: 4^2; without row 7 only the first."""
    ids, g = torch.tensor([[5, 5, 7]]), torch.tensor([[[1.0], [2.0], [4.0]]])
    assert embedding_grad_norms_sq(ids, g).tolist() == [25.0]
    assert embedding_grad_norms_sq(ids, g, padding_idx=7).tolist() == [9.0]


def test_form_that_costs_less_is_chosen():
    """Square matrices cross where (T + a panel) 2 N = (2 T + a square-sum) N; factors of rank 8 are direct from few tokens on."""
    crossing = 4096 - gradients.PANEL + gradients.SQUARE // 2
    assert gradients.is_ghost(crossing - 1, 4096, 4096)
    assert not gradients.is_ghost(crossing + 100, 4096, 4096)
    assert not gradients.is_ghost(128, 4096, 8)
    assert gradients.is_ghost(1900, 4096, 1024, has_gram=True)
    assert not gradients.is_ghost(2048, 4096, 1024, has_gram=True)
    assert gradients.is_direct_with_gradient(256, 512, 512)
    assert not gradients.is_direct_with_gradient(16, 512, 512)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_matches_the_reference(shape, dtype):
    x, g = pair(*shape, dtype)
    assert_right(gradients.ghost(x, g), x, g)
    assert_right(gradients.direct(x, g), x, g)
    assert_right(grad_norms_sq(x, g), x, g)
    assert_right(grad_norms_sq(x, g, input_gram(x)), x, g)
    squares, gradient = gradients.direct_with_gradient(x, g)
    assert_right(squares, x, g)
    want = torch.einsum("btm,btn->mn", g.double(), x.double())
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("form", ["ghost", "direct", "grad_norms_sq"])
def test_small_blocks_change_nothing(form, monkeypatch):
    monkeypatch.setattr(gradients, "BLOCK", 50)
    monkeypatch.setattr(gradients, "PANEL", 4)
    monkeypatch.setattr(gradients, "TILE", 15)
    x, g = pair(3, 11, 7, 9)
    assert_right(getattr(gradients, form)(x, g), x, g)
    assert_right(gradients.direct_with_gradient(x, g)[0], x, g)
    torch.testing.assert_close(gradients.input_gram(x), x @ x.mT)


# one block and its edges; less than a vector of features; two tiles of tokens and a bit; so many tokens that rounding their tiles up
# could save one; two chunks of features and a bit
NATIVE_SHAPES = [
    *SHAPES,
    (2, 12, 16, 17),
    (2, 133, 30, 7),
    (2, 1441, 3, 2),
    (1, 265, 40, 9),
    (2, 13, 520, 1030),
    (2, 140, 1025, 3),
]
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.fixture(params=native.simds())
def simd(request):
    with native.use_simd(request.param):
        yield request.param


@needs_native
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_ghost_form_matches_the_reference(shape, dtype, simd):
    x, g = pair(*shape, dtype)
    assert_right(native.ghost(x, g), x, g)
    gram = native.lower_gram(x)
    torch.testing.assert_close(gram.double(), (x.double() @ x.double().mT).tril(), rtol=0, atol=2e-6 * shape[2])
    # what lies above the diagonal is not looked at
    assert_right(native.ghost(x, g, gram + torch.full_like(gram, float("nan")).triu(1)), x, g)


# besides: blocks that are not full, on either side; several tiles; more tokens than are packed at a time, and as many; one side thin
SHARES_SHAPES = [*NATIVE_SHAPES, (2, 193, 31, 15), (3, 20, 300, 700), (2, 192, 64, 28), (2, 385, 8, 90), (2, 40, 90, 8)]


@needs_native
@pytest.mark.parametrize("shape", SHARES_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_direct_form_matches_the_reference_with_and_without_the_gradient(shape, dtype, simd):
    x, g = pair(*shape, dtype)
    assert_right(native.direct(x, g), x, g)
    squares, gradient = native.direct_with_gradient(x, g)
    assert_right(squares, x, g)
    wanted = torch.einsum("btm,btn->mn", g.double(), x.double())
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max() if wanted.numel() else 0)
    )


@needs_native
@pytest.mark.parametrize("form", [native.ghost, native.direct], ids=["ghost", "direct"])
def test_native_forms_read_strided_inputs(form, simd):
    wide, transposed = torch.randn(3, 150, 2, 20)[:, :, 1], torch.randn(3, 9, 150).mT
    assert_right(form(wide, transposed), wide, transposed)
    assert_right(form(wide.transpose(0, 1), wide.transpose(0, 1)), wide.transpose(0, 1), wide.transpose(0, 1))
    narrow, shifted = transposed.bfloat16(), torch.randn(3, 150, 21).bfloat16()[:, :, 1:]
    assert_right(form(shifted, narrow), shifted, narrow)
    assert_right(form(wide, narrow), wide, narrow)


@needs_native
def test_native_forms_give_the_same_bits_on_any_number_of_threads(simd):
    small, large = pair(5, 300, 33, 65), pair(5, 300, 133, 165)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((native.ghost(*small), *native.direct_with_gradient(*large)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in found for one, other in zip(found[0], result, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_native_sums_hardly_grows_with_the_tokens(dtype, simd):
    """40,000 products of one sign, as a vocabulary has them: one sum after the other would lose 1e-5."""
    x, g = torch.rand(1, 40000, 9).to(dtype), torch.rand(1, 40000, 5).to(dtype)
    squares, gradient = native.direct_with_gradient(x, g)
    wanted = g[0].double().T @ x[0].double()
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=0)
    torch.testing.assert_close(squares.double(), wanted.square().sum()[None], rtol=2e-6, atol=0)


@needs_native
def test_native_results_are_float32_whatever_the_default_dtype():
    """Code that loads a model in bfloat16 may have made that the default; float64 shows it, and overruns no buffer."""
    (x, g), norm = pair(2, 7, 6, 8), torch.ones(6)

    def results():
        norms = native.ghost(x, g), *native.direct_with_gradient(x, g), native.lower_gram(x)
        return *norms, native.column_energy(x[0], None), native.block_scores(x[0], norm, None, 7, 2)

    found = results()
    torch.set_default_dtype(torch.float64)
    try:
        again = (*results(), native.column_energy(x[0, :0], None), native.direct_with_gradient(x[:0], g[:0])[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in again)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=False))


@needs_native
@pytest.mark.parametrize("shape", [(3, 50, 200, 130), (1, 1, 7, 5), (2, 100, 64, 64), (0, 3, 2, 4)], ids=str)
def test_gradient_of_a_linear_input_is_that_of_autograd(shape, simd):
    B, T, N, M = shape
    weight, g = torch.randn(M, N), torch.randn(B, T, M)
    x = torch.randn(B, T, N, requires_grad=True)
    torch.nn.functional.linear(x, weight).backward(g)
    found = native_gradients.input_gradient(g, weight)
    want = g.double() @ weight.double()
    assert found.shape == x.grad.shape
    for got in (found, native_gradients.input_gradient(g.mT.contiguous().mT, weight), x.grad):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * M)
    assert torch.equal(gradients.input_gradient(g, weight), x.grad)


@needs_native
def test_gradient_of_a_linear_input_is_formed_here_where_that_is_faster():
    g, weight = torch.empty(4, 4, 64), torch.empty(64, 512)
    for simd in native.simds():
        with native.use_simd(simd):
            faster = simd.startswith("avx512")
            assert native_gradients.is_input_gradient(g, weight) == faster
            assert not native_gradients.is_input_gradient(g, weight[:, 1:])
            assert not native_gradients.is_input_gradient(torch.empty(4, 4, 2049), torch.empty(2049, 512))
            assert not native_gradients.is_input_gradient(g.bfloat16(), weight.bfloat16())
    assert not gradients.is_input_gradient(g, weight)


@needs_native
def test_native_direct_form_of_nothing_and_nan(simd):
    for B, T, M, N in [(0, 3, 2, 2), (2, 0, 3, 2), (2, 3, 0, 4)]:
        squares, gradient = native.direct_with_gradient(torch.ones(B, T, N), torch.ones(B, T, M))
        assert squares.tolist() == [0.0] * B
        assert torch.equal(gradient, torch.zeros(M, N))
    x, g = pair(3, 14, 50, 60)
    x[1, 13, 3] = float("nan")
    squares, gradient = native.direct_with_gradient(x, g)
    assert squares.isnan().tolist() == [False, True, False]
    assert gradient.isnan().sum(dim=0).nonzero().tolist() == [[3]]


@needs_native
def test_native_ghost_form_of_nothing_nan_and_terms_that_cancel(simd):
    assert native.ghost(torch.ones(0, 3, 2), torch.ones(0, 3, 2)).shape == (0,)
    assert native.ghost(torch.ones(2, 0, 2), torch.ones(2, 0, 3)).tolist() == [0.0, 0.0]
    x, g = pair(3, 14, 5, 6)
    x[1, 13, 3] = float("nan")
    assert native.ghost(x, g).isnan().tolist() == [False, True, False]
    x, g = torch.randn(1, 1, 64).expand(1, 2, 64), torch.randn(1, 1, 64)
    assert float(native.ghost(x, torch.cat((g, -g), dim=1))) >= 0


@needs_native
def test_native_form_is_taken_for_the_dtypes_and_on_the_processors_it_is_faster_with():
    if native.simd() == "portable":
        pytest.skip("no native library, or a processor without AVX2")
    x = torch.ones(1, 2, 3)
    assert native_gradients.serves(x, x)
    assert native_gradients.serves(x, x.bfloat16()) == native.simd().startswith("avx512")
    with use_backend("torch"):
        assert host_kernels(x) is gradients
    with use_backend("native"):
        assert host_kernels(x) is native_gradients
        assert host_kernels(x.double()) is gradients
        with native.use_simd("portable"):
            assert host_kernels(x) is gradients
    assert native_gradients.is_ghost(511, 512, 512)
    assert not native_gradients.is_ghost(512, 512, 512)
    assert native_gradients.is_ghost(1023, 512, 512, has_gram=True)
    assert native_gradients.is_direct_with_gradient(128, 512, 512)
    assert not native_gradients.is_direct_with_gradient(1, 512, 512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without the interpreter the kernels need tensors on the GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_reference(shape, dtype):
    kernels = pytest.importorskip("hftcore.kernels.triton_gradients")
    x, g = pair(*shape, dtype)
    assert_right(kernels.ghost(x, g), x, g)
    assert_right(kernels.direct(x, g), x, g)
    with use_backend("triton"):
        assert_right(grad_norms_sq(x, g), x, g)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 512, 1024, 640), (2, 300, 64, 8)], ids=str)
def test_kernels_on_the_gpu_match_the_reference(shape, dtype):
    from hftcore.kernels import triton_gradients as kernels

    x, g = (tensor.cuda() for tensor in pair(*shape, dtype))
    assert_right(kernels.ghost(x, g), x, g)
    assert_right(kernels.direct(x, g), x, g)


def test_strided_inputs_and_mixed_dtypes_are_read_in_place():
    x, g = torch.randn(2, 6, 5).mT, torch.randn(5, 2, 3).bfloat16().transpose(0, 1)
    assert_right(grad_norms_sq(x, g), x, g)
    if not torch.cuda.is_available():
        kernels = pytest.importorskip("hftcore.kernels.triton_gradients")
        assert_right(kernels.ghost(x, g), x, g)
        assert_right(kernels.direct(x, g), x, g)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_embedding_norms_match_the_reference(B, T, M, vocabulary, padding):
    ids, g = torch.randint(vocabulary, (B, T)), torch.randn(B, T, M)
    for padding_idx in (None, padding):
        want = gradients.reference_embedding_grad_norms_sq(ids, g.double(), padding_idx)
        torch.testing.assert_close(
            embedding_grad_norms_sq(ids, g, padding_idx).double(), want, rtol=1e-5, atol=1e-10, msg=str(padding_idx)
        )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.floats(-8, 8))
def test_norms_scale_with_the_square_and_padding_adds_nothing(B, T, N, M, factor):
    x, g = pair(B, T, N, M)
    square = grad_norms_sq(x, g)
    torch.testing.assert_close(grad_norms_sq(x, factor * g), factor**2 * square, rtol=1e-4, atol=1e-6)
    padded = torch.cat((torch.zeros(B, 3, M), g), dim=1)
    torch.testing.assert_close(
        grad_norms_sq(torch.cat((torch.randn(B, 3, N), x), dim=1), padded), square, rtol=1e-4, atol=1e-6
    )


def test_tied_cross_is_the_inner_product_of_the_two_gradients():
    head_x, head_g = pair(2, 7, 5, 6)
    ids, g = torch.randint(6, (2, 4)), torch.randn(2, 4, 5)
    head = torch.einsum("btm,btn->bmn", head_g.double(), head_x.double())
    looked_up = torch.einsum("btm,btn->bmn", torch.nn.functional.one_hot(ids, 6).double(), g.double())
    at_ids = head_g.gather(2, ids[:, None].expand(-1, 7, -1))
    got = gradients.tied_cross(head_x, at_ids, g).double()
    torch.testing.assert_close(got, (head * looked_up).sum(dim=(1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [4, 90])
def test_activations_still_in_a_graph_give_norms_that_are_not(T):
    x, g = pair(2, T, 50, 40)
    want, ids = grad_norms_sq(x, g), torch.zeros(2, T, dtype=torch.int64)
    for backend in ("native", "torch") if native.available() else ("torch",):
        free = x.clone().requires_grad_(), g.clone().requires_grad_()
        with use_backend(backend):
            for found in (grad_norms_sq(*free), grad_norms_sq(*free, input_gram(free[0]))):
                assert not found.requires_grad
                torch.testing.assert_close(found, want)
            assert not embedding_grad_norms_sq(ids, free[1]).requires_grad


def test_no_samples_or_no_tokens():
    assert grad_norms_sq(torch.ones(0, 3, 2), torch.ones(0, 3, 2)).shape == (0,)
    assert grad_norms_sq(torch.ones(2, 0, 2), torch.ones(2, 0, 3)).tolist() == [0.0, 0.0]
    assert not gradients.direct_with_gradient(torch.ones(0, 3, 2), torch.ones(0, 3, 4))[1].any()
    assert not gradients.direct_with_gradient(torch.ones(2, 0, 700), torch.ones(2, 0, 700))[1].any()
    assert embedding_grad_norms_sq(torch.ones(2, 0, dtype=torch.int64), torch.ones(2, 0, 3)).tolist() == [0.0, 0.0]


def test_large_float16_values_do_not_overflow():
    assert grad_norms_sq(torch.full((1, 2, 3), 6e4).half(), torch.full((1, 2, 3), 6e4).half()).isfinite().all()


def test_terms_that_cancel_do_not_go_below_zero():
    x = torch.randn(1, 1, 64).expand(1, 2, 64)
    g = torch.randn(1, 1, 64)
    assert float(gradients.ghost(x, torch.cat((g, -g), dim=1))) >= 0


@pytest.mark.parametrize("where", ["x", "g"])
def test_nan_stays_in_its_sample(where):
    x, g = pair(3, 4, 5, 6)
    {"x": x, "g": g}[where][1, 2, 3] = float("nan")
    for form in (gradients.ghost, gradients.direct):
        assert form(x, g).isnan().tolist() == [False, True, False]


def test_refusals_name_the_argument():
    x, g = pair(2, 3, 4, 5)
    with pytest.raises(HftcoreError, match=r"x must be \[B, T, features\].*got torch.float32 \(3, 4\)"):
        grad_norms_sq(x[0], g)
    with pytest.raises(HftcoreError, match=r"g must be \[B, T, features\].*int64"):
        grad_norms_sq(x, g.long())
    with pytest.raises(HftcoreError, match=r"g must be \[B, T, M\] with the B and T.*\(2, 3\).*got \(2, 2, 5\)"):
        grad_norms_sq(x, g[:, :2])
    with pytest.raises(HftcoreError, match=r"gram must be input_gram\(x\).*\(2, 3, 3\)"):
        grad_norms_sq(x, g, torch.ones(2, 2, 2))
    with pytest.raises(HftcoreError, match=r"ids must be int64 or int32 of shape \(2, 3\).*got torch.float32"):
        embedding_grad_norms_sq(torch.ones(2, 3), g)


COMPILE = """
import sys, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hftcore.kernels import triton_gradients as kernels

kind, arch, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(kind, int(arch) if arch.isdigit() else arch, warp)
for kernel, numbers in (
    (kernels._ghost_kernel, {"BLOCK_T": 64, "BLOCK_K": 64}),
    (kernels._direct_kernel, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 64}),
):
    constants = {**numbers, "stride_xn": 1, "stride_gm": 1}
    types = {"x_ptr": "*bf16", "g_ptr": "*bf16", "partial_ptr": "*fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    built = triton.compile(source, target=target, options={"num_warps": 8 if "BLOCK_M" in numbers else 4})
    assert built.asm["cubin" if kind == "cuda" else "hsaco"]
    code = built.asm["ptx" if kind == "cuda" else "amdgcn"]
    print(any(word in code for word in ("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")))
"""


@pytest.mark.parametrize("target", ["cuda 90 32", "hip gfx942 64"])
def test_kernels_compile_onto_tensor_cores(target, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE, *target.split()], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]
