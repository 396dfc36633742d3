"""capture_grad_norms: against a loop of single-sample backward passes in float64, on random models of many families."""

import copy
import warnings

import pytest
import torch
import transformers
from tiny_models import DENSE, SMALL, VOCABULARY, batch, fingerprint, one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.grad_norms import capture_grad_norms
from hftcore.kernels import native, native_gradients

RTOL = 1e-5  # float32 forward and backward passes of two blocks against float64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_products_are_worth_it(monkeypatch):
    """The models of these tests are smaller than what the native library forms the inputs' gradients of."""
    monkeypatch.setattr(native_gradients, "LEAST", 1)


def oracle(model, one, loss="mean"):
    """Names -> [B] norms, and under "" that over all parameters: one backward pass a sample, float64."""
    judge = copy.deepcopy(model).double()
    total = (one["labels"][:, 1:] != -100).sum()
    norms = {name: [] for name, parameter in judge.named_parameters() if parameter.requires_grad}
    for row in range(len(one["labels"])):
        judge.zero_grad()
        own = {key: value[row : row + 1] for key, value in one.items()}
        count = (own["labels"][:, 1:] != -100).sum()
        value = judge(**own).loss
        (value * {"mean": 1, "sum": count, "share": count / total}[loss]).backward()
        for name, parameter in judge.named_parameters():
            if name in norms:
                norms[name].append(torch.zeros(()) if parameter.grad is None else parameter.grad.norm())
    norms = {name: torch.stack(values).double() for name, values in norms.items()}
    return {"": torch.stack(list(norms.values())).square().sum(dim=0).sqrt(), **norms}


def assert_norms(norms, want, rtol=RTOL):
    torch.testing.assert_close(norms.per_sample.double(), want[""], rtol=rtol, atol=0)
    assert norms.per_parameter.keys() == want.keys() - {""}
    for name, value in norms.per_parameter.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(),
            want[name],
            rtol=rtol,
            atol=rtol * float(want[""].max()) / 10,
            msg=lambda text, n=name: n + text,
        )


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_plain_gradients(model, one, got):
    model.zero_grad()
    model(**one).loss.backward()
    want = gradients(model)
    largest = max(float(value.abs().max()) for value in want.values() if value is not None)
    for name, value in want.items():
        if value is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6 * largest)


def run(model, one, **options):
    with capture_grad_norms(model, **options) as norms:
        model(**one).loss.backward()
    return norms


def test_meaning_by_hand():
    """Gradients of the outputs are 1, so those of the weight are the inputs, and of the bias 1."""
    layer = nn.Linear(2, 1)
    with capture_grad_norms(layer, loss="share") as norms:
        layer(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
    torch.testing.assert_close(norms.per_sample, torch.tensor([26.0, 2.0]).sqrt())
    torch.testing.assert_close(norms.per_parameter["weight"], torch.tensor([5.0, 1.0]))
    assert norms.per_parameter["bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", DENSE)
def test_every_family_matches_the_loop(name):
    model, one = tiny_model(name), batch((7, 4, 5))
    assert_norms(run(model, one), oracle(model, one))
    assert_plain_gradients(model, one, gradients(model))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2", "opt", "gemma3"])
def test_left_padding(name):
    model, one = tiny_model(name), batch((7, 4), side="left")
    assert_norms(run(model, one), oracle(model, one))


def test_left_padding_of_gemma2_is_as_if_it_were_not_there():
    """Judged without the padding: transformers' masked float64 attention of this family is NaN (it takes the softmax in float32)."""
    model, one = tiny_model("gemma2"), batch((7, 4), side="left")
    norms = run(model, one)
    for row, length in enumerate((7, 4)):
        want = oracle(model, {key: value[row : row + 1, -length:] for key, value in one.items()})
        torch.testing.assert_close(norms.per_sample[row].double(), want[""][0], rtol=RTOL, atol=0)
        for name, value in norms.per_parameter.items():
            torch.testing.assert_close(value[row].double(), want[name][0], rtol=RTOL, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ["mean", "sum", "share"])
def test_loss_conventions(loss):
    model, one = tiny_model("llama"), batch((7, 4))
    assert_norms(run(model, one, loss=loss), oracle(model, one, loss))


def test_num_items_in_batch_is_what_the_loss_was_divided_by():
    model, one = tiny_model("llama"), batch((7, 4))
    with capture_grad_norms(model) as norms:
        model(**one, num_items_in_batch=torch.tensor(19)).loss.backward()
    assert_norms(norms, oracle(model, one))


def test_loss_scale_is_divided_out():
    model, one = tiny_model("llama"), batch((7, 4))
    with capture_grad_norms(model, loss_scale=1024.0) as norms:
        (model(**one).loss * 1024).backward()
    assert_norms(norms, oracle(model, one))


@pytest.mark.parametrize("is_direct", [True, False])
def test_both_ways_of_forming_gradients_agree(is_direct, monkeypatch):
    monkeypatch.setattr("hftcore.grad_ledger._is_direct_with_gradient", lambda *_: is_direct)
    for name in ("llama", "gpt2"):
        model, one = tiny_model(name), batch((7, 4))
        assert_norms(run(model, one), oracle(model, one))
        assert_plain_gradients(model, one, gradients(model))


@pytest.mark.parametrize("norms_only", [True, False])
def test_gradients_of_inputs_are_those_of_autograd_whoever_forms_them(norms_only, monkeypatch):
    """What comes before the first module watched gets them too, also where an own hook changes the gradient."""
    model, one = tiny_model("opt").requires_grad_(False), batch((7, 4))
    for part in model.model.decoder.layers[1:].modules():
        if isinstance(part, nn.Linear):
            part.requires_grad_(True)
    last = model.model.decoder.layers[1].fc1
    last.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 3,))
    last.register_forward_hook(lambda module, args, output: output * 2)
    embeds = model.get_input_embeddings()(one["input_ids"])

    def gradient(capture):
        x = embeds.clone().requires_grad_(True)
        rest = {key: value for key, value in one.items() if key != "input_ids"}
        if capture:
            with capture_grad_norms(model, norms_only=norms_only):
                model(inputs_embeds=x, **rest).loss.backward()
        else:
            model(inputs_embeds=x, **rest).loss.backward()
        return x.grad

    want = gradient(capture=False)
    for least in (1, 1 << 30):
        monkeypatch.setattr(native_gradients, "LEAST", least)
        torch.testing.assert_close(gradient(capture=True), want, rtol=1e-5, atol=1e-7 * float(want.abs().max()))


class Reversed(nn.Linear):
    """Computes what `nn.Linear` does, and hands on the negative gradient."""

    def forward(self, x):
        return nn.functional.linear(2 * x.detach() - x, self.weight, self.bias)


def replace_forward(block):
    # as accelerate's hooks do
    own = block.fc1.forward
    block.fc1.forward = lambda x: own(x) + 0 * x.sum()


def replace_class(block):
    new = Reversed(*reversed(block.fc1.weight.shape))
    new.load_state_dict(block.fc1.state_dict())
    block.fc1 = new


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.fc1.requires_grad_(False))
    block.fc1.bias.requires_grad_(True)


@pytest.mark.parametrize("change", [replace_forward, replace_class, parametrize])
def test_what_stands_between_a_linear_layers_input_and_output_stays_in_the_gradient(change):
    model, one = tiny_model("opt").requires_grad_(False), batch((7, 4))
    block = model.model.decoder.layers[1]
    block.fc1.requires_grad_(True)
    change(block)
    x = model.get_input_embeddings()(one["input_ids"]).requires_grad_(True)
    rest = {key: value for key, value in one.items() if key != "input_ids"}
    (want,) = torch.autograd.grad(model(inputs_embeds=x, **rest).loss, x)
    with capture_grad_norms(model, norms_only=True):
        model(inputs_embeds=x, **rest).loss.backward()
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-7 * float(want.abs().max()))


@pytest.mark.parametrize("is_global", [True, False])
def test_hooks_that_run_before_ours_keep_their_say(is_global):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with capture_grad_norms(layer, loss="share"):
        register = nn.modules.module.register_module_forward_hook if is_global else layer.register_forward_hook
        handle = register(lambda module, args, output: output * 5, **({} if is_global else {"prepend": True}))
        try:
            layer(x).sum().backward()
        finally:
            handle.remove()
    torch.testing.assert_close(x.grad, 5 * layer.weight.sum(dim=0).expand(4, 3))


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_the_library_forms_the_gradients_of_the_inputs_of_trained_and_of_frozen_linear_layers(targets, monkeypatch):
    model, one, want = tiny_model("llama"), batch((7, 4)), 7 + 7 + 1
    if targets:
        # what comes before the first factors sees no input that requires a gradient, and their second ones are too tall
        model, want = with_lora(model, targets), 5 + 9 + 1
    formed, form = [], native_gradients.input_gradient
    monkeypatch.setattr(native_gradients, "input_gradient", lambda g, weight: formed.append(1) or form(g, weight))
    for simd in native.simds():
        formed.clear()
        with native.use_simd(simd):
            run(model, one)
        assert len(formed) == (want if simd.startswith("avx512") else 0), simd


def test_weight_that_changed_before_the_backward_pass_is_refused():
    """As autograd does, for the gradients of the inputs would be those of another model."""
    model, one = tiny_model("llama"), batch((7, 4))

    def step():
        with capture_grad_norms(model, norms_only=True):
            value = model(**one).loss
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(2)
            value.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_norms_only_leaves_gradients_alone(name):
    model, one = tiny_model(name), batch((7, 4))
    kept = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = kept
    norms = run(model, one, norms_only=True)
    assert next(model.parameters()).grad is kept
    assert bool((kept == 1).all())
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    next(model.parameters()).grad = None
    assert_norms(norms, oracle(model, one))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "lora"])
@pytest.mark.parametrize("norms_only", [True, False])
def test_gradient_checkpointing(name, reentrant, norms_only):
    model = with_lora(tiny_model("llama"), ["q_proj", "down_proj"]) if name == "lora" else tiny_model(name)
    one = batch((7, 4))
    want = oracle(model, one)
    model.train()  # transformers checkpoints only while training; these models have no dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "lora":
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_norms(run(model, one, norms_only=norms_only), want)
    if not norms_only:
        got = gradients(model)
        model.gradient_checkpointing_disable()
        assert_plain_gradients(model, one, got)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "up_proj", "down_proj"]])
def test_lora_counts_the_factors_and_not_the_base(targets):
    model, one = with_lora(tiny_model("llama"), targets), batch((7, 4, 6))
    norms = run(model, one)
    assert_norms(norms, oracle(model, one))
    assert all("lora_" in name for name in norms.per_parameter)
    assert_plain_gradients(model, one, gradients(model))


def test_lora_moved_after_it_was_wrapped_has_the_norms_of_its_new_parameters():
    """Where a move gives a model other parameters, hooks that hold the old ones train nothing (Opacus' issue 820)."""
    model, one = with_lora(tiny_model("llama"), ["q_proj", "down_proj"]), batch((7, 4, 6))
    before = run(model, one)
    held = list(model.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert not {id(old) for old in held} & {id(new) for new in model.parameters()}
    model.zero_grad()
    norms = run(model, one)
    torch.testing.assert_close(norms.per_sample.double(), before.per_sample.double(), rtol=1e-4, atol=0)
    assert_norms(norms, oracle(model, one))
    assert all(new.grad is not None for new in model.parameters() if new.requires_grad)


def test_lora_on_conv1d():
    model, one = with_lora(tiny_model("gpt2"), ["c_attn"]), batch((7, 4))
    assert_norms(run(model, one), oracle(model, one))


@pytest.mark.parametrize("lengths", [(7, 4), (16, 16)])
@pytest.mark.parametrize("magnitude", [True, False])
def test_dora_is_refused_whatever_is_trained_and_however_long_the_batch(lengths, magnitude):
    """Its factors multiply an identity matrix, which 16 + 16 tokens of a model of width 32 could be taken for."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(magnitude)
    with pytest.raises(HftcoreError, match=r"layers\.0\.self_attn\.q_proj'.* DoRA; train with use_dora=False"):
        run(model, batch(lengths))


@pytest.mark.parametrize("bias", [True, False])
def test_falcons_own_linear_layers_are_linear_layers(bias):
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=bias, pad_token_id=0
    )
    model, one = transformers.FalconForCausalLM(config).eval(), batch((7, 4))
    assert_norms(run(model, one), oracle(model, one))
    assert_plain_gradients(model, one, gradients(model))


def test_layer_norms_by_one_plus_a_weight():
    torch.manual_seed(0)
    model, one = transformers.NemotronForCausalLM(transformers.NemotronConfig(**SMALL)).eval(), batch((7, 4))
    assert_norms(run(model, one), oracle(model, one))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_that_the_batch_shares_are_refused(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(HftcoreError, match=r"'prompt_encoder.default'.*looked up once for the whole batch"):
        run(model, batch((7, 4)))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Counted(nn.Linear):
    def forward(self, x, count):
        return super().forward(x) * count


@pytest.mark.parametrize("kind", [Doubling, Counted])
def test_linear_layers_that_compute_something_else_are_refused(kind):
    model = nn.Sequential(kind(3, 2))
    with (
        pytest.raises(HftcoreError, match=f"'0' is a {kind.__name__}; freeze it"),
        capture_grad_norms(model, loss="share"),
    ):
        pass


def test_frozen_parameters_do_not_count():
    model, one = tiny_model("gpt2"), batch((7, 4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_" in name or name.endswith("c_fc.bias"))
    assert_norms(run(model, one), oracle(model, one))


class Twice(nn.Module):
    """One layer called twice, once more under a checkpoint if asked for."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embed, self.layer, self.norm = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def block(self, x):
        return torch.relu_(self.layer(self.norm(x)))

    def forward(self, input_ids, labels):
        x = self.embed(input_ids) + self.embed(input_ids.flip(1))
        x = self.block(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        logits = self.head(self.norm(x))
        value = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": value, "logits": logits})


@pytest.mark.parametrize("norms_only", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_modules_called_more_than_once(reentrant, norms_only):
    model, one = Twice(reentrant), batch((7, 4))
    one = {"input_ids": one["input_ids"] % 9, "labels": torch.where(one["labels"] > 0, one["labels"] % 9, -100)}
    assert_norms(run(model, one, norms_only=norms_only), oracle(model, one))
    if not norms_only:
        assert_plain_gradients(model, one, gradients(model))


def test_evaluation_inside_the_block_is_not_counted():
    model, one = tiny_model("llama-tied"), batch((7, 4))
    with capture_grad_norms(model) as norms:
        value = model(**one).loss
        with torch.no_grad():
            model(**batch((3, 3, 3)))
        value.backward()
    assert_norms(norms, oracle(model, one))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2"])
def test_bfloat16_is_as_good_as_its_activations(name):
    """Inputs and output gradients carry rounding errors of 2**-9 each time they are made; the norms add none of their own."""
    model, one = tiny_model(name, torch.bfloat16), batch((7, 4))
    torch.testing.assert_close(run(model, one).per_sample.double(), oracle(model, one)[""], rtol=0.05, atol=0)


def test_autocast():
    model, one = tiny_model("llama"), batch((7, 4))
    with capture_grad_norms(model) as norms, torch.autocast("cpu", torch.bfloat16):
        model(**one).loss.backward()
    torch.testing.assert_close(norms.per_sample.double(), oracle(model, one)[""], rtol=0.05, atol=0)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_autocast_with_a_scaled_loss():
    model, one = tiny_model("llama-tied"), batch((7, 4))
    with capture_grad_norms(model, loss_scale=2.0**12) as norms, torch.autocast("cpu", torch.bfloat16):
        (model(**one).loss * 2.0**12).backward()
    torch.testing.assert_close(norms.per_sample.double(), oracle(model, one)[""], rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "lora"])
def test_layers_are_blocks_and_what_lies_outside_them(name):
    model = with_lora(tiny_model("llama"), ["q_proj"]) if name == "lora" else tiny_model(name)
    one = batch((7, 4))
    norms, want = run(model, one), oracle(model, one)
    expected = {
        "llama-tied": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"],
        "gpt2": ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"],
        "lora": ["base_model.model.model.layers.0", "base_model.model.model.layers.1"],
    }[name]
    assert list(norms.per_layer) == expected
    for part, value in norms.per_layer.items():
        inside = [norm.square() for label, norm in want.items() if label.startswith(f"{part}.")]
        torch.testing.assert_close(value.double(), torch.stack(inside).sum(dim=0).sqrt(), rtol=RTOL, atol=0)
    total = torch.stack([value.square() for value in norms.per_layer.values()]).sum(dim=0).sqrt()
    torch.testing.assert_close(total, norms.per_sample)


def test_layers_of_a_model_without_blocks_are_its_modules():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with capture_grad_norms(model, loss="share") as norms:
        model(torch.ones(2, 2)).sum().backward()
    assert list(norms.per_layer) == ["0", "2"]


class Positions(nn.Module):
    """Position rows looked up once, without a batch axis, and added to every sample."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(9, 6), nn.Embedding(8, 6), nn.Linear(6, 9)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))))


def test_positions_without_a_batch_axis():
    model, ids = Positions(), torch.randint(9, (2, 5))
    with capture_grad_norms(model, loss="share") as norms:
        model(ids).square().sum().backward()
    for row in range(2):
        judge = copy.deepcopy(model).double()
        judge.zero_grad()
        judge(ids[row : row + 1]).square().sum().backward()
        for name, parameter in judge.named_parameters():
            torch.testing.assert_close(
                norms.per_parameter[name][row].double(), parameter.grad.norm(), rtol=RTOL, atol=0
            )


@pytest.mark.parametrize("whose", ["the wrapper's", "the model's"])
def test_a_compiled_model_runs_uncompiled_and_its_norms_are_right(whose):
    model, one = tiny_model("llama-tied"), batch((7, 4))
    want = oracle(model, one)[""]
    compiled = torch.compile(model, backend="eager")
    with capture_grad_norms(compiled if whose == "the wrapper's" else model) as norms:
        compiled(**one).loss.backward()
    torch.testing.assert_close(norms.per_sample.double(), want, rtol=RTOL, atol=0)


def test_positions_that_could_be_samples_are_refused():
    model = Positions()
    with (
        pytest.raises(HftcoreError, match=r"'positions' looked up 3 rows.*B = T = 3"),
        capture_grad_norms(model, loss="share"),
    ):
        model(torch.zeros(3, 3, dtype=torch.int64)).sum().backward()


def test_single_sample_and_single_token():
    model, one = tiny_model("gpt2"), batch((7,))
    assert_norms(run(model, one), oracle(model, one))
    one = batch((2, 2), prompt=1)
    assert_norms(run(model, one), oracle(model, one))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "lora", "twice"])
def test_weighted_backward_is_the_weighted_sum_of_the_samples(name):
    model = {"lora": lambda: with_lora(tiny_model("llama"), ["q_proj"]), "twice": Twice}.get(
        name, lambda: tiny_model(name)
    )()
    one = batch((7, 4, 5))
    if name == "twice":
        one = {"input_ids": one["input_ids"] % 9, "labels": torch.where(one["labels"] > 0, one["labels"] % 9, -100)}
    norms = run(model, one, norms_only=True, keep=True)
    weights = torch.tensor([0.5, 0.0, 2.0])
    norms.backward(weights)
    judge = copy.deepcopy(model).double()
    judge.zero_grad()
    for row, weight in enumerate(weights):
        (judge(**{key: value[row : row + 1] for key, value in one.items()}).loss * weight).backward()
    for (label, parameter), right in zip(model.named_parameters(), judge.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad.double(), right.grad, rtol=1e-4, atol=1e-5 * float(right.grad.abs().max()), msg=label
            )


def test_weighted_backward_adds_to_what_is_there():
    layer = nn.Linear(2, 1, bias=False)
    with capture_grad_norms(layer, loss="share", keep=True) as norms:
        layer(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 5.0]]
    norms.backward(1 / norms.per_sample)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[3.6, 6.8]]))


def test_sample_without_labels_has_norm_zero_and_is_named():
    model, one = tiny_model("llama"), batch((7, 4, 5))
    one["labels"][1] = -100
    with pytest.warns(UserWarning, match=r"samples \[1\] have no supervised token"):
        norms = run(model, one)
    assert norms.per_sample[1] == 0
    assert bool((norms.per_sample[[0, 2]] > 0).all())


@pytest.mark.parametrize("raised", [False, True])
def test_model_is_left_as_it_was(raised):
    model, one = tiny_model("gpt2"), batch((7, 4))
    frozen = next(model.parameters()).requires_grad_(False)
    before, flags = fingerprint(model), [parameter.requires_grad for parameter in model.parameters()]
    if raised:
        with pytest.raises(IndexError), capture_grad_norms(model):
            model(input_ids=one["input_ids"] + 1000, labels=one["labels"])
    else:
        run(model, one)
    assert fingerprint(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert frozen.grad is None
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_nothing_but_unsupervised_samples_have_norm_zero():
    model, one = tiny_model("llama"), batch((7, 4))
    with pytest.warns(UserWarning, match=r"samples \[0, 1\] have no supervised token"):
        norms = run(model, one | {"labels": torch.full_like(one["labels"], -100)})
    assert norms.per_sample.tolist() == [0.0, 0.0]


def test_nan_in_the_gradient_alone_is_refused():
    model, one = tiny_model("llama"), batch((7, 4))
    with pytest.raises(NonFiniteError, match="NaN or infinite for sample 0"), capture_grad_norms(model):
        (model(**one).loss * float("nan")).backward()


def test_second_backward_pass_is_refused():
    model, one = tiny_model("llama"), batch((7, 4))
    with capture_grad_norms(model):
        value = model(**one).loss
        value.backward(retain_graph=True)
        with pytest.raises(HftcoreError, match="a second backward pass"):
            value.backward()


def test_second_derivatives_are_refused():
    """Norms and gradients formed here are constants, so what is differentiated again would be wrong in silence."""
    model, one = tiny_model("llama"), batch((7, 4))

    def step():
        with capture_grad_norms(model):
            model(**one).loss.backward(create_graph=True)

    with pytest.raises(HftcoreError, match="leave create_graph out"):
        step()


def test_nan_is_refused_by_name():
    model, one = tiny_model("llama"), batch((7, 4))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"gradient of parameter .* NaN or infinite for sample 0"):
        run(model, one)


def test_refusals_say_what_to_do():
    model, one = tiny_model("llama"), batch((7, 4))
    with pytest.raises(HftcoreError, match="loss must be one of mean, sum, share, got 'median'"):
        run(model, one, loss="median")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(HftcoreError, match="loss_scale must be a positive number, got"):
            run(model, one, loss_scale=scale)
    with capture_grad_norms(model):
        model(**one).loss.backward()
        with pytest.raises(HftcoreError, match="called a second time"):
            model(**one)
    with pytest.raises(HftcoreError, match=r"labels of shape \[2, 7\], got \(1, 7\)"):
        run(model, one | {"labels": one["labels"][:1]})
    with pytest.raises(HftcoreError, match="no backward pass ran"), capture_grad_norms(model):
        model(**one)
    with pytest.raises(HftcoreError, match="needs the model to be called with labels"), capture_grad_norms(model):
        model(one["input_ids"])
    with capture_grad_norms(model, loss="share") as norms:
        value = model(**one).loss
        value.backward()
    with pytest.raises(HftcoreError, match="keep=True"):
        norms.backward(torch.ones(2))
    kept = run(model, one, keep=True)
    with pytest.raises(HftcoreError, match=r"weights must be a finite tensor of shape \(2,\)"):
        kept.backward(torch.ones(3))
    before = gradients(model)
    with pytest.raises(HftcoreError, match=r"weights must be a finite tensor of shape \(2,\).*nan"):
        kept.backward(torch.tensor([1.0, float("nan")]))
    assert all(torch.equal(before[name], value) for name, value in gradients(model).items())


def test_backward_after_the_block_is_refused():
    model, one = tiny_model("llama"), batch((7, 4))
    with pytest.raises(HftcoreError), capture_grad_norms(model):
        value = model(**one).loss
    with pytest.raises(HftcoreError, match="inside the capture_grad_norms block"):
        value.backward()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(x) * self.scale + x @ self.layer.weight


def test_unknown_parameters_are_refused_by_name():
    model = Scaled()
    with pytest.raises(HftcoreError, match=r"'scale'.*Scaled.*freeze it"), capture_grad_norms(model, loss="share"):
        pass
    with pytest.raises(HftcoreError, match="requires a gradient"), capture_grad_norms(model.requires_grad_(False)):
        pass


def test_matrix_used_outside_its_module_is_refused_when_seen():
    model = Scaled()
    model.scale.requires_grad_(False)
    with (
        pytest.raises(HftcoreError, match=r"'layer.weight' got a gradient from outside"),
        capture_grad_norms(model, loss="share", norms_only=True),
    ):
        model(torch.ones(2, 3)).sum().backward()


def test_a_fused_loss_on_the_weight_of_a_tied_head_is_refused_and_no_loss_on_it_is_right():
    model, one = tiny_model("llama-tied"), batch((7, 4))

    def hidden(of):
        return of.model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).last_hidden_state

    with (
        pytest.raises(HftcoreError, match=r"'model.embed_tokens.weight' is an embedding and a head.*call the head"),
        capture_grad_norms(model, loss="share"),
    ):
        nn.functional.linear(hidden(model), model.lm_head.weight).logsumexp(-1).sum().backward()
    with capture_grad_norms(model, loss="share") as norms:
        hidden(model).square().sum().backward()
    judge = copy.deepcopy(model).double()
    for row in range(2):
        judge.zero_grad()
        hidden(judge)[row].square().sum().backward()
        want = torch.stack([p.grad.norm() for p in judge.parameters()]).norm()
        torch.testing.assert_close(norms.per_sample[row].double(), want, rtol=RTOL, atol=0)


def test_layer_that_cannot_tell_samples_apart_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Flatten(0, 1), nn.Unflatten(0, (3, 2)), nn.Linear(3, 1))
    with pytest.raises(HftcoreError, match="module '3' saw an input of shape"), capture_grad_norms(model, loss="share"):
        model(torch.ones(2, 3, 3))


def test_no_warning_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny_model("llama"), batch((7, 4)))
