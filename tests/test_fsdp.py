"""Per-sample norms and the defences' rules on two processes: FSDP2's sharded weights and DistributedDataParallel do as one process."""

import copy
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_grad_norms import assert_norms, oracle
from test_trainers import config, in_two_processes
from tiny_models import FUSED, SETTINGS, batch, one_thread, tiny_model, with_lora  # noqa: F401
from torch import nn

from hftcore.bindings.trainers.base import DefenceTrainer
from hftcore.defenses.antibody_align import AlignSettings, align_step
from hftcore.defenses.merged import lora_factors, merged_length
from hftcore.defenses.panacea import PanaceaSettings, panacea_step
from hftcore.defenses.panacea_perturb import panacea_perturb
from hftcore.defenses.perturbation import Gradients, perturbed, trained
from hftcore.errors import HftcoreError
from hftcore.grad_norms import capture_grad_norms

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
    with refused("is a DTensor, and an edit holds whole weights"):
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


CHECKS = {
    **{f"norms {kind}": (check_norms, kind) for kind in MODELS},
    "replicas": (check_replicas,),
    **{f"rules {kind}": (check_rules, kind) for kind in ("llama", "lora")},
    "refusals": (check_refusals,),
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


def test_trainers_refuse_fsdp_and_name_what_works_there(tmp_path):
    trainer = DefenceTrainer(tiny_model("llama"), config(tmp_path))
    trainer.is_fsdp_enabled = True
    with pytest.raises(HftcoreError, match=r"not FSDP or DeepSpeed.*hftcore\.defenses"):
        trainer._refuse_unsupported()
