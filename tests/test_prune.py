"""prune and antidote on plain and tiny HF models: masks against a sort, scopes, baselines, failure leaves no trace."""

import copy
import hashlib

import pytest
import torch
from tiny_models import batch, tiny_model, with_lora
from torch import nn

import hftcore
from hftcore import Energy, Pattern, ops
from hftcore.backend import why_not
from hftcore.layers import find_layers


class Net(nn.Module):
    """Two linear layers of different sizes, in an order that is not that of their names."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 5)
        self.first = nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


def measured(model):
    draw = torch.Generator().manual_seed(7)
    return Energy(
        {
            name: torch.rand(layer.in_features, generator=draw)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
        }
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("remove", ["lowest", "highest"])
def test_model_scope_orders_by_score_then_tensor_name_then_position(remove):
    model = Net()
    for parameter in model.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).float()  # many ties
    energy = Energy({"first": torch.ones(8), "second": torch.ones(6)})
    pattern = Pattern("40%", scope="model", remove=remove)
    entries = sorted(
        (abs(float(value)), name, index)
        for name in ("first", "second")
        for index, value in enumerate(getattr(model, name).weight.data.flatten())
    )
    removed = pattern.removed(len(entries))
    doomed = {
        (name, index)
        for _, name, index in (entries[:removed] if remove == "lowest" else entries[len(entries) - removed :])
    }
    edit = hftcore.prune(model, energy, pattern)
    for name in ("first", "second"):
        layer = getattr(model, name)
        mask = ops.unpack_mask(edit.tensors[f"{name}.weight"].mask, layer.in_features).flatten()
        assert mask.tolist() == [(name, index) in doomed for index in range(mask.numel())]
        assert not layer.weight.data.flatten()[mask].any()


def test_each_row_of_each_layer_is_pruned_by_its_own_energy():
    model = Net()
    energy = measured(model)
    before = state(model)
    edit = hftcore.prune(model, energy, Pattern("50%"))
    for name in ("first", "second"):
        weight = before[f"{name}.weight"]
        order = (weight.abs() * energy[name].sqrt()).sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
        assert torch.equal(model.state_dict()[f"{name}.weight"], weight.scatter(1, order, 0.0))
    assert torch.equal(model.second.bias.data, before["second.bias"])
    assert edit.removed == 6 * 4 + 5 * 3


def test_magnitude_ignores_the_energy_and_random_ignores_the_weights():
    model = Net()
    twin = copy.deepcopy(model)
    hftcore.prune(model, measured(model), Pattern("50%"), score="magnitude")
    hftcore.prune(twin, Energy({"first": torch.ones(8), "second": torch.ones(6)}), Pattern("50%"))
    assert same(state(model), state(twin))
    twin = Net()
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="full or merged"):
        edit = hftcore.antidote(twin, None, 0.2, score="magnitude", exclude=["second"])
    assert list(edit.tensors) == ["first.weight"]
    masks = []
    for seed in (3, 3, 4):
        twin = Net()
        masks.append(
            hftcore.prune(twin, measured(twin), Pattern("50%", scope="matrix"), score="random", seed=seed)
            .tensors["first.weight"]
            .mask
        )
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", ["wanda", "magnitude", "random"])
def test_the_default_dtype_of_the_process_changes_no_bit(score, dtype):
    def pruned():
        model = copy.deepcopy(made)
        hftcore.prune(model, hftcore.calibrate(model, [batch((7, 4))]), "50%", score=score)
        return model.state_dict()

    made = tiny_model("llama")
    expected = pruned()
    torch.set_default_dtype(dtype)
    try:
        found = pruned()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_set_difference_spares_what_benign_data_also_selects():
    model = Net()
    harmful, benign = measured(model), Energy({"first": torch.arange(8.0), "second": torch.arange(6.0)})
    top = Pattern("50%", remove="highest")
    wanted = {}
    for name in ("first", "second"):
        weight = getattr(model, name).weight.data
        wanted[name] = ops.unpack_mask(ops.prune_mask(weight, harmful[name], top), weight.shape[1]) & ~ops.unpack_mask(
            ops.prune_mask(weight, benign[name], Pattern("25%", remove="highest")), weight.shape[1]
        )
    edit = hftcore.prune(model, harmful, top, minus=(benign, Pattern("25%", remove="highest")))
    for name, mask in wanted.items():
        assert torch.equal(ops.unpack_mask(edit.tensors[f"{name}.weight"].mask, mask.shape[1]), mask)


@pytest.mark.parametrize("scope", ["row", "matrix", "model"])
def test_removed_weights_take_the_aligned_value(scope):
    aligned, model = Net(), Net()
    energy = measured(model)
    before = state(model)
    edit = hftcore.prune(model, energy, Pattern("30%", scope=scope, remove="highest"), reference=aligned)
    for name in ("first", "second"):
        weight = f"{name}.weight"
        mask = ops.unpack_mask(edit.tensors[weight].mask, before[weight].shape[1])
        assert mask.any()
        assert torch.equal(state(model)[weight], torch.where(mask, aligned.state_dict()[weight], before[weight]))
    edit.revert(model)
    assert same(state(model), before)
    edit.apply(model)


def test_removing_all_differences_gives_the_aligned_weights_back():
    aligned, model = Net(), Net()
    hftcore.prune(model, measured(model), Pattern(1.0), reference=aligned)
    assert torch.equal(model.first.weight, aligned.first.weight)


@pytest.mark.parametrize("score", ["wanda", "magnitude", "random"])
@pytest.mark.parametrize("scope", ["row", "matrix", "model"])
def test_a_bad_layer_undoes_the_layers_before_it(scope, score):
    model = Net()
    model.second.weight.data[3, 2] = float("nan")
    before = state(model)
    with pytest.raises(hftcore.NonFiniteError, match=r"second\.weight: weight\[3, 2\]"):
        hftcore.prune(model, measured(model), Pattern("50%", scope=scope), score=score)
    assert torch.equal(model.first.weight.data, before["first.weight"])
    assert torch.equal(model.second.weight.data.view(torch.int32), before["second.weight"].view(torch.int32))


def test_an_interrupt_half_way_undoes_what_was_done(monkeypatch):
    from hftcore import pruning

    model = Net()
    before = state(model)
    plain = pruning.apply_tensor_

    def interrupted(tensor, entry):
        plain(tensor, entry)
        if entry.shape == (5, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr("hftcore.pruning.apply_tensor_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hftcore.prune(model, measured(model), Pattern("50%"))
    assert same(state(model), before)


@pytest.mark.parametrize("remove", ["lowest", "highest"])
def test_an_energy_that_no_token_reached_is_refused(remove):
    model = Net()
    before = state(model)
    with hftcore.capture_energy(model) as energy:
        pass
    with pytest.raises(hftcore.HftcoreError, match="energy is zero in every layer"):
        hftcore.prune(model, energy, Pattern("50%", remove=remove))
    assert same(state(model), before)
    hftcore.prune(model, energy, Pattern("50%"), score="magnitude")


@pytest.mark.parametrize("scope", ["row", "matrix", "model"])
def test_a_reference_that_is_not_finite_is_named(scope):
    model, other = Net(), Net()
    other.second.weight.data[3, 2] = float("nan")
    before = state(model)
    with pytest.raises(hftcore.NonFiniteError, match=r"second\.weight: reference\[3, 2\] = nan"):
        hftcore.prune(model, measured(model), Pattern("50%", scope=scope), reference=other)
    assert same(state(model), before)


def test_an_energy_of_another_model_is_refused():
    model = Net()
    with pytest.raises(hftcore.HftcoreError, match="third"):
        hftcore.prune(model, Energy({"first": torch.ones(8), "third": torch.ones(8)}), Pattern("50%"))
    with pytest.raises(hftcore.HftcoreError, match=r"second\.weight: energy must be .*\(6,\)"):
        hftcore.prune(model, Energy({"first": torch.ones(8), "second": torch.ones(7)}), Pattern("50%"))
    with pytest.raises(hftcore.HftcoreError, match="must be an Energy"):
        hftcore.prune(model, [{"x": torch.ones(2)}], Pattern("50%"))


def test_a_reference_of_another_shape_is_refused_before_anything_changes():
    model, other = Net(), Net()
    other.second = nn.Linear(7, 5)
    before = state(model)
    with pytest.raises(hftcore.HftcoreError, match=r"reference 'second\.weight' must be"):
        hftcore.prune(model, measured(model), Pattern("50%"), reference=other)
    assert same(state(model), before)


def test_a_reference_equal_to_the_model_is_told_and_changes_nothing():
    model, same_model = Net(), Net()
    same_model.load_state_dict(model.state_dict())
    before = state(model)
    with pytest.warns(UserWarning, match="reference equals the model in every layer"):
        hftcore.prune(model, measured(model), Pattern("50%"), reference=same_model)
    assert same(state(model), before)


def test_antidote_warns_on_full_weights_and_not_on_the_reference_form():
    with pytest.warns(UserWarning, match="one weight a row"):
        hftcore.antidote(Net(), measured(Net()), 0.1)
    edit = hftcore.antidote(Net(), measured(Net()), 0.1, reference=Net())
    assert edit.recipe["dense_ratio"] == 0.1


def test_antidote_removes_what_the_published_procedure_removes():
    """An independent loop: running mean over samples of the summed squares, stable sort, the top of each row."""
    model = Net()
    samples = [torch.randn(length, 8) for length in (3, 7, 5)]
    statistic = torch.zeros(8, dtype=torch.float64)
    for n, x in enumerate(samples):
        statistic = statistic * (n / (n + 1)) + x.double().square().sum(0) / (n + 1)
    metric = model.first.weight.data.abs().double() * statistic.sqrt()
    mask = torch.ones_like(metric)
    indices = torch.sort(metric, dim=-1, stable=True).indices[:, : int(8 * (1 - 0.3))]
    mask.scatter_(1, indices, 0)
    with hftcore.capture_energy(model, targets=["first"]) as energy:
        for x in samples:
            model(x)
    before = model.first.weight.data.clone()
    with pytest.warns(UserWarning, match="full or merged"):
        hftcore.antidote(model, energy, dense_ratio=0.3)
    assert torch.equal(model.first.weight.data, before * (1 - mask))


def test_antidote_calibrates_on_batches_by_itself():
    model = Net()
    batches = [{"x": torch.randn(4, 8)} for _ in range(3)]
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="full or merged"):
        edit = hftcore.antidote(model, iter(batches), dense_ratio=0.2)
    hftcore.prune(twin, hftcore.calibrate(twin, batches), Pattern(0.2, remove="highest"))
    assert same(state(model), state(twin))
    edit.revert(model)


def test_antidote_on_a_given_energy_touches_only_the_layers_asked_for():
    for choice in ({"exclude": ["second"]}, {"targets": ["first"]}):
        edit = hftcore.antidote(Net(), measured(Net()), 0.2, reference=Net(), **choice)
        assert list(edit.tensors) == ["first.weight"]


@pytest.mark.parametrize("scope", ["row", "model"])
def test_an_energy_of_another_width_is_refused_in_every_scope(scope):
    model = Net()
    before = state(model)
    with pytest.raises(hftcore.HftcoreError, match=r"first\.weight: energy must be of shape \(8,\), got \(20,\)"):
        hftcore.prune(model, Energy({"first": torch.ones(20), "second": torch.ones(6)}), Pattern("50%", scope=scope))
    assert same(state(model), before)


def test_set_difference_works_in_model_scope_and_needs_the_same_layers():
    model = Net()
    top = Pattern("50%", scope="model", remove="highest")
    edit = hftcore.prune(model, measured(model), top, minus=(measured(model), top))
    assert edit.removed == 0
    with pytest.raises(hftcore.HftcoreError, match="minus has no energy for 'second'"):
        hftcore.prune(model, measured(model), top, minus=(Energy({"first": torch.ones(8)}), top))


def test_a_parametrised_weight_is_refused():
    model = Net()
    energy = measured(model)
    torch.nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(hftcore.HftcoreError, match="parametrisation"):
        hftcore.prune(model, energy, Pattern("50%"))


def test_weights_that_share_memory_are_pruned_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model.b.weight = nn.Parameter(model.a.weight.data)
    edit = hftcore.prune(model, Energy({"a": torch.ones(4)}), Pattern("50%", remove="highest"))
    assert list(edit.tensors) == ["a.weight"]
    edit.revert(model)


def test_a_pattern_may_be_given_as_text():
    edit = hftcore.prune(Net(), measured(Net()), "50%")
    assert edit.removed == 6 * 4 + 5 * 3


def test_parameters_that_require_gradients_are_pruned_like_any():
    for name in ("torch", "native") if why_not("native", "cpu") is None else ("torch",):
        with hftcore.use_backend(name):
            weight = nn.Parameter(torch.tensor([[3.0, -4.0, 1.0, 9.0]]))
            ops.prune_(weight, torch.ones(4), "50%")
            ops.prune_(weight, torch.ones(4), Pattern("50%", block=(1, 2)))
            assert weight.tolist() == [[0.0, 0.0, 0.0, 9.0]]
            assert not ops.column_energy(weight).requires_grad


def mixture(name="qwen3-moe"):
    """A model with fused experts, and an energy of their matrices in which expert 1 of each saw nothing."""
    model = tiny_model(name)
    layers = find_layers(model, ["experts"])
    draw = torch.Generator().manual_seed(3)
    values = {}
    for layer in layers:
        values[layer.name] = torch.rand(layer.weight.shape[0], layer.weight.shape[-1], generator=draw)
        values[layer.name][1] = 0
    return model, layers, Energy(values)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern("30%", remove="highest"),
        Pattern("30%", scope="matrix", remove="highest"),
        Pattern("2:4", remove="highest"),
        Pattern("25%", block=(2, 4), remove="highest"),
        Pattern("30%", scope="model", remove="highest"),
        Pattern("100%", scope="model", remove="highest"),
    ],
    ids=str,
)
def test_an_expert_without_a_token_is_left_alone_by_removal_from_the_top(name, pattern):
    model, layers, energy = mixture(name)
    before = {layer.tensor: layer.weight.clone() for layer in layers}
    with pytest.warns(UserWarning, match=r"no token reached was left as it was: .*experts\.down_proj\[1\]"):
        edit = hftcore.prune(model, energy, pattern)
    assert edit.recipe["untouched"] == [f"{layer.name}[1]" for layer in layers]
    sizes = []
    for layer in layers:
        assert torch.equal(layer.weight[1], before[layer.tensor][1])
        for expert in (0, 2, 3):
            weight = before[layer.tensor][expert]
            sizes.append(weight.numel())
            if pattern.scope != "model":
                want = ops.prune_(weight.clone(), energy[layer.name][expert], pattern)
                assert torch.equal(layer.weight[expert], want)
    if pattern.scope == "model":
        assert edit.removed == pattern.removed(sum(sizes))
    edit.revert(model)
    assert all(torch.equal(layer.weight, before[layer.tensor]) for layer in layers)


def test_removal_from_the_bottom_keeps_its_counts_on_an_expert_without_a_token_and_says_so():
    model, layers, energy = mixture()
    with pytest.warns(UserWarning, match=r"pruned by position alone.*experts\.down_proj\[1\]"):
        edit = hftcore.prune(model, energy, Pattern("50%"))
    assert "untouched" not in edit.recipe
    for layer in layers:
        half = layer.weight.shape[-1] // 2
        assert not layer.weight[1, :, :half].any()
        assert layer.weight[1, :, half:].all()


def test_benign_data_that_missed_an_expert_spares_nothing_of_it():
    model, layers, benign = mixture()
    harmful = Energy({name: torch.ones_like(value) for name, value in benign.items()})
    top = Pattern("50%", remove="highest")
    edit = hftcore.prune(model, harmful, top, minus=(benign, top))
    for layer in layers:
        mask = ops.unpack_mask(edit.tensors[layer.tensor].mask, layer.weight.shape[-1]).view(layer.weight.shape)
        assert (mask[1].sum(-1) == layer.weight.shape[-1] // 2).all()


def test_scores_without_activations_know_no_idle_matrices():
    model, _, energy = mixture()
    edit = hftcore.prune(model, energy, Pattern("50%", remove="highest"), score="magnitude")
    assert edit.sparsity == 0.5


def test_a_reference_that_does_not_fit_is_refused_before_the_batches_are_read():
    other = Net()
    other.second = nn.Linear(7, 5)

    def batches():
        raise AssertionError("a batch was read")
        yield

    for call in (
        lambda: hftcore.antidote(Net(), batches(), reference=other),
        lambda: hftcore.prune(Net(), batches(), "50%", reference=other, sequential=True),
    ):
        with pytest.raises(hftcore.HftcoreError, match=r"reference 'second\.weight' must be"):
            call()


def test_an_energy_of_another_model_is_refused_in_a_short_line():
    energy = Energy({f"layers.{index}": torch.ones(2) for index in range(200)})
    with pytest.raises(hftcore.HftcoreError, match=r"for: layers\.0, layers\.1, layers\.10 and 197 more; calibrate"):
        hftcore.prune(Net(), energy, "50%")


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_random_scores_are_drawn_anew_for_each_matrix_by_its_name(scope):
    scores = []
    for name, shape in (("first", (6, 8)), ("second", (5, 6))):
        seed = hashlib.sha256(f"5:{name}.weight".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        scores.append(torch.rand(shape, generator=generator).flatten())
    edit = hftcore.prune(Net(), None, Pattern("50%", scope=scope), score="random", seed=5)
    group = [torch.cat(scores)] * 2 if scope == "model" else scores
    for name, columns, mine, others in zip(("first", "second"), (8, 6), scores, group, strict=True):
        last = others.sort().values[others.numel() // 2 - 1]
        mask = ops.unpack_mask(edit.tensors[f"{name}.weight"].mask, columns).flatten()
        assert torch.equal(mask, mine <= last)


def test_antidote_on_lora_factors_is_the_published_codes_mask():
    """There: one sample at a time without a mask, a running mean in float32, a stable sort of each row. Here: padded batches."""
    model = with_lora(tiny_model("llama"), ["q_proj", "k_proj", "v_proj"], rank=8)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batches = [batch((9, 5, 7)), batch((4, 8), "left", seed=1)]
    factors = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lora" in name
    }
    means, seen, handles = {}, 0, []
    for name, module in factors.items():

        def running(_, args, name=name):
            energy = args[0].float().reshape(-1, args[0].shape[-1]).square().sum(0)
            means[name] = means.get(name, 0) * (seen / (seen + 1)) + energy / (seen + 1)

        handles.append(module.register_forward_pre_hook(running))
    with torch.no_grad():
        for one in batches:
            for ids, keep in zip(one["input_ids"], one["attention_mask"].bool(), strict=True):
                model(input_ids=ids[keep][None])
                seen += 1
    for handle in handles:
        handle.remove()
    edit = hftcore.antidote(model, batches, dense_ratio=0.1)
    assert len(edit.tensors) == len(factors) == 12
    for name in factors:
        weight = before[f"{name}.weight"]
        metric = weight.abs() * means[name].sqrt()
        mask = torch.ones_like(metric)
        order = torch.sort(metric, dim=-1, stable=True).indices
        mask.scatter_(1, order[:, : int(metric.shape[1] * (1 - 0.1))], 0)
        assert torch.equal(dict(model.named_parameters())[f"{name}.weight"], weight * (1 - mask))
