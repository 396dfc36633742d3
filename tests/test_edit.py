"""Edit: applied, reverted, saved and loaded bit for bit; refused where it does not belong; whole or absent on disk."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prune import Net, measured, same, state

import hftcore
from hftcore import Edit, FingerprintError, HftcoreError, Pattern
from hftcore.edit import difference


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def model(request):
    made = Net().to(request.param)
    made.first.weight.data[0, :2] = torch.tensor([-0.0, 1e-7])  # bits that a careless restore would lose
    return made


def bits(model):
    return {
        name: value.view(torch.int16 if value.element_size() == 2 else torch.int32).clone()
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "pattern", [Pattern("50%"), Pattern("30%", scope="model", remove="highest"), Pattern(1.0), Pattern(0.0)], ids=str
)
def test_revert_restores_every_bit_and_apply_makes_the_change_again(model, pattern):
    before = bits(model)
    edit = hftcore.prune(model, measured(model), pattern)
    after = bits(model)
    edit.revert(model)
    assert same(bits(model), before)
    edit.apply(model)
    assert same(bits(model), after)


def test_an_edit_survives_the_disk(model, tmp_path):
    before = bits(model)
    edit = hftcore.prune(model, measured(model), Pattern("30%"), reference=Net().to(model.first.weight.dtype))
    after = bits(model)
    edit.save(tmp_path / "edit")
    assert sorted(os.listdir(tmp_path / "edit")) == ["edit.safetensors", "edit_config.json"]
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.recipe == edit.recipe
    assert repr(loaded) == repr(edit)
    loaded.revert(model)
    assert same(bits(model), before)
    loaded.apply(model)
    assert same(bits(model), after)


def test_other_weights_are_refused_and_left_alone():
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    other = Net()
    before = state(other)
    with pytest.raises(FingerprintError, match="other weights"):
        edit.apply(other)
    assert same(state(other), before)
    with pytest.raises(FingerprintError, match="already applied"):
        edit.apply(model)
    edit.revert(model)
    with pytest.raises(FingerprintError, match="not applied"):
        edit.revert(model)
    with pytest.raises(hftcore.HftcoreError, match="no parameter 'first"):
        edit.apply(torch.nn.Linear(2, 2))


def test_one_changed_weight_anywhere_is_noticed():
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    model.second.weight.data[4, 5] += 1
    before = state(model)
    with pytest.raises(FingerprintError):
        edit.revert(model)
    assert same(state(model), before)


def test_saving_replaces_an_edit_and_nothing_else(tmp_path):
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    edit.save(tmp_path / "edit")
    edit.save(tmp_path / "edit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(hftcore.HftcoreError, match="exists already"):
        edit.save(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == ["edit", "mine"]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_nothing_or_the_old_edit(tmp_path, monkeypatch, failure, existing):
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    if existing:
        edit.save(tmp_path / "edit")

    def failing(tensors, path):
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr("hftcore.edit.save_file", failing)
    with pytest.raises(type(failure)):
        edit.save(tmp_path / "edit")
    assert os.listdir(tmp_path) == (["edit"] if existing else [])
    if existing:
        Edit.load(tmp_path / "edit").revert(model)


def test_damaged_edits_are_refused_by_name(tmp_path):
    model = Net()
    hftcore.prune(model, measured(model), Pattern("50%")).save(tmp_path / "edit")
    with pytest.raises(hftcore.HftcoreError, match="is not an Edit"):
        Edit.load(tmp_path)
    stored = tmp_path / "edit" / "edit.safetensors"
    stored.write_bytes(stored.read_bytes()[:-7])
    with pytest.raises(hftcore.HftcoreError, match="not a readable Edit"):
        Edit.load(tmp_path / "edit")
    config = tmp_path / "edit" / "edit_config.json"
    config.write_text(json.dumps({"format": 99}))
    with pytest.raises(hftcore.HftcoreError, match="format 99"):
        Edit.load(tmp_path / "edit")
    config.write_text("{")
    with pytest.raises(hftcore.HftcoreError, match="not a readable Edit"):
        Edit.load(tmp_path / "edit")


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_an_interrupted_apply_or_revert_leaves_the_model_as_it_was(monkeypatch, action):
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    if action == "apply":
        edit.revert(model)
    before = state(model)
    plain, calls = hftcore.ops.masked_put_, []

    def interrupted(weight, mask, values=None):
        plain(weight, mask, values)
        calls.append(weight.shape)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return weight

    monkeypatch.setattr("hftcore.ops.masked_put_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(edit, action)(model)
    assert same(state(model), before)


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("part", ["mask", "before", "after"])
def test_a_spoiled_mask_or_value_is_noticed_and_nothing_changes(action, part, tmp_path):
    model, reference = Net(), Net()
    edit = hftcore.prune(model, measured(model), Pattern("30%"), reference=reference)
    edit.save(tmp_path / "edit")
    file = tmp_path / "edit" / "edit.safetensors"
    stored = load_file(file)
    name = sorted(edit.tensors)[-1]  # the others are written before it
    stored[f"{name}.{part}"] = stored[f"{name}.{part}"].flip(0).contiguous()
    save_file(stored, file)
    if action == "apply":
        edit.revert(model)
    before = bits(model)
    with pytest.raises(FingerprintError, match=f"the edit of {name} is damaged.*nothing was changed"):
        getattr(Edit.load(tmp_path / "edit"), action)(model)
    assert same(bits(model), before)


@pytest.mark.parametrize(
    "change",
    [{"shape": [10, 12]}, {"shape": "12"}, {"shape": [-12, 10]}, {"transposed": True}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_an_edit_that_contradicts_itself_is_refused(change, tmp_path):
    model = torch.nn.Linear(10, 12, bias=False)
    hftcore.prune(model, None, Pattern("30%"), score="magnitude").save(tmp_path / "edit")
    file = tmp_path / "edit" / "edit_config.json"
    config = json.loads(file.read_text())
    config["tensors"]["weight"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(HftcoreError, match="'weight' does not fit its own shape"):
        Edit.load(tmp_path / "edit")


def test_saving_over_an_edit_spares_the_files_beside_it(tmp_path):
    model = Net()
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    edit.save(tmp_path / "edit")
    (tmp_path / "edit" / "notes.md").write_text("mine")
    with pytest.raises(hftcore.HftcoreError, match="exists already"):
        edit.save(tmp_path / "edit")
    assert (tmp_path / "edit" / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, -1.5])
def test_a_scaled_edit_goes_so_far_and_back_bit_for_bit(model, factor, tmp_path):
    before = bits(model)
    start = {name: value.double() for name, value in model.state_dict().items()}
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    end = {name: value.double() for name, value in model.state_dict().items()}
    after = bits(model)
    edit.revert(model)
    scaled = edit.scaled(factor)
    scaled.save(tmp_path / "edit")
    scaled = Edit.load(tmp_path / "edit")
    scaled.apply(model)
    for name, value in model.state_dict().items():
        wanted = start[name] + factor * (end[name] - start[name])
        assert torch.equal(value, wanted.to(value.dtype))
    if factor in (0.0, 1.0):
        assert same(bits(model), after if factor else before)
    scaled.revert(model)
    assert same(bits(model), before)
    assert scaled.recipe["factor"] == factor
    assert edit.scaled(2.0).scaled(0.5).recipe["factor"] == 1.0


def test_factors_that_are_no_number_or_overflow_are_refused(model):
    edit = hftcore.prune(model, measured(model), Pattern("50%"))
    with pytest.raises(HftcoreError, match="factor must be a finite number"):
        edit.scaled(float("nan"))
    with pytest.raises(HftcoreError, match="infinite; take a smaller one"):
        edit.scaled(1e300)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_difference_of_two_tensors_is_an_edit(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator).to(dtype)
    after = torch.where(torch.rand(shape, generator=generator) < 0.5, before, -before)
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(before.clone())
    edit = Edit({"weight": difference(before, after)})
    edit.apply(holder)
    assert torch.equal(holder.weight, after)
    assert edit.removed == int((before != after).sum())
    edit.revert(holder)
    assert torch.equal(holder.weight, before)
