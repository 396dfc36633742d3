"""Norms of the samples of a data set: the measurement, its files and histograms, the command line, refusals."""

import json
import struct

import pytest
import test_cli
import torch
from test_grad_norms import oracle
from tiny_models import one_thread  # noqa: F401

from hftcore.bindings.data import load_samples, make_batches
from hftcore.bindings.gradnorms import choose_parameters, sample_norms, separation
from hftcore.bindings.models_io import load_model
from hftcore.errors import HftcoreError

pytestmark = pytest.mark.usefixtures("one_thread")

world = test_cli.world
hftcore_command = test_cli.hftcore_command


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_norms_are_those_of_each_sample_alone_in_the_order_of_the_file(world):
    model, tokenizer = load_model(world / "model")
    lengths = (3, 1, 5, 2)
    samples = load_samples([{"prompt": "w3 w4", "completion": " ".join(["w7"] * length)} for length in lengths])
    found = sample_norms(model, tokenizer, samples, batch_size=3)
    assert [one.number for one in found] == [1, 2, 3, 4]
    for one, sample in zip(found, samples, strict=True):
        (alone,) = make_batches([sample], tokenizer)
        want = oracle(model, alone)
        assert one.tokens == int((alone["labels"][:, 1:] != -100).sum())
        assert one.norm == pytest.approx(float(want[""]), rel=1e-5)
        assert sum(part**2 for part in one.layers.values()) == pytest.approx(one.norm**2, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sample_without_a_response_has_norm_zero_and_is_named(world):
    model, tokenizer = load_model(world / "model")
    long = {"prompt": " ".join(["w3"] * 90), "completion": "w7"}
    samples = load_samples([{"prompt": "w3", "completion": "w7 w8"}, long])
    with pytest.warns(UserWarning, match="samples 2 have no supervised token"):
        found = sample_norms(model, tokenizer, samples, max_length=80)
    assert found[0].norm > 0
    assert (found[1].norm, found[1].tokens, found[1].layers) == (0.0, 0, {})
    with pytest.raises(HftcoreError, match="no sample has a response token within max_length=80"):
        sample_norms(model, tokenizer, samples[1:], max_length=80)


def test_an_adapter_is_measured_by_its_factors(world):
    model, _ = load_model(world / "adapter")
    assert choose_parameters(model, "auto") == "lora"
    assert {name.rsplit(".", 3)[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert choose_parameters(model, "all") == "all"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_command_writes_rows_histograms_and_a_summary(world, tmp_path):
    other = tmp_path / "harmful.jsonl"
    other.write_text("\n".join(json.dumps({"prompt": "w5", "completion": f"w{n}"}) for n in range(30, 36)))
    arguments = ["gradnorms", world / "adapter", "--data", world / "data.jsonl", "--against", other, "--layers"]
    out, plot = tmp_path / "norms.jsonl", tmp_path / "norms.png"
    code, text, error = hftcore_command(*arguments, "--out", out, "--plot", plot, "--device", "cpu")
    assert code == 0, error
    assert "data.jsonl: 9 samples, median norm" in text
    assert "harmful.jsonl has the larger norm with probability" in text
    found = rows(out)
    assert [(row["data"], row["sample"]) for row in found] == [
        *(("data.jsonl", number) for number in range(1, 10)),
        *(("harmful.jsonl", number) for number in range(1, 7)),
    ]
    assert set(found[0]) == {"data", "sample", "tokens", "norm", "layers"}
    assert all("layers." in part for part in found[0]["layers"])
    header = plot.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:24])) > 300


def test_command_as_json(world, tmp_path):
    arguments = ["gradnorms", world / "model", "--data", world / "data.jsonl", "--num-samples", 2, "--json"]
    code, text, error = hftcore_command(*arguments, "--out", tmp_path / "norms.jsonl", "--device", "cpu")
    assert code == 0, error
    result = json.loads(text)
    assert (result["over"], result["plot"], list(result["norms"])) == ("all", None, ["data.jsonl"])
    assert result["norms"]["data.jsonl"]["samples"] == 2
    assert "separation" not in result


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--over", "lora"], "--over lora needs an adapter"),
        (["--against", "data"], "--against must be another file than --data"),
        (["--plot", "out"], "--plot must be another file than --out"),
        (["--plot", "norms.svg"], "--plot must end in .png"),
        (["--max-seq-length", "1"], "no sample has a response token within max_length=1"),
    ],
)
def test_refusals_leave_nothing(world, tmp_path, extra, message):
    out = tmp_path / "norms.jsonl"
    extra = [{"data": world / "data.jsonl", "out": out}.get(value, value) for value in extra]
    arguments = ["gradnorms", world / "model", "--data", world / "data.jsonl", "--out", out, "--device", "cpu"]
    code, _, error = hftcore_command(*arguments, *extra)
    assert code == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_output_that_exists_is_kept(world, tmp_path):
    out = tmp_path / "norms.jsonl"
    out.write_text("mine")
    code, _, error = hftcore_command("gradnorms", world / "model", "--data", world / "data.jsonl", "--out", out)
    assert code == 1
    assert "--out must be a file that does not exist yet" in error
    assert out.read_text() == "mine"


def test_separation_by_hand():
    """Of the pairs (1, 0), (1, 2), (1, 1) one is larger and one equal."""
    assert separation([1.0], [0.0, 2.0, 1.0]) == 0.5
    assert separation([1.0, 2.0], [3.0]) == 1.0


def test_histograms_of_equal_and_of_wide_values(tmp_path):
    histograms = pytest.importorskip("hftcore.bindings.histograms")
    pytest.importorskip("matplotlib")
    wide = torch.logspace(-3, 3, 20).tolist()
    for name, panels in (("equal", {"": {"one": [0.0, 0.0]}}), ("wide", {"a": {"one": wide, "two": [1.0]}})):
        histograms.draw_histograms(panels, "norm", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 2
