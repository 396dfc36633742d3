"""Panacea: its step, its perturbation as an Edit, and the perturbation alone."""

import math

import numpy as np
import pytest
import torch
from defence_oracles import assert_gradient, collated, double_loss, gradients, mean_loss, norm, shifted
from test_trainers import config, equal, samples, weights
from tiny_models import one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn
from transformers import Trainer, TrainingArguments

import hftcore
from hftcore import Edit, HftcoreError, NonFiniteError
from hftcore.bindings.checkpoints.edits import apply_edit, revert_edit
from hftcore.bindings.coefficients import draw_coefficients
from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.panacea import PanaceaConfig, PanaceaTrainer
from hftcore.defenses import panacea_perturb
from hftcore.defenses.merged import Factors, lora_factors, merged_length
from hftcore.defenses.panacea import PanaceaSettings, panacea_step
from hftcore.defenses.panacea_perturb import safety_coefficients
from hftcore.defenses.perturbation import Gradients, perturbed, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(model, tmp_path, harmful=None, **options):
    harmful = samples(6, seed=9) if harmful is None else harmful
    settings = config(tmp_path, PanaceaConfig, **options)
    loss = double_loss if next(model.parameters()).dtype == torch.float64 else None
    data = {"train_dataset": samples(8), "harmful_dataset": harmful}
    return PanaceaTrainer(model, settings, compute_loss_func=loss, **data)


def seen(trainer, steps=1, accumulation=1):
    """The harmful batches the trainer will draw, without drawing them."""
    drawn = [trainer.harmful.draw() for _ in range(steps * accumulation)]
    trainer.harmful.drawn = 0
    return drawn


@pytest.mark.parametrize("clamp", [None, 1e-3, 1e3])
def test_an_update_is_the_papers_formula_in_float64(tmp_path, clamp):
    model = tiny_model("llama").double()
    made = trainer(model, tmp_path, rho=0.3, lam=0.5, clamp=clamp)
    harmful, user = seen(made, accumulation=2), collated(samples(4, seed=3))
    g = gradients(model, lambda m: mean_loss(m, user))
    h = gradients(model, lambda m: mean_loss(m, harmful))
    step = {name: 0.3 * value / norm(h) for name, value in h.items()}
    moved = shifted(model, step)(lambda m: gradients(m, mean_loss(m, harmful)))
    if clamp == 1e-3:
        moved = {name: torch.zeros_like(value) for name, value in moved.items()}
    before = weights(model)
    made.update(user)
    assert_gradient(model, {name: g[name] - 0.5 * (moved[name] - h[name]) for name in g})
    assert equal(weights(model), before)


def test_accumulated_micro_batches_give_the_update_of_one_batch(tmp_path):
    grads = []
    for size in (2, 4):
        model = tiny_model("llama").double()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        made = trainer(model, tmp_path, samples(4, seed=9), lam=0.5, **options)
        made.update(collated(samples(4, seed=3), size))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("option", [{"rho": 0.0}, {"lam": 0.0}])
def test_without_rho_or_lambda_training_is_plain_bit_for_bit(tmp_path, option):
    plain, ours = tiny_model("llama"), tiny_model("llama")
    arguments = config(tmp_path, TrainingArguments, max_steps=5)
    Trainer(plain, arguments, train_dataset=samples(8), data_collator=Collator(0)).train()
    made = trainer(ours, tmp_path, max_steps=5, **option)
    made.train()
    assert made.harmful.drawn == (0 if "rho" in option else 1)
    made.edit.revert(ours)
    assert equal(weights(plain), weights(ours))


def test_training_ends_with_the_last_steps_perturbation_saved_as_an_edit(tmp_path):
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"])
    made = trainer(model, tmp_path, rho=0.7, save_strategy="steps", save_steps=4, max_steps=4)
    made.train()
    edit = Edit.load(tmp_path / "edit")
    assert edit.recipe == {"method": "panacea", "rho": 0.7, "lam": 0.001, "space": "trained"}
    moved = {name: entry.after.double() - entry.before.double() for name, entry in edit.tensors.items()}
    assert norm(moved) == pytest.approx(0.7, rel=1e-5)
    perturbed_weights = weights(model)
    edit.revert(model)
    # the last checkpoint was written before the perturbation
    saved = trainer(with_lora(tiny_model("llama"), ["q_proj", "v_proj"]), tmp_path, rho=0.7, save_steps=4, max_steps=4)
    saved.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(weights(saved.model), perturbed_weights)
    saved.edit.revert(saved.model)
    assert equal(weights(saved.model), weights(model))


def test_the_direction_is_that_of_the_last_step_not_of_the_trained_weights(tmp_path):
    model = tiny_model("llama")
    made = trainer(model, tmp_path, max_steps=1, rho=0.2)
    harmful = seen(made)
    start = tiny_model("llama")
    h = gradients(start, lambda m: mean_loss(m, harmful))
    made.train()
    for name, entry in made.edit.tensors.items():
        wanted = 0.2 * h[name] / norm(h)
        moved = torch.zeros_like(wanted).reshape(-1)
        mask = hftcore.ops.unpack_mask(entry.mask, wanted.shape[-1]).reshape(-1)
        moved[mask] = entry.after - entry.before
        torch.testing.assert_close(moved.view_as(wanted), wanted, rtol=1e-3, atol=1e-6)


def test_a_run_resumed_in_the_middle_ends_as_the_whole(tmp_path):
    whole, parts = tiny_model("llama"), tiny_model("llama")
    options = {"save_strategy": "steps", "save_steps": 2, "lam": 0.1}
    trainer(whole, tmp_path / "whole", max_steps=4, **options).train()
    trainer(tiny_model("llama"), tmp_path / "parts", max_steps=2, **options).train()
    resumed = trainer(parts, tmp_path / "parts", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert equal(weights(whole), weights(parts))


def test_bfloat16_weights_come_back_bit_for_bit_at_every_step(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    made = trainer(model, tmp_path, rho=5.0)
    before = weights(model)
    for _ in range(3):
        model.zero_grad()
        made.update(collated(samples(2)))
        assert equal(weights(model), before)


def test_a_zero_harmful_gradient_trains_plainly_and_warns_at_the_end(tmp_path):
    plain, ours = tiny_model("llama"), tiny_model("llama")
    arguments = config(tmp_path, TrainingArguments)
    Trainer(plain, arguments, train_dataset=samples(8), data_collator=Collator(0)).train()
    made = trainer(ours, tmp_path)
    made._harmful = lambda count: lambda: torch.tensor(0.0)
    with pytest.warns(UserWarning, match="the harmful gradient is zero"):
        made.train()
    assert made.edit.tensors == {}
    assert equal(weights(plain), weights(ours))


def test_a_harmful_loss_that_is_nan_stops_the_run_with_the_weights_as_they_were(tmp_path):
    model = tiny_model("llama")
    made = trainer(model, tmp_path)
    before = weights(model)

    def broken(count):
        def run():
            loss = sum(p.sum() for p in model.parameters()) * math.nan
            loss.backward()
            return loss.detach()

        return run

    made._harmful = broken
    with pytest.raises(NonFiniteError, match="the gradient to move along is NaN or infinite in"):
        made.train()
    assert equal(weights(model), before)


def test_missing_and_empty_harmful_sets_are_refused_and_small_ones_taken_whole(tmp_path):
    with pytest.raises(HftcoreError, match="harmful_dataset is empty"):
        trainer(tiny_model("llama"), tmp_path, [])
    with pytest.raises(HftcoreError, match="PanaceaTrainer needs harmful_dataset"):
        PanaceaTrainer(tiny_model("llama"), config(tmp_path, PanaceaConfig), train_dataset=samples(4))
    made = trainer(tiny_model("llama"), tmp_path, samples(1), max_steps=2)
    made.train()
    assert made.edit.removed > 0


@pytest.mark.parametrize("setting", [{"rho": -1}, {"lam": math.nan}, {"space": "weights"}, {"clamp": 0}])
def test_settings_out_of_range_are_refused_by_name(setting, tmp_path):
    with pytest.raises(HftcoreError, match=next(iter(setting))):
        config(tmp_path, PanaceaConfig, **setting)


@torch.no_grad()
def merged_norm(model, edit):
    """The norm of the change of every merged weight, formed in full."""
    named, total = dict(model.named_parameters()), 0.0
    old = weights(model)
    edit.apply(model)
    for pair in lora_factors(model):
        change = named[pair.b].double() @ named[pair.a].double() - old[pair.b].double() @ old[pair.a].double()
        total += float((pair.scaling * change).square().sum())
    edit.revert(model)
    return total**0.5


@pytest.mark.parametrize("rho", [1e-3, 0.5, 30.0])
def test_in_merged_space_rho_is_the_norm_of_the_merged_change(rho):
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"])
    before = weights(model)
    edit = hftcore.panacea_perturb(model, collated(samples(4)), rho, space="merged")
    edit.revert(model)
    assert equal(weights(model), before)
    assert merged_norm(model, edit) == pytest.approx(rho, rel=1e-3)
    plain = hftcore.panacea_perturb(model, collated(samples(4)), rho)
    moved = {name: entry.after.double() - entry.before.double() for name, entry in plain.tensors.items()}
    assert norm(moved) == pytest.approx(rho, rel=1e-3)


def test_the_smallest_step_that_moves_the_merged_weights_so_far_is_taken():
    # products of two numbers that both move are not monotone in t, so several t may give one norm
    rng = np.random.default_rng(0)
    for _ in range(50):
        A, B, dA, dB = (torch.tensor(rng.normal(size=(1, 1))) for _ in range(4))
        parameters = {"a": nn.Parameter(A), "b": nn.Parameter(B)}
        direction = Gradients({"a": dA, "b": dB})
        t = merged_length(parameters, [Factors("a", "b", 0.7)], direction, 0.25)
        u, v = float(dA) / direction.norm(), float(dB) / direction.norm()
        grid = np.linspace(0, t, 2001)
        moved = np.abs(0.7 * ((float(B) + grid * v) * (float(A) + grid * u) - float(B) * float(A)))
        assert moved[-1] == pytest.approx(0.25, rel=1e-6)
        assert moved[:-1].max() < 0.25


def test_fresh_adapters_and_other_parameters_count_in_merged_space():
    model = with_lora(tiny_model("llama"), ["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
        parameter.requires_grad_("lora_" in name or name.endswith("norm.weight"))
    parameters = trained(model)
    direction = Gradients({name: torch.randn_like(p) for name, p in parameters.items()})
    length = merged_length(parameters, lora_factors(model), direction, 2.0)
    before = {name: p.detach().double().clone() for name, p in parameters.items()}
    total = 0.0
    with perturbed(parameters, direction, length):
        for name, p in parameters.items():
            if "lora_" not in name:
                total += float((p.detach().double() - before[name]).square().sum())
        for pair in lora_factors(model):
            change = (parameters[pair.b].double() @ parameters[pair.a].double()).detach()
            total += float((pair.scaling * change).square().sum())
    assert total**0.5 == pytest.approx(2.0, rel=1e-4)


def test_the_perturbation_alone_is_a_step_along_the_common_gradient():
    model = tiny_model("llama")
    model.train()
    batches = collated(samples(5))
    parameter = model.model.norm.weight
    parameter.requires_grad_(False)
    parameter.grad = torch.ones_like(parameter)
    before = weights(model)
    h = gradients(model, lambda m: mean_loss(m, batches))
    edit = hftcore.panacea_perturb(model, iter(batches), 0.4)
    for name, value in weights(model).items():
        wanted = before[name] + 0.4 * h[name] / norm(h) if name in h else before[name]
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    assert model.training
    assert not parameter.requires_grad
    assert bool((parameter.grad == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    edit.revert(model)
    assert equal(weights(model), before)


def test_what_the_end_of_training_could_not_do_is_refused_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained"))
    peft = pytest.importorskip("peft")

    def made(model, **settings):
        arguments = config(tmp_path, PanaceaConfig, lam=0.0, **settings)
        return PanaceaTrainer(model, arguments, train_dataset=samples(2), harmful_dataset=samples(2))

    def dora():
        options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
        return peft.get_peft_model(tiny_model("llama"), options)

    with pytest.raises(HftcoreError, match=r"lora_magnitude_vector.*use space='trained'"):
        made(dora(), space="merged").train()
    model = tiny_model("llama")
    model.extra = nn.Parameter(torch.zeros(1, 1, 1, 1))
    with pytest.raises(HftcoreError, match="extra has 4 dimensions, an edit holds at most 3"):
        made(model).train()
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    made(dora()).train()
    made(model, rho=0.0).train()


class Elsewhere(torch.Tensor):
    """On another device, as far as one can tell without one: nothing works before `to`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.Tensor.to, "computed with where it was"
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].as_subclass(torch.Tensor)


def test_batches_are_moved_to_the_models_device():
    batches = collated(samples(3))
    near, far = tiny_model("llama"), tiny_model("llama")
    hftcore.panacea_perturb(near, batches)
    hftcore.panacea_perturb(
        far, [{name: value.as_subclass(Elsewhere) for name, value in one.items()} for one in batches]
    )
    assert all(torch.equal(a, b) for a, b in zip(near.parameters(), far.parameters(), strict=True))


def test_with_an_adapter_its_factors_alone_are_moved_even_if_frozen():
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"]).requires_grad_(False)
    edit = hftcore.panacea_perturb(model, collated(samples(2)))
    assert len(edit.tensors) == 8
    assert all("lora_" in name for name in edit.tensors)
    chosen = hftcore.panacea_perturb(model, collated(samples(2)), targets=["down_proj"])
    assert [name.endswith("down_proj.weight") for name in chosen.tensors] == [True, True]
    assert not any(p.requires_grad for p in model.parameters())


def test_random_noise_has_the_same_length_and_repeats():
    edits = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        edits.append(hftcore.panacea_perturb(model, None, 0.3, direction="random", seed=seed))
    after = [torch.cat([entry.after for entry in edit.tensors.values()]) for edit in edits]
    moved = {name: entry.after.double() - entry.before.double() for name, entry in edits[0].tensors.items()}
    assert norm(moved) == pytest.approx(0.3, rel=1e-4)
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], after[2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_a_perturbation_of_all_weights_applies_to_the_checkpoint_on_disk(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    edit = hftcore.panacea_perturb(model, collated(samples(4)), 0.5)
    apply_edit(edit, tmp_path / "model", tmp_path / "moved")
    revert_edit(edit, tmp_path / "moved", tmp_path / "back")
    assert equal(weights(type(model).from_pretrained(tmp_path / "moved")), weights(model))
    edit.revert(model)
    assert equal(weights(type(model).from_pretrained(tmp_path / "back")), weights(model))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no supervised token"),
        (None, "harmful_batches must be batches"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], "batch 0 has no labels"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.full((1, 3), -100)}], "no supervised"),
    ],
)
def test_bad_harmful_batches_are_refused_and_change_nothing(batches, message):
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(HftcoreError, match=message):
        hftcore.panacea_perturb(model, batches)
    assert equal(weights(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_fails_when_the_edit_is_made_leaves_every_weight(monkeypatch):
    model, made = tiny_model("llama"), []

    def difference(*args):
        made.append(args)
        if len(made) == 3:
            raise MemoryError
        return kept(*args)

    kept = panacea_perturb.difference
    monkeypatch.setattr(panacea_perturb, "difference", difference)
    before = weights(model)
    with pytest.raises(MemoryError):
        hftcore.panacea_perturb(model, None, direction="random")
    assert len(made) == 3
    assert equal(weights(model), before)


def test_coefficients_are_sums_by_block_and_drawn(tmp_path):
    model = tiny_model("llama")
    before = weights(model)
    edit = hftcore.panacea_perturb(model, collated(samples(4)))
    found = safety_coefficients(edit)
    for block in (0, 1):
        names = [name for name in before if name.startswith(f"model.layers.{block}.")]
        wanted = sum(float((weights(model)[name].double() - before[name].double()).abs().sum()) for name in names)
        assert found[block] == pytest.approx(wanted, rel=1e-12)
    draw_coefficients({"gradient": found}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_where_lambda_is_zero_does_not_run_the_harmful_pass():
    theta = {"w": nn.Parameter(torch.ones(2))}

    def user():
        theta["w"].sum().backward()
        return theta["w"].sum().detach()

    step = panacea_step(theta, user, lambda: pytest.fail("run"), PanaceaSettings(lam=0.0))
    assert step.direction is None
    assert theta["w"].grad.tolist() == [1.0, 1.0]
