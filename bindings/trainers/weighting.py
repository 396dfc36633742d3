"""Per-sample weights for any Trainer, through its `compute_loss_func`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hftcore.bindings.trainers.likelihood import following, logits_logprobs
from hftcore.errors import HftcoreError


def weighted_loss(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A `compute_loss_func` for `transformers.Trainer` and its subclasses, TRL's among them, in which each sample has a weight.

    The loss is −Σ_i w_i log π(y_i | x_i) / number of supervised tokens, the Trainer's own where every weight is 1; the number is that of
    the whole accumulated batch, so gradient accumulation is right as far as the weights do not depend on the micro-batch.

    Args:
        weigh: (log-likelihoods [B] in nats, numbers of supervised tokens [B]), without gradient, to weights [B]. To weigh by a refusal's
            likelihood too, use `AntibodyTrainer`.

    Returns:
        A function of the model's outputs, the labels and `num_items_in_batch`. It raises HftcoreError where the weights are not finite
        or not of shape [B].

    >>> from types import SimpleNamespace
    >>> outputs, labels = SimpleNamespace(logits=torch.zeros(2, 3, 4)), torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> weighted_loss(lambda logprobs, counts: torch.tensor([0.0, 3.0]))(outputs, labels)       # 3 log 4 / 3
    tensor(1.3863)
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise HftcoreError("weighted_loss needs labels in the batch, got none")
        sums, counts = logits_logprobs(outputs.logits, following(labels).to(outputs.logits.device))
        weights = weigh(sums.detach(), counts)
        if weights.shape != sums.shape or not bool(weights.isfinite().all()):
            raise HftcoreError(f"weigh must give finite weights of shape {tuple(sums.shape)}, got {weights}")
        number = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(number, Tensor):
            number = number.to(sums.device)
        return -(weights.detach().to(sums) * sums).sum() / number

    return loss
