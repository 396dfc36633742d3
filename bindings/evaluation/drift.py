"""What an edit does to a model that replies do not show: perplexity on plain text, and how far its embeddings have moved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hftcore.bindings.datasets import Pair
from hftcore.bindings.demo.data import pair_batches
from hftcore.errors import HftcoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 512


def window_losses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    windows: int = 8,
    length: int = WINDOW,
) -> list[float]:
    """The mean negative log-likelihood of a token, in nats, for each window of the documents' joined tokens; perplexity is its exponential.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        documents: plain texts, joined by an empty line.
        windows: how many are cut at most.
        length: tokens of a window, the first of which is not scored.

    Raises:
        HftcoreError: the documents do not fill one window.
    """
    tokens = torch.tensor(tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"])
    count = min(windows, len(tokens) // length)
    if not count:
        raise HftcoreError(
            f"documents must hold at least {length} tokens (one window), got {len(tokens)}; give more text"
        )
    device = next(model.parameters()).device
    losses = []
    with torch.inference_mode():
        for window in tokens[: count * length].reshape(count, length).to(device):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(float(nn.functional.cross_entropy(logits, window[1:])))
    return losses


def embedding_drift(
    model: "PreTrainedModel",
    reference: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Pair],
) -> tuple[list[float], list[float]]:
    """How far the attention outputs have moved from those of `reference`: for each pair, summed and averaged.

    Args:
        model, reference: two models of one architecture, with or without adapters.
        tokenizer: of both.
        pairs: requests with safe answers, the data of the alignment.

    Returns:
        sums: for each pair Σ over layers of ‖E - E_ref‖_F, E the [T, d] output of a layer's attention. Their total is the published number;
            it grows with length, layers and pairs.
        means: for each pair the mean over layers and tokens of ‖e - e_ref‖₂, which does not.

    Raises:
        HftcoreError: a model without attention modules, or two of different architecture.

    Source: harmful embedding drift of Vaccine (arXiv:2402.01109), as `track_embedding` of Antidote's code has it, with one sample a batch.
    """
    ours, theirs = _attention_layers(model), _attention_layers(reference)
    if len(ours) != len(theirs) or not ours:
        raise HftcoreError(
            f"model and reference must have the same attention layers, got {len(ours)} and {len(theirs)}; "
            "give the model before fine-tuning as reference"
        )
    sums, means = [], []
    with _seen(ours) as now, _seen(theirs) as then, torch.inference_mode():
        for batch in pair_batches(tokenizer, pairs, batch_size=1, max_tokens=WINDOW):
            now.clear()
            then.clear()
            for one in (model, reference):
                device = next(one.parameters()).device
                one(input_ids=batch["input_ids"].to(device))
            moved = [(e.float().cpu() - e_ref.float().cpu())[0] for e, e_ref in zip(now, then, strict=True)]
            sums.append(sum(float(difference.norm()) for difference in moved))
            means.append(sum(float(difference.norm(dim=-1).mean()) for difference in moved) / len(moved))
    return sums, means


def _attention_layers(model: Any) -> list[nn.Module]:
    """In the order of the layers; a name ending in Attention is transformers' convention."""
    named = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return [module for module in named if any(True for _ in module.children())]


@contextmanager
def _seen(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of `layers` in the order in which they ran, since the list was last cleared."""
    outputs: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(see) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
