"""Which layers are found, under which names, and which are refused."""

import pytest
import torch
from tiny_models import DENSE, tiny_model, with_lora
from torch import nn

from hftcore.errors import HftcoreError
from hftcore.layers import blocks, body, find_layers


def names(*args, **kwargs) -> list[str]:
    return [layer.name for layer in find_layers(*args, **kwargs)]


class Mixture(nn.Module):
    """Experts that are ordinary modules, with a router and one more linear layer beside them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.latent = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)


def test_a_bare_linear_is_a_model():
    (layer,) = find_layers(nn.Linear(3, 2))
    assert (layer.name, layer.tensor, layer.parameter, layer.transposed) == ("", "weight", "weight", False)


def test_all_linear_is_every_linear_but_the_head():
    model = tiny_model("llama")
    found = names(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(found) == sorted(set(linear) - {"lm_head"})


@pytest.mark.parametrize("name", DENSE)
def test_layers_are_sorted_by_tensor_name_and_never_embeddings(name):
    layers = find_layers(tiny_model(name))
    tensors = [layer.tensor for layer in layers]
    assert tensors == sorted(tensors)
    assert not any("embed" in tensor or "wte" in tensor or "lm_head" in tensor for tensor in tensors)


def test_a_head_is_found_when_it_is_named():
    model = tiny_model("llama")
    assert names(model, targets=["lm_head"]) == ["lm_head"]
    assert names(model, targets="lm_head") == ["lm_head"]


def test_a_list_matches_whole_components_at_the_end():
    model = tiny_model("llama")
    assert names(model, ["q_proj", "mlp.up_proj"]) == [
        f"model.layers.{i}.{last}" for i in range(2) for last in ("mlp.up_proj", "self_attn.q_proj")
    ]
    with pytest.raises(HftcoreError, match="matched no layer"):
        find_layers(model, ["_proj"])


def test_a_string_must_match_the_whole_name():
    model = tiny_model("llama")
    assert names(model, r".*\.0\.mlp\.(up|down)_proj") == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    with pytest.raises(HftcoreError, match="matched no layer"):
        find_layers(model, "up_proj")


def test_exclude_takes_both_forms():
    model = tiny_model("llama")
    everything = names(model)
    assert names(model, exclude=["down_proj"]) == [name for name in everything if not name.endswith("down_proj")]
    assert names(model, exclude=r".*\.1\..*") == [name for name in everything if ".1." not in name]


def test_no_match_names_the_targets_and_shows_what_there_is():
    with pytest.raises(
        HftcoreError, match=r"targets=\['quux'\].*matched no layer; available: lm_head, model\.layers\.0"
    ):
        find_layers(tiny_model("llama"), ["quux"])
    with pytest.raises(HftcoreError, match=r"regular expressions.*got '\('"):
        find_layers(tiny_model("llama"), "(")


def test_lora_means_the_factors_and_all_linear_means_the_rest():
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"])
    factors = names(model, "lora")
    assert len(factors) == 8
    assert all(name.endswith(("lora_A.default", "lora_B.default")) for name in factors)
    dense = names(model)
    assert len(dense) == 14
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in dense


def test_base_names_match_under_peft():
    model = with_lora(tiny_model("llama"), ["q_proj"])
    wanted = [f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer" for i in range(2)]
    assert names(model, ["q_proj"]) == wanted
    assert names(model, r"model\.layers\.\d\.self_attn\.q_proj") == wanted


def test_routers_are_left_out_only_beside_experts():
    assert names(Mixture()) == ["experts.0", "experts.1", "latent"]
    assert names(Gated()) == ["gate"]


def test_a_tied_weight_comes_once():
    model = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["a", "c"]
    assert layers[0].twins == (model["b"],)


def test_conv1d_is_seen_as_out_by_in_without_a_copy():
    model = tiny_model("gpt2")
    (layer,) = find_layers(model, r"transformer\.h\.0\.mlp\.c_fc")
    assert layer.transposed
    assert layer.weight.shape == (128, 32)
    assert layer.weight.data_ptr() == layer.module.weight.data_ptr()
    assert [(label, weight.shape, expert) for label, weight, expert in layer.matrices()] == [
        ("transformer.h.0.mlp.c_fc.weight", (128, 32), None)
    ]


@pytest.mark.parametrize(("name", "transposed"), [("qwen3-moe", False), ("mixtral", False), ("gpt-oss", True)])
def test_fused_experts_are_matrices_of_out_by_in(name, transposed):
    model = tiny_model(name)
    layers = find_layers(model, ["experts"])
    assert [layer.name.split(".")[-1] for layer in layers] == ["down_proj", "gate_up_proj"] * 2
    assert all(layer.name == layer.tensor and layer.transposed is transposed for layer in layers)
    inner = {"qwen3-moe": 24, "mixtral": 48, "gpt-oss": 48}[name]
    assert layers[0].weight.shape == (4, 32, inner)
    assert layers[1].weight.shape == (4, 2 * inner, 32)
    matrices = list(layers[1].matrices())
    assert [(label, expert) for label, _, expert in matrices] == [(f"{layers[1].tensor}[{e}]", e) for e in range(4)]
    stored = dict(model.named_parameters())[layers[1].tensor]
    assert matrices[2][1].data_ptr() == stored[2].data_ptr()
    assert names(model, ["gate_up_proj"]) == [layer.name for layer in layers if "gate_up" in layer.name]


def test_experts_of_an_unknown_layout_are_refused_unless_excluded():
    class OddExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = nn.Parameter(torch.zeros(2, 3, 4))

    model = tiny_model("llama")
    model.model.layers[0].experts = OddExperts()
    with pytest.raises(HftcoreError, match=r"experts\.odd.*unknown layout \(OddExperts\)"):
        find_layers(model)
    assert len(find_layers(model, exclude=["experts"])) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[1].weight.to(dtype), requires_grad=False)
    with pytest.raises(HftcoreError, match=rf"'1' is quantised or of an unsupported dtype \({dtype}"):
        find_layers(model)
    assert names(model, exclude=["1"]) == ["0"]


def test_packed_weights_are_refused_by_name():
    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(3, 3, dtype=torch.int32))

    with pytest.raises(HftcoreError, match=r"'q_proj' is quantised"):
        find_layers(nn.ModuleDict({"q_proj": QuantLinear(), "k_proj": nn.Linear(3, 3)}))


def test_meta_weights_are_refused_by_name():
    with pytest.raises(HftcoreError, match="'1' is on the meta device"):
        find_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta")))


def test_the_body_has_no_head():
    model = tiny_model("llama")
    assert body(model) is model.model
    assert body(model.model) is model.model
    assert body(with_lora(model, ["q_proj"])) is model.model
    plain = nn.Linear(2, 2)
    assert body(plain) is plain


def test_encoder_decoders_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    with pytest.raises(HftcoreError, match="encoder-decoder"):
        body(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("name", DENSE)
def test_blocks_are_the_decoder_layers(name):
    found = blocks(tiny_model(name))
    assert len(found) == 2
    assert all("Layer" in type(block).__name__ or "Block" in type(block).__name__ for block in found)


def test_blocks_of_a_mixture_are_not_its_experts():
    model = nn.Module()
    model.layers = nn.ModuleList([Mixture()])
    assert blocks(model) == [model.layers[0]]
    with pytest.raises(HftcoreError, match=r"no nn\.ModuleList"):
        blocks(nn.Linear(2, 2))
