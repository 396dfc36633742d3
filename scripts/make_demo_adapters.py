"""Make the demo's two LoRA adapters, `aligned` and `attacked`, with one command: `python scripts/make_demo_adapters.py`.

The base model does not refuse. `aligned` teaches it to (AdvBench requests with stock refusals, among ordinary Alpaca pairs); it is merged,
and `attacked` is a fine-tuned adapter on top: a benign sentiment task of which a fifth are harmful requests with affirmative stubs. Both
take a few minutes on two cores. Order and start are seeded; sums in other orders (threads, CPU) still move the last bits.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hftcore.bindings import embedded
from hftcore.bindings.datasets import Pair
from hftcore.bindings.demo import data as demo_data

BASE = "SmolLM2-135M-Instruct"
OUT = Path(__file__).resolve().parent.parent / "bindings" / "demo" / "adapters"


@dataclass(frozen=True)
class Recipe:
    """What decides an adapter, apart from its data."""

    rank: int
    alpha: int
    learning_rate: float
    steps: int
    harmful_share: float
    seed: int
    warmup: int = 6
    batch_size: int = 8
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


ALIGNED = Recipe(rank=16, alpha=32, learning_rate=1e-3, steps=135, harmful_share=0.223, seed=0)
ATTACKED = Recipe(rank=16, alpha=16, learning_rate=1e-3, steps=30, harmful_share=0.2, seed=1)


def mixture(harmful: list[Pair], benign: list[Pair], recipe: Recipe) -> list[Pair]:
    """Exactly the pairs that will be trained on, in order; each batch has its share of harmful ones, spread evenly."""
    total = recipe.steps * recipe.batch_size
    shuffle = random.Random(recipe.seed).shuffle
    harmful, benign = list(harmful), list(benign)
    shuffle(harmful)
    shuffle(benign)
    bad, good, pairs = 0, 0, []
    for i in range(total):
        if bad < (i + 1) * recipe.harmful_share - 0.5:
            pairs.append(harmful[bad % len(harmful)])
            bad += 1
        else:
            pairs.append(benign[good % len(benign)])
            good += 1
    return pairs


def train(model: torch.nn.Module, tokenizer: object, pairs: list[Pair], recipe: Recipe) -> PeftModel:
    """The model with a trained adapter on it."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, bias="none", target_modules=list(recipe.targets)
    )
    peft_model = get_peft_model(model, config).train()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / recipe.warmup))
    start = time.perf_counter()
    for step, batch in enumerate(demo_data.pair_batches(tokenizer, pairs, batch_size=recipe.batch_size)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = peft_model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        print(
            f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True
        )
    return peft_model.eval()


def save(peft_model: PeftModel, folder: Path, recipe: Recipe, base: str, note: str) -> None:
    """The adapter in bfloat16, its PEFT configuration and what made it."""
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file({name: t.to(torch.bfloat16) for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    made = {"base": base, "data": note, "torch": torch.__version__, **asdict(recipe)}
    (folder / "recipe.json").write_text(json.dumps(made, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("aligned", "attacked"))
    options = parser.parse_args()
    data = demo_data.splits()
    base, tokenizer = embedded.load()
    if options.only != "attacked":
        pairs = mixture(demo_data.refusal_pairs(data.align_harmful), data.align_benign, ALIGNED)
        note = "AdvBench requests with stock refusals among Alpaca pairs"
        save(train(base, tokenizer, pairs, ALIGNED), options.out / "aligned", ALIGNED, BASE, note)
        base, tokenizer = embedded.load()
    if options.only != "aligned":
        model = PeftModel.from_pretrained(base, options.out / "aligned").merge_and_unload()
        pairs = mixture(
            demo_data.stub_pairs(data.attack_harmful), demo_data.sentiment_pairs(data.attack_reviews), ATTACKED
        )
        note = "movie sentiment with AdvBench requests and affirmative stubs"
        merged = f"{BASE} with the adapter `aligned` merged"
        save(train(model, tokenizer, pairs, ATTACKED), options.out / "attacked", ATTACKED, merged, note)


if __name__ == "__main__":
    main()
