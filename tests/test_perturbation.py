"""Gradients set aside, and weights moved along them and put back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hftcore.defenses.perturbation import CHUNK, Gradients, gradient_change, perturbed, trained
from hftcore.defenses.set_aside import SetAside
from hftcore.defenses.settings import check_choice, check_number
from hftcore.errors import HftcoreError, NonFiniteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def direction(like, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Gradients({name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in like.items()})


def bits(held):
    return {name: p.detach().clone().reshape(-1).view(torch.uint8) for name, p in held.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_is_rho_times_the_direction_over_its_norm(dtype):
    theta = parameters(dtype)
    along = direction(theta)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in along.tensors.values()))
    before = {name: p.detach().double().clone() for name, p in theta.items()}
    with perturbed(theta, along, -0.3):
        for name, p in theta.items():
            expected = before[name] - 0.3 * along.tensors[name].double() / norm
            # one product and one sum, each rounded to the dtype
            torch.testing.assert_close(
                p.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
            )


@given(seed=st.integers(0, 99), rho=st.floats(-1e3, 1e3), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_every_bit_comes_back(seed, rho, dtype):
    theta = parameters(dtype, seed)
    with torch.no_grad():
        theta["b"][:3] = torch.tensor([-0.0, 1e-7, 6e4])
    before = bits(theta)
    with perturbed(theta, direction(theta), rho):
        pass
    assert equal(bits(theta), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gradients_are_added_like_plain_ones_and_keep_no_rows_of_zeros(dtype):
    table, matrix = torch.zeros(300, 4, 2), torch.randn(300, 5)
    table[7], table[200, 1, 1] = 2.0, -3.0
    plain = Gradients({"table": table.to(dtype), "matrix": matrix.to(dtype)})
    packed = Gradients(dict(plain.tensors)).packed()
    assert packed.tensors["table"].values().shape == (2, 4, 2)
    assert packed.tensors["matrix"] is plain.tensors["matrix"]
    found = []
    for gradients in (plain, packed):
        theta = {name: nn.Parameter(torch.zeros_like(tensor)) for name, tensor in plain.tensors.items()}
        for start in (None, 0.25):
            for parameter in theta.values():
                parameter.grad = None if start is None else torch.full_like(parameter, start)
            gradients.add_to_grad(theta, 0.5)
            found.append({name: parameter.grad for name, parameter in theta.items()})
    assert equal(bits(found[0]), bits(found[2]))
    assert equal(bits(found[1]), bits(found[3]))


@pytest.mark.parametrize("rho", [0.5, -0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_stay_are_not_kept_and_every_bit_comes_back(rho, dtype):
    """As with an embedding; a zero's sign may change where zero is added, and its row is kept then."""
    weight = nn.Parameter(torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    with torch.no_grad():
        weight[5, 1, 2] = -0.0
    along = torch.zeros_like(weight)
    along[3], along[170, 0, 1] = 1.0, -2.0
    theta, before = {"w": weight}, bits({"w": weight})
    with perturbed(theta, Gradients({"w": along}), rho):
        changed = (bits(theta)["w"] != before["w"]).view(200, -1).any(dim=1).nonzero().flatten().tolist()
    assert changed == ([3, 5, 170] if rho > 0 else [3, 170])
    assert equal(bits(theta), before)

    kept = SetAside(weight.detach())
    with torch.no_grad():
        weight.add_(along, alpha=rho)
    kept.shrink(along)
    assert len(kept.values) == len(changed)
    kept.put_back()
    assert equal(bits(theta), before)


def test_every_bit_comes_back_after_an_exception():
    theta = parameters(torch.bfloat16)
    before = bits(theta)
    moved = []

    def fail():
        moved.append(bits(theta))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), perturbed(theta, direction(theta), 1.0):
        fail()
    assert not equal(moved[0], before)
    assert equal(bits(theta), before)


def test_a_step_of_zero_and_a_direction_of_zero_move_nothing():
    theta = parameters()
    before = bits(theta)
    with perturbed(theta, direction(theta), 0.0):
        assert equal(bits(theta), before)
    with perturbed(theta, Gradients({name: torch.zeros_like(p) for name, p in theta.items()}), 0.5):
        assert equal(bits(theta), before)


def test_parameters_without_a_gradient_stay():
    theta = parameters()
    before = bits(theta)
    with perturbed(theta, Gradients({"a": torch.ones(3, 5)}), 0.5):
        moved = bits(theta)
        assert torch.equal(moved["b"], before["b"])
        assert not torch.equal(moved["a"], before["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name_before_anything_moves(value):
    theta = parameters()
    along = direction(theta)
    along.tensors["b"][2] = value
    before = bits(theta)
    with pytest.raises(NonFiniteError, match="'b'"), perturbed(theta, along, 0.5):
        pass
    assert equal(bits(theta), before)


@pytest.mark.parametrize("rho", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_refused(rho):
    theta = parameters()
    with pytest.raises(HftcoreError, match="rho"), perturbed(theta, direction(theta), rho):
        pass


def test_half_precision_gradients_do_not_overflow_in_the_norm():
    assert Gradients({"a": torch.full((4,), 60000.0, dtype=torch.float16)}).norm() == 2 * 59968.0 + 64
    assert Gradients({"a": torch.full((4,), 1e30)}).norm() == pytest.approx(2e30)


def test_long_gradients_are_summed_in_chunks_as_in_float64():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(CHUNK + 77, generator=generator) for _ in range(2))
    left, right = Gradients({"a": a, "only": torch.ones(3)}), Gradients({"a": b})
    assert left.dot(right) == pytest.approx(float(a.double() @ b.double()), rel=1e-12)
    assert left.norm() == pytest.approx(math.sqrt(float(a.double().square().sum()) + 3), rel=1e-12)


def test_taking_moves_the_gradient_without_copying_and_adding_combines():
    theta = parameters()
    theta["a"].grad = torch.ones(3, 5)
    place = theta["a"].grad.data_ptr()
    taken = Gradients.take(theta)
    assert theta["a"].grad is None
    assert taken.tensors["a"].data_ptr() == place
    assert list(taken.tensors) == ["a"]
    theta["a"].grad = torch.full((3, 5), 10.0)
    taken.add_(Gradients({"a": torch.ones(3, 5), "b": torch.ones(7)}), -0.5)
    taken.add_to_grad(theta, 4.0)
    assert torch.equal(theta["a"].grad, torch.full((3, 5), 12.0))
    assert torch.equal(theta["b"].grad, torch.full((7,), -2.0))
    before = theta["a"].grad.clone()
    Gradients({"a": torch.full((3, 5), math.nan)}).add_to_grad(theta, 0.0)
    assert torch.equal(theta["a"].grad, before)


def quadratic(matrix, theta):
    def run():
        loss = theta["w"] @ matrix @ theta["w"] / 2
        loss.backward()
        return loss.detach()

    return run


@pytest.mark.parametrize("rho", [-0.1, 0.7])
def test_the_change_of_a_quadratics_gradient_is_its_curvature_along_the_step(rho):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix = half + half.T
    theta = {"w": nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))}
    g = matrix @ theta["w"].detach()
    change = gradient_change(theta, quadratic(matrix, theta), rho)
    torch.testing.assert_close(change.tensors["w"], -rho * matrix @ g / g.norm(), rtol=1e-12, atol=1e-13)
    assert theta["w"].grad is None


def test_what_runs_inside_runs_at_the_moved_point_and_leaves_its_gradient():
    theta = {"w": nn.Parameter(torch.tensor([2.0], dtype=torch.float64))}

    def inside():
        assert theta["w"].grad is None
        (theta["w"] * 3).sum().backward()
        seen.append(float(theta["w"].detach()))

    seen: list[float] = []
    gradient_change(theta, quadratic(torch.eye(1, dtype=torch.float64), theta), -0.5, inside)
    assert seen == [1.5]
    assert theta["w"].grad.tolist() == [3.0]


def test_the_change_lies_in_the_first_gradients_memory_so_two_gradients_never_exist_side_by_side():
    theta = {"w": nn.Parameter(torch.tensor([2.0, 1.0]))}
    places = []

    def run():
        loss = theta["w"].square().sum()
        loss.backward()
        places.append(theta["w"].grad.data_ptr())
        return loss.detach()

    change = gradient_change(theta, run, rho=-0.5)
    assert places == [change.tensors["w"].data_ptr()] * 2


def test_a_parameter_that_only_the_moved_pass_uses_counts_with_its_whole_gradient():
    theta = {name: nn.Parameter(torch.tensor([2.0])) for name in "ab"}
    passes = []

    def run():
        passes.append(None)
        loss = theta["a"].square().sum() + (3 * theta["b"].sum() if len(passes) == 2 else 0)
        loss.backward()
        return loss.detach()

    change = gradient_change(theta, run, rho=-0.5)
    assert {name: tensor.tolist() for name, tensor in change.tensors.items()} == {"a": [1.0], "b": [-3.0]}


def test_gradients_left_from_before_are_refused():
    theta = {"w": nn.Parameter(torch.ones(1))}
    theta["w"].grad = torch.ones(1)
    with pytest.raises(HftcoreError, match=r"param\.grad must be empty"):
        gradient_change(theta, lambda: torch.tensor(0.0), 0.1)


def test_at_most_one_copy_of_the_parameters_exists_while_they_are_moved(monkeypatch):
    theta = parameters()
    along = direction(theta)
    cloned = []
    plain = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **k: cloned.append(self.numel()) or plain(self, **k))
    with perturbed(theta, along, 0.5):
        pass
    assert sum(cloned) == sum(p.numel() for p in theta.values())


def test_only_what_is_trained_is_listed_and_tied_weights_once():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    model["two"].weight = model["one"].weight
    model["one"].bias.requires_grad_(False)
    assert list(trained(model)) == ["one.weight", "two.bias"]
    with pytest.raises(HftcoreError, match="no trainable parameter"):
        trained(model.requires_grad_(False))


@pytest.mark.parametrize("value", [-1, 2.5, math.nan, "1", True, None])
def test_numbers_out_of_range_are_refused_by_name(value):
    with pytest.raises(HftcoreError, match=r"rho must be a number in \[0, 2\]"):
        check_number("rho", value, 0, 2)
    with pytest.raises(HftcoreError, match=r"tau must be a number in \(0, inf\)"):
        check_number("tau", 0, 0, is_open=True)
    with pytest.raises(HftcoreError, match="rule must be one of a, b, got 'c'"):
        check_choice("rule", "c", ("a", "b"))


def test_inside_an_autocast_region_the_moved_weights_are_seen():
    layer = nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        with perturbed(trained(layer), Gradients({"weight": torch.ones(1, 2)}), 2.0):
            moved = layer(x)
        after = layer(x)
    assert float((moved - before).detach()) == pytest.approx(2 * math.sqrt(2), abs=0.05)
    assert torch.equal(before, after)
