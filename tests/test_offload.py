"""Calibrating block by block from the files gives what calibrating in memory gives, bit for bit, in the memory of two blocks."""

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, batch, one_thread, tiny_model, with_lora  # noqa: F401 (one is a fixture)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaModel
from typer.testing import CliRunner

import hftcore
from hftcore import HftcoreError, NonFiniteError
from hftcore.bindings import memory
from hftcore.bindings.checkpoints import activations, job, offload, weights
from hftcore.bindings.checkpoints.activations import Activations
from hftcore.bindings.checkpoints.manifest import MANIFEST
from hftcore.bindings.checkpoints.offload import calibrate_folder
from hftcore.bindings.cli.app import app
from hftcore.block_runs import BlockRuns
from hftcore.layers import find_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:saw no token", "ignore:removing the highest", "ignore:what no token reached"),
]
BATCHES = [batch(), batch((3, 6), "left", 1), batch((5, 5, 5), seed=2)]


def saved(name, folder, dtype=torch.float32, seed=0):
    """A tiny model in several files."""
    tiny_model(name, dtype, seed).save_pretrained(folder, max_shard_size="30KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def in_memory(folder, batches=BATCHES, dtype="auto", **options):
    return hftcore.calibrate(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), batches, **options)


def assert_same(got, want):
    assert want
    assert list(got) == list(want)
    assert all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)
    assert (got.tokens, got.samples, got.average) == (want.tokens, want.samples, want.average)
    assert got.expert_tokens.keys() == want.expert_tokens.keys()
    assert all(torch.equal(got.expert_tokens[name], want.expert_tokens[name]) for name in want.expert_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "gpt2",
        "opt",
        "gemma2",
        "gemma3",
        "gpt-neox",
        "qwen3-moe",
        "mixtral",
        "gpt-oss",
        "deepseek-v3",
    ],
)
def test_energies_are_those_of_the_model_in_memory_bit_for_bit(tmp_path, name, dtype):
    saved(name, tmp_path, dtype)
    assert_same(calibrate_folder(tmp_path, BATCHES), in_memory(tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_response_tokens_and_hidden_states_in_a_file_change_nothing(tmp_path, name):
    saved(name, tmp_path / "model", torch.bfloat16)
    (tmp_path / "scratch").mkdir()
    want = in_memory(tmp_path / "model", tokens="response")
    one = 2 * 7 * 32 * 2  # bytes of the first batch's hidden states
    for budget in (0, one, None):
        got = calibrate_folder(
            tmp_path / "model", BATCHES, tokens="response", scratch=tmp_path / "scratch", budget=budget
        )
        assert_same(got, want)
    assert [*(tmp_path / "scratch").iterdir()] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"targets": ["lm_head", "up_proj"]}),
        ("llama-tied", {"targets": ["lm_head"]}),
        ("gpt-neox", {"targets": r".*embed_out|lm_head|.*\.1\..*"}),
        ("opt", {"targets": ["project_in", "project_out", "fc1"]}),
        ("gpt2", {"targets": r".*h\.0\..*"}),
        ("qwen3-moe", {"exclude": ["layers.0.mlp.experts"]}),
        ("gpt-oss", {"exclude": ["layers.0.mlp.experts"]}),
        ("qwen3-moe", {"exclude": ["experts"]}),
    ],
)
def test_any_choice_of_layers_is_measured_as_in_memory(tmp_path, name, options):
    saved(name, tmp_path, torch.bfloat16)
    assert_same(calibrate_folder(tmp_path, BATCHES, **options), in_memory(tmp_path, **options))


def test_another_dtype_is_that_of_a_model_loaded_in_it(tmp_path):
    saved("qwen3-moe", tmp_path, torch.bfloat16)
    assert_same(calibrate_folder(tmp_path, BATCHES, dtype="float32"), in_memory(tmp_path, dtype=torch.float32))


def test_a_dtype_that_the_configuration_does_not_name_is_that_of_the_files(tmp_path):
    saved("llama", tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(calibrate_folder(tmp_path, BATCHES), in_memory(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "qwen3-moe", "gpt-oss"])
def test_weights_read_are_those_of_a_loaded_model_and_start_where_its_do(tmp_path, name):
    """Where a tensor starts within 64 bytes may decide on the order of a sum."""
    saved(name, tmp_path, torch.bfloat16)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    stored = offload.list_tensors(tmp_path)
    model = weights.build_model(tmp_path, stored, "auto", torch.device("cpu"))
    parts = weights.find_parts(model, [*model.modules()], weights.by_name_in_memory(model, stored))
    buffer = torch.empty(max(part.stop for part in parts), dtype=torch.uint8)
    with weights.filled(parts, [part.read(buffer) for part in parts]):
        read = dict(model.named_parameters())
        assert read.keys() == loaded.keys()
        for key, value in loaded.items():
            assert torch.equal(read[key], value)
            assert (read[key].dtype, read[key].data_ptr() % 64) == (value.dtype, value.data_ptr() % 64), key
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in model.parameters())


def test_each_block_is_read_once_and_none_that_is_not_needed(tmp_path, monkeypatch):
    saved("qwen3-moe", tmp_path)
    read = []
    plain = weights._read_bytes
    monkeypatch.setattr(weights, "_read_bytes", lambda piece, rows: (read.append(piece.stored), plain(piece, rows)))
    calibrate_folder(tmp_path, BATCHES)
    stored = {name for name in offload.list_tensors(tmp_path) if ".layers." in name}
    assert sorted(read) == sorted(stored)
    read.clear()
    calibrate_folder(tmp_path, BATCHES, targets=r".*layers\.0\..*")
    assert sorted(read) == sorted(name for name in stored if ".layers.0." in name)


def test_an_activation_that_is_not_finite_is_named_as_in_memory(tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError) as expected:
        hftcore.calibrate(model, BATCHES)
    with pytest.raises(NonFiniteError, match=re.escape(str(expected.value))):
        calibrate_folder(tmp_path, BATCHES)


def test_a_tensor_that_the_files_lack_is_refused_by_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HftcoreError, match=r"lacks 1 of .* such as 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        calibrate_folder(tmp_path, BATCHES)


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    find = offload.find_parts

    def cut(*args):
        parts = find(*args)
        os.truncate(tmp_path / "model.safetensors", 9000)
        return parts

    monkeypatch.setattr(offload, "find_parts", cut)
    monkeypatch.setattr(weights.Part, "mapped", lambda part, device: torch.zeros(part.shape, dtype=part.dtype))
    with pytest.raises(HftcoreError, match=r"model\.safetensors ended \d+ bytes early"):
        calibrate_folder(tmp_path, BATCHES)


def test_blocks_that_run_twice_are_refused(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    forward = LlamaModel.forward

    def twice(self, *args, **kwargs):
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", twice)
    with pytest.raises(HftcoreError, match=r"one after the other.*--no-offload"):
        calibrate_folder(tmp_path, BATCHES)


def test_a_layer_that_two_blocks_use_is_refused():
    one, two = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(torch.nn.Linear(2, 2))
    two[0].weight = one[0].weight
    with pytest.raises(HftcoreError, match="used by several blocks"):
        offload._refuse_shared([one, two], find_layers(torch.nn.Sequential(one, two)))


def test_activations_beyond_the_budget_are_in_the_file_and_all_come_back(tmp_path):
    xs = [torch.randn(3, 5), torch.randn(5, 3).t(), torch.randn(2, 2).bfloat16(), torch.tensor([1.5])]
    with closing(Activations(3 * 5 * 4, tmp_path, torch.device("cpu"))) as held:
        for number, x in enumerate(xs):
            held[number] = x
        assert held.slots.keys() == {1, 2, 3}
        for _ in range(2):
            for number, x in enumerate(xs):
                assert torch.equal(held[number], x)
                assert held[number].stride() == x.stride()
            xs = [x * 2 if x.dim() > 1 else torch.ones(4) for x in xs]
            for number, x in enumerate(xs):
                held[number] = x


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    class Full:
        def seek(self, *_):
            return 0

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(HftcoreError, match=r"no room for the hidden states.*No space left.*fewer or shorter samples"):
        Activations(0, tmp_path, torch.device("cpu"))[0] = torch.ones(2)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    cpu = torch.device("cpu")
    plain = memory.available_memory(cpu)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 2100\nfile 400\n")
    assert memory.available_memory(cpu) == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(cpu) > 900
    assert plain > 900


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders `model`, `tuned`, `moe` and `adapter`, and `data.jsonl`; tests leave them alone."""
    root = tmp_path_factory.mktemp("world")
    words = ["<pad>", "<unk>", "<eos>", *(f"w{index}" for index in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    for seed, (name, kind) in enumerate((("model", "llama"), ("tuned", "llama"), ("moe", "mixtral"))):
        tokenizer.save_pretrained(saved(kind, root / name, torch.bfloat16, seed))
    with_lora(tiny_model("llama"), ["q_proj"]).save_pretrained(root / "adapter")
    rows = [{"prompt": f"w{index} w4", "completion": f"w{index + 9} w7 w8"} for index in range(3, 12)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def hftcore_command(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def contents(folder):
    """Every tensor, and every other file of the Edit."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        place = file.parent.relative_to(folder).as_posix()
        tensors |= {f"{place}/{name}": tensor.view(torch.uint8) for name, tensor in load_file(file).items()}
    texts = {path.name: path.read_text() for path in folder.rglob("edit_config.json") if path.name != MANIFEST}
    return tensors, texts


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("model", ["wanda"]),
        ("moe", ["wanda", "--sparsity", "2:4"]),
        ("model", ["wanda", "--scope", "model", "--tokens", "response", "--exclude", "q_proj"]),
        ("moe", ["antidote", "--batch-size", "2"]),
        ("tuned", ["antidote", "--dense-ratio", "0.2", "--reference", "model", "--tokens", "response"]),
        ("model", ["antidote", "--edit-only"]),
    ],
)
def test_pruning_offloaded_gives_the_model_and_the_edit_of_pruning_in_memory(world, tmp_path, model, command):
    args = [
        world / arg if arg == "model" and before == "--reference" else arg
        for before, arg in zip(["", *command], command, strict=False)
    ]
    found = {}
    for way in ("--offload", "--no-offload"):
        out = tmp_path / way
        code, _, err = hftcore_command(
            args[0], world / model, *args[1:], "--data", world / "data.jsonl", "--out", out, way
        )
        assert code == 0, err
        found[way] = contents(out)
    (got, texts), (want, wanted_texts) = found.values()
    assert texts == wanted_texts
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["--no-offload", "--offload"]


def test_calibrate_writes_the_same_file(world, tmp_path):
    for way in ("--offload", "--no-offload"):
        options = ["--data", world / "data.jsonl", "--out", tmp_path / way, "--dtype", "float32", way]
        code, out, err = hftcore_command("calibrate", world / "moe", *options)
        assert (code, err) == (0, "")
        assert out.startswith("Measured ")
    assert_same(hftcore.Energy.load(tmp_path / "--offload"), hftcore.Energy.load(tmp_path / "--no-offload"))


def test_a_model_too_large_for_the_memory_is_offloaded_and_that_is_said(world, tmp_path, monkeypatch, caplog):
    def run(free, *options):
        monkeypatch.setattr(job, "available_memory", lambda _: free)
        way = []
        monkeypatch.setattr(
            job, "calibrate_folder", lambda *args, **kw: (way.append("offloaded"), calibrate_folder(*args, **kw))[1]
        )
        caplog.clear()
        out = tmp_path / f"{len([*tmp_path.iterdir()])}.safetensors"
        code, _, err = hftcore_command(
            "calibrate", world / "model", "--data", world / "data.jsonl", "--out", out, *options
        )
        assert code == 0, err
        return bool(way), caplog.text

    size = sum(file.stat().st_size for file in (world / "model").glob("*.safetensors"))
    offloaded, said = run(size)
    assert offloaded
    assert re.search(r"the weights take .* are free: measuring block by block from the files", said)
    assert run(2 * size) == (False, "")
    assert run(size, "--no-offload") == (False, "")
    assert run(2 * size, "--dtype", "float32")[0]
    assert run(2 * size, "--offload") == (True, "")


def test_what_cannot_be_offloaded_is_refused_in_one_line(world, tmp_path, monkeypatch):
    model, data, out = world / "model", ["--data", world / "data.jsonl"], tmp_path / "out"
    packed, pickled, mute = tmp_path / "packed", tmp_path / "pickled", tmp_path / "mute"
    for folder in (packed, pickled, mute):
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(BlockRuns, "run", None)  # nothing is measured
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for file in pickled.glob("*.safetensors*"):
        file.unlink()
    (pickled / "pytorch_model.bin").touch()
    (mute / "tokenizer.json").unlink()
    (mute / "tokenizer_config.json").unlink()
    for args, message in [
        (["wanda", world / "adapter", *data], "--offload reads whole models, and MODEL .* is an adapter: merge it"),
        (["calibrate", world / "adapter", *data], "is an adapter: merge it"),
        (["antidote", model, *data, "--reference", world / "adapter"], "--reference .* is an adapter: merge it"),
        (["wanda", model, *data, "--base", model], "--base is for adapters"),
        (["wanda", model, *data, "--sequential"], "--sequential as it is pruned so far: choose one"),
        (["wanda", model, *data, "--dtype", "float32"], "leave --dtype float32 out"),
        (["wanda", model], "needs --data"),
        (["wanda", model, "--score", "magnitude"], "needs --data, --score wanda"),
        (["calibrate", packed, *data], "is quantised .* dequantise it first"),
        (["calibrate", pickled, *data], "no .safetensors files .* a pickle, .* convert the checkpoint"),
        (["wanda", mute, *data], "no tokenizer"),
        (["wanda", tmp_path / "absent", *data], "MODEL must be a checkpoint folder"),
        (["wanda", model, *data, "--targets", "nothing_like_it"], "nothing_like_it"),
        (["wanda", model, *data, "--device", "toaster"], "device 'toaster'"),
        (["antidote", model, *data, "--reference", world / "moe"], r"--reference .*layers\.0\.mlp\.down_proj\.weight"),
    ]:
        code, text, err = hftcore_command(*args, "--offload", "--out", out)
        assert (code, text) == (1, ""), (args, err)
        assert re.search(message, err), err
        assert err.count("\n") == 1
    code, _, err = hftcore_command("calibrate", model, *data, "--offload", "--out", model / "energy")
    assert code == 1
    assert "--out must" in err
    assert not out.exists()
    assert hftcore_command("antidote", model, *data, "--adapters", world / "adapter", "--offload", "--out", out)[0] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what RLIMIT_DATA limits in this way")
def test_a_model_of_several_times_the_memory_is_measured(tmp_path):
    # A block of 4 * 1024^2 + 3 * 1024 * 2816 float32 weights takes 51 MB, 12 of them 615 MB. Allowed beyond what the process has
    # after a first small run: two blocks (103 MB), and 61 MB for the parameters that no block holds (2 * 2 MB), what a pass computes,
    # the thread that reads, and what libraries take when first used. Together a quarter of the model.
    allowed = 164_000_000
    program = f"""
import json, os, re, resource, sys
from pathlib import Path
import torch
from hftcore.bindings.checkpoints.offload import calibrate_folder
from hftcore.bindings.checkpoints.skeleton import load_skeleton

torch.set_num_threads(1)

def made(folder, blocks, hidden, inner):
    "A Llama of zeros, in files without blocks on the disk."
    folder.mkdir()
    config = dict(model_type="llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=512, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    header, position = {{}}, 0
    for name, parameter in load_skeleton(folder).named_parameters():
        stop = position + 4 * parameter.numel()
        header[name] = dict(dtype="F32", shape=list(parameter.shape), data_offsets=[position, stop])
        position = stop
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return folder

batches = [dict(input_ids=torch.arange(32).view(2, 16) + shift) for shift in range(3)]
root = Path({str(tmp_path)!r})
calibrate_folder(made(root / "small", 2, 64, 128), batches)
large = made(root / "large", 12, 1024, 2816)
now = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + {allowed}, now + {allowed}))
energy = calibrate_folder(large, batches, budget=1 << 20)
assert len(energy) == 12 * 7
assert (large / "model.safetensors").stat().st_size > 3.7 * {allowed}
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [*Path(tmp_path).glob(".*")]
