"""Training from a recipe, with any method of `hftcore.bindings.trainers.METHODS`."""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hftcore.bindings.data import load_samples
from hftcore.bindings.models_io import is_adapter, load_model, merged, save_model
from hftcore.bindings.output import check_output
from hftcore.bindings.recipe import Recipe, read_recipe
from hftcore.errors import HftcoreError


def run_training(
    name: str, model: str, config: Path, out: Path, resume: bool = False, device: str | None = None, dtype: str = "auto"
) -> dict[str, Any]:
    """Train a model or adapter by a recipe and write the result to `out`, which is whole or absent.

    With `save_strategy` in the recipe, checkpoints lie beside `out`, in `<out>.checkpoints`, and `resume` goes on from the last.

    Returns:
        method, out, steps, the mean loss and the log's entries.

    Raises:
        HftcoreError: what the recipe, the data or the trainer refuses, before the first step.
    """
    recipe = read_recipe(name, config)
    if recipe.lora is not None and is_adapter(model):
        raise HftcoreError(
            f"{config}: lora makes a new adapter, and {model} is one, which is trained on; leave lora out"
        )
    return train(recipe, name, model, out, resume, device, dtype)


def train(
    recipe: Recipe,
    name: str,
    model: str,
    out: Path,
    resume: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    merges: bool = False,
) -> dict[str, Any]:
    """As `run_training`, by a recipe that was read; `merges`: the adapter is merged into the model, and that is written."""
    from transformers import set_seed

    check_output(out, [model], "--out")
    loaded, tokenizer = load_model(model, device, dtype)
    # a new adapter begins with random factors
    set_seed(recipe.settings.get("seed", 42))
    with _checkpoints(recipe, out, resume) as (folder, checkpoint):
        trainer = make_trainer(recipe, _trainable(loaded, recipe.lora), tokenizer, folder)
        _check_trained(trainer)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained, edit = trainer.model.eval(), getattr(trainer, "edit", None)
    if merges and hasattr(trained, "peft_config"):
        # an edit of the factors says nothing about merged weights
        trained, edit = merged(trained), None
    # under torchrun all processes hold the result, and one writes it
    if trainer.args.should_save:
        save_model(trained, tokenizer, out, (model,), edit)
    return {
        "method": name,
        "out": str(out),
        "steps": int(result.global_step),
        "loss": float(result.training_loss),
        "log": trainer.state.log_history,
    }


def checkpoints_of(out: Path) -> Path:
    """Where the checkpoints of a training that writes to `out` lie."""
    return out.with_name(f"{out.name}.checkpoints")


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a training that writes to `out`: one that it was killed while writing does not count."""
    found = checkpoints_of(out).glob("checkpoint-*")
    whole = [path for path in found if path.name[11:].isdigit() and _is_whole(path)]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        # what transformers writes last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def make_arguments(recipe: Recipe, folder: Path, is_cpu: bool) -> Any:
    """The trainer's arguments, of the recipe's settings.

    Raises:
        HftcoreError: a setting that is out of range, or does not fit the others.
    """
    _, config_class = recipe.method.load()
    defaults = {"save_strategy": "no", "logging_steps": 10}
    own = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": not sys.stderr.isatty(), "use_cpu": is_cpu}
    try:
        args = config_class(**(defaults | recipe.settings | own))
    except HftcoreError:
        raise
    except (TypeError, ValueError) as error:
        raise HftcoreError(f"the training settings do not fit together: {' '.join(str(error).split())}") from error
    if args.eval_strategy != "no":
        raise HftcoreError(
            f"eval_strategy must be no, as a recipe has no data to evaluate on, got {args.eval_strategy.value}; leave it out"
        )
    return args


def make_trainer(recipe: Recipe, model: Any, tokenizer: Any, folder: Path) -> Any:
    """The trainer of a recipe; checkpoints go to `folder`."""
    from transformers.trainer_callback import PrinterCallback

    from hftcore.bindings.trainers.data import tokenize
    from hftcore.bindings.trainers.pairs import pair_samples

    trainer_class, _ = recipe.method.load()
    args = make_arguments(recipe, folder, next(model.parameters()).device.type == "cpu")
    data: dict[str, Any] = {
        dataset: tokenize(load_samples(str(path)), tokenizer, recipe.max_length)
        for dataset, path in recipe.data.items()
    }
    if recipe.method.is_paired:
        data["train_dataset"] = pair_samples(data["train_dataset"], data.pop("harmful_dataset"))
    refusals = {} if recipe.refusals is None else {"refusals": recipe.refusals}
    trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **data, **refusals)
    # it prints every log entry to stdout, which is the command's
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainable(model: Any, lora: dict[str, Any] | None) -> Any:
    """The model with what is to be trained requiring gradients: its adapter, a new one, or all of it."""
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        try:
            return get_peft_model(model, LoraConfig(**lora))
        except (TypeError, ValueError) as error:
            raise HftcoreError(f"lora does not fit the model: {' '.join(str(error).split())}") from error
    has_adapter = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not has_adapter or ".lora_" in name or ".modules_to_save." in name)
    return model


def _check_trained(trainer: Any) -> None:
    """Refuse what would fail after the last step, and warn of what would train little."""
    trained, is_adapter = trainer.parameters, hasattr(trainer.model, "peft_config")
    outside = [name for name in trained if ".lora_" not in name] if is_adapter and hasattr(trainer, "edit") else []
    if outside:
        raise HftcoreError(
            f"{type(trainer).__name__} saves an Edit, which beside an adapter holds LoRA factors alone, and {outside[0]} is trained too; "
            "leave modules_to_save and bias out of lora"
        )
    half = next((parameter.dtype for parameter in trained.values() if parameter.dtype.itemsize < 4), None)
    if half is not None:
        warnings.warn(
            f"the trained weights are {str(half).removeprefix('torch.')}, in which steps smaller than half a unit in a weight's last place "
            "are lost; --dtype float32 keeps them (with bf16: true in the recipe it computes in bfloat16 all the same)",
            stacklevel=2,
        )


@contextmanager
def _checkpoints(recipe: Recipe, out: Path, resume: bool) -> Iterator[tuple[Path, Path | None]]:
    """Where checkpoints go, and the one to go on from."""
    if recipe.settings.get("save_strategy", "no") == "no":
        if resume:
            raise HftcoreError("--resume needs checkpoints; set save_strategy in the recipe")
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary), None
        return
    folder, last = checkpoints_of(out), last_checkpoint(out)
    if resume != (last is not None):
        wanted = "has no checkpoint to resume from" if resume else "holds checkpoints of an earlier run"
        raise HftcoreError(f"{folder} {wanted}; {'leave --resume out' if resume else 'give --resume, or remove it'}")
    try:
        yield folder, last
    finally:
        # the trainer makes it before its first step, which a run that is refused never takes
        with suppress(OSError):
            folder.rmdir()
