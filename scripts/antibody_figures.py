"""Figures 2 and 4 of Antibody (arXiv:2603.00498) on a small real model: `python scripts/antibody_figures.py`.

SmolLM2-135M-Instruct with the shipped `aligned` adapter merged is aligned further with a fresh LoRA, by plain SFT and by Antibody's
alignment. Figure 4: norms of each sample's gradient over the LoRA at the start of fine-tuning. Figure 2: r = log π(y|x) − log π(refusal|x)
before and after fine-tuning on a benign task of which a fifth are harmful requests: plainly, and with Antibody's weights. Answers to
harmful requests are affirmative stubs. Every seed draws its own start and order. Writes `antibody_figures.md` and two PNGs in `figures/`.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hftcore.bindings import embedded
from hftcore.bindings.datasets import Pair
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.demo.run import ADAPTERS
from hftcore.bindings.gradnorms import separation
from hftcore.bindings.histograms import draw_histograms
from hftcore.bindings.refusals import REFUSALS
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.likelihood import Likelihoods, following
from hftcore.defenses.antibody import log_ratios
from hftcore.grad_norms import capture_grad_norms

DOCS = Path(__file__).resolve().parent.parent / "docs"
ARMS = {"SFT": ("sft", "sft"), "Antibody": ("antibody-align", "antibody")}
MAX_TOKENS = 96
LONGEST = 200  # characters of a prompt, for its answer to be within MAX_TOKENS
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj"]
LEARNING_RATE = 5e-4
HARMFUL_SHARE = 5  # every so-manieth sample of the fine-tuning set is harmful

Values = dict[str, list[float]]


def rows(tokenizer: Any, pairs: list[Pair]) -> list[dict[str, torch.Tensor]]:
    """One sample for each pair, without a batch axis."""
    batches = demo_data.pair_batches(tokenizer, pairs, batch_size=1, max_tokens=MAX_TOKENS)
    return [{name: value[0] for name, value in batch.items()} for batch in batches]


def short(pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if len(pair.prompt) <= LONGEST]


def interleaved(harmful: list[Pair], benign: list[Pair], every: int, seed: int) -> list[Pair]:
    """As many as `benign` allows, every so-manieth a harmful one, both shuffled."""
    draw = random.Random(seed)
    harmful, benign = draw.sample(harmful, len(harmful)), draw.sample(benign, len(benign))
    mixed = []
    for index in range(len(benign)):
        if index % (every - 1) == 0:
            mixed.append(harmful[index // (every - 1) % len(harmful)])
        mixed.append(benign[index])
    return mixed


def train(
    method: str, model: Any, tokenizer: Any, data: dict[str, list[Pair]], steps: int, size: int, seed: int
) -> None:
    """`steps` steps of a method on the pairs of `data`, each under the name of the trainer's argument."""
    trainer_class, config_class = METHODS[method].load()
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            bf16=True,
            use_cpu=True,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        sets = {
            name: rows(tokenizer, pairs)
            for name, pairs in data.items()
            if name == "train_dataset" or name in METHODS[method].datasets
        }
        trainer_class(model=model, args=config, processing_class=tokenizer, **sets).train()
    model.eval()


def norms(model: Any, tokenizer: Any, pairs: list[Pair]) -> list[float]:
    """Of each pair's own gradient of its mean loss, over the LoRA."""
    found: list[float] = []
    for batch in demo_data.pair_batches(tokenizer, pairs, max_tokens=MAX_TOKENS):
        with capture_grad_norms(model, norms_only=True) as captured:
            model(**batch, use_cache=False).loss.backward()
        found += captured.per_sample.tolist()
    return found


def ratios(model: Any, tokenizer: Any, pairs: list[Pair]) -> list[float]:
    """r of each pair, of means over tokens as in the published code, refusals taken in turn."""
    refused = [Pair(pair.prompt, REFUSALS[index % len(REFUSALS)]) for index, pair in enumerate(pairs)]
    likelihoods = Likelihoods(model)
    found: list[float] = []
    with torch.no_grad():
        both = (demo_data.pair_batches(tokenizer, side, max_tokens=2 * MAX_TOKENS) for side in (pairs, refused))
        for answered, refusing in zip(*both, strict=True):
            (own,) = likelihoods.logprobs(model, answered, following(answered["labels"]))
            (other,) = likelihoods.logprobs(model, refusing, following(refusing["labels"]))
            found += log_ratios(*own, *other).tolist()
    return found


def run(seed: int, align_steps: int, tune_steps: int, samples: int) -> dict[str, dict[str, Values]]:
    """Arm -> what -> group -> values, for one seed."""
    splits = demo_data.splits()
    draw = random.Random(seed)
    requests = demo_data.stub_pairs(splits.attack_harmful)
    harmful = draw.sample(requests, samples)
    reviews = short(demo_data.sentiment_pairs(splits.attack_reviews))
    benign = draw.sample(reviews, samples)
    safe = demo_data.refusal_pairs(splits.align_harmful)
    align = {
        "train_dataset": interleaved(safe, short(splits.align_benign)[: len(safe)], 2, seed),
        "harmful_dataset": demo_data.stub_pairs(splits.align_harmful),
    }
    tune = {"train_dataset": interleaved(requests, reviews, HARMFUL_SHARE, seed)}
    found: dict[str, dict[str, Values]] = {}
    for arm, (first, second) in ARMS.items():
        base, tokenizer = embedded.load()
        merged = PeftModel.from_pretrained(base, ADAPTERS / "aligned").merge_and_unload()
        torch.manual_seed(seed)
        model = get_peft_model(merged, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
        start = time.perf_counter()
        train(first, model, tokenizer, align, align_steps, 4, seed)
        groups = {"benign": benign, "harmful": harmful}
        found[arm] = {
            "norms": {name: norms(model, tokenizer, pairs) for name, pairs in groups.items()},
            "before": {name: ratios(model, tokenizer, pairs) for name, pairs in groups.items()},
        }
        train(second, model, tokenizer, tune, tune_steps, 8, seed)
        found[arm]["after"] = {name: ratios(model, tokenizer, pairs) for name, pairs in groups.items()}
        print(f"seed {seed} {arm}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def together(results: dict[str, Any], arm: str, what: str) -> Values:
    return {
        group: [value for one in results.values() for value in one[arm][what][group]] for group in ("benign", "harmful")
    }


def spread(numbers: list[float]) -> str:
    """Mean over seeds, and each of them."""
    return f"{statistics.fmean(numbers):.2f} ({', '.join(f'{number:.2f}' for number in numbers)})"


def line(results: dict[str, Any], arm: str, what: str) -> str:
    each = [one[arm][what] for one in results.values()]
    medians = [spread([statistics.median(one[group]) for one in each]) for group in ("benign", "harmful")]
    apart = spread([separation(one["benign"], one["harmful"]) for one in each])
    return f"| {arm} | {medians[0]} | {medians[1]} | {apart} |"


def write(results: dict[str, Any], settings: dict[str, int], docs: Path) -> None:
    """The two pictures and the page with the numbers."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    draw_histograms(
        {f"aligned by {arm}": together(results, arm, "norms") for arm in ARMS},
        "gradient norm of a sample's mean loss over the LoRA, at the start of fine-tuning",
        docs / "figures" / "antibody_gradient_norms.png",
    )
    draw_histograms(
        {f"{arm}, {what} fine-tuning": together(results, arm, what) for arm in ARMS for what in ("before", "after")},
        "r = log π(y|x) − log π(refusal|x), means over tokens, nats",
        docs / "figures" / "antibody_ratios.png",
    )
    head = "| | benign | harmful | larger for harmful |\n|---|---|---|---|\n"
    tables = {what: head + "\n".join(line(results, arm, what) for arm in ARMS) for what in ("norms", "before", "after")}
    page = f"""# Antibody's figures 2 and 4 on a small model

Made by `scripts/antibody_figures.py`; nothing below is typed by hand. SmolLM2-135M-Instruct with the shipped `aligned` adapter merged,
then a fresh LoRA (rank {RANK}, {", ".join(TARGETS)}) aligned for {settings["align_steps"]} further steps of 4 samples, plainly (SFT) or
by `AntibodyAlignTrainer` with its defaults; fine-tuned for {settings["tune_steps"]} steps of 8 samples on movie sentiment, one in
{HARMFUL_SHARE} a harmful request, plainly or by `AntibodyTrainer`. Learning rate {LEARNING_RATE:g}, seeds {", ".join(results)};
{settings["samples"]} benign and {settings["samples"]} harmful samples each. Harmful answers are affirmative stubs that echo the request,
far shorter and plainer than what the paper fine-tunes on, and the model is fifty times smaller; so this checks the machinery and the
direction of the effects, not the paper's numbers. Benign answers are one word, so the gradients of their mean loss are long: compare a
group between the two alignments, not the groups within one. Fewer than three seeds tell nothing about the spread.

Entries are medians over samples: mean over seeds, and each seed in brackets. *Larger for harmful* is the probability that of a random pair
the harmful sample has the larger value; 0.50 tells nothing apart.

## Norms of per-sample gradients at the start of fine-tuning (figure 4)

{tables["norms"]}

![histograms](figures/antibody_gradient_norms.png)

## r before fine-tuning (figure 2)

{tables["before"]}

## r after fine-tuning

{tables["after"]}

![histograms](figures/antibody_ratios.png)
"""
    (docs / "antibody_figures.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--align-steps", type=int, default=16)
    parser.add_argument("--tune-steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=24, help="benign ones and harmful ones")
    parser.add_argument("--results", type=Path, help="file of finished seeds; those in it are not run again")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    settings = {"align_steps": options.align_steps, "tune_steps": options.tune_steps, "samples": options.samples}
    known = options.results is not None and options.results.is_file()
    results = json.loads(options.results.read_text(encoding="utf-8")) if known else {}
    for seed in options.seeds:
        if str(seed) not in results:
            results[str(seed)] = run(seed, **settings)
            if options.results is not None:
                options.results.write_text(json.dumps(results), encoding="utf-8")
    write(results, settings, options.docs)


if __name__ == "__main__":
    main()
