"""Antibody, both stages: against updates written out by hand in float64."""

import copy
import functools
import gc
import itertools
import math

import pytest
import torch
from test_trainers import config, in_two_processes, samples, weights
from tiny_models import VOCABULARY, one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hftcore.bindings
from hftcore.bindings import AntibodyAlignConfig, AntibodyAlignTrainer, AntibodyConfig, AntibodyTrainer
from hftcore.bindings.evaluation.judge import is_refusal
from hftcore.bindings.refusals import REFUSALS
from hftcore.bindings.trainers.collate import Collator
from hftcore.bindings.trainers.likelihood import Likelihoods, following
from hftcore.bindings.trainers.refusal import RefusalCollator, WithRefusals, refusal_tokens, split
from hftcore.defenses.antibody import RunningSoftmax, WeightSettings, attenuation, coefficients, running_bound
from hftcore.defenses.antibody_align import AlignSettings, align_step
from hftcore.defenses.branches import branch_mask, branched, cut
from hftcore.errors import HftcoreError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSAL_IDS = [[11, 12, 2], [13, 2], [14, 15, 16, 2]]
BRANCHING = ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "phi3", "gpt-neox", "deepseek-v3", "qwen3-moe", "mixtral")


def exact_model():
    """A model whose arithmetic is float64 throughout (those with RMSNorm or rotary positions have float32 inside), without dropout."""
    model = tiny_model("gpt2", torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def sgd(tmp_path, kind, **options):
    """Plain gradient descent without clipping, so that one step shows the gradient."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
    return config(tmp_path, kind, **(settings | options))


def step_of(trainer, model):
    """The gradient of the trainer's one step, read off the weights."""
    before = weights(model)
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def exact(outputs, labels, num_items_in_batch):
    """The Trainer's loss without its cast to float32, so that float64 can be compared."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def nll(model, prompt, answer):
    """Summed negative log-likelihood of an answer, one sample alone, without padding."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0]
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")


def parts(row):
    cut_at = next(place for place, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:cut_at], row["input_ids"][cut_at:]


def gradient_of(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters)


def dot(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def align_by_hand(model, safe, harmful, refusals, rho, rule, xi, lambda_refusal, last=None):
    """The alignment step as section 3 of the paper writes it; returns (gradient by name, λ)."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def mean_loss(net, pairs):
        return sum(nll(net, *pair) for pair in pairs) / sum(len(answer) for _, answer in pairs)

    pairs = [parts(row) for row in harmful]
    refused = [(prompt, refusals[i]) for i, (prompt, _) in enumerate(pairs)]
    g_h = gradient_of(model, mean_loss(model, pairs))
    moved = copy.deepcopy(model)
    norm = dot(g_h, g_h).sqrt()
    with torch.no_grad():
        for p, g in zip([p for p in moved.parameters() if p.requires_grad], g_h, strict=True):
            p -= rho * g / norm
    g_p = gradient_of(moved, mean_loss(moved, pairs))
    g_r = gradient_of(moved, mean_loss(moved, refused))
    g_a = gradient_of(model, mean_loss(model, [parts(row) for row in safe]))
    d = [a - b for a, b in zip(g_h, g_p, strict=True)]
    if rule == "theorem":
        raw = max(0.0, float((xi * dot(d, d) - dot(g_a, d)) / dot(d, d)))
    elif rule == "code":
        raw = max(0.0, xi - float(dot(g_a, d) / (dot(g_a, g_a).sqrt() * dot(d, d).sqrt())))
    else:
        raw = xi
    lam = raw if last is None else 0.99 * last + 0.01 * raw
    total = [a + lam * c + lambda_refusal * r for a, c, r in zip(g_a, d, g_r, strict=True)]
    return dict(zip(names, total, strict=True)), lam


@pytest.mark.parametrize("rule", ["theorem", "code", "constant"])
def test_an_alignment_step_is_the_one_written_by_hand(tmp_path, rule):
    model = exact_model()
    safe, harmful = samples(2, seed=3), samples(2, seed=4)
    args = sgd(tmp_path, AntibodyAlignConfig, lambda_rule=rule, rho=0.1, xi=5.0, lambda_refusal=0.05)
    expected, lam = align_by_hand(copy.deepcopy(model), safe, harmful, REFUSAL_IDS, 0.1, rule, 5.0, 0.05)
    trainer = AntibodyAlignTrainer(
        model, args, train_dataset=safe, harmful_dataset=harmful, refusals=REFUSAL_IDS, compute_loss_func=exact
    )
    found = step_of(trainer, model)
    assert trainer.kept["lambda"] == pytest.approx(lam, rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)
    entry = next(entry for entry in trainer.state.log_history if "lambda" in entry)
    assert {"loss_harmful", "loss_refusal", "sharpness", "cosine", "loss"} <= entry.keys()


def test_the_average_of_lambda_follows_the_code(tmp_path):
    model = exact_model()
    safe, harmful = samples(2, seed=3), samples(2, seed=4)
    args = sgd(tmp_path, AntibodyAlignConfig, lambda_rule="code", max_steps=2, learning_rate=0.01)
    hand = copy.deepcopy(model)
    last = None
    for _ in range(2):
        gradient, last = align_by_hand(hand, safe, harmful, REFUSAL_IDS, 0.1, "code", 5.0, 0.05, last)
        with torch.no_grad():
            for name, p in hand.named_parameters():
                p -= 0.01 * gradient[name]
    trainer = AntibodyAlignTrainer(
        model, args, train_dataset=safe, harmful_dataset=harmful, refusals=REFUSAL_IDS, compute_loss_func=exact
    )
    trainer.train()
    assert trainer.kept["lambda"] == pytest.approx(last, rel=1e-9)


def passes_of(theta, losses):
    def of(loss):
        def run():
            value = loss(theta["w"])
            value.backward()
            return value.detach()

        return run

    return [of(loss) for loss in losses]


def test_lambda_is_what_theorem_4_1_says_on_numbers_checked_by_hand():
    """h = w₁²: g_h = (4, 0), θ⁺ = (1.5, 0), d = (1, 0). g_a = (2, 3), so λ = (a_t − 2) / 1."""
    theta = {"w": nn.Parameter(torch.tensor([2.0, 0.0], dtype=torch.float64))}
    align, harmful = passes_of(theta, (lambda w: 2 * w[0] + 3 * w[1], lambda w: w[0] ** 2))
    for settings, lam in (
        (AlignSettings(rho=0.5, xi=5, lambda_refusal=0), 3.0),
        (AlignSettings(rho=0.5, xi=1, lambda_refusal=0), 0.0),
        (AlignSettings(rho=0.5, a_t=4.5, lambda_refusal=0), 2.5),
        (AlignSettings(rho=0.5, xi=5, lambda_rule="code", lambda_refusal=0), 5 - 2 / math.sqrt(13)),
    ):
        theta["w"].grad = None
        step = align_step(theta, align, harmful, None, settings)
        assert step.lambda_t == pytest.approx(lam)
        assert theta["w"].grad.tolist() == pytest.approx([2 + lam, 3])
        assert theta["w"].tolist() == [2.0, 0.0]
        assert float(step.sharpness) == pytest.approx(4 - 2.25)


def test_a_flat_harmful_loss_leaves_plain_alignment():
    theta = {"w": nn.Parameter(torch.tensor([2.0, 1.0]))}
    align, harmful = passes_of(theta, (lambda w: w.sum(), lambda w: (w * 0).sum()))
    step = align_step(theta, align, harmful, None, AlignSettings(lambda_refusal=0))
    assert step.lambda_t == 0
    assert theta["w"].grad.tolist() == [1.0, 1.0]


def test_an_alignment_gradient_that_is_nan_is_refused_and_the_weights_stay():
    theta = {"w": nn.Parameter(torch.tensor([2.0, 1.0]))}
    align, harmful = passes_of(theta, (lambda w: w.sum(), lambda w: (w * math.nan).sum()))
    with pytest.raises(NonFiniteError, match="'w'"):
        align_step(theta, align, harmful, None, AlignSettings(lambda_refusal=0))
    assert theta["w"].tolist() == [2.0, 1.0]


def test_with_a_constant_lambda_and_no_refusal_it_is_booster(tmp_path):
    """∇f + λ(∇h(w) − ∇h(w − α ∇h/‖∇h‖)), arXiv:2409.01586."""
    model = exact_model()
    safe, harmful = samples(2, seed=3), samples(2, seed=4)
    options = {"lambda_rule": "constant", "xi": 5.0, "rho": 0.1, "lambda_refusal": 0.0}
    expected, _ = align_by_hand(copy.deepcopy(model), safe, harmful, REFUSAL_IDS, 0.1, "constant", 5.0, 0.0)
    trainer = AntibodyAlignTrainer(
        model,
        sgd(tmp_path, AntibodyAlignConfig, **options),
        train_dataset=safe,
        harmful_dataset=harmful,
        compute_loss_func=exact,
    )
    found = step_of(trainer, model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)


def test_an_alignment_step_without_terms_is_plain_training_bit_for_bit(tmp_path):
    from transformers import Trainer, TrainingArguments

    ours, theirs = tiny_model("llama"), tiny_model("llama")
    safe = samples(4, seed=3)
    off = {"lambda_rule": "constant", "xi": 0.0, "lambda_refusal": 0.0}
    AntibodyAlignTrainer(
        ours, config(tmp_path, AntibodyAlignConfig, **off), train_dataset=safe, harmful_dataset=samples(3, seed=4)
    ).train()
    Trainer(theirs, config(tmp_path, TrainingArguments), train_dataset=safe, data_collator=Collator(0)).train()
    left, right = weights(ours), weights(theirs)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_accumulating_gradients_does_not_change_the_alignment_step(tmp_path):
    safe, harmful = samples(4, seed=3), samples(4, seed=4)
    found = []
    for options in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        model = exact_model()
        trainer = AntibodyAlignTrainer(
            model,
            sgd(tmp_path, AntibodyAlignConfig, **options),
            train_dataset=safe,
            harmful_dataset=harmful,
            refusals=REFUSAL_IDS,
            compute_loss_func=exact,
        )
        found.append(step_of(trainer, model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)


def test_at_most_two_copies_of_the_parameters_exist_beside_their_gradient():
    """Counted at the end of every pass, when its gradient is there too."""
    theta = {"w": nn.Parameter(torch.ones(10007))}
    most = []

    def held():
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        found = [*tensors, *(tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None)]
        return len({tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel() == 10007})

    def of(factor):
        def run():
            loss = (theta["w"] ** 3 * factor).sum()
            loss.backward()
            value = loss.detach()
            del loss
            most.append(held())
            return value

        return run

    align_step(theta, of(1.0), of(2.0), of(3.0), AlignSettings())
    assert len(most) == 4
    assert max(most) == 2 + 2


def test_an_alignment_step_makes_four_passes(tmp_path):
    model = tiny_model("llama")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    trainer = AntibodyAlignTrainer(
        model,
        sgd(tmp_path, AntibodyAlignConfig),
        train_dataset=samples(2, seed=3),
        harmful_dataset=samples(2, seed=4),
        refusals=REFUSAL_IDS,
    )
    trainer.train()
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1}, r"rho must be a number in \[0, inf\)"),
        ({"lambda_rule": "paper"}, "lambda_rule must be one of theorem, code, constant"),
        ({"ema_momentum": 1.5}, r"ema_momentum must be a number in \[0, 1\]"),
        ({"lambda_rule": "code", "a_t": 1.0}, "a_t is for lambda_rule"),
    ],
)
def test_bad_alignment_settings_are_refused(tmp_path, options, message):
    with pytest.raises(HftcoreError, match=message):
        config(tmp_path, AntibodyAlignConfig, **options)


def collated(rows, form, side="right"):
    def collate(plain):
        batch = Collator(0)(plain)
        if side == "left":
            for row, own in enumerate(plain):
                for name in batch:
                    batch[name][row] = batch[name][row].roll(batch["input_ids"].shape[1] - len(own["input_ids"]))
        return batch

    with_refusals = WithRefusals("data", rows, REFUSAL_IDS)
    return RefusalCollator(collate, 0, form)([with_refusals[index] for index in range(len(rows))])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BRANCHING)
@torch.no_grad()
def test_both_answers_are_as_likely_in_one_sequence_as_each_alone(name, side):
    """In float32 two orders of summing a few dozen numbers of size 1 differ by some 1e-6 of a log-likelihood."""
    model = tiny_model(name)
    likelihoods = Likelihoods(model)
    assert likelihoods.obstacle is None
    assert likelihoods.head is not None
    rows = samples(4, seed=5)
    batch = collated(rows, "branched", side)
    (target, _), (refused, counts) = likelihoods.logprobs(model, batch, batch["target_next"], batch["refusal_next"])
    for index, row in enumerate(rows):
        prompt, answer = parts(row)
        refusal = REFUSAL_IDS[index % 3]
        assert float(target[index]) == pytest.approx(-float(nll(model, prompt, answer)), rel=1e-5)
        assert float(refused[index]) == pytest.approx(-float(nll(model, prompt, refusal)), rel=1e-5)
        assert int(counts[index]) == len(refusal)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "gpt-oss"])
def test_models_with_short_attention_windows_share_the_prompt_only_within_the_window(name):
    likelihoods = Likelihoods(tiny_model(name))
    if likelihoods.obstacle is None:
        assert likelihoods.window == 4


@torch.no_grad()
def test_gemma_2_with_a_window_beyond_the_batch_shares_the_prompt_and_caps_its_logits():
    model = tiny_model("gemma2")
    model.config.sliding_window = 64
    for layer in model.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and 64
    likelihoods = Likelihoods(model)
    rows = samples(3, seed=5)
    batch = collated(rows, "branched")
    assert likelihoods.obstacle is None
    assert likelihoods.head is not None
    ((target, _),) = likelihoods.logprobs(model, batch, batch["target_next"])
    for index, row in enumerate(rows):
        assert float(target[index]) == pytest.approx(-float(nll(model, *parts(row))), rel=1e-5)


def test_a_path_longer_than_the_window_gets_batches_of_its_own():
    rows = [WithRefusals("data", samples(2), REFUSAL_IDS)[index] for index in range(2)]
    longest = max(len(row["input_ids"]) for row in rows)
    assert "segments" in RefusalCollator(Collator(0), 0, "branched", longest)(rows)
    assert "segments" not in RefusalCollator(Collator(0), 0, "branched", longest - 1)(rows)


@torch.no_grad()
def test_models_that_cannot_share_a_prompt_are_found_out_and_computed_plainly(caplog):
    import transformers

    torch.manual_seed(0)
    mamba = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    bloom = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    for made in (transformers.MambaForCausalLM(mamba), transformers.BloomForCausalLM(bloom)):
        caplog.clear()
        likelihoods = Likelihoods(made)
        assert likelihoods.obstacle is not None
        said = [record.message for record in caplog.records if record.name == "hftcore"]
        assert len(said) == 1
        assert likelihoods.obstacle in said[0]
        rows = samples(3, seed=5)
        batch, _ = split(collated(rows, "separate"))
        ((sums, _),) = likelihoods.logprobs(made, batch, following(batch["labels"]))
        for index, row in enumerate(rows):
            assert float(sums[index]) == pytest.approx(-float(nll(made, *parts(row))), rel=1e-4)


def causal(inputs):
    mask = inputs["attention_mask"]
    return inputs | {"attention_mask": torch.ones_like(mask).tril() if mask.dim() == 4 else mask}


def unplaced(inputs):
    return {name: value for name, value in inputs.items() if name != "position_ids"}


@pytest.mark.parametrize(
    ("changed", "obstacle"),
    [(causal, "one answer would see the other"), (unplaced, "another likelihood there than alone")],
)
def test_a_model_that_takes_an_argument_and_ignores_it_is_found_out(changed, obstacle):
    model = tiny_model("gpt2")
    whole = model.forward
    model.forward = functools.wraps(whole)(lambda **inputs: whole(**changed(inputs)))
    assert obstacle in Likelihoods(model).obstacle


@torch.no_grad()
def test_a_model_that_changes_its_logits_after_the_head_is_read_off_its_logits():
    import transformers

    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "logits_scaling": 8.0, "max_position_embeddings": 64}
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings, **heads)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    likelihoods = Likelihoods(model)
    assert likelihoods.head is None
    row = samples(1, seed=5)[0]
    batch, _ = split(collated([row], "separate"))
    ((sums, _),) = likelihoods.logprobs(model, batch, following(batch["labels"]))
    assert float(sums[0]) == pytest.approx(-float(nll(model, *parts(row))), rel=1e-5)


def test_reading_likelihoods_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = dict(vars(model.lm_head)), [m.training for m in model.modules()]
    Likelihoods(model)
    assert vars(model.lm_head).keys() == before[0].keys()
    assert [m.training for m in model.modules()] == before[1]


def test_autocast_around_the_check_hides_neither_the_head_nor_the_shared_prompt():
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        likelihoods = Likelihoods(model)
    assert likelihoods.obstacle is None
    assert likelihoods.head is not None


def test_a_model_aligned_in_bf16_before_still_shares_its_prompts(tmp_path):
    """accelerate leaves autocast around the forward of a model that it trained, which rounds as no change of logits would."""
    model, rows = tiny_model("llama"), samples(4, seed=6)
    options = {"max_steps": 1, "bf16": True, "per_device_train_batch_size": 4}
    AntibodyAlignTrainer(
        model,
        config(tmp_path, AntibodyAlignConfig, **options),
        train_dataset=rows,
        harmful_dataset=rows,
        refusals=REFUSAL_IDS,
    ).train()
    autocast = vars(model)["forward"]
    likelihoods = Likelihoods(model)
    assert vars(model)["forward"] is autocast
    assert likelihoods.obstacle is None
    assert likelihoods.head is not None
    args = config(tmp_path, AntibodyConfig, **options)
    trainer = AntibodyTrainer(model, args, train_dataset=rows, refusals=REFUSAL_IDS)
    assert trainer.likelihoods.obstacle is None
    assert math.isfinite(trainer.train().training_loss)


def weights_by_hand(model, rows, tau, score, scale):
    """The fine-tuning loss of section 3.3, sample by sample."""
    pairs = [parts(row) for row in rows]
    own = [nll(model, prompt, answer) for prompt, answer in pairs]
    refused = [nll(model, prompt, REFUSAL_IDS[i % 3]) for i, (prompt, _) in enumerate(pairs)]
    lengths = [len(answer) for _, answer in pairs]
    ratios = []
    for i, (s, q) in enumerate(zip(own, refused, strict=True)):
        per = (lengths[i], len(REFUSAL_IDS[i % 3])) if score == "mean" else (1, 1)
        ratios.append(float(q.detach()) / per[1] - float(s.detach()) / per[0])
    largest = max(ratios)
    w = [math.exp((r - largest) / tau) for r in ratios]
    w = [value / sum(w) for value in w]
    if scale == "eq12":
        return sum(a * s for a, s in zip(w, own, strict=True)), w
    if scale == "eq12-mean":
        return sum(a * s / n for a, s, n in zip(w, own, lengths, strict=True)), w
    return sum(a * s for a, s in zip(w, own, strict=True)) / sum(a * n for a, n in zip(w, lengths, strict=True)), w


@pytest.mark.parametrize("form", ["branched", "separate"])
@pytest.mark.parametrize(
    ("score", "scale"), [("mean", "code"), ("sum", "eq12"), ("mean", "eq12"), ("sum", "eq12-mean")]
)
def test_a_weighted_step_is_the_one_written_by_hand(tmp_path, score, scale, form):
    model = exact_model()
    rows = samples(4, seed=6)
    names = [name for name, _ in model.named_parameters()]
    loss, w = weights_by_hand(model, rows, 2.0, score, scale)
    expected = dict(zip(names, gradient_of(model, loss), strict=True))
    options = {"tau": 2.0, "score": score, "scale": scale, "per_device_train_batch_size": 4}
    trainer = AntibodyTrainer(model, sgd(tmp_path, AntibodyConfig, **options), train_dataset=rows, refusals=REFUSAL_IDS)
    trainer.data_collator.form = form
    found = step_of(trainer, model)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-11)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert entry["effective_samples"] == pytest.approx(1 / sum(value**2 for value in w))


def test_for_a_large_tau_all_weights_are_equal_and_the_step_is_plain_fine_tuning(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = samples(4, seed=6)
    ours, theirs = exact_model(), exact_model()
    options = {"per_device_train_batch_size": 4}
    args = sgd(tmp_path, AntibodyConfig, tau=1e9, **options)
    found = step_of(AntibodyTrainer(ours, args, train_dataset=rows, refusals=REFUSAL_IDS), ours)
    plain = sgd(tmp_path, TrainingArguments, **options)
    trainer = Trainer(theirs, plain, train_dataset=rows, data_collator=Collator(0), compute_loss_func=exact)
    expected = step_of(trainer, theirs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["branched", "separate", "both"])
def test_accumulated_micro_batches_with_a_softmax_each_count_alike(tmp_path, form):
    model = exact_model()
    start = copy.deepcopy(model.state_dict())
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    args = sgd(tmp_path, AntibodyConfig, **options)
    trainer = AntibodyTrainer(model, args, train_dataset=samples(6, seed=6), refusals=REFUSAL_IDS)
    forms = itertools.repeat(form) if form != "both" else itertools.cycle(["separate", "branched"])
    seen = []
    update, collate = trainer.update, trainer.data_collator

    def formed(rows):
        collate.form = next(forms)
        return collate(rows)

    trainer.data_collator = formed
    trainer.update = lambda batches: seen.extend(batches) or update(batches)
    found = step_of(trainer, model)
    model.load_state_dict(start)
    expected = gradient_of(model, sum(trainer._loss(model, batch) for batch in seen) / 3)
    branches = ["segments" in batch for batch in seen]
    assert branches == [form == "branched", form != "separate", form == "branched"]
    for value, hand in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["code", "eq12", "eq12-mean"])
def test_one_softmax_over_the_accumulated_batch_is_that_of_one_large_batch(tmp_path, scale):
    rows = samples(6, seed=6)
    found = []
    for options in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "weights_over": "step"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "weights_over": "step"},
    ):
        model = exact_model()
        args = sgd(tmp_path, AntibodyConfig, scale=scale, **options)
        trainer = AntibodyTrainer(model, args, train_dataset=rows, refusals=REFUSAL_IDS)
        found.append((step_of(trainer, model), trainer.state.log_history[0]))
    for other, entry in found[1:]:
        for name in other:
            torch.testing.assert_close(other[name], found[0][0][name], rtol=1e-9, atol=1e-12)
        assert entry["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-4)
        assert entry["effective_samples"] == pytest.approx(found[0][1]["effective_samples"], rel=1e-6)


def test_a_running_softmax_survives_ratios_that_overflow_when_taken_alone():
    ratios = torch.tensor([-800.0, 900.0, 899.0, -5.0])
    softmax = RunningSoftmax(1.0)
    summed = 0.0
    for group in ratios.split(1):
        summed *= softmax.add(group)
        summed += float(softmax.numbers(group).sum())
    torch.testing.assert_close(softmax.numbers(ratios) / softmax.total, torch.softmax(ratios, 0))
    assert summed == pytest.approx(softmax.total)


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("scale", ["code", "eq12"])
def test_attenuation_multiplies_each_samples_gradient(tmp_path, trained, scale):
    """Σ c_i min(1, C / ‖∇ℓ_i‖) ∇s_i from a loop of single-sample backward passes."""
    model = exact_model()
    if trained == "lora":
        torch.manual_seed(0)
        model = with_lora(model, ["c_attn", "c_proj"])
    rows = samples(4, seed=6)
    _, w = weights_by_hand(model, rows, 1.0, "mean", scale)
    lengths = [len(parts(row)[1]) for row in rows]
    per_sample = [gradient_of(model, nll(model, *parts(row))) for row in rows]
    norms = torch.tensor([float(dot(g, g).sqrt()) / n for g, n in zip(per_sample, lengths, strict=True)])
    bound = float(norms.quantile(0.5))
    pulls = coefficients(torch.tensor(w, dtype=torch.float64), torch.tensor(lengths), scale)
    pulls = pulls * attenuation(norms.double(), bound)
    expected = [sum(p * g[k] for p, g in zip(pulls, per_sample, strict=True)) for k in range(len(per_sample[0]))]
    options = {"attenuation": "norm", "scale": scale, "per_device_train_batch_size": 4}
    trainer = AntibodyTrainer(model, sgd(tmp_path, AntibodyConfig, **options), train_dataset=rows, refusals=REFUSAL_IDS)
    found = step_of(trainer, model)
    for value, hand in zip(found.values(), expected, strict=True):
        # the norms are float32
        torch.testing.assert_close(value, hand, rtol=1e-4, atol=1e-6)
    entry = next(entry for entry in trainer.state.log_history if "attenuated" in entry)
    assert entry["attenuated"] == 0.5


def test_the_bound_runs_over_a_window_and_a_bound_above_all_norms_changes_nothing():
    settings = WeightSettings(quantile=1.0, window=3)
    bound, history = running_bound(torch.tensor([5.0, 1.0]), torch.tensor([9.0, 2.0]), settings)
    assert bound == 5.0
    assert history.tolist() == [2.0, 5.0, 1.0]
    assert attenuation(torch.tensor([5.0, 0.0]), bound).tolist() == [1.0, 1.0]
    with pytest.raises(NonFiniteError, match="finite"):
        running_bound(torch.tensor([math.nan]), history, settings)


def bad(labels, length=4):
    return {"input_ids": list(range(1, length + 1)), "labels": labels}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([bad([1, 2, 3, 4])], r"train_dataset\[0\] has no label -100"),
        ([*samples(2), bad([-100] * 4)], r"train_dataset\[2\] has no supervised token"),
        ([bad([-100] * 62 + [5], 63)], "prompt of 62 tokens and its refusal of 3 do not fit the model's window of 64"),
        ([{"input_ids": [1, 2]}], r"train_dataset\[0\] must have input_ids and labels"),
        (iter([]), "must have __len__ and __getitem__"),
        ([], "train_dataset is empty"),
    ],
)
def test_bad_samples_are_refused_before_training(tmp_path, rows, message):
    with pytest.raises(HftcoreError, match=message):
        AntibodyTrainer(tiny_model("llama"), config(tmp_path, AntibodyConfig), train_dataset=rows, refusals=REFUSAL_IDS)


def test_one_sample_a_softmax_is_refused_with_the_reason(tmp_path):
    one = {"per_device_train_batch_size": 1}
    data = {"train_dataset": samples(4), "refusals": REFUSAL_IDS}
    with pytest.raises(HftcoreError, match="weight 1, so the defence is off"):
        AntibodyTrainer(tiny_model("llama"), config(tmp_path, AntibodyConfig, **one), **data)
    with pytest.raises(HftcoreError, match="weight 1, so the defence is off"):
        AntibodyTrainer(tiny_model("llama"), config(tmp_path, AntibodyConfig, weights_over="step", **one), **data)


def test_losses_that_would_be_ignored_are_refused(tmp_path):
    data = {"train_dataset": samples(4), "refusals": REFUSAL_IDS}
    with pytest.raises(HftcoreError, match="makes its own loss"):
        AntibodyTrainer(tiny_model("llama"), config(tmp_path, AntibodyConfig), compute_loss_func=exact, **data)
    smoothed = config(tmp_path, AntibodyConfig, label_smoothing_factor=0.1)
    with pytest.raises(HftcoreError, match="makes its own loss"):
        AntibodyTrainer(tiny_model("llama"), smoothed, **data)


def test_settings_that_would_take_the_refusals_or_the_model_away_are_refused(tmp_path):
    data = {"train_dataset": samples(4), "refusals": REFUSAL_IDS}
    unused = config(tmp_path, AntibodyConfig, remove_unused_columns=True)
    with pytest.raises(HftcoreError, match="take the refusals out of the batches"):
        AntibodyTrainer(tiny_model("llama"), unused, **data)
    with pytest.raises(HftcoreError, match="model_init makes another"):
        AntibodyTrainer(None, config(tmp_path, AntibodyConfig), model_init=lambda: tiny_model("llama"), **data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0}, r"tau must be a number in \(0, inf\), got 0"),
        ({"tau": math.nan}, "tau must be a number"),
        ({"score": "median"}, "score must be one of mean, sum"),
        ({"scale": "paper"}, "scale must be one of"),
        ({"attenuation": "norm", "weights_over": "step"}, "attenuation"),
        ({"quantile": 1.5}, "quantile"),
    ],
)
def test_bad_weight_settings_are_refused(tmp_path, options, message):
    with pytest.raises(HftcoreError, match=message):
        config(tmp_path, AntibodyConfig, **options)


def test_refusals_without_tokens_or_without_a_tokenizer_are_refused():
    with pytest.raises(HftcoreError, match="needs processing_class"):
        refusal_tokens(None)
    with pytest.raises(HftcoreError, match=r"refusals\[1\] is empty"):
        refusal_tokens(None, [[1], []])
    with pytest.raises(HftcoreError, match="at least one"):
        refusal_tokens(None, [])


def test_the_projects_refusals_are_a_hundred_different_sentences_that_the_judge_takes_for_refusals():
    """A model that has learnt them must not count as harmful for it."""
    assert len(set(REFUSALS)) == 100
    assert len([sentence for sentence in REFUSALS if not is_refusal(sentence)]) <= 3


def test_samples_keep_their_refusal_in_every_epoch():
    data = WithRefusals("data", samples(5), REFUSAL_IDS)
    assert [data[index]["refusal_ids"] for index in range(5)] == [*REFUSAL_IDS, *REFUSAL_IDS[:2]]


def test_the_mask_lets_nobody_see_the_other_answer_or_padding():
    rows = [([7, 8], [9, 10, 11], [3, 4]), ([7], [9], [3])]
    batch = [(torch.tensor(p), torch.tensor(a), torch.tensor(r)) for p, a, r in rows]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    labels, mask = torch.full((2, 5), -100), torch.zeros(2, 5, dtype=torch.int64)
    for row, (prompt, answer, _) in enumerate(batch):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.cat([prompt, answer])
        labels[row, len(prompt) : length] = answer
        mask[row, :length] = 1
    made = branched(cut(ids, mask, labels), [refusal for *_, refusal in batch])
    seen = branch_mask(made["segments"])
    assert seen.shape == (2, 1, 7, 7)
    for row in range(2):
        segments = made["segments"][row].tolist()
        for query in range(7):
            for key in range(7):
                same = segments[key] == 1 or segments[key] == segments[query] != 0
                assert bool(seen[row, 0, query, key]) == (
                    (key <= query and same and segments[key] != 0) or key == query
                )
    assert made["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 2, 3]


def test_the_trainers_are_names_of_the_package_loaded_on_first_use():
    assert {"AntibodyAlignTrainer", "AntibodyConfig"} <= set(dir(hftcore.bindings))
    with pytest.raises(AttributeError, match="has no attribute 'NoTrainer'"):
        hftcore.bindings.NoTrainer()


def train_three_ways(folder, size):
    """One step of each trainer; the weights of this process."""
    common = {"per_device_train_batch_size": size, "ddp_backend": "gloo" if size == 2 else None, "learning_rate": 0.1}
    norm = {"attenuation": "norm", "tau": 1e9, "scale": "eq12-mean"}
    found = {}
    for name, trainer, kind, options, data in (
        ("align", AntibodyAlignTrainer, AntibodyAlignConfig, {}, {"harmful_dataset": samples(8, seed=1)}),
        ("step", AntibodyTrainer, AntibodyConfig, {"weights_over": "step"}, {}),
        ("norm", AntibodyTrainer, AntibodyConfig, norm, {}),
    ):
        model = tiny_model("llama")
        args = sgd(folder, kind, **common, **options)
        trainer(model, args, train_dataset=samples(8), refusals=REFUSAL_IDS, **data).train()
        found[name] = weights(model)
    return found


def test_two_processes_take_the_step_of_one_process_with_the_batches_of_both(tmp_path):
    both = in_two_processes(tmp_path, "import test_antibody as t; found = t.train_three_ways(folder, 2)")
    start = weights(tiny_model("llama"))
    for name, alone in train_three_ways(tmp_path / "alone", 4).items():
        for key, value in alone.items():
            assert torch.equal(both[0][name][key], both[1][name][key])
            # float32 gradients of size 0.1 to 10, summed in another order
            torch.testing.assert_close(both[0][name][key], value, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(alone["lm_head.weight"], start["lm_head.weight"], atol=1e-3)
