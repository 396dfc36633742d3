"""Training steps of the defences: what each costs beside a plain one of the same batch, in time and in copies of the trained weights."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hftcore.bench.job import Job, UnavailableError, shape_of
from hftcore.bench.models import model_of
from hftcore.bindings.recipe import PAPERS_LORA
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.pairs import pair_samples
from hftcore.edit import Edit

SFT_STEP = "one plain SFT step"


@dataclass(frozen=True)
class Defence:
    """A trainer's step, with the update of AdamW.

    Fields:
        method: a name out of `METHODS`.
        options: of its configuration where they are not the defaults.
        ending: whether what comes once, after the last step, is measured instead of a step.
        lora: whether LoRA factors are trained, the papers' rank and targets, in place of all weights; of the plain step too.
        most: times a plain step, at most; None where nothing is promised.
    """

    about: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ending: bool = False
    lora: bool = False
    most: float | None = None


_FULL = {
    "panacea": Defence("Panacea", "panacea", most=3.1),
    "panacea lam=0": Defence("Panacea with lam=0", "panacea", {"lam": 0.0}, most=1.02),
    # 2 % of a hundred steps
    "panacea lam=0, the end": Defence("Panacea's perturbation", "panacea", {"lam": 0.0}, ending=True, most=2.0),
    "immunize": Defence("the immunization loss", "immunize", most=2.1),
    "booster": Defence("Booster", "booster", most=3.1),
    "vaccine": Defence("Vaccine", "vaccine", most=2.1),
    "lisa": Defence("Lisa in the middle of a turn", "lisa", most=1.05),
    "ldifs": Defence("LDIFS", "ldifs", most=1.4),
    "ldifs, cached": Defence(
        "LDIFS with the features of samples that come again", "ldifs", {"cache_gb": 1.0}, most=1.4
    ),
    "repnoise": Defence("RepNoise", "repnoise"),
    "repnoise, no lens": Defence("RepNoise without the losses read off hidden states", "repnoise", {"lens": False}),
    "antibody-align": Defence("Antibody's alignment", "antibody-align", most=4.2),
    "antibody": Defence("Antibody's fine-tuning, refusals of a tenth of the sequence", "antibody", most=1.15),
    "antibody, attenuated": Defence("Antibody's fine-tuning, attenuated by norm", "antibody", {"attenuation": "norm"}),
}
# the same costs on LoRA factors, or nearly
_ONCE = ("panacea lam=0", "panacea lam=0, the end", "repnoise, no lens", "antibody, attenuated")
DEFENCES = _FULL | {
    f"LoRA {name}": replace(defence, about=f"{defence.about}, LoRA factors", lora=True)
    for name, defence in _FULL.items()
    if name not in _ONCE
}


def defence_job(defence: Defence) -> Callable[[str, torch.dtype, torch.device], Job]:
    """Prepares a step of a randomly initialised Llama; half of each sample is prompt."""

    def prepare(shape: str, dtype: torch.dtype, device: torch.device) -> Job:
        ours, plain = (_Runner(one, shape, dtype, device) for one in (defence, Defence("", "sft", lora=defence.lora)))

        def close() -> None:
            for runner in (ours, plain):
                runner.folder.cleanup()

        return Job(
            ours.ending if defence.ending else ours.step,
            {},
            restore=ours.undo,
            agrees=lambda mine, theirs: True,
            answer=lambda loss: loss,
            check=_check_loss,
            ceilings={SFT_STEP: plain.step},
            is_long=shape != "tiny-llama",
            rounds=5,
            holds_memory=True,
            close=close,
        )

    return prepare


class _Runner:
    """A trainer whose steps are taken one at a time, on the same batch."""

    def __init__(self, defence: Defence, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        samples, length = shape_of(shape, dtype)
        model: Any = model_of(shape, dtype, device)
        if defence.lora:
            model = _with_lora(model)
        self.folder = tempfile.TemporaryDirectory()
        kind, config = METHODS[defence.method].load()
        train: Any = _rows(model, samples, length, 1)
        if defence.method in ("immunize", "repnoise"):
            train = pair_samples(train, _rows(model, samples, length, 2))
        second: dict[str, Any] = {name: _rows(model, samples, length, 2) for name in METHODS[defence.method].datasets}
        if defence.method.startswith("antibody"):
            second["refusals"] = [list(range(5, 5 + max(1, length // 10)))]
        arguments = config(
            self.folder.name,
            per_device_train_batch_size=samples,
            report_to="none",
            use_cpu=device.type == "cpu",
            **defence.options,
        )
        self._trainer = kind(model, arguments, train_dataset=train, **second)
        self._trainer.model.train()
        rows = [self._trainer.train_dataset[index] for index in range(samples)]
        self._batches = [self._trainer._prepare_inputs(self._trainer.data_collator(rows))]
        self._edits: list[Edit] = []
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        # past every warm-up: Lisa's first turn, and memory that is taken once
        self._trainer.state.max_steps, self._trainer.state.global_step = 1000, 100
        self.step()
        self._trainer.state.global_step = 500

    def step(self) -> torch.Tensor:
        loss = self._trainer.update(self._batches)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def ending(self) -> torch.Tensor:
        self._edits.append(self._trainer._perturb())
        return torch.zeros(())

    def undo(self) -> None:
        while self._edits:
            self._edits.pop().revert(self._trainer.model)


def _with_lora(model: Any) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnavailableError('PEFT is not installed; run: pip install "hftcore[peft]"') from None
    settings: dict[str, Any] = dict(PAPERS_LORA)
    return get_peft_model(model, LoraConfig(**settings))


def _check_loss(loss: torch.Tensor) -> None:
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss must be finite, got {float(loss)}")


def _rows(model: Any, samples: int, length: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one length, the first half prompt; the prompts are the same for every seed."""
    vocabulary = model.config.vocab_size
    prompts = torch.randint(1, vocabulary, (samples, length // 2), generator=torch.Generator().manual_seed(0))
    answers = torch.randint(1, vocabulary, (samples, length // 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([prompts, answers], dim=1).tolist()
    return [{"input_ids": row, "labels": [-100] * (length // 2) + row[length // 2 :]} for row in ids]
