"""Per-sample norms and the defences' rules on two processes: FSDP2's sharded weights and DistributedDataParallel do as one process."""

import copy
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_grad_norms import assert_norms, oracle
from test_trainers import config, in_two_processes, samples
from tiny_models import FUSED, SETTINGS, batch, one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn
from transformers import LlamaForCausalLM

from hftcore.bindings.trainers.antibody import AntibodyAlignTrainer, AntibodyTrainer
from hftcore.bindings.trainers.base import STATE_FILE, DefenceTrainer
from hftcore.bindings.trainers.kept import placed
from hftcore.bindings.trainers.panacea import PanaceaTrainer
from hftcore.defenses.antibody_align import AlignSettings, align_step
from hftcore.defenses.merged import lora_factors, merged_length
from hftcore.defenses.panacea import PanaceaSettings, panacea_step
from hftcore.defenses.panacea_perturb import panacea_perturb, whole
from hftcore.defenses.perturbation import Gradients, perturbed, trained
from hftcore.edit import Edit
from hftcore.errors import HftcoreError
from hftcore.grad_norms import capture_grad_norms
from hftcore.kernels import native_gradients

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed"),
]
LENGTHS = (7, 4, 6)  # the first process has two of these samples, the second one
MODELS = ("llama", "gpt2", "leaves", "lora", "checkpointed llama", "mixtral", "checkpointed qwen3-moe", "gpt-oss")


def pair(kind):
    """(a model sharded over both processes, the same model whole)."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    name = kind.removeprefix("checkpointed ")
    model = tiny_model(name if name in SETTINGS else "llama")
    if name in FUSED:
        model.set_experts_implementation("eager")  # the others know no float64
        for label, parameter in model.named_parameters():
            parameter.requires_grad_(not label.endswith("sinks"))
    if kind == "lora":
        model = with_lora(model, ["q_proj", "down_proj"])
    if kind != name:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole = copy.deepcopy(model)
    if kind == "leaves":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                fully_shard(module)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    return fully_shard(model), whole


def part(one):
    """This process's samples."""
    return {name: rows[:2] if dist.get_rank() == 0 else rows[2:] for name, rows in one.items()}


def refused(match):
    return pytest.raises(HftcoreError, match=match)


def mean(values):
    dist.all_reduce(values)
    return values / dist.get_world_size()


def assert_gradients(model, whole, *, is_common=False):
    """The sharded gradients are the whole model's, or their mean over the processes."""
    for (name, sharded), one in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (sharded.grad is None) == (one.grad is None), name
        if one.grad is not None:
            want = one.grad if is_common else mean(one.grad.clone())
            got = sharded.grad.full_tensor()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def check_norms(kind):
    native_gradients.LEAST = 1  # small as these models are, gradients of inputs are formed from the gathered weights
    model, whole = pair(kind)
    own = part(batch(LENGTHS))
    weights = torch.tensor([0.5, 2.0])[: len(own["labels"])] + dist.get_rank()
    with capture_grad_norms(whole, keep=True) as want:
        whole(**own).loss.backward()
    with capture_grad_norms(model) as norms:
        model(**own).loss.backward()
    assert_norms(norms, oracle(whole, own))
    assert_gradients(model, whole)
    model.zero_grad(), whole.zero_grad()
    with capture_grad_norms(model, norms_only=True, keep=True) as norms:
        model(**own).loss.backward()
    torch.testing.assert_close(norms.per_sample, want.per_sample)
    assert all(parameter.grad is None for parameter in model.parameters())
    want.backward(weights)
    for _ in range(2):  # adds to what is there
        norms.backward(weights / 2)
    assert_gradients(model, whole)
    # the hooks are gone, and the model trains as ever
    for one in (model, whole):
        one.zero_grad()
        one(**own).loss.backward()
    assert_gradients(model, whole)


def check_replicas():
    whole = tiny_model("llama")
    model, own = nn.parallel.DistributedDataParallel(copy.deepcopy(whole)), part(batch(LENGTHS))
    with capture_grad_norms(whole) as want:
        whole(**own).loss.backward()
    with capture_grad_norms(model) as norms:
        model(**own).loss.backward()
    torch.testing.assert_close(norms.per_sample, want.per_sample)
    for replica, one in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(replica.grad, mean(one.grad.clone()), rtol=1e-4, atol=1e-6)
    with refused(r"norms_only leaves no gradients.*model\.module"), capture_grad_norms(model, norms_only=True):
        pass
    with capture_grad_norms(model.module, norms_only=True) as norms:
        model.module(**own).loss.backward()
    torch.testing.assert_close(norms.per_sample, want.per_sample)


def passes(model, is_shared):
    """A pass over each of three batches, of which a process of several takes its half."""
    rank = dist.get_rank()

    def over(one):
        own = {name: rows[2 * rank :][:2] if is_shared else rows for name, rows in one.items()}

        def run():
            loss = model(**own).loss
            loss.backward()
            return mean(loss.detach()) if is_shared else loss.detach()

        return run

    return [over(batch((6, 6, 6, 6), seed=seed)) for seed in range(3)]


def check_rules(kind):
    model, whole = pair(kind)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    for name in ("align", "panacea"):
        steps = []
        for one, is_shared in ((model, True), (whole, False)):
            first, second, third = passes(one, is_shared)
            if name == "align":
                steps.append(align_step(trained(one), first, second, third, AlignSettings(lambda_refusal=0.3)))
            else:
                steps.append(panacea_step(trained(one), first, second, PanaceaSettings(rho=0.1, lam=0.5)))
        got, want = steps
        if name == "align":
            assert (got.lambda_t, got.cosine) == pytest.approx((want.lambda_t, want.cosine), rel=1e-4, abs=1e-4)
        else:
            assert float(got.moved_loss) == pytest.approx(float(want.moved_loss), rel=1e-5)
            assert got.length == pytest.approx(want.length, rel=1e-5)
        assert Gradients.of(trained(model)).norm() == pytest.approx(Gradients.of(trained(whole)).norm(), rel=1e-4)
        for now, then in zip(model.parameters(), before, strict=True):
            assert torch.equal(now.to_local(), then)
        assert_gradients(model, whole, is_common=True)
        model.zero_grad(), whole.zero_grad()


def check_refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=None)})
    with refused(r"module '0' are DTensors while it runs.*fully_shard"), capture_grad_norms(model, loss="share"):
        model(torch.ones(3, 4))
    assert all(parameter.requires_grad for parameter in model.parameters())
    sharded, whole = pair("lora")
    passes(sharded, True)[0]()
    with refused('space "merged" needs whole'):
        merged_length(trained(sharded), lora_factors(whole), Gradients.of(trained(sharded)), 0.1)
    with refused("is a DTensor, and panacea_perturb moves whole weights"):
        panacea_perturb(sharded, None, direction="random")
    # one process's NaN stops all of them, before anything is moved
    model, _ = pair("llama")
    parameters = trained(model)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    passes(model, True)[0]()
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local().fill_(float("nan"))
    with refused("the gradient to move along is NaN or infinite"), perturbed(parameters, Gradients.of(parameters), 0.1):
        pass
    assert all(torch.equal(now.to_local(), then) for now, then in zip(model.parameters(), before, strict=True))


def reset_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


TRAINERS = {
    "align": (AntibodyAlignTrainer, {"lambda_refusal": 0.3}),
    "antibody": (AntibodyTrainer, {}),
    "antibody over a step": (AntibodyTrainer, {"weights_over": "step", "gradient_accumulation_steps": 4}),
    "antibody and norms": (AntibodyTrainer, {"attenuation": "norm"}),
    "panacea": (PanaceaTrainer, {"rho": 0.1, "lam": 0.5}),
}


TRAINED = {"align": "llama", "antibody": "llama", "antibody over a step": "lora", "antibody and norms": "llama"}


def trainer(kind, model, folder, *, version=None, **options):
    """One of ours on this process; with a version of FSDP accelerate cuts the model, as it would on several GPUs."""
    reset_accelerate()
    made, own = TRAINERS[kind]
    data = {"train_dataset": samples(16)}
    if made is not AntibodyTrainer:
        data["harmful_dataset"] = samples(16, seed=1)
    if made is not PanaceaTrainer:
        data["refusals"] = [[3, 4, 5], [6, 7]]
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"} | own | options
    if version is not None:
        asked = {"version": version, "activation_checkpointing": kind == "panacea"} | options.pop("fsdp_config", {})
        options |= {"fsdp": True, "fsdp_config": asked}
    arguments = config(folder, made.config, **options)
    if version is not None:
        # of several CPUs accelerate makes no FSDP; all that it does for GPUs runs on these all the same
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made(model, arguments, **data)


def shared_folder():
    """A new folder, the same one on both processes."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


def gathered_weights(one):
    return {name: whole(value.detach()).clone() for name, value in one.parameters.items()}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        # sums of other orders in float32, through two steps of AdamW at 1e-2
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def check_trainer(kind, name):
    folder, found, files = shared_folder(), {}, {}
    for version in (None, 2):
        model = tiny_model("llama")
        model = with_lora(model, ["q_proj", "down_proj"]) if name == "lora" else model
        one = trainer(kind, model, folder / str(version), version=version)
        one.train()
        losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
        found[version] = gathered_weights(one), losses
        one.save_model(str(folder / f"saved {version}"))
        one.accelerator.wait_for_everyone()
        (file,) = (folder / f"saved {version}").glob("*.safetensors")
        files[version] = load_file(file)
        assert all(hasattr(parameter, "to_local") == (version == 2) for parameter in one.model.parameters())
    assert_close(found[2][0], found[None][0])
    assert_close(files[2], files[None])
    assert found[2][1] == pytest.approx(found[None][1], rel=1e-4)
    assert len(losses) == 2
    reset_accelerate()


def check_panacea():
    """Its perturbation is an Edit of the whole model, and a run resumed between two steps ends as one that was not stopped."""
    folder = shared_folder()
    replicas = trainer("panacea", tiny_model("llama"), folder / "replicas")
    replicas.train()
    want = gathered_weights(replicas)
    straight = trainer("panacea", tiny_model("llama"), folder / "straight", version=2)
    straight.train()
    straight.save_model(str(folder / "saved"))
    straight.accelerator.wait_for_everyone()
    got = gathered_weights(straight)
    assert_close(got, want)
    assert (straight.edit is None) == (dist.get_rank() == 1)
    if dist.get_rank() == 0:
        model = LlamaForCausalLM.from_pretrained(folder / "saved")
        edit = Edit.load(folder / "straight" / "edit")
        assert edit.tensors.keys() == replicas.edit.tensors.keys()
        edit.revert(model)
        replicas.edit.revert(replicas.model)
        assert_close(dict(model.named_parameters()), dict(replicas.model.named_parameters()))
    dist.barrier()
    # the direction of the last step, which the end of a run needs, comes from the checkpoint
    options = {"version": 2, "save_strategy": "steps", "save_steps": 1}
    stopped = trainer("panacea", tiny_model("llama"), folder / "parts", max_steps=1, **options)
    stopped.train()
    resumed = trainer("panacea", tiny_model("llama"), folder / "parts", **options)
    resumed.train(resume_from_checkpoint=str(folder / "parts" / "checkpoint-1"))
    assert_close(gathered_weights(resumed), got)
    state = torch.load(folder / "parts" / "checkpoint-1" / STATE_FILE, weights_only=True)["kept"]
    again = placed(state, stopped.parameters, torch.device("cpu"))
    assert again["length"] == stopped.kept["length"] == 0.1
    assert again["direction"].keys() == stopped.kept["direction"].keys() == stopped.parameters.keys()
    for name, value in stopped.kept["direction"].items():
        assert state["direction"][name].shape == value.shape
        assert again["direction"][name].placements == value.placements
        assert torch.equal(again["direction"][name].to_local(), value.to_local())
    with refused('space "merged" needs whole LoRA factors'):
        trainer("panacea", with_lora(tiny_model("llama"), ["q_proj"]), folder, version=2, space="merged").train()
    with refused("set cpu_ram_efficient_loading to false"):
        lean = {"cpu_ram_efficient_loading": True}
        trainer("antibody", tiny_model("llama"), folder, version=2, fsdp_config=lean)
    with refused("got a model that is in parts already"):
        trainer("panacea", pair("llama")[0], folder, version=2)
    reset_accelerate()


CHECKS = {
    **{f"norms {kind}": (check_norms, kind) for kind in MODELS},
    "replicas": (check_replicas,),
    **{f"rules {kind}": (check_rules, kind) for kind in ("llama", "lora")},
    "refusals": (check_refusals,),
    **{f"trainer {kind}": (check_trainer, kind, name) for kind, name in TRAINED.items()},
    "panacea": (check_panacea,),
}


def work():
    """Name of each check -> what went wrong on this process; one failure ends the work, for the processes are then out of step."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = dict.fromkeys(CHECKS, "not reached")
    for name, (check, *arguments) in CHECKS.items():
        try:
            check(*arguments)
        except Exception:
            found[name] = traceback.format_exc()
            break
        found[name] = ""
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("fsdp"), "import test_fsdp as t; found = t.work()")


@pytest.mark.parametrize("kind", MODELS)
def test_norms_and_gradients_of_a_sharded_model_are_those_of_the_whole_one(found, kind):
    assert [one[f"norms {kind}"] for one in found] == ["", ""]


def test_norms_and_gradients_under_distributed_data_parallel(found):
    assert [one["replicas"] for one in found] == ["", ""]


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_rules_on_a_sharded_model_take_the_step_of_one_process_and_restore_every_bit(found, kind):
    assert [one[f"rules {kind}"] for one in found] == ["", ""]


def test_what_cannot_be_sharded_is_refused_and_changes_nothing(found):
    assert [one["refusals"] for one in found] == ["", ""]


@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_that_accelerate_cuts_is_trained_and_saved_as_replicas_are(found, kind):
    assert [one[f"trainer {kind}"] for one in found] == ["", ""]


def test_panacea_perturbs_and_resumes_under_fsdp2_and_refuses_what_it_does_not_know(found):
    assert [one["panacea"] for one in found] == ["", ""]


@pytest.mark.parametrize(
    ("made", "asked", "version", "message"),
    [
        (DefenceTrainer, "is_fsdp_enabled", 2, r"not been tried under FSDP.*hftcore\.defenses"),
        (AntibodyAlignTrainer, "is_fsdp_enabled", 1, r"under FSDP2, not FSDP's version 1"),
        (AntibodyAlignTrainer, "is_deepspeed_enabled", None, "not DeepSpeed"),
    ],
)
def test_trainers_refuse_what_was_never_tried_and_name_what_works(tmp_path, monkeypatch, made, asked, version, message):
    data = {"harmful_dataset": samples(4), "refusals": [[3]]} if made is AntibodyAlignTrainer else {}
    one = made(tiny_model("llama"), config(tmp_path, made.config), **data)
    setattr(one, asked, True)
    monkeypatch.setattr(one.accelerator, "state", SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version)))
    with pytest.raises(HftcoreError, match=message):
        one._refuse_unsupported()
