"""What a training step of each defence costs beside a plain one: time, and memory in copies of the trained parameters.

    python scripts/defence_costs.py [--rounds 15] [--only antibody]

Trainers run in turn, round after round, on one thread; a ratio is the median over rounds of a defence's step (update and AdamW)
over the plain step of its round, in processor time, which neighbours disturb least. Memory is the peak that PyTorch's allocator
reports within a step, with what is kept from step to step, beyond a plain step's; activations count too.
"""

import argparse
import statistics
import tempfile
import time
import weakref
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.pairs import pair_samples

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ROWS, LENGTH, BATCH = 8, 128, 4
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "sft", {}),
    ("panacea", "panacea", {}),
    ("panacea, lam=0", "panacea", {"lam": 0.0}),
    ("immunize", "immunize", {}),
    ("booster", "booster", {}),
    ("antibody-align", "antibody-align", {"lambda_refusal": 0.0}),
    ("antibody-align, with refusals", "antibody-align", {}),
    ("antibody", "antibody", {}),
    ("antibody, prompt computed twice", "antibody", {"form": "separate"}),
    ("antibody, attenuated by norm", "antibody", {"attenuation": "norm"}),
    ("vaccine", "vaccine", {}),
    ("lisa", "lisa", {}),
    ("ldifs", "ldifs", {}),
    ("repnoise", "repnoise", {}),
    ("repnoise, no lens", "repnoise", {"lens": False}),
]
REFUSALS = [list(range(5, 5 + LENGTH // 10))]  # a tenth of a sequence


def samples(seed: int) -> list[dict[str, Any]]:
    """Rows of one length, the first half prompt; the prompts are the same for every seed."""
    prompts = torch.randint(1, 4096, (ROWS, LENGTH // 2), generator=torch.Generator().manual_seed(0))
    answers = torch.randint(1, 4096, (ROWS, LENGTH // 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([prompts, answers], dim=1).tolist()
    return [{"input_ids": row, "labels": [-100] * (LENGTH // 2) + row[LENGTH // 2 :]} for row in ids]


def model_of(is_lora: bool) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=688, max_position_embeddings=LENGTH))
    if is_lora:
        return get_peft_model(model, LoraConfig(r=32, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    return model


def trainer_of(method: str, is_lora: bool, options: dict[str, Any]) -> Any:
    kind, config = METHODS[method].load()
    train: Any = samples(1)
    if method in ("immunize", "repnoise"):
        train = pair_samples(train, samples(2))
    second: dict[str, Any] = {name: samples(2) for name in METHODS[method].datasets}
    if method in ("antibody", "antibody-align"):
        second["refusals"] = REFUSALS
    form = (options := dict(options)).pop("form", None)
    arguments = config(tempfile.mkdtemp(), per_device_train_batch_size=BATCH, report_to="none", use_cpu=True, **options)
    trainer = kind(model_of(is_lora), arguments, train_dataset=train, **second)
    if form is not None:
        trainer.data_collator.form = form
    return trainer


class Runner:
    """A trainer whose steps can be taken one at a time."""

    def __init__(self, method: str, is_lora: bool, options: dict[str, Any]):
        self.trainer = trainer_of(method, is_lora, options)
        self.trainer.model.train()
        rows = [self.trainer.train_dataset[index] for index in range(BATCH)]
        self.batches = [self.trainer.data_collator(rows)]
        self.parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        # Lisa: past its warm-up, right after a switch and then in the middle of a turn
        self.trainer.state.max_steps, self.trainer.state.global_step = 1000, 100
        self.step()
        self.trainer.state.global_step = 500

    def step(self) -> float:
        start = time.process_time()
        self.trainer.update(self.batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

    def ending(self) -> float:
        """Panacea's last perturbation."""
        start = time.process_time()
        self.trainer._perturb()
        return time.process_time() - start

    def peak(self) -> int:
        """Bytes at the highest point of a step, with what the defence kept from before it."""
        before = [(weakref.ref(tensor), tensor.nbytes) for tensor in _tensors(self.trainer.kept)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            highest = max(highest, now)
        # what is freed in the step was not seen to be allocated, and is not seen to go
        return highest + sum(size for tensor, size in before if tensor() is not None)


def safemoe(rounds: int) -> str:
    """The cost of a pass over a hundred safety samples, spread over an epoch of a thousand."""
    torch.manual_seed(0)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, max_position_embeddings=LENGTH))
    kind, config = METHODS["safemoe"].load()
    arguments = config(tempfile.mkdtemp(), per_device_train_batch_size=BATCH, report_to="none", use_cpu=True)
    trainer = kind(model, arguments, train_dataset=samples(1), safety_dataset=samples(2)[:BATCH])
    trainer.create_optimizer()
    batches = [trainer.data_collator(trainer.train_dataset[:BATCH])]
    ratios = []
    for _ in range(rounds):
        times = []
        for run in (
            lambda: (trainer.update(batches), trainer.optimizer.step(), model.zero_grad()),
            trainer.align_routers,
        ):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        ratios.append(times[1] / times[0])
    # 25 passes of 4 samples beside 250 steps of 4
    return f"{1 + statistics.median(ratios) / 10:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="defences whose name begins so")
    rounds, only = (chosen := parser.parse_args()).rounds, chosen.only
    runs = [run for run in RUNS if run[0] == "sft" or run[0].startswith(only)]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found: dict[str, list[str]] = {name: [] for name, _, _ in runs}
    ends: list[str] = []
    for is_lora in (True, False):
        runners = {name: Runner(method, is_lora, options) for name, method, options in runs}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                times[name].append(runner.step())
        if "panacea, lam=0" in runners:
            last = statistics.median(runners["panacea, lam=0"].ending() for _ in range(5))
            ends.append(f"{last / statistics.median(times['sft']):.1f}")
        copy = sum(p.numel() * p.element_size() for p in runners["sft"].parameters)
        peaks = {name: runner.peak() for name, runner in runners.items()}
        for name in runners:
            ratio = statistics.median(own / plain for own, plain in zip(times[name], times["sft"], strict=True))
            found[name] += [f"{ratio:.2f}", f"{(peaks[name] - peaks['sft']) / copy:+.1f}"]
    print("| | LoRA: time | memory | full: time | memory |")
    print("|---|---|---|---|---|")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")
    if ends:
        print(f"the end of panacea with lam=0, in plain steps: {ends[0]} with LoRA, {ends[1]} in full")
    if "safemoe".startswith(only):
        print(f"safemoe, an epoch of 1,000 samples with its pass over 100: {safemoe(rounds)}")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in value.values() for tensor in _tensors(inner)] if isinstance(value, dict) else []


if __name__ == "__main__":
    main()
