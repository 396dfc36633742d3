"""Norms of fused experts, of both orientations, and of their routers: against the loop of single-sample float64 backward passes."""

import pytest
import torch
import transformers
from test_grad_norms import assert_norms, assert_plain_gradients, gradients, oracle, run
from tiny_models import FUSED, MOE, batch, fingerprint, one_thread, tiny_model  # noqa: F401
from torch import nn

from hftcore.errors import HftcoreError
from hftcore.grad_experts import by_sample
from hftcore.grad_norms import capture_grad_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def moe(name, dtype=torch.float32):
    model = tiny_model(name, dtype)
    for label, parameter in model.named_parameters():
        # gpt-oss: what attention leaves to nobody is a parameter of attention itself
        parameter.requires_grad_(not label.endswith("sinks"))
    model.set_experts_implementation("eager")  # the others know no float64
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FUSED)
def test_every_family_of_experts_matches_the_loop(name, side):
    model, one = moe(name), batch((7, 4, 5), side=side)
    norms = run(model, one)
    assert_norms(norms, oracle(model, one))
    assert {key for key in norms.per_parameter if "experts" in key or "router" in key or ".gate." in key}
    assert_plain_gradients(model, one, gradients(model))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_however_the_experts_are_run_otherwise(implementation):
    model, one = moe("qwen3-moe"), batch((7, 4))
    want = oracle(model, one)
    model.set_experts_implementation(implementation)
    before = fingerprint(model)
    assert_norms(run(model, one), want)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", FUSED)
def test_norms_only_and_the_weighted_sum_from_them(name):
    model, one = moe(name), batch((7, 4))
    norms = run(model, one, norms_only=True, keep=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_norms(norms, oracle(model, one))
    norms.backward(torch.tensor([2.0, -1.0]))
    got = gradients(model)
    model.zero_grad()
    for row, weight in enumerate((2.0, -1.0)):
        (model(**{key: value[row : row + 1] for key, value in one.items()}).loss * weight).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    for label, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[label], parameter.grad, rtol=1e-4, atol=1e-6 * largest, msg=label)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_experts_under_gradient_checkpointing(name, reentrant):
    model, one = moe(name), batch((7, 4))
    want = oracle(model, one)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_norms(run(model, one), want)
    got = gradients(model)
    model.gradient_checkpointing_disable()
    assert_plain_gradients(model, one, got)


def test_only_the_experts_trained():
    model, one = moe("gpt-oss"), batch((7, 4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("down_proj", "gate_up_proj_bias")))
    norms = run(model, one)
    assert_norms(norms, oracle(model, one))
    assert len(norms.per_parameter) == 4


def test_an_expert_that_saw_nothing_has_no_share():
    """A router whose bias forbids an expert: its part of the gradient is zero, and the norm is that of the others."""
    model, one = moe("gpt-oss"), batch((7, 4))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[0] = -1e4
    assert_norms(run(model, one), oracle(model, one))
    assert not model.model.layers[0].mlp.experts.gate_up_proj.grad[0].any()


def test_bfloat16_experts():
    model, one = moe("mixtral", torch.bfloat16), batch((7, 4))
    norms = run(model, one)
    assert bool(norms.per_sample.isfinite().all())
    assert model.model.layers[0].mlp.experts.down_proj.grad.dtype == torch.bfloat16


def test_rows_go_beside_those_of_their_sample():
    """Tokens 0 to 2 are sample 0, 3 to 5 sample 1, 6 to 8 sample 2; their order does not matter."""
    tokens = torch.tensor([4, 0, 3, 8])
    rows = torch.arange(1.0, 5.0)[:, None]
    x, g = by_sample(rows, 10 * rows, tokens, 3, 3)
    assert x.squeeze(2).tolist() == [[2.0, 0.0], [1.0, 3.0], [4.0, 0.0]]
    assert torch.equal(g, 10 * x)


def test_attention_sinks_are_refused_by_name():
    with pytest.raises(HftcoreError, match=r"'model.layers.0.self_attn.sinks'.*freeze it"):
        run(tiny_model("gpt-oss"), batch((7, 4)))


def test_llama_4_is_right_but_for_its_experts_which_are_refused_by_name():
    """Every expert multiplies every token there, most of them scaled to zero."""
    torch.manual_seed(0)
    sizes = MOE | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64}
    model, one = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes)).eval(), batch((7, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    with pytest.raises(HftcoreError, match=r"'model.layers.0.feed_forward.experts.gate_up_proj'.*freeze it"):
        run(model, one)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts." not in name)
    norms = run(model, one)
    assert_norms(norms, oracle(model, one))
    assert any("router" in name for name in norms.per_parameter)
    assert_plain_gradients(model, one, gradients(model))


@pytest.mark.parametrize("asked", ["by the configuration", "in the call"])
def test_load_balancing_losses_are_refused(asked):
    model, one = moe("mixtral"), batch((7, 4))
    if asked == "in the call":
        one["output_router_logits"] = True
    else:
        model.config.output_router_logits = True
    with pytest.raises(HftcoreError, match=r"load-balancing loss .* mixes samples"):
        run(model, one)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.0
    run(model, one)


class OddRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return x @ self.weight.T


def test_router_that_multiplies_in_another_way_is_refused():
    model = nn.Sequential(OddRouter())
    with (
        pytest.raises(HftcoreError, match=r"OddRouter.*0 linear maps instead of one"),
        capture_grad_norms(model, loss="share"),
    ):
        model(torch.ones(2, 3)).sum().backward()


def test_experts_are_left_as_they_were_after_an_exception():
    model, one = moe("qwen3-moe"), batch((7, 4))
    before, flags = fingerprint(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(IndexError), capture_grad_norms(model):
        model(input_ids=one["input_ids"] + 1000, labels=one["labels"])
    assert fingerprint(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
