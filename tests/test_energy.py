"""Energies are sums that merge, and files that are whole or refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from hftcore.energy import Energy
from hftcore.errors import HftcoreError


def make(scale: float = 1.0) -> Energy:
    values = {"b": scale * torch.tensor([9.0, 4.0]), "experts.down_proj": scale * torch.ones(3, 2)}
    return Energy(values, tokens=5, samples=2, expert_tokens={"experts.down_proj": torch.tensor([3, 0, 2])})


def test_addition_adds_values_and_counts():
    total = make() + make(2.0)
    assert total["b"].tolist() == [27.0, 12.0]
    assert (total.tokens, total.samples) == (10, 4)
    assert total.expert_tokens["experts.down_proj"].tolist() == [6, 0, 4]


def test_addition_leaves_both_terms_alone():
    first, second = make(), make(2.0)
    _ = first + second
    assert first["b"].tolist() == [9.0, 4.0]
    assert second["b"].tolist() == [18.0, 8.0]
    assert first.expert_tokens["experts.down_proj"].tolist() == [3, 0, 2]


def test_values_are_not_shared_with_the_caller():
    value = torch.ones(2)
    energy = Energy({"a": value})
    energy.add_("a", torch.ones(2))
    assert value.tolist() == [1.0, 1.0]


def test_norm_is_the_rounded_root():
    assert torch.equal(make().norm("b"), torch.tensor([3.0, 2.0]))
    assert Energy({"a": torch.tensor([2.0])}).norm("a").item() == torch.tensor(2.0).sqrt().item()


def test_add_starts_at_zero_and_accumulates():
    energy = Energy()
    energy.add_("a", torch.ones(2, dtype=torch.float64)).add_("a", torch.ones(2))
    assert energy["a"].dtype == torch.float32
    assert energy["a"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(1, 2, 3), torch.ones(2, dtype=torch.int64)])
def test_refuses_values_that_are_no_energy(value):
    with pytest.raises(HftcoreError, match="'a' must be"):
        Energy({"a": value})


def test_refuses_to_add_other_layers_and_shapes():
    with pytest.raises(HftcoreError, match=r"same layers.*only one of them has experts"):
        make() + Energy({"b": torch.ones(2)})
    with pytest.raises(HftcoreError, match=r"'b' has shape \(2,\), cannot add \(3,\)"):
        Energy({"b": torch.ones(2)}) + Energy({"b": torch.ones(3)})


def test_refuses_to_add_what_is_not_a_sum():
    mean = Energy({"b": torch.ones(2)}, average="sample-norm")
    with pytest.raises(HftcoreError, match="only sums can be added"):
        mean + mean
    with pytest.raises(HftcoreError, match='average must be "sum" or "sample-norm", got \'mean\''):
        Energy(average="mean")


def test_repr_tells_size_and_counts():
    assert repr(make()) == "Energy(2 layers, 5 tokens, 2 samples)"


def test_a_saved_energy_comes_back_bit_for_bit(tmp_path):
    energy = make(1 / 3)
    energy.save(tmp_path / "energy.safetensors")
    again = Energy.load(tmp_path / "energy.safetensors")
    assert list(again) == sorted(energy)
    assert all(torch.equal(again[name], energy[name]) for name in energy)
    assert (again.tokens, again.samples, again.average) == (5, 2, "sum")
    assert torch.equal(again.expert_tokens["experts.down_proj"], energy.expert_tokens["experts.down_proj"])


def test_a_saved_average_is_still_not_additive(tmp_path):
    Energy({"b": torch.ones(2)}, average="sample-norm").save(tmp_path / "e")
    assert Energy.load(tmp_path / "e").average == "sample-norm"


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "energy.safetensors"
    make().save(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(7.0).save(path)
    assert Energy.load(path)["b"].tolist() == [9.0, 4.0]
    assert os.listdir(tmp_path) == ["energy.safetensors"]


def test_load_refuses_other_files(tmp_path):
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(HftcoreError, match="not a safetensors file or is damaged"):
        Energy.load(tmp_path / "text")
    save_file({"b": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(HftcoreError, match="must be an energy file of format hftcore-energy-1, got None"):
        Energy.load(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        Energy.load(tmp_path / "absent")


@pytest.mark.parametrize("broken", [{"tokens": "many"}, {"expert_tokens": "{"}, {"average": "mean"}])
def test_load_refuses_broken_metadata(tmp_path, broken):
    whole = {"format": "hftcore-energy-1", "tokens": "1", "samples": "1", "average": "sum", "expert_tokens": "{}"}
    save_file({"b": torch.ones(2)}, tmp_path / "energy", whole | broken)
    with pytest.raises(HftcoreError, match="broken metadata"):
        Energy.load(tmp_path / "energy")


def test_load_refuses_a_cut_file(tmp_path):
    make().save(tmp_path / "energy")
    whole = (tmp_path / "energy").read_bytes()
    (tmp_path / "energy").write_bytes(whole[:-4])
    with pytest.raises(HftcoreError, match="damaged"):
        Energy.load(tmp_path / "energy")


def test_a_folder_is_no_energy_file(tmp_path):
    with pytest.raises(HftcoreError, match="must be an energy file, got a folder"):
        Energy.load(tmp_path)
