"""Energies of transformers' and PEFT's models against independent float64 loops."""

import warnings

import accelerate
import pytest
import torch
from tiny_models import (
    DENSE,
    FUSED,
    all_tokens,
    batch,
    fingerprint,
    hooked_energies,
    one_thread,  # noqa: F401 (a fixture)
    response_tokens,
    tiny_model,
    with_lora,
)
from torch import Tensor, nn

from hftcore.calibration import calibrate
from hftcore.capture import capture_energy
from hftcore.errors import HftcoreError
from hftcore.layers import find_layers
from hftcore.pruning import prune
from hftcore.sequential import blockwise_energy

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-5, "atol": 1e-9}
BATCHES = [batch(), batch((3, 6), "left", 1)]


@pytest.mark.parametrize(("tokens", "keep"), [("all", all_tokens), ("response", response_tokens)])
@pytest.mark.parametrize("name", DENSE)
def test_energies_are_those_of_a_float64_loop(name, tokens, keep):
    model = tiny_model(name)
    before = fingerprint(model)
    energy = calibrate(model, BATCHES, tokens=tokens)
    want = hooked_energies(model, BATCHES, keep)
    # OPT's head is applied to a projection that belongs to the body
    assert energy.keys() == want.keys() - {"lm_head"}
    for key, value in energy.items():
        torch.testing.assert_close(value.double(), want[key], **CLOSE)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_summed_exactly(name, dtype):
    model = tiny_model(name, dtype)
    with capture_energy(model, exclude=["experts"]) as energy, torch.no_grad():
        model(**BATCHES[0])
    want = hooked_energies(model, BATCHES[:1], all_tokens)
    for key, value in energy.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want[key], **CLOSE)


def expert_energies(model: nn.Module, batches: list[dict[str, Tensor]], keep) -> tuple[dict, dict]:
    """The judge for fused experts: token by token in float64, from the inputs of each experts module."""
    energies: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def hook(name: str):
        def see(experts: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
            hidden, chosen = args[0].double(), args[1]
            up, down = (getattr(experts, key).double() for key in ("gate_up_proj", "down_proj"))
            interleaved = type(experts).__name__ == "GptOssExperts"
            inner = down.shape[1] if interleaved else down.shape[2]
            into = energies.setdefault(
                f"{name}.gate_up_proj", torch.zeros(len(up), hidden.shape[1], dtype=torch.float64)
            )
            out = energies.setdefault(f"{name}.down_proj", torch.zeros(len(up), inner, dtype=torch.float64))
            count = counts.setdefault(f"{name}.down_proj", torch.zeros(len(up), dtype=torch.int64))
            for token in kept[0].reshape(-1).nonzero().flatten().tolist():
                for expert in chosen[token].tolist():
                    x = hidden[token]
                    into[expert] += x.square()
                    if interleaved:
                        y = x @ up[expert] + experts.gate_up_proj_bias[expert].double()
                        gate, rise = y[::2].clamp(max=experts.limit), y[1::2].clamp(-experts.limit, experts.limit)
                        z = (rise + 1) * gate * torch.sigmoid(experts.alpha * gate)
                    else:
                        y = up[expert] @ x
                        z = torch.nn.functional.silu(y[:inner]) * y[inner:]
                    out[expert] += z.square()
                    count[expert] += 1

        return see

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith("experts")
    ]
    with torch.no_grad():
        for one in batches:
            kept[:] = [keep(one)]
            model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
    for handle in handles:
        handle.remove()
    return energies, counts


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize(("tokens", "keep"), [("all", all_tokens), ("response", response_tokens)])
@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_are_measured_one_by_one(name, tokens, keep, implementation):
    model = tiny_model(name)
    model.set_experts_implementation(implementation)
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        energy = calibrate(model, BATCHES, tokens=tokens)
    assert fingerprint(model) == before
    want, counts = expert_energies(model, BATCHES, keep)
    assert {key for key in energy if "experts" in key} == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(energy[key].double(), value, rtol=1e-4, atol=1e-7)
    for key, count in counts.items():
        assert torch.equal(energy.expert_tokens[key], count)
        assert torch.equal(energy.expert_tokens[key.replace("down", "gate_up")], count)
    dense = hooked_energies(model, BATCHES, keep)
    attention = [key for key in energy if "self_attn" in key]
    assert len(attention) == 8
    for key in attention:
        torch.testing.assert_close(energy[key].double(), dense[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FUSED)
def test_capture_changes_no_output_of_experts(name):
    model = tiny_model(name)
    with torch.no_grad():
        before = model(**BATCHES[0]).logits
        with capture_energy(model, ["experts"]):
            during = model(**BATCHES[0]).logits
        after = model(**BATCHES[0]).logits
    # the same products, summed by another matrix routine
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)


def test_experts_can_be_trained_under_capture():
    model = tiny_model("qwen3-moe")
    model(**BATCHES[0]).loss.backward()
    experts = model.model.layers[0].mlp.experts
    want = experts.gate_up_proj.grad.clone()
    model.zero_grad()
    with capture_energy(model, ["experts"]):
        model(**BATCHES[0]).loss.backward()
    torch.testing.assert_close(experts.gate_up_proj.grad, want, rtol=1e-4, atol=1e-6)


def test_experts_settings_come_back_after_an_exception():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = tiny_model("mixtral")
    before = fingerprint(model), list(ALL_EXPERTS_FUNCTIONS)
    with pytest.raises(IndexError), capture_energy(model):
        model(input_ids=torch.tensor([[1, 10_000]]))
    assert (fingerprint(model), list(ALL_EXPERTS_FUNCTIONS)) == before


def test_two_captures_of_experts_do_not_disturb_each_other():
    first, second = tiny_model("mixtral"), tiny_model("mixtral")
    with capture_energy(first, ["experts"]) as energy:
        with capture_energy(second, ["experts"]) as other:
            first(**BATCHES[0])
            second(**BATCHES[0])
        first(**BATCHES[1])
    assert other.tokens == 11
    assert energy.tokens == 20
    want = calibrate_quietly(second, BATCHES)
    for key in energy:
        torch.testing.assert_close(energy[key], want[key], rtol=1e-6, atol=0)


def calibrate_quietly(model: nn.Module, batches: list[dict[str, Tensor]]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibrate(model, batches, targets=["experts"])


def test_experts_that_saw_nothing_are_named():
    model = tiny_model("qwen3-moe")
    one = {"input_ids": torch.tensor([[5]])}
    with pytest.warns(UserWarning, match=r"saw no token.*: model\.layers\.0\.mlp\.experts\.down_proj\[\d\]"):
        energy = calibrate(model, [one])
    count = energy.expert_tokens["model.layers.0.mlp.experts.down_proj"]
    assert int((count == 0).sum()) == 2
    assert not energy["model.layers.0.mlp.experts.down_proj"][count == 0].any()


def test_experts_have_no_sample_norm():
    with pytest.raises(HftcoreError, match=r'"sample-norm" is not defined for fused experts \(model\.layers\.0'):
        calibrate(tiny_model("mixtral"), BATCHES, average="sample-norm")


def test_block_by_block_measures_experts_too():
    model = tiny_model("gpt-oss")
    layers = find_layers(model, ["experts"])
    want = calibrate_quietly(model, BATCHES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        steps = list(blockwise_energy(model, BATCHES, layers))
    got = {key: value for _, energy in steps for key, value in energy.items()}
    assert got.keys() == want.keys()
    for key in want:
        # the inputs of the second block come out of transformers' own experts
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-7)


def test_experts_that_are_ordinary_modules_need_unmasked_tokens():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, inputs_embeds, attention_mask=None):
            x = inputs_embeds.reshape(-1, 3)
            return self.experts[0](x[::2]), self.experts[1](x[1::2])

    x = torch.arange(12.0).view(2, 2, 3)
    energy = calibrate(Mixture(), [{"inputs_embeds": x, "attention_mask": torch.ones(2, 2)}])
    assert energy["experts.0"].tolist() == [36.0, 50.0, 68.0]
    with pytest.raises(HftcoreError, match=r"experts\.0"):
        calibrate(Mixture(), [{"inputs_embeds": x, "attention_mask": torch.tensor([[1, 0], [1, 1]])}])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_factors_see_their_own_inputs(name):
    model = with_lora(tiny_model(name), ["q_proj", "v_proj"] if name == "llama" else ["c_attn"])
    before = fingerprint(model)
    energy = calibrate(model, BATCHES, targets="lora")
    want = hooked_energies(model, BATCHES, all_tokens)
    assert energy.keys() == {key for key in want if "lora_" in key}
    for key, value in energy.items():
        torch.testing.assert_close(value.double(), want[key], **CLOSE)
    assert fingerprint(model) == before
    base = next(key for key in want if key.endswith("base_layer"))
    factor = base.replace("base_layer", "lora_A.default")
    assert torch.equal(calibrate(model, BATCHES)[base], energy[factor])


def test_lora_is_captured_by_hooks_on_the_wrapper():
    model = with_lora(tiny_model("llama"), ["q_proj"])
    with capture_energy(model, "lora", tokens="response") as energy:
        model(**BATCHES[0])
    want = calibrate(model, BATCHES[:1], targets="lora", tokens="response")
    assert energy.tokens == want.tokens > 0
    assert all(torch.equal(energy[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_a_model_that_accelerate_spread_over_devices_is_a_model_like_any(tmp_path, name):
    plain = tiny_model(name)
    plain.save_pretrained(tmp_path)
    batches = [batch(), batch(seed=1)]
    loaded = type(plain).from_pretrained(tmp_path, device_map={"": "cpu"})
    # the hooks that move inputs between devices are there for one device too
    spread = accelerate.dispatch_model(loaded, {"": "cpu"}, force_hooks=True)
    energy, found = calibrate(plain, batches), calibrate(spread, batches)
    assert all(torch.equal(found[key], value) for key, value in energy.items())
    prune(plain, energy, "50%")
    edit = prune(spread, found, "50%")
    assert all(torch.equal(mine, other) for mine, other in zip(plain.parameters(), spread.parameters(), strict=True))
    edit.revert(spread)
    away = accelerate.cpu_offload(tiny_model(name), "cpu")
    for call in (lambda: calibrate(away, batches), lambda: prune(away, energy, "50%")):
        with pytest.raises(HftcoreError, match=r"is on the meta device \(offloaded or not loaded\); load it"):
            call()


def test_importing_the_core_and_measuring_plain_modules_loads_no_transformers():
    import subprocess
    import sys

    program = (
        "import sys, torch, hftcore\n"
        "hftcore.calibrate(torch.nn.Linear(2, 2), [{'input': torch.ones(1, 2)}])\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
