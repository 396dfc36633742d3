"""Run in llm-compressor's environment: its Wanda on the saved model and tokens, block by block."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.bench.job import Job
from hftcore.bench.worker import serve


def prepare(folder: Path, request: dict[str, Any]) -> Job:
    """Half of every row of every linear layer but the head."""
    os.environ["TQDM_DISABLE"] = "1"
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from loguru import logger
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    logger.remove()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.load(folder / "inputs.pt", weights_only=True)["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    # the tokens are there already, but it insists on a tokenizer
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")), pad_token="", unk_token=""
    )
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def wanda() -> None:
        recipe = WandaPruningModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
        oneshot(
            model=model,
            processor=words,
            dataset=data,
            recipe=recipe,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
        )

    @torch.no_grad()
    def restore() -> None:
        for name, layer in layers.items():
            layer.weight.copy_(original[name])

    def answer(_: None) -> dict[str, Tensor]:
        return {name: layer.weight.detach().clone() for name, layer in layers.items()}

    return Job(ours=wanda, peers={}, restore=restore, agrees=torch.equal, answer=answer)


if __name__ == "__main__":
    serve(partial(prepare, Path(sys.argv[1])))
