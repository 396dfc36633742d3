"""The scoreboard's engine: defences and null hypotheses through alignment, poisoned fine-tuning and repair, cell by cell.

The alignment adapter is merged and the user's fine-tuning gets an adapter of its own, as in Antidote's code. Attack targets are stubs that
agree and say nothing.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hftcore.bindings.data import make_batches
from hftcore.bindings.datasets import Pair
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation import judge
from hftcore.bindings.evaluation.cells import Cells, key_of
from hftcore.bindings.evaluation.evaluate import Items, Subject, parts
from hftcore.bindings.evaluation.suites import Suite
from hftcore.bindings.mixture import harmful_count, poisoned, samples
from hftcore.bindings.models_io import load_model, merged, save_model
from hftcore.bindings.recipe import PAPERS_LORA
from hftcore.bindings.trainers import METHODS
from hftcore.bindings.trainers.data import tokenize
from hftcore.bindings.trainers.pairs import PairTrainer, pair_samples
from hftcore.bindings.tuning.doses import METHODS as DOSES
from hftcore.errors import HftcoreError


@dataclass(frozen=True)
class Defence:
    """A row: the trainer of each stage and what is done afterwards.

    `post` names a dose of `hftcore.bindings.tuning.doses`; `is_null` marks what a defence must beat; `settings` has, for "align" and
    "tune", the settings of a trainer where they are not its own.
    """

    align: str = "sft"
    tune: str = "sft"
    post: str | None = None
    dose: float = 0.0
    on_benign: bool = False
    is_null: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it needs models of its own, which SFT's are not."""
        return (self.align, self.tune) != ("sft", "sft")


# papers' defaults; a post-stage dose for each attack is what `hftcore tune` is for
DEFENCES: dict[str, Defence] = {
    "SFT": Defence(),
    "Vaccine": Defence(align="vaccine"),
    "RepNoise": Defence(align="repnoise"),
    "Booster": Defence(align="booster"),
    "Immunization": Defence(align="immunize"),
    "Antibody": Defence(align="antibody-align", tune="antibody"),
    # its own cycle, 100 steps and 900, would end before a short fine-tuning has seen any of the user's data
    "Lisa": Defence(tune="lisa", settings={"tune": {"align_steps": 1, "user_steps": 9}}),
    "LDIFS": Defence(tune="ldifs"),
    "LDIFS as published": Defence(tune="ldifs", settings={"tune": {"drop_above": 0.1}}),
    "Panacea": Defence(tune="panacea"),
    "Antidote 0.1": Defence(post="antidote", dose=0.1),
    "benign energies 0.1": Defence(post="antidote", dose=0.1, on_benign=True, is_null=True),
    "magnitude 0.1": Defence(post="magnitude", dose=0.1, is_null=True),
    "random 0.1": Defence(post="random", dose=0.1, is_null=True),
    "random of its norm": Defence(post="random-norm", dose=0.1, is_null=True),
    "adapter × 0.2": Defence(post="shrink", dose=0.8, is_null=True),
    "noise ρ 1": Defence(post="noise", dose=1.0, is_null=True),
}


@dataclass(frozen=True)
class Data:
    """What stages are trained on; the parts share no item."""

    align_harmful: list[str]
    align_benign: list[Pair]
    attack_harmful: list[str]
    attack_benign: list[Pair]
    defend_harmful: list[str]
    defend_benign: list[Pair]


@dataclass(frozen=True)
class Setting:
    """The grid and the training.

    Fields:
        poison_ratios: shares of harmful items among the user's.
        strengths: the attack's epochs.
        seeds: of the user's data and fine-tuning.
        trained_ratios: the poison ratios of rows that train models of their own; None for all. The others share those of SFT.
        size: the user's training items.
        align_size: harmful requests with refusals that alignment learns from, among twice as many benign pairs; None for all there are.
        align_epochs: passes over them.
        lora_alpha: of every adapter, whose other settings are the papers'.
        bf16: train under bfloat16 autocast and evaluate the base model in bfloat16; False for float32 throughout.
    """

    poison_ratios: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    strengths: tuple[int, ...] = (1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    trained_ratios: tuple[float, ...] | None = None
    size: int = 480
    align_size: int | None = None
    align_epochs: int = 1
    learning_rate: float = 3e-3
    batch_size: int = 8
    max_length: int = 96
    lora_alpha: int = 4
    bf16: bool = False

    @property
    def lora(self) -> dict[str, Any]:
        """Settings of `peft.LoraConfig`."""
        return PAPERS_LORA | {"lora_alpha": self.lora_alpha}


@dataclass(frozen=True)
class Cell:
    """One entry of the grid."""

    defence: str
    poison_ratio: float
    strength: int
    seed: int


def cells_of(setting: Setting, defences: Sequence[str]) -> list[Cell]:
    """In the order in which they are run: one seed of all before the next, so that an unfinished grid is still balanced."""
    return [
        Cell(name, ratio, strength, seed)
        for seed in setting.seeds
        for strength in setting.strengths
        for ratio in setting.poison_ratios
        for name in defences
        if setting.trained_ratios is None or ratio in setting.trained_ratios or not DEFENCES[name].trains
    ]


class Scoreboard:
    """Runs cells and keeps their results in `out/scoreboard.json` and trained models in `out/models`.

    Args:
        base: folder or hub id of the model before alignment.
        data, suite, setting: what is trained on, asked and varied.
        out: a folder, made or continued.
    """

    def __init__(self, base: str, data: Data, suite: Suite, setting: Setting, out: Path) -> None:
        needed = max(harmful_count(setting.size, ratio) for ratio in setting.poison_ratios)
        if needed > len(set(data.attack_harmful)):
            raise HftcoreError(
                f"size {setting.size} with poison ratio {max(setting.poison_ratios)} needs {needed} harmful items, there are "
                f"{len(set(data.attack_harmful))}; lower size"
            )
        self.base, self.data, self.setting, self.out = base, data, setting, out
        self._parts = parts(suite, judge.KeywordJudge())
        self.cells = Cells(out / "scoreboard.json", {"base": base, "setting": asdict(setting)})

    def run(self, cell: Cell) -> Items:
        """The items of one cell: trained, defended, evaluated, or found."""
        found = self.found(cell)
        if found is not None:
            return found
        defence = DEFENCES[cell.defence]
        items: Items = {}
        dtype = "bfloat16" if self.setting.bf16 else "float32"
        model, tokenizer = load_model(self._attacked(defence, cell), dtype=dtype, base=str(self._aligned(defence)))
        if defence.post is not None:
            DOSES[defence.post].prepare(model, partial(self._defence_batches, tokenizer, defence))(defence.dose)
        subject = Subject(model, tokenizer)
        for step, recipe in zip(self._parts, self._recipes(cell), strict=True):
            items |= self.cells.once(recipe, partial(step.measure, subject))
        return items

    def found(self, cell: Cell) -> Items | None:
        """The items of a cell that was measured before; None where a part is missing."""
        items: Items = {}
        for recipe in self._recipes(cell):
            if recipe not in self.cells:
                return None
            items |= self.cells.once(recipe, dict)
        return items

    def _recipes(self, cell: Cell) -> list[dict[str, Any]]:
        row = asdict(DEFENCES[cell.defence])
        return [asdict(cell) | {"row": row, "training": self._training()} | part.recipe for part in self._parts]

    def _training(self) -> dict[str, Any]:
        """What every trained model of this board depends on."""
        grid = ("poison_ratios", "strengths", "seeds", "trained_ratios")
        setting = {name: value for name, value in asdict(self.setting).items() if name not in grid}
        return {"base": self.base, "lora": self.setting.lora, "data": key_of(asdict(self.data)), **setting}

    def _aligned(self, defence: Defence) -> Path:
        """The folder of the aligned model; alignment has one seed, the user's data and fine-tuning have those of the grid."""
        settings = dict(defence.settings.get("align", {}))
        target = self._place("aligned", {"method": defence.align, "settings": settings})
        if not target.exists():
            refusals = demo_data.refusal_pairs(self._align_harmful())
            pairs = refusals + self.data.align_benign[: 2 * len(refusals)]
            epochs = self.setting.align_epochs
            model, tokenizer = self._train(defence.align, self.base, pairs, epochs, 0, settings)
            save_model(merged(model), tokenizer, target)
        return target

    def _attacked(self, defence: Defence, cell: Cell) -> Path:
        """The folder of the fine-tuned adapter of the aligned model."""
        settings, aligned = dict(defence.settings.get("tune", {})), self._aligned(defence)
        recipe = {"method": defence.tune, "settings": settings, "aligned": aligned.name}
        attack = {"poison_ratio": cell.poison_ratio, "strength": cell.strength, "seed": cell.seed}
        target = self._place("tuned", recipe | attack)
        if not target.exists():
            stubs = demo_data.stub_pairs(self.data.attack_harmful)
            pairs = poisoned(self.data.attack_benign, stubs, self.setting.size, cell.poison_ratio, cell.seed)
            model, tokenizer = self._train(defence.tune, str(aligned), pairs, cell.strength, cell.seed, settings)
            save_model(model, tokenizer, target)
        return target

    def _align_harmful(self) -> list[str]:
        return self.data.align_harmful[: self.setting.align_size]

    def _place(self, stage: str, recipe: dict[str, Any]) -> Path:
        return self.out / "models" / f"{stage}-{key_of(recipe | self._training())}"

    def _train(
        self, method: str, start: str, pairs: list[Pair], epochs: int, seed: int, settings: dict[str, Any]
    ) -> tuple[Any, Any]:
        """A new adapter on the model in `start`, trained by a method; (model, tokenizer)."""
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback, set_seed

        trainer_class, config_class = METHODS[method].load()
        model, tokenizer = load_model(start, dtype="float32")
        set_seed(seed)
        model = get_peft_model(model, LoraConfig(**self.setting.lora))
        with tempfile.TemporaryDirectory() as folder:
            args = config_class(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=self.setting.batch_size,
                learning_rate=self.setting.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=6,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=self.setting.bf16,
                use_cpu=next(model.parameters()).device.type == "cpu",
                **settings,
            )
            data = self._datasets(method, issubclass(trainer_class, PairTrainer), tokenizer, pairs)
            trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **data)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model.eval(), tokenizer

    def _datasets(self, method: str, is_paired: bool, tokenizer: Any, pairs: list[Pair]) -> dict[str, Any]:
        """The training set, and what the method takes beside it."""

        def ready(some: list[Pair]) -> list[Any]:
            return tokenize(samples(some), tokenizer, self.setting.max_length)

        refusals = demo_data.refusal_pairs(self._align_harmful())
        known = {
            "harmful_dataset": demo_data.stub_pairs(self.data.defend_harmful),
            "alignment_dataset": refusals,
            "safety_dataset": refusals,
        }
        data = {name: ready(known[name]) for name in METHODS[method].datasets}
        if is_paired:
            stubs = demo_data.stub_pairs(self._align_harmful())
            return data | {"train_dataset": pair_samples(ready(refusals), ready(stubs))}
        return data | {"train_dataset": ready(pairs)}

    def _defence_batches(self, tokenizer: Any, defence: Defence) -> Any:
        pairs = self.data.defend_benign if defence.on_benign else demo_data.stub_pairs(self.data.defend_harmful)
        return make_batches(samples(pairs), tokenizer, max_length=self.setting.max_length)
