"""Hidden states of a model on the way: the outputs of its attention or MLP modules, seen or changed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hftcore.errors import HftcoreError
from hftcore.layers import blocks

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")


def block_parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """From each decoder block the child that bears one of the names.

    Raises:
        HftcoreError: a block has none; its children are listed.

    >>> block = nn.ModuleDict({"self_attn": nn.Linear(2, 2), "mlp": nn.ReLU()})
    >>> block_parts(nn.ModuleList([block]), MLP)
    [ReLU()]
    """
    parts = []
    for index, block in enumerate(blocks(model)):
        children = dict(block.named_children())
        found = next((children[name] for name in names if name in children), None)
        if found is None:
            raise HftcoreError(
                f"block {index} has no child named {' or '.join(names)}, only {', '.join(children) or 'none'}; "
                "this defence looks at its output, so pass a model whose blocks have one"
            )
        parts.append(found)
    return parts


@contextmanager
def watched(modules: Sequence[nn.Module], see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside the block `see(index, output)` is called with each module's output, the first of several, and may replace it."""

    def hook(index: int) -> Callable[..., Any]:
        def look(module: nn.Module, args: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            changed = see(index, state)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return look

    handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Index -> the output of each module in its first run inside the block; runs that recompute it do not count.

    >>> layer = nn.Linear(2, 3)
    >>> with captured([layer]) as seen:
    ...     _ = layer(Tensor([[1.0, 2.0]]))
    >>> seen[0].shape
    torch.Size([1, 3])
    """
    seen: dict[int, Tensor] = {}

    def keep(index: int, state: Tensor) -> None:
        seen.setdefault(index, state)

    with watched(modules, keep):
        yield seen


def need_gradient(states: Iterable[Tensor]) -> None:
    """Refuse hidden states none of which depends on what is trained: a penalty on them would do nothing.

    >>> need_gradient([Tensor([1.0])])
    Traceback (most recent call last):
    hftcore.errors.HftcoreError: no hidden state that this defence holds has a gradient, so it would do nothing; train weights below the \
head, and with gradient checkpointing set use_reentrant=False
    """
    if not any(state.requires_grad for state in states):
        raise HftcoreError(
            "no hidden state that this defence holds has a gradient, so it would do nothing; train weights below the head, and with "
            "gradient checkpointing set use_reentrant=False"
        )
