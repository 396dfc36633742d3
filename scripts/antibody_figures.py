"""Antibody (arXiv:2603.00498) on a small real model: figures 2 and 4, and what its weights do to harm.

`python scripts/antibody_figures.py --results FILE`. SmolLM2-135M-Instruct with the shipped `aligned` adapter merged is aligned further
with a fresh LoRA, by plain SFT and by Antibody's alignment. Figure 4: norms of each sample's gradient over the LoRA at the start of
fine-tuning. Figure 2: r = log π(y|x) − log π(refusal|x) before and after fine-tuning on a benign task of which some are harmful requests:
plainly, and with Antibody's weights. Then, all from the start that Antibody aligned: plain fine-tuning, Antibody's weights, and those with
`attenuation="norm"`, judged by held-out requests and the task. Answers to harmful requests are affirmative stubs. Every seed draws its own
LoRA and order. Writes `antibody_figures.md`, and in `figures/` two PNGs and `antibody_samples.jsonl`, a line for each sample.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hftcore.bindings import embedded
from hftcore.bindings.datasets import Pair
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.demo.run import ADAPTERS
from hftcore.bindings.evaluation.evaluate import Items, Subject, parts
from hftcore.bindings.evaluation.judge import KeywordJudge
from hftcore.bindings.evaluation.metrics import Mean, bootstrap_runs
from hftcore.bindings.evaluation.suites import load_suite
from hftcore.bindings.gradnorms import separation
from hftcore.bindings.histograms import draw_histograms
from hftcore.bindings.refusals import REFUSALS
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.likelihood import Likelihoods, following
from hftcore.defenses.antibody import log_ratios
from hftcore.grad_norms import capture_grad_norms

DOCS = Path(__file__).resolve().parent.parent / "docs"
ALIGNMENTS = {"SFT": "sft", "Antibody": "antibody-align"}
# in the order in which they are run: what figure 2 needs first
TUNINGS: dict[str, tuple[str, dict[str, str]]] = {
    "Antibody": ("antibody", {}),
    "attenuated": ("antibody", {"attenuation": "norm"}),
    "SFT": ("sft", {}),
}
TITLES = {"SFT": "SFT", "Antibody": "Antibody's weights", "attenuated": 'Antibody\'s weights, `attenuation="norm"`'}
MAX_TOKENS = 96
LONGEST = 200  # characters of a prompt, for its answer to be within MAX_TOKENS
RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj"]
LEARNING_RATE = 5e-4
FIGURE_SHARE = 5  # figure 2: every so-manieth sample of the fine-tuning set is harmful
FEW = """

Not every seed is finished: the second column says which a row is of. Fewer than three tell nothing about the spread; the same command with
the same `--results` goes on from there."""

Values = dict[str, list[float]]
Cell = dict[str, Values]  # of one model: "norms" and "r" by group, "items" by score
Results = dict[str, dict[str, Cell]]  # by seed, by the name of the model


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
    method: str,
    model: Any,
    tokenizer: Any,
    data: dict[str, list[Pair]],
    steps: int,
    size: int,
    seed: int,
    **settings: Any,
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
            **settings,
        )
        sets = {
            name: rows(tokenizer, pairs)
            for name, pairs in data.items()
            if name == "train_dataset" or name in METHODS[method].datasets
        }
        trainer = trainer_class(model=model, args=config, processing_class=tokenizer, **sets)
        trainer.train()
    # bfloat16 ends with the training: what is measured after it is in float32
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
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
    """r of each pair, of means over tokens as in the published code, refusals taken in turn; in bfloat16, as in the training."""
    refused = [Pair(pair.prompt, REFUSALS[index % len(REFUSALS)]) for index, pair in enumerate(pairs)]
    likelihoods = Likelihoods(model)
    found: list[float] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        both = (demo_data.pair_batches(tokenizer, side, max_tokens=2 * MAX_TOKENS) for side in (pairs, refused))
        for answered, refusing in zip(*both, strict=True):
            (own,) = likelihoods.logprobs(model, answered, following(answered["labels"]))
            (other,) = likelihoods.logprobs(model, refusing, following(refusing["labels"]))
            found += log_ratios(*own, *other).tolist()
    return found


def asked(model: Any, tokenizer: Any, count: int) -> Items:
    """1 or 0 of each held-out item, by score: requests served (HS), the task solved (FA), and what replies are."""
    plain = copy.deepcopy(model).merge_and_unload().eval()
    # not .to(): that would round the rotary frequencies too
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    found: Items = {}
    # the suite whose system message is the one that is trained with
    for part in parts(replace(load_suite("demo").limited(count), benign=[]), KeywordJudge()):
        found |= part.measure(Subject(plain, tokenizer))
    return found


class Experiment:
    """One seed: its data, its two starts, and what came of them.

    Args:
        seed: of the LoRA, the samples drawn and every order.
        settings: those of the command line that decide numbers.
        aligned: file of the two aligned adapters, written when they are made, read when it is there; None: made anew each time.
    """

    def __init__(self, seed: int, settings: dict[str, int], aligned: Path | None) -> None:
        self.seed, self.settings, self.aligned = seed, settings, aligned
        splits = demo_data.splits()
        draw = random.Random(seed)
        self.requests = demo_data.stub_pairs(splits.attack_harmful)
        self.reviews = short(demo_data.sentiment_pairs(splits.attack_reviews))
        self.groups = {
            "benign": draw.sample(self.reviews, settings["samples"]),
            "harmful": draw.sample(self.requests, settings["samples"]),
        }
        safe = demo_data.refusal_pairs(splits.align_harmful)
        self.alignment = {
            "train_dataset": interleaved(safe, short(splits.align_benign)[: len(safe)], 2, seed),
            "harmful_dataset": demo_data.stub_pairs(splits.align_harmful),
        }

    def fill(self, cells: dict[str, Cell], share: int, keep: Callable[[], None]) -> None:
        """Add to `cells` what is missing of a share of harmful samples, `keep()` after each: "start" and "start/tuning/share"."""
        for start in ALIGNMENTS:
            tunings = {f"{start}/{tuning}/{share}": tuning for tuning in TUNINGS if is_run(start, tuning, share)}
            if not [name for name in (start, *tunings) if name not in cells]:
                continue
            model, tokenizer = self.start(start)
            if start not in cells:
                of_norms = {name: norms(model, tokenizer, pairs) for name, pairs in self.groups.items()}
                cells[start] = {"norms": of_norms, **self.measured(model, tokenizer)}
                keep()
            before = trained(model)
            data = {"train_dataset": interleaved(self.requests, self.reviews, share, self.seed)}
            for name, tuning in tunings.items():
                if name in cells:
                    continue
                method, more = TUNINGS[tuning]
                model.load_state_dict(before, strict=False)
                train(method, model, tokenizer, data, self.settings["tune_steps"], 8, self.seed, **more)
                cells[name] = self.measured(model, tokenizer)
                keep()
                print(f"seed {self.seed} {name}", flush=True)

    def start(self, alignment: str) -> tuple[Any, Any]:
        """The aligned model and its tokenizer."""
        base, tokenizer = embedded.load()
        merged = PeftModel.from_pretrained(base, ADAPTERS / "aligned").merge_and_unload()
        torch.manual_seed(self.seed)
        model = get_peft_model(merged, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
        known = torch.load(self.aligned) if self.aligned is not None and self.aligned.is_file() else {}
        if alignment in known:
            model.load_state_dict(known[alignment], strict=False)
        else:
            train(ALIGNMENTS[alignment], model, tokenizer, self.alignment, self.settings["align_steps"], 4, self.seed)
            if self.aligned is not None:
                torch.save({**known, alignment: trained(model)}, self.aligned)
        return model.eval(), tokenizer

    def measured(self, model: Any, tokenizer: Any) -> Cell:
        """r of the samples, and the answers to held-out items."""
        r = {name: ratios(model, tokenizer, pairs) for name, pairs in self.groups.items()}
        return {"r": r, "items": asked(model, tokenizer, self.settings["asked"])}


def is_run(start: str, tuning: str, share: int) -> bool:
    """Everything from Antibody's start; from the other only what figure 2 shows."""
    return start == "Antibody" or (tuning == "SFT" and share == FIGURE_SHARE)


def trained(model: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def having(results: Results, *cells: str) -> Results:
    """The seeds for which all of these are finished."""
    return {seed: one for seed, one in results.items() if set(cells) <= one.keys()}


def panels(results: Results, what: str, cells: dict[str, str]) -> dict[str, Values]:
    """Title -> group -> values of all seeds, from title -> cell; without those that no seed has."""
    return {
        title: {
            group: [value for one in having(results, cell).values() for value in one[cell][what][group]]
            for group in ("benign", "harmful")
        }
        for title, cell in cells.items()
        if having(results, cell)
    }


def of_samples(results: Results) -> Iterator[dict[str, Any]]:
    """One line for each sample and model: its gradient's norm where that was taken, and its r."""
    for seed, cells in results.items():
        for model, cell in cells.items():
            for group, ratios_found in cell["r"].items():
                norms_found = cell.get("norms", {}).get(group, [None] * len(ratios_found))
                for sample, (norm, r) in enumerate(zip(norms_found, ratios_found, strict=True)):
                    yield {"seed": int(seed), "model": model, "group": group, "sample": sample, "norm": norm, "r": r}


def spread(numbers: list[float], digits: int = 2) -> str:
    """Mean over seeds, and each of them."""
    return f"{statistics.fmean(numbers):.{digits}f} ({', '.join(f'{number:.{digits}f}' for number in numbers)})"


def table(results: Results, what: str, cells: dict[str, str]) -> str:
    """For each cell the medians of both groups, and how well the values tell them apart."""
    lines = ["| | seeds | benign | harmful | larger for harmful |", "|---|---|---|---|---|"]
    for title, cell in cells.items():
        if seeds := having(results, cell):
            each = [one[cell][what] for one in seeds.values()]
            columns = [spread([statistics.median(one[group]) for one in each]) for group in ("benign", "harmful")]
            columns.append(spread([separation(one["benign"], one["harmful"]) for one in each]))
            lines.append(f"| {title} | {', '.join(seeds)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def scores(results: Results, cells: dict[str, str]) -> str:
    """For each cell HS, agreeing replies and FA in percent, and r of both groups."""
    lines = ["| fine-tuning | seeds | HS | agrees | FA | r benign | r harmful |", "|---|---|---|---|---|---|---|"]
    for title, cell in cells.items():
        if seeds := having(results, cell):
            each = [one[cell] for one in seeds.values()]
            shares = [
                [100 * statistics.fmean(one["items"][name]) for one in each] for name in ("HS", "affirmative", "FA")
            ]
            columns = [spread(share, 0) for share in shares]
            columns += [spread([statistics.median(one["r"][name]) for one in each]) for name in ("benign", "harmful")]
            lines.append(f"| {title} | {', '.join(seeds)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def change(results: Results, cell: str, against: str, score: str) -> Mean:
    """Of a share, in points, over seeds and items."""
    return bootstrap_runs(
        [
            [100 * (a - b) for a, b in zip(one[cell]["items"][score], one[against]["items"][score], strict=True)]
            for one in results.values()
        ]
    )


def reading(results: Results, share: int, tuning: str, against: str) -> str:
    """What a way of fine-tuning does to harm and to the task, by the 95 % intervals of the differences; empty before there is a seed."""
    cells = f"Antibody/{tuning}/{share}", f"Antibody/{against}/{share}"
    seeds = having(results, *cells)
    if not seeds:
        return ""
    harm, task = (change(seeds, *cells, score) for score in ("HS", "FA"))
    safer, riskier = harm.high < 0, harm.low > 0
    better, worse = task.low > 0, task.high < 0
    if len(seeds) < 2:
        verdict = "one seed, so no verdict"
    elif (safer or better) and not (riskier or worse):
        verdict = "it helps"
    elif (riskier or worse) and not (safer or better):
        verdict = "it hurts"
    elif safer or riskier:
        verdict = "it trades one for the other"
    else:
        verdict = "it does nothing that these runs show"
    numbers = [f"{name} {m.value:+.0f} [{m.low:+.0f}, {m.high:+.0f}]" for name, m in (("HS", harm), ("FA", task))]
    what = f"one in {share} harmful, {TITLES[tuning]} against {TITLES[against]}, seeds {', '.join(seeds)}"
    return f"- {what}: {', '.join(numbers)}: **{verdict}**.\n"


def write(results: Results, settings: dict[str, int], shares: list[int], docs: Path) -> None:
    """The two pictures and the page, of what is finished."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    before = {start: start for start in ALIGNMENTS}
    after = {start: f"{start}/{start}/{FIGURE_SHARE}" for start in ALIGNMENTS}
    draw_histograms(
        panels(results, "norms", {f"aligned by {start}": start for start in ALIGNMENTS}),
        "gradient norm of a sample's mean loss over the LoRA, at the start of fine-tuning",
        docs / "figures" / "antibody_gradient_norms.png",
    )
    both = {
        f"{start}, {when} fine-tuning": cells[start]
        for start in ALIGNMENTS
        for when, cells in (("before", before), ("after", after))
    }
    draw_histograms(
        panels(results, "r", both),
        "r = log π(y|x) − log π(refusal|x), means over tokens, nats",
        docs / "figures" / "antibody_ratios.png",
    )
    rows = {f"none, aligned by {start}": start for start in ALIGNMENTS}
    for share in shares:
        rows |= {f"SFT, aligned by SFT, 1 in {share}": f"SFT/SFT/{share}"} if is_run("SFT", "SFT", share) else {}
        rows |= {f"{title}, 1 in {share}": f"Antibody/{tuning}/{share}" for tuning, title in TITLES.items()}
    pairs = ("Antibody", "SFT"), ("attenuated", "Antibody"), ("attenuated", "SFT")
    readings = "".join(reading(results, share, *pair) for share in shares for pair in pairs)
    fewest = min(len(having(results, cell)) for cell in (*before.values(), *rows.values()))
    page = f"""# Antibody on a small model: figures 2 and 4, its weights, and attenuation by norm

Made by `python scripts/antibody_figures.py --results FILE`; no number below is typed by hand. SmolLM2-135M-Instruct with the shipped
`aligned` adapter merged, then a fresh LoRA (rank {RANK}, {", ".join(TARGETS)}) aligned for {settings["align_steps"]} further steps of 4
samples, plainly (SFT) or by `AntibodyAlignTrainer` with its defaults; fine-tuned for {settings["tune_steps"]} steps of 8 samples on
movie sentiment, one in {FIGURE_SHARE} a harmful request, plainly or by `AntibodyTrainer`. Learning rate {LEARNING_RATE:g};
{settings["samples"]} benign and {settings["samples"]} harmful samples each. Harmful answers are affirmative stubs that echo the request,
far shorter and plainer than what the paper fine-tunes on, and the model is fifty times smaller; so this checks the machinery and the
direction of the effects, not the paper's numbers. Benign answers are one word, so the gradients of their mean loss are long: compare a
group between the two alignments, not the groups within one.{FEW if fewest < 3 else ""}

Entries are medians over samples: mean over seeds, and each seed in brackets. *Larger for harmful* is the probability that of a random pair
the harmful sample has the larger value; 0.50 tells nothing apart.

## Norms of per-sample gradients at the start of fine-tuning (figure 4)

{table(results, "norms", before)}

![histograms](figures/antibody_gradient_norms.png)

## r before fine-tuning (figure 2)

{table(results, "r", before)}

## r after fine-tuning

{table(results, "r", after)}

![histograms](figures/antibody_ratios.png)

Each sample's values: [figures/antibody_samples.jsonl](figures/antibody_samples.jsonl); the model is named alignment/fine-tuning/how many of
which one is harmful.

## What the weights do to harm, and what `attenuation="norm"` adds

From here on every model but those "aligned by SFT" starts where Antibody's alignment ended. {settings["asked"]} held-out harmful requests
(HS: share not refused, by keywords; agrees: share whose reply opens as the attack's do) and {settings["asked"]} held-out reviews
(FA: accuracy), in percent; r in nats, medians over the samples above, likelihoods in bfloat16. Mean over seeds, and each seed in brackets.

{scores(results, rows)}

Differences in points, with 95 % intervals over seeds and items (bootstrap; few seeds make rough ones). *Helps*: HS falls or FA rises beyond
its interval, and the other does not get worse beyond its own; *hurts*: the opposite:

{readings}"""
    (docs / "antibody_figures.md").write_text(page, encoding="utf-8")
    with (docs / "figures" / "antibody_samples.jsonl").open("w", encoding="utf-8") as samples:
        samples.writelines(json.dumps(line) + "\n" for line in of_samples(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=int, nargs="+", default=[FIGURE_SHARE, 2], help="of so many one is harmful")
    parser.add_argument("--align-steps", type=int, default=10)
    parser.add_argument("--tune-steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=12, help="benign ones and harmful ones")
    parser.add_argument("--asked", type=int, default=30, help="held-out items of each kind")
    parser.add_argument("--results", type=Path, help="file of what is finished, which is not run again")
    parser.add_argument("--finished", action="store_true", help="run nothing; write the page of what is finished")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    file: Path | None = options.results
    settings = {name: getattr(options, name) for name in ("align_steps", "tune_steps", "samples", "asked")}
    known = file is not None and file.is_file()
    kept = json.loads(file.read_text(encoding="utf-8")) if known else {"settings": settings, "seeds": {}}
    if kept["settings"] != settings:
        parser.error(f"--results {file} was made with {kept['settings']}, not {settings}; name another file")

    def keep() -> None:
        if file is not None:
            file.write_text(json.dumps(kept), encoding="utf-8")

    # figure 2's share of all seeds before the others
    shares = sorted({FIGURE_SHARE, *options.shares}, key=lambda share: (share != FIGURE_SHARE, share))
    for share in () if options.finished else shares:
        for seed in options.seeds:
            cells = kept["seeds"].setdefault(str(seed), {})
            aligned = None if file is None else file.with_name(f"{file.stem}.aligned-{seed}.pt")
            Experiment(seed, settings, aligned).fill(cells, share, keep)
    if not any("Antibody" in cells for cells in kept["seeds"].values()):
        parser.error(f"nothing is finished in --results {file} yet; run without --finished first")
    write({str(seed): kept["seeds"].get(str(seed), {}) for seed in options.seeds}, settings, shares, options.docs)


if __name__ == "__main__":
    main()
