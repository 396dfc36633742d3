"""A base model that takes one adapter after the other and is afterwards, bit for bit, what it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hftcore import ops
from hftcore.bindings.models_io import load_model, with_adapter

log = logging.getLogger("hftcore")


class Base:
    """A causal model and its tokenizer, loaded once.

    Args:
        path: folder or hub id.
        device, dtype: as for `load_model`, and the same errors.
    """

    def __init__(self, path: str | Path, device: str | None = None, dtype: str = "auto") -> None:
        self._how = (path, device, dtype)
        self.model, self.tokenizer = load_model(path, device, dtype)
        self._bits = _fingerprints(self.model)

    @contextmanager
    def adapted(self, folder: Path) -> Iterator[Any]:
        """Yield the `PeftModel` with the adapter of a folder, in eval mode; afterwards the base is what it was.

        Raises:
            HftcoreError: as `with_adapter`; the base is what it was then too.
        """
        try:
            with restored(self.model):
                yield with_adapter(self.model, folder).to(self.model.device).eval()
        finally:
            # biases trained with the factors, and starts such as PiSSA's, are written into the base's own weights
            if _fingerprints(self.model) != self._bits:
                log.info("adapter %s changed weights of the base model, which is loaded again", folder)
                del self.model
                self.model, _ = load_model(*self._how)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give every module of `model`, at the end of the block, the attributes, children and parameters that it had before.

    Whatever replaced modules or hung something on them, and however far it came, is gone; values written into a tensor stay.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> with restored(model):
    ...     model[0] = nn.Identity()
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    # dicts are emptied and filled again, as handles of hooks know them by identity
    kept = [
        (
            vars(module),
            [(key, value, dict(value) if isinstance(value, dict) else None) for key, value in vars(module).items()],
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, items in kept:
            attributes.clear()
            for key, value, content in items:
                if content is not None:
                    value.clear()
                    value.update(content)
                attributes[key] = value


def _fingerprints(model: nn.Module) -> dict[str, str]:
    return {name: ops.fingerprint(tensor.detach()) for name, tensor in model.named_parameters()}
