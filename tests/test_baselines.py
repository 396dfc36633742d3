"""The defences that the papers compare with: each update against float64 written out by hand, their reductions and their edges."""

import copy
import itertools
import math

import pytest
import torch
from defence_oracles import assert_gradient, collated, double_loss, gradients, mean_loss, norm, shifted, token_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from test_immunization import pairs
from test_trainers import config, equal, in_two_processes, samples, weights
from tiny_models import one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn
from transformers import Trainer, TrainingArguments

from hftcore import HftcoreError, NonFiniteError
from hftcore.bindings.trainers import METHODS, ldifs
from hftcore.bindings.trainers.collate import Collator
from hftcore.defenses.anchors import pull, snapshot, swapped
from hftcore.defenses.antibody_align import AlignSettings, align_step
from hftcore.defenses.booster import BoosterSettings, booster_step
from hftcore.defenses.hidden import ATTENTION, MLP, block_parts, captured
from hftcore.defenses.ldifs import FeatureCache
from hftcore.defenses.lisa import LisaSettings, lisa_turn
from hftcore.defenses.repnoise import noise_discrepancy
from hftcore.defenses.safemoe import last_tokens, routing_divergence

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(method, model, tmp_path, data=None, **options):
    """A defence's trainer on small data; in float64 its loss is the judge's."""
    kind, settings = METHODS[method].load()
    on_pairs = method in ("repnoise", "immunize")
    second = {name: samples(6, seed=9) for name in METHODS[method].datasets} | (data or {})
    extra = {name: options.pop(name) for name in ("optimizers",) if name in options}
    if next(model.parameters()).dtype == torch.float64:
        extra["compute_loss_func"] = double_loss
    train = {"train_dataset": pairs(8) if on_pairs else samples(8)} | second
    return kind(model, config(tmp_path, settings, **options), **train, **extra)


def upcoming(stream, count):
    """The next batches of a stream, which stay to be drawn."""
    drawn = [stream.draw() for _ in range(count)]
    stream.drawn -= count
    return drawn


PLAIN = [
    ("sft", {}),
    ("booster", {"lam": 0.0}),
    ("booster", {"alpha": 0.0}),
    ("vaccine", {"rho": 0.0}),
    ("lisa", {"align_steps": 0}),
    ("ldifs", {"lam": 0.0}),
]


@pytest.mark.parametrize(("method", "options"), PLAIN)
def test_switched_off_it_is_plain_training_bit_for_bit(tmp_path, method, options):
    plain, ours = tiny_model("llama"), tiny_model("llama")
    shared = {"max_steps": 4, "gradient_accumulation_steps": 2}
    arguments = config(tmp_path, TrainingArguments, **shared)
    Trainer(plain, arguments, train_dataset=samples(8), data_collator=Collator(0)).train()
    trainer(method, ours, tmp_path, **options, **shared).train()
    assert equal(weights(plain), weights(ours))


def test_booster_is_its_formula_in_float64(tmp_path):
    model, user = tiny_model("gpt2").double(), collated(samples(4, seed=3))
    made = trainer("booster", model, tmp_path, lam=0.7, alpha=0.2)
    harmful = upcoming(made.harmful, 2)
    f = gradients(model, lambda m: mean_loss(m, user))
    h = gradients(model, lambda m: mean_loss(m, harmful))
    step = {name: -0.2 * value / norm(h) for name, value in h.items()}
    moved = shifted(model, step)(lambda m: gradients(m, mean_loss(m, harmful)))
    before = weights(model)
    made.update(user)
    assert_gradient(model, {name: f[name] + 0.7 * (h[name] - moved[name]) for name in f})
    assert equal(weights(model), before)


def test_booster_is_antibody_with_a_constant_weight_and_no_refusal_loss_bit_for_bit():
    found = []
    for which in ("booster", "antibody"):
        model = tiny_model("llama")
        parameters = dict(model.named_parameters())

        def passes(rows, model=model):
            def run():
                loss = mean_loss(model, collated(rows))
                loss.backward()
                return loss.detach()

            return run

        both = passes(samples(4, seed=1)), passes(samples(4, seed=2))
        if which == "booster":
            booster_step(parameters, *both, BoosterSettings(lam=5.0, alpha=0.1))
        else:
            same = AlignSettings(rho=0.1, lambda_rule="constant", xi=5.0, lambda_refusal=0.0)
            align_step(parameters, *both, None, same)
        found.append({name: p.grad for name, p in parameters.items()})
    assert equal(*found)


def test_boosters_trainer_is_antibodys_with_those_settings_bit_for_bit(tmp_path):
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    trainer("booster", ours, tmp_path).train()
    trainer("antibody-align", theirs, tmp_path, rho=0.1, lambda_rule="constant", xi=5.0, lambda_refusal=0.0).train()
    assert equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("method", ["booster", "antibody-align", "immunize"])
def test_a_harmful_gradient_of_zero_leaves_that_of_the_other_data(tmp_path, method):
    model, plain = tiny_model("llama"), tiny_model("llama")
    options = {"lambda_refusal": 0.0} if method == "antibody-align" else {}
    made = trainer(method, model, tmp_path, **options)
    batches = collated(pairs(4) if method == "immunize" else samples(4, seed=3))
    harmless = made.split(batches, "shifted")[0] if method == "immunize" else batches
    original, sides = made.own_loss, []

    def flat(model, batch, number):
        is_harmless = any(torch.equal(batch["input_ids"], one["input_ids"]) for one in harmless)
        sides.append(is_harmless)
        return original(model, batch, number) * (1.0 if is_harmless else 0.0)

    made.own_loss = flat
    made.update(batches)
    assert set(sides) == {True, False}
    reference = trainer("sft", plain, tmp_path)
    reference.over(harmless, reference.own_loss)() if method != "immunize" else trainer(
        "immunize", plain, tmp_path, alpha=0.0
    ).update(batches)
    assert_gradient(model, {name: p.grad for name, p in plain.named_parameters()}, rtol=0, atol=0)


def hooked(modules, keep, add=None):
    """Hooks that append the modules' outputs to `keep` and add `add[index]` to them; returns the handles."""
    handles = []
    for index, module in enumerate(modules):

        def hook(module, args, output, index=index):
            state = output[0] if isinstance(output, tuple) else output
            if add is not None:
                state = state + add[index]
            keep.append(state)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handles.append(module.register_forward_hook(hook))
    return handles


@pytest.mark.parametrize("size", [2, 4])
def test_vaccine_is_its_formula_in_float64_however_the_batch_is_cut(tmp_path, size):
    model, rows = tiny_model("gpt2").double(), samples(4, seed=3)
    batch, attention = Collator(0)(rows), [block.attn for block in model.transformer.h]
    states = []
    handles = hooked(attention, states)
    slopes = torch.autograd.grad(mean_loss(model, [batch]), states)
    for handle in handles:
        handle.remove()
    length = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    handles = hooked(attention, [], [0.8 * slope / length for slope in slopes])
    wanted = gradients(model, lambda m: mean_loss(m, [batch]))
    for handle in handles:
        handle.remove()
    plain = gradients(model, lambda m: mean_loss(m, [batch]))
    made = trainer("vaccine", model, tmp_path, rho=0.8)
    made.update(collated(rows, size))
    assert_gradient(model, wanted)
    assert norm({name: wanted[name] - plain[name] for name in plain}) > 1e-3
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_vaccine_leaves_parameters_trainable_after_a_failure(tmp_path):
    model = tiny_model("llama")
    made = trainer("vaccine", model, tmp_path)
    made.own_loss = lambda *args: (_ for _ in ()).throw(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        made.update(collated(samples(2)))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_vaccine_and_ldifs_are_the_same_under_gradient_checkpointing(tmp_path, reentrant):
    for method, options in (("vaccine", {"rho": 0.8}), ("ldifs", {"lam": 0.5})):
        found = []
        for checkpointed in (False, True):
            model = tiny_model("llama")
            made = trainer(method, model, tmp_path, **options)
            made.update(collated(samples(2)))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            model.zero_grad()
            model.train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            if method == "ldifs" and reentrant and checkpointed:
                with pytest.raises(HftcoreError, match="set use_reentrant=False"):
                    made.update(collated(samples(2)))
                return
            made.update(collated(samples(2)))
            found.append({name: p.grad for name, p in model.named_parameters()})
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_repnoise_is_the_same_under_gradient_checkpointing_and_refuses_what_would_hide_its_features(tmp_path):
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = tiny_model("llama")
        made = trainer("repnoise", model, tmp_path, beta=0.5)
        model.train()
        if options is not None:
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        if options == {"use_reentrant": True}:
            with pytest.raises(HftcoreError, match="set use_reentrant=False"):
                made.update(collated(pairs(4)))
            return
        made.update(collated(pairs(4)))
        found.append({name: p.grad for name, p in model.named_parameters()})
        if options is not None:
            for name in found[0]:
                torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_ldifs_is_its_formula_in_float64_however_the_batch_is_cut(tmp_path, size):
    model = tiny_model("gpt2").double()
    made = trainer("ldifs", model, tmp_path, lam=0.05)
    made.update(collated(samples(2)))
    aligned = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype)
    rows = samples(4, seed=3)

    def wanted(m):
        kept, batch = [[], []], Collator(0)(rows)
        for side, states in zip((m, aligned), kept, strict=True):
            handles = hooked([block.mlp for block in side.transformer.h], states)
            loss = mean_loss(side, [batch])
            for handle in handles:
                handle.remove()
            if side is m:
                own = loss
        real = batch["attention_mask"].bool()
        return own + sum(0.025 * (a[real] - b[real].detach()).square().sum() for a, b in zip(*kept, strict=True))

    expected = gradients(model, wanted)
    model.zero_grad()
    made.update(collated(rows, size))
    assert_gradient(model, expected)


def test_ldifs_computes_the_aligned_features_of_a_sample_once_where_they_fit(tmp_path, monkeypatch):
    plain, runs, ends = ldifs.aligned_features, [], []
    monkeypatch.setattr(ldifs, "aligned_features", lambda *args: runs.append(1) or plain(*args))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 12}
    # 8 samples, three epochs
    for gigabytes, forwards in ((0.0, 12), (1e-12, 12), (1.0, 4)):
        runs.clear()
        model = tiny_model("llama")
        trainer("ldifs", model, tmp_path, lam=0.5, cache_gb=gigabytes, **settings).train()
        assert len(runs) == forwards
        ends.append(weights(model))
    assert equal(ends[0], ends[1])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[2][name], rtol=1e-4, atol=1e-5)


def test_ldifs_tells_samples_apart_by_tokens_and_by_where_they_begin():
    cache, made = FeatureCache(1.0), itertools.count()
    ids = torch.tensor([[0, 5, 6]])

    def get(ids, mask):
        return float(
            cache.get({"input_ids": ids, "attention_mask": mask}, lambda: {0: torch.full((2, 1), next(made))})[0][0]
        )

    left, right = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 0]])
    assert [get(ids, left), get(ids.roll(-1), right), get(ids, left)] == [0, 1, 0]
    assert get(torch.tensor([[0, 5, 7]]), left) == 2


def test_ldifs_sees_the_weights_of_now_under_autocast(tmp_path):
    found = []
    for bf16 in (False, True):
        model = tiny_model("llama")
        made = trainer("ldifs", model, tmp_path, lam=0.05, bf16=bf16)
        made.update(collated(samples(2)))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        model.zero_grad()
        loss = made.update(collated(samples(2)))
        assert made._noted["drift"][-1] > 1
        found.append((float(loss), made._noted["drift"][-1]))
    # two significant digits: bfloat16 has eight bits
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_ldifs_drops_large_terms_when_asked(tmp_path):
    model = tiny_model("llama").double()
    made = trainer("ldifs", model, tmp_path, lam=1e6, drop_above=0.1)
    made.update(collated(samples(2)))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype)
    batches = collated(samples(2, seed=3))
    wanted = gradients(model, lambda m: mean_loss(m, batches))
    model.zero_grad()
    made.update(batches)
    assert_gradient(model, wanted)


def test_ldifs_with_lora_measures_against_the_adapter_it_started_from(tmp_path):
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"])
    start = weights(model)
    made = trainer("ldifs", model, tmp_path, lam=0.1, max_steps=3)
    made.train()
    assert equal({n: start[n] for n in made.kept["aligned"]}, made.kept["aligned"])
    drifts = [entry["drift"] for entry in made.state.log_history if "drift" in entry]
    assert drifts[0] == 0.0
    assert min(drifts[1:]) > 0


def test_lisa_is_its_formula_over_two_cycles_in_float64(tmp_path):
    model = tiny_model("gpt2").double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"align_steps": 2, "user_steps": 1, "rho": 0.5, "warmup": 0.2, "max_steps": 6, "max_grad_norm": 0.0}
    made = trainer("lisa", model, tmp_path, optimizers=(optimizer, None), lr_scheduler_type="constant", **options)
    seen, original = [], made.over
    made.over = lambda batches: seen.append(batches) or original(batches)
    made.train()
    anchor = None
    for step, batches in enumerate(seen):
        if step % 3 in (0, 2):
            anchor = weights(by_hand)
        grads = gradients(by_hand, lambda m, batches=batches: mean_loss(m, batches))
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                # the first fifth of six steps is steps 0 and 1
                pulled = 0.5 * (p - anchor[name]) if step >= 2 else 0.0
                p -= 0.1 * (grads[name] + pulled)
    alignment = {tuple(row["input_ids"]) for row in samples(6, seed=9)}
    sources = [
        all(
            tuple(row[mask.bool()].tolist()) in alignment
            for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        )
        for (b,) in seen
    ]
    assert sources == [True, True, False] * 2
    for name, p in by_hand.named_parameters():
        torch.testing.assert_close(weights(model)[name], p.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_lisa_resumed_anywhere_in_a_cycle_ends_as_the_whole(tmp_path, stop):
    options = {
        "align_steps": 2,
        "user_steps": 3,
        "warmup": 0.0,
        "rho": 5.0,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    options |= {"num_train_epochs": 2, "max_steps": 8}
    whole, parts = tiny_model("llama"), tiny_model("llama")
    straight = trainer("lisa", whole, tmp_path, **options)
    straight.train()
    resumed = trainer("lisa", parts, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert equal(weights(whole), weights(parts))


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 60))
@settings(max_examples=60)
def test_lisas_turns_follow_the_cycle(first, second, step):
    if first + second == 0:
        with pytest.raises(HftcoreError, match="must not both be 0"):
            LisaSettings(0, 0).check()
        return
    cycle = [True] * first + [False] * second
    turn = lisa_turn(step, 50, LisaSettings(first, second, rho=1.0, warmup=0.1))
    assert turn.is_alignment == cycle[step % len(cycle)]
    both = first > 0 and second > 0
    changed = step == 0 or cycle[step % len(cycle)] != cycle[(step - 1) % len(cycle)]
    assert turn.is_switch == (both and changed)
    assert turn.is_pulled == (both and step >= 5)


def test_lisas_pull_begins_with_the_first_step_after_the_warm_up():
    pulled = [lisa_turn(step, 50, LisaSettings(1, 1, warmup=0.1)).is_pulled for step in range(7)]
    assert pulled == [False] * 5 + [True] * 2


def test_weights_put_in_the_parameters_place_leave_no_trace():
    model = nn.Linear(2, 2)
    held = snapshot(dict(model.named_parameters()))
    before = weights(model)
    place = model.weight.data_ptr()
    with torch.no_grad():
        held["weight"] += 1

    def fail():
        assert torch.equal(model.weight, held["weight"])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), swapped(dict(model.named_parameters()), held):
        fail()
    assert equal(weights(model), before)
    assert model.weight.data_ptr() == place


def test_a_pull_is_the_gradient_of_the_proximal_term():
    theta = {
        "w": nn.Parameter(torch.randn(5, dtype=torch.float64)),
        "b": nn.Parameter(torch.randn(2, dtype=torch.float64)),
    }
    anchor = {name: torch.randn_like(p) for name, p in theta.items()}
    theta["w"].grad = torch.ones(5, dtype=torch.float64)
    value = pull(theta, anchor, 0.3)
    wanted = {name: 0.3 * (p.detach() - anchor[name]) for name, p in theta.items()}
    torch.testing.assert_close(theta["w"].grad, 1 + wanted["w"])
    torch.testing.assert_close(theta["b"].grad, wanted["b"])
    assert float(value) == pytest.approx(norm(wanted) ** 2 / 0.6, rel=1e-6)


def discrepancy_by_hand(x, y):
    """Every kernel value on its own."""
    every = [*x, *y]
    distances = [[float((a - b).detach().square().sum()) for b in every] for a in every]
    n, half = len(every), len(x)
    width = sum(map(sum, distances)) / (n * n - n) / 4
    total = 0.0
    for i in range(half):
        for j in range(half):
            for sign, p, q in ((1, i, j), (1, half + i, half + j), (-1, i, half + j), (-1, half + i, j)):
                between = (every[p] - every[q]).square().sum()
                total = total + sign * sum(torch.exp(-between / (width * 2**k)) for k in range(5))
    return total / half**2


def test_the_discrepancy_is_that_of_five_kernels():
    x, y = (torch.randn(3, 8, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(noise_discrepancy(x, y), discrepancy_by_hand(x, y))
    assert float(noise_discrepancy(x, x + 3)) > float(noise_discrepancy(x, torch.randn_like(x)))


def test_the_discrepancy_holds_no_differences_for_the_backward_pass():
    features, saved = torch.randn(4, 1000, requires_grad=True), {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noise_discrepancy(features, torch.randn(4, 1000)).backward()
    # 64 differences of 1,000 would be; the union of both sets is 8
    assert sum(saved.values()) < 16 * 1000


@pytest.mark.parametrize("rule", ["shifted", "code"])
@pytest.mark.parametrize("lens", [True, False])
def test_repnoise_is_its_formula_in_float64(tmp_path, rule, lens):
    model, rows = tiny_model("gpt2").double(), pairs(3, seed=3)
    made = trainer("repnoise", model, tmp_path, alpha=0.4, beta=0.6, lens=lens, mask_rule=rule)
    (harmless,), (harmful,) = made.split([Collator(0)(rows)], rule)
    differs = harmful["differs"]
    heads = nn.functional.linear

    def masked_loss(logits, side):
        shown = logits * differs[:, :, None] if rule == "code" else logits
        return token_losses(shown, side["labels"]).mean()

    def wanted(m):
        states = []
        handles = hooked([block.mlp for block in m.transformer.h], states)
        inputs = {name: harmful[name] for name in ("input_ids", "attention_mask")}
        output = m(**inputs, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        losses = [masked_loss(output.logits, harmful)]
        if lens:
            *inner, last = output.hidden_states
            read = [*(m.transformer.ln_f(state) for state in inner), last]
            losses += [masked_loss(heads(state, m.lm_head.weight), harmful) for state in read]
        h = sum(losses) / max(1, len(losses) - 1)
        torch.manual_seed(11)
        noise = 0.0
        counted = differs if rule == "code" else differs & harmful["attention_mask"].bool()
        for state in states:
            drawn = torch.randn(state.shape, dtype=state.dtype)
            shown = [(x * counted[:, :, None]).flatten(1) for x in (state, drawn)]
            noise = noise + discrepancy_by_hand(*shown) / len(states)
        plain = m(**{name: harmless[name] for name in inputs}).logits
        return masked_loss(plain, harmless) + 0.6 * noise - 0.4 * torch.log(1 + h)

    expected = gradients(model, wanted)
    torch.manual_seed(11)
    made.update([Collator(0)(rows)])
    assert_gradient(model, expected)


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def routed(model, batch):
    """Router logits of the last real token of every sample, from hooks."""
    states = []
    handles = hooked(routers(model), states)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    B, T = batch["input_ids"].shape
    last = batch["attention_mask"].sum(dim=1) - 1
    return [state.view(B, T, -1)[range(B), last] for state in states]


@pytest.mark.parametrize("layers", ["sum", "mean"])
def test_safemoe_takes_steps_on_the_divergence_of_the_routers(tmp_path, layers):
    model = tiny_model("qwen3-moe").double()
    # the default has no float64
    model.set_experts_implementation("eager")
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"max_steps": 4, "every": 2, "max_grad_norm": 0.0, "layers": layers, "tau": 0.5}
    data = {"safety_dataset": samples(3, seed=9)}
    made = trainer("safemoe", model, tmp_path, data, optimizers=(optimizer, None), **options)
    seen, original = [], made.over
    made.over = lambda batches: seen.append(batches) or original(batches)
    made.train()
    safety = collated(samples(3, seed=9))
    with torch.no_grad():
        aligned = [routed(by_hand, batch) for batch in safety]

    def descend(loss):
        for p, grad in zip(by_hand.parameters(), gradients(by_hand, loss).values(), strict=True):
            with torch.no_grad():
                p -= 0.05 * grad

    for step, batches in enumerate(seen, start=1):
        descend(lambda m, batches=batches: mean_loss(m, batches))
        for batch, theirs in zip(safety, aligned, strict=True) if step % 2 == 0 else ():

            def divergence(m, batch=batch, theirs=theirs):
                terms = [
                    nn.functional.kl_div((q / 0.5).log_softmax(-1), (p / 0.5).softmax(-1), reduction="batchmean")
                    for q, p in zip(routed(m, batch), theirs, strict=True)
                ]
                return sum(terms) / (len(terms) if layers == "mean" else 1)

            descend(divergence)
    for name, p in by_hand.named_parameters():
        torch.testing.assert_close(weights(model)[name], p.detach(), rtol=1e-5, atol=1e-7)


def test_safemoes_passes_come_at_the_end_of_epochs_and_survive_a_stop(tmp_path):
    def made(model, steps, folder):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 4}
        return trainer("safemoe", model, folder, **options)

    whole, parts = (with_lora(tiny_model("qwen3-moe"), ["q_proj", "v_proj"]) for _ in range(2))
    straight = made(whole, 8, tmp_path / "whole")
    straight.train()
    passes = [e["step"] for e in straight.state.log_history if "routing_divergence" in e]
    assert passes == [4, 8]
    resumed = made(parts, 8, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(weights(whole), weights(parts))


def test_divergences_and_last_tokens_by_hand():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    logits = torch.arange(12.0).view(6, 2)
    assert last_tokens([logits], mask)[0].tolist() == [[4.0, 5.0], [8.0, 9.0]]
    even, sure = torch.zeros(2, 4), torch.tensor([[50.0, 0, 0, 0], [0, 0, 0, 0]])
    found = routing_divergence([even, even], [sure, even], tau=1.0, layers="mean")
    assert float(found) == pytest.approx(math.log(4) / 4, rel=1e-5)


def test_models_without_the_parts_a_defence_looks_at_are_refused(tmp_path):
    with pytest.raises(HftcoreError, match="LlamaForCausalLM has no routers"):
        trainer("safemoe", tiny_model("llama"), tmp_path)
    with pytest.raises(HftcoreError, match="safety_dataset"):
        trainer("safemoe", tiny_model("qwen3-moe"), tmp_path, {"safety_dataset": []})
    with pytest.raises(HftcoreError, match=r"block 0 has no child named self_attn or .*, only 0"):
        block_parts(nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])), ATTENTION)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "gpt-neox", "gemma3", "phi3", "deepseek-v3", "qwen3-moe", "gpt-oss"]
)
def test_attention_and_mlp_are_found_and_give_hidden_states(name):
    model = tiny_model(name)
    for names in (ATTENTION, MLP):
        parts = block_parts(model, names)
        with captured(parts) as seen, torch.no_grad():
            model(input_ids=torch.ones(2, 5, dtype=torch.int64))
        assert [seen[i].shape[-1] for i in range(2)] == [32, 32]
        assert all(seen[i].numel() == 2 * 5 * 32 for i in range(2))


@pytest.mark.parametrize("method", ["booster", "lisa", "vaccine", "ldifs", "repnoise", "safemoe"])
def test_runs_with_adapters_small_sets_and_one_sample_batches(tmp_path, method):
    model = tiny_model("qwen3-moe" if method == "safemoe" else "llama")
    if method != "safemoe":
        model = with_lora(model, ["q_proj", "v_proj"])
    before = weights(model)
    data = {name: samples(1, seed=4) for name in METHODS[method].datasets}
    options = {"align_steps": 1, "user_steps": 1} if method == "lisa" else {}
    made = trainer(method, model, tmp_path, data, per_device_train_batch_size=1, **options)
    made.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= trained


@pytest.mark.parametrize("method", ["panacea", "booster", "lisa", "safemoe"])
def test_empty_and_missing_sets_are_refused_by_name(tmp_path, method):
    (name,) = METHODS[method].datasets
    for data in ([], None):
        with pytest.raises(HftcoreError, match=name):
            trainer(method, tiny_model("qwen3-moe" if method == "safemoe" else "llama"), tmp_path, {name: data})


@pytest.mark.parametrize("method", ["booster", "vaccine", "ldifs", "lisa", "sft", "repnoise"])
def test_a_nan_loss_stops_the_run_before_the_weights_change(tmp_path, method):
    model = tiny_model("llama")
    made = trainer(method, model, tmp_path)
    before = weights(model)
    original = made.own_loss
    made.own_loss = lambda *args: original(*args) * math.nan
    with pytest.raises(NonFiniteError):
        made.train()
    assert equal(weights(model), before)


BAD = [
    ("booster", {"lam": -1}),
    ("vaccine", {"rho": math.nan}),
    ("lisa", {"align_steps": 1.5}),
    ("lisa", {"warmup": 2}),
    ("ldifs", {"drop_above": 0}),
    ("repnoise", {"beta": -1}),
    ("safemoe", {"tau": 0}),
    ("safemoe", {"layers": "max"}),
]


@pytest.mark.parametrize(("method", "setting"), BAD)
def test_settings_out_of_range_are_refused_by_name(tmp_path, method, setting):
    with pytest.raises(HftcoreError, match=next(iter(setting))):
        config(tmp_path, METHODS[method].load()[1], **setting)


def test_bfloat16_weights_come_back_bit_for_bit_after_boosters_step(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    made = trainer("booster", model, tmp_path, alpha=5.0)
    before = weights(model)
    for _ in range(3):
        model.zero_grad()
        made.update(collated(samples(2)))
        assert equal(weights(model), before)


def test_a_checkpoint_whose_names_are_not_the_models_is_refused(tmp_path):
    """transformers writes fused experts under other names, and its Trainer would go on with the old ones and a warning."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer("sft", tiny_model("qwen3-moe"), tmp_path, **options).train()
    again = trainer("sft", tiny_model("qwen3-moe"), tmp_path, max_steps=2)
    with pytest.raises(HftcoreError, match="stored under other names"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


SHARED = {
    "panacea": {"lam": 0.5},
    "vaccine": {"rho": 1.0},
    "ldifs": {"lam": 0.1},
    "safemoe": {"every": 1},
}


def train_each(folder, size):
    found = {}
    for method, options in SHARED.items():
        model = tiny_model("qwen3-moe" if method == "safemoe" else "llama")
        options = options | {
            "per_device_train_batch_size": size,
            "max_steps": 2,
            "ddp_backend": "gloo" if size == 2 else None,
        }
        data = {name: samples(8, seed=9) for name in METHODS[method].datasets}
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2), None
        trainer(method, model, folder / method, data, optimizers=sgd, **options).train()
        found[method] = weights(model)
    return found


def test_two_processes_train_as_one_with_the_batches_of_both(tmp_path):
    both = in_two_processes(tmp_path, "import test_baselines as t; found = t.train_each(folder, 2)")
    alone = train_each(tmp_path / "alone", 4)
    for method in SHARED:
        one, two = alone[method], both[0][method]
        for name in one:
            torch.testing.assert_close(
                one[name], two[name], rtol=1e-3, atol=1e-5, msg=lambda m, at=(method, name): f"{at}: {m}"
            )
