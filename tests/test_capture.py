"""Energies captured from a running model, against hooks and float64 sums written here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    all_tokens,
    batch,
    fingerprint,
    hooked_energies,
    one_thread,  # noqa: F401 (a fixture)
    response_tokens,
    tiny_model,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import hftcore.capture
from hftcore.calibration import calibrate
from hftcore.capture import capture_energy
from hftcore.errors import HftcoreError, NonFiniteError
from hftcore.layers import find_layers
from hftcore.sequential import blockwise_energy

# one float32 rounding of the sum and some of partial sums over at most 64 tokens
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


def assert_energies(energy, want):
    assert energy
    for name, value in energy.items():
        torch.testing.assert_close(value.double(), want[name], **CLOSE)


class Masked(nn.Module):
    """A model that takes a mask, gathers tokens, and can be told to fail."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.gather = False
        self.fail = False

    def forward(self, inputs_embeds, attention_mask=None, labels=None):
        x = self.first(inputs_embeds)
        if self.fail:
            raise RuntimeError("stopped on purpose")
        return self.second(x[:, :1] if self.gather else x)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def counted(monkeypatch):
    """How many times an input was reduced."""
    calls = []
    plain = hftcore.capture.ops.column_energy

    def counting(x, mask=None):
        calls.append(x.shape)
        return plain(x, mask)

    monkeypatch.setattr(hftcore.capture.ops, "column_energy", counting)
    return calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("tokens", "keep"), [("all", all_tokens), ("response", response_tokens)])
def test_calibrated_energies_are_sums_over_counted_tokens(model, side, tokens, keep):
    batches = [batch((7, 4), side), batch((2, 5, 6), side, seed=1)]
    energy = calibrate(model, batches, tokens=tokens)
    assert_energies(energy, hooked_energies(model, batches, keep))
    assert energy.tokens == sum(int(keep(one).sum()) for one in batches)
    # a sample of two tokens has no response after a prompt of two
    assert energy.samples == (5 if tokens == "all" else 4)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_hooks_and_calibration_agree_bit_for_bit(model, tokens):
    one = batch()
    with capture_energy(model, tokens=tokens) as energy:
        model(**one)
    want = calibrate(model, [one], tokens=tokens)
    assert energy.keys() == want.keys()
    assert all(torch.equal(energy[name], want[name]) for name in want)
    assert (energy.tokens, energy.samples) == (want.tokens, want.samples)


def test_the_body_alone_is_a_pass_too(model):
    one = batch()
    with capture_energy(model) as energy:
        model.model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
    want = calibrate(model, [one])
    assert all(torch.equal(energy[name], want[name]) for name in want)


def test_positional_arguments_are_understood(model):
    one = batch()
    with capture_energy(model) as energy:
        model(one["input_ids"], one["attention_mask"])
    assert energy.tokens == 11


def test_padding_never_counts_whatever_it_holds(model):
    one, other = batch(), batch()
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 17)
    first, second = calibrate(model, [one]), calibrate(model, [other])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_mask_every_token_counts(model):
    one = batch((5, 5))
    energy = calibrate(model, [{"input_ids": one["input_ids"]}])
    assert (energy.tokens, energy.samples) == (10, 2)
    assert_energies(energy, hooked_energies(model, [one], all_tokens))


@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), side=st.sampled_from(["left", "right"]))
def test_energies_add_up(lengths, side):
    model = tiny_model("llama")
    batches = [batch((length,), side, seed=length) for length in lengths]
    whole = calibrate(model, batches)
    parts = calibrate(model, batches[:1]) + calibrate(model, batches[1:])
    assert (parts.tokens, parts.samples) == (whole.tokens, whole.samples)
    for name in whole:
        # sums of the same float32 numbers in two orders
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=0)


def test_the_same_data_gives_the_same_bits(model):
    first, second = (calibrate(model, [batch()]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_input_shared_by_layers_is_reduced_once(model, counted):
    calibrate(model, [batch()])
    # q/k/v, o, gate/up, down of two blocks
    assert len(counted) == 2 * 4


def test_an_input_changed_in_place_is_reduced_again(counted):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    for mode in (torch.no_grad, torch.inference_mode):
        model = Changing()
        with mode(), capture_energy(model) as energy:
            model(torch.tensor([[1.0, 2.0]]))
        assert energy["a"].tolist() == [1.0, 4.0]
        assert energy["b"].tolist() == [4.0, 16.0]
    assert len(counted) == 4


def test_a_tied_weight_gets_the_inputs_of_all_its_users():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(2 * torch.eye(2))
    energy = calibrate(model, [{"input": torch.tensor([[1.0, 3.0]])}])
    assert list(energy) == ["0"]
    assert energy["0"].tolist() == [1.0 + 4.0, 9.0 + 36.0]


def test_the_named_head_is_measured(model):
    energy = calibrate(model, [batch()], targets=["lm_head"])
    assert_energies(energy, hooked_energies(model, [batch()], all_tokens))


def test_the_head_is_not_run(model):
    def fail(*args):
        raise AssertionError("the head ran")

    model.lm_head.register_forward_pre_hook(fail)
    calibrate(model, [batch()])


@pytest.mark.parametrize("run", ["calibrate", "capture"])
def test_the_model_is_left_as_it_was(model, run):
    model.train()
    model.model.layers[0].eval()
    before = fingerprint(model)
    logits = model(**batch()).logits
    if run == "calibrate":
        calibrate(model, [batch()])
    else:
        with capture_energy(model):
            assert torch.equal(model(**batch()).logits, logits)
    assert fingerprint(model) == before
    assert torch.equal(model(**batch()).logits, logits)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("run", ["calibrate", "capture", "sequential"])
def test_everything_is_undone_after_an_exception(model, run):
    model.train()
    before = fingerprint(model)
    bad = {"input_ids": torch.tensor([[1, 10_000]])}

    def fail():
        if run == "calibrate":
            calibrate(model, [batch(), bad])
        elif run == "sequential":
            list(blockwise_energy(model, [batch(), bad], find_layers(model)))
        with capture_energy(model):
            model(**bad)

    with pytest.raises(IndexError):
        fail()
    assert fingerprint(model) == before
    assert torch.is_grad_enabled()


def test_a_failed_pass_adds_nothing():
    model = Masked()
    x = torch.ones(1, 2, 3)
    with capture_energy(model) as energy:
        model(x)
        model.fail = True
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        model.fail = False
        model(x)
    assert energy["first"].tolist() == [4.0, 4.0, 4.0]
    assert energy.tokens == 4


def test_training_works_under_capture(model):
    one = batch()
    with capture_energy(model) as energy:
        model(**one).loss.backward()
    assert all(not value.requires_grad for value in energy.values())
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_count_once(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)

        def forward(self, x):
            return self.b(checkpoint(lambda x: self.a(x).relu(), x, use_reentrant=reentrant))

    model = Checkpointed()
    with capture_energy(model) as energy:
        model(torch.tensor([[1.0, 2.0]], requires_grad=True)).sum().backward()
    assert energy["a"].tolist() == [1.0, 4.0]


def test_generation_counts_every_token_it_runs(model):
    one = batch((5, 3), "left")
    with capture_energy(model, ["q_proj"]) as energy:
        model.generate(
            input_ids=one["input_ids"],
            attention_mask=one["attention_mask"],
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
    # the prompt, then one token a step for both samples; the last one made is not run
    assert energy.tokens == 8 + 3 * 2


def test_sample_norm_is_the_squared_mean_of_norms(model):
    one = batch((7, 4, 5))
    energy = calibrate(model, [one], average="sample-norm")
    for name, value in energy.items():
        norms = []
        for row in range(3):
            alone = {key: part[row : row + 1] for key, part in one.items()}
            norms.append(hooked_energies(model, [alone], all_tokens)[name].sqrt())
        want = (sum(norms) / 3).square()
        torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-7)
    assert energy.average == "sample-norm"


def test_sample_norm_by_hand():
    x = torch.tensor([[[3.0], [4.0]], [[1.0], [0.0]]])
    energy = calibrate(nn.Linear(1, 1), [{"input": x}], average="sample-norm")
    assert energy[""].tolist() == [9.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite_are_refused_by_name(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = fingerprint(model)
    with pytest.raises(NonFiniteError, match=r"layer '0' .* feature 1"), capture_energy(model) as energy:
        model(torch.tensor([[1.0, value]]))
    assert not any(total.any() for total in energy.values())
    assert fingerprint(model) == before


def test_gathered_tokens_are_refused_only_where_tokens_are_masked():
    model = Masked()
    model.gather = True
    x = torch.ones(2, 3, 3)
    full = torch.ones(2, 3, dtype=torch.int64)
    assert calibrate(model, [{"inputs_embeds": x, "attention_mask": full}]).tokens == 6
    full[0, 2] = 0
    with pytest.raises(HftcoreError, match=r"'second' saw tokens of shape \(2, 1\) where the token mask has \(2, 3\)"):
        calibrate(model, [{"inputs_embeds": x, "attention_mask": full}])
    assert calibrate(model, [{"inputs_embeds": x, "attention_mask": full}], exclude=["second"]).tokens == 5


def test_empty_data_is_refused(model):
    with pytest.raises(HftcoreError, match="no token to count"):
        calibrate(model, [])
    padding = batch()
    padding["attention_mask"].zero_()
    with pytest.raises(HftcoreError, match="every token is padding"):
        calibrate(model, [padding])
    prompts = batch(prompt=9)
    with pytest.raises(HftcoreError, match="every label is -100"):
        calibrate(model, [prompts], tokens="response")
    with pytest.raises(HftcoreError, match="got none"):
        list(blockwise_energy(model, [], find_layers(model)))


def test_layers_that_were_not_run_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(2, 2)
            self.idle = nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match="saw no token, so nothing is known about: idle$"):
        energy = calibrate(Half(), [{"x": torch.ones(1, 2)}])
    assert energy["idle"].tolist() == [0.0, 0.0]


def test_blocks_that_write_into_their_input_are_fed_right():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return x.add_(self.fc(x))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, inputs_embeds):
            for block in self.blocks:
                inputs_embeds = block(inputs_embeds)
            return inputs_embeds

    model = Stack()
    x = torch.randn(1, 3, 2)
    got = {}
    for _, energy in blockwise_energy(model, [{"inputs_embeds": x.clone()}], find_layers(model)):
        got |= energy
    want = calibrate(model, [{"inputs_embeds": x.clone()}])
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_labels_choose_tokens_and_are_not_run():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1)

        def forward(self, inputs_embeds):
            return self.fc(inputs_embeds)

    one = {"inputs_embeds": torch.tensor([[[1.0], [2.0], [3.0]]]), "labels": torch.tensor([[-100, 5, 6]])}
    assert calibrate(Plain(), [one], tokens="response")["fc"].tolist() == [13.0]


def test_arguments_are_checked(model):
    one = batch()
    with pytest.raises(HftcoreError, match='tokens must be "all" or "response", got \'answer\''):
        calibrate(model, [one], tokens="answer")
    with pytest.raises(HftcoreError, match="average must be"):
        calibrate(model, [one], average="mean")
    with pytest.raises(HftcoreError, match=r'tokens="response" needs labels of shape \[2, 7\].*got None'):
        calibrate(model, [{key: one[key] for key in ("input_ids", "attention_mask")}], tokens="response")
    with pytest.raises(HftcoreError, match=r"attention_mask must be \[B, T\] = \[2, 7\], got \(2, 1, 7, 7\)"):
        calibrate(model, [one | {"attention_mask": torch.ones(2, 1, 7, 7)}])
    with pytest.raises(HftcoreError, match="batches must yield dicts of tensors, got Tensor"):
        calibrate(model, [one["input_ids"]])
    with pytest.raises(HftcoreError, match="a batch must hold a tensor"):
        calibrate(model, [{"text": "words"}])


def test_layers_called_by_hand_are_refused(model):
    def by_hand():
        with capture_energy(model):
            model.model.layers[0].mlp(torch.ones(1, 2, 32))

    with pytest.raises(HftcoreError, match=r"mlp.*was called outside a forward pass of the model"):
        by_hand()


def test_progress_wraps_the_batches(model):
    seen = []

    def progress(batches):
        for one in batches:
            seen.append(one)
            yield one

    calibrate(model, iter([batch(), batch()]), progress=progress)
    assert len(seen) == 2


def test_a_batch_can_be_any_iterable_with_other_columns_left_out(model):
    energy = calibrate(model, (one for one in [batch()]))
    assert energy.tokens == 11


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_block_by_block_without_change_is_calibration(name):
    model = tiny_model(name)
    batches = [batch(), batch((3, 6), "left", 1)]
    layers = [layer for layer in find_layers(model) if "project_" not in layer.name]
    before = fingerprint(model)
    got = {
        key: value
        for _, energy in blockwise_energy(model, batches, layers, "response")
        for key, value in energy.items()
    }
    want = calibrate(model, batches, exclude=["project_in", "project_out"], tokens="response")
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key])
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_each_block_sees_the_blocks_before_it_as_changed(name):
    batches = [batch(), batch((3, 6), "left", 1)]
    model = tiny_model(name)
    layers = find_layers(model, exclude=["experts"])
    got = {}
    for home, energy in blockwise_energy(model, batches, layers):
        got |= energy
        for layer in home:
            layer.weight[:, ::2] = 0

    # by hand: change block after block of a second copy and measure the whole model each time
    other = tiny_model(name)
    want = {}
    for index, block in enumerate(other.model.layers):
        all_energies = hooked_energies(other, batches, all_tokens)
        want |= {key: value for key, value in all_energies.items() if f"layers.{index}." in key}
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data[:, ::2] = 0
    assert len(got) == len(layers)
    assert_energies(got, want)
    changed = dict(model.named_parameters())
    assert all(torch.equal(parameter, changed[key]) for key, parameter in other.named_parameters())


def test_block_by_block_passes_over_blocks_without_layers(model):
    layers = find_layers(model, r".*\.1\..*q_proj")
    ((home, energy),) = blockwise_energy(model, [batch()], layers)
    assert [layer.name for layer in home] == ["model.layers.1.self_attn.q_proj"]
    assert torch.equal(energy[home[0].name], calibrate(model, [batch()])[home[0].name])


def test_an_abandoned_block_by_block_run_leaves_the_model_as_it_was(model):
    model.train()
    before = fingerprint(model)
    steps = blockwise_energy(model, [batch()], find_layers(model))
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert fingerprint(model) == before


def test_block_by_block_refuses_layers_outside_the_blocks(model):
    with pytest.raises(HftcoreError, match=r"layers outside the blocks.*lm_head"):
        list(blockwise_energy(model, [batch()], find_layers(model, ["lm_head", "q_proj"])))


def test_block_by_block_runs_a_block_twice_for_each_batch(model):
    batches = [batch(), batch((3, 6), "left", 1), batch((5,), seed=2)]
    runs = [0, 0]
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    list(blockwise_energy(model, batches, find_layers(model)))
    # once more for the first batch; what the last block returns is not needed
    assert runs == [2 * len(batches) + 1, len(batches) + 1]
    assert all("forward" not in vars(block) for block in model.model.layers)


class Chained(nn.Module):
    """Blocks that return a tuple and take, beside the hidden states, the mean of the inputs or of what the block `lag` before
    computed."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x, shift):
            y = self.fc(x + shift)
            return y, y.mean()

    def __init__(self, lag):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block(), self.Block()])
        self.lag = lag

    def forward(self, inputs_embeds):
        x = inputs_embeds
        means = [x.mean()]
        for block in self.blocks:
            x, mean = block(x, means[-self.lag] if len(means) > self.lag > 0 else means[0])
            means.append(mean)
        return x


@pytest.mark.parametrize("lag", [0, 1])
def test_blocks_that_return_tuples_can_be_measured_block_by_block(lag):
    model = Chained(lag)
    batches = [{"inputs_embeds": torch.randn(2, 3, 2)} for _ in range(2)]
    want = calibrate(model, batches)
    got = {}
    for _, energy in blockwise_energy(model, batches, find_layers(model)):
        got |= energy
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_blocks_that_cannot_be_run_alone_are_refused():
    model = Chained(lag=2)
    before = fingerprint(model)
    with pytest.raises(HftcoreError, match=r"depend on what blocks further up.*computed.*sequential=False"):
        list(blockwise_energy(model, [{"inputs_embeds": torch.randn(2, 3, 2)}], find_layers(model)))
    assert fingerprint(model) == before


def test_a_forward_of_the_blocks_own_comes_back(model):
    def forward(*args, **kwargs):
        return type(block).forward(block, *args, **kwargs)

    block = model.model.layers[1]
    block.forward = forward
    list(blockwise_energy(model, [batch()], find_layers(model)))
    assert vars(block)["forward"] is forward


@pytest.mark.parametrize("order", [[1, 0], [0, 1, 1], [0]])
def test_blocks_that_do_not_run_once_each_in_their_order_are_refused(order):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])

        def forward(self, inputs_embeds):
            for index in order:
                inputs_embeds = self.blocks[index](inputs_embeds)
            return inputs_embeds

    model = Stack()
    with pytest.raises(HftcoreError, match=r"one after the other.*use sequential=False"):
        list(blockwise_energy(model, [{"inputs_embeds": torch.ones(1, 3, 2)}], find_layers(model)))
