"""Of which loss of a sample the gradient is taken, and what turns its share of a batch's gradient into that."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hftcore.errors import HftcoreError

LOSSES = ("mean", "sum", "share")


class SampleLoss:
    """The convention, and once the model was called what it needs of that call."""

    def __init__(self, kind: str, loss_scale: float):
        if kind not in LOSSES:
            raise HftcoreError(f"loss must be one of {', '.join(LOSSES)}, got {kind!r}")
        if not 0 < loss_scale < math.inf:
            raise HftcoreError(f"loss_scale must be a positive number, got {loss_scale}")
        self.kind = kind
        self.loss_scale = float(loss_scale)
        self.is_known = False
        self.samples = 0
        self.tokens = 0
        self._counts: Tensor | None = None
        self._total: Any = None

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the shape of the batch and its labels from the arguments of the model's forward.

        Raises:
            HftcoreError: no tensor, labels missing or of another shape, or a load-balancing loss beside that of the labels.
        """
        names = inspect.signature(module.forward).parameters
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [inputs.get("input_ids"), inputs.get("inputs_embeds"), *inputs.values()]
        x = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
        if x is None:
            raise HftcoreError(f"the model must be called with a tensor such as input_ids, got {sorted(inputs)}")
        shape = x.shape[0], x.shape[1] if x.dim() > 1 + x.is_floating_point() else 1
        if self.kind != "share":
            _refuse_balancing(module, inputs)
            self._counts = self._count(inputs, shape)
        self._total = inputs.get("num_items_in_batch")
        self.samples, self.tokens = shape
        self.is_known = True

    def scale(self, device: torch.device) -> Tensor:
        """[B] float64: by what the sample's share of the batch's gradient is multiplied."""
        scale = torch.full((self.samples,), 1 / self.loss_scale, dtype=torch.float64, device=device)
        if self._counts is None:
            return scale
        counts = self._counts.to(device).double()
        scale *= counts.sum() if self._total is None else float(self._total)
        return scale.masked_fill(counts == 0, 0) if self.kind == "sum" else scale * (counts > 0) / counts.clamp(min=1)

    @property
    def unsupervised(self) -> list[int]:
        """The samples without a supervised token, where labels tell."""
        return [] if self._counts is None else (self._counts == 0).nonzero().flatten().tolist()

    def _count(self, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        shifted = inputs.get("shift_labels")
        labels = inputs.get("labels") if shifted is None else shifted
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != shape[0]:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise HftcoreError(
                f'loss="{self.kind}" needs the model to be called with labels of shape {list(shape)}, got {got}; '
                'for another loss take loss="share"'
            )
        return ((labels if shifted is not None else labels[:, 1:]) != -100).sum(dim=1)


def _refuse_balancing(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    config: Any = next((part.config for part in module.modules() if hasattr(part, "config")), None)
    asked = inputs.get("output_router_logits")
    is_added = getattr(config, "output_router_logits", False) if asked is None else asked
    if is_added and getattr(config, "router_aux_loss_coef", 0):
        raise HftcoreError(
            "the model adds a load-balancing loss (output_router_logits=True), which mixes samples, so none has a gradient of its own; "
            "set model.config.output_router_logits = False"
        )
