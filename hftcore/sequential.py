"""Energies block by block, each block fed by the blocks before it as they are by then: Wanda's own procedure."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from hftcore.block_runs import BlockRuns, by_block
from hftcore.calibration import Batch, check_counts, evaluating, runs_without_head
from hftcore.capture import Meter
from hftcore.energy import Energy
from hftcore.errors import HftcoreError
from hftcore.layers import Layer, blocks


def blockwise_energy(
    model: nn.Module, batches: Iterable[Batch], layers: Sequence[Layer], tokens: str = "all"
) -> Iterator[tuple[list[Layer], Energy]]:
    """Yield (layers of a block, their energies) block by block; what is done to a block before the next step is seen
    by the next one.

    Every block runs twice on all batches (`BlockRuns`), once to measure and once, as the consumer left it, to make the next block's
    inputs. All batches and what one block returns for them are held in memory. The first batch also runs through the whole model
    before anything is yielded, to see that the blocks run in their order.

    Args:
        model, batches, tokens: as in `calibrate`.
        layers: what to measure (`find_layers`); all must lie inside the blocks. Blocks without a layer are only
            passed through.

    Raises:
        HftcoreError: a layer outside the blocks; no token to count; blocks whose other arguments depend on what the blocks before
            them computed; and what `capture_energy` raises.

    Source: Sun et al. 2023 (arXiv:2306.11695), `prune_wanda` of their code. Different: a block's other arguments are those the model
    gives it and not those of the first block, since blocks of one model may take different masks and rotary tables; padding is
    told apart.
    """
    members = blocks(model)
    homes, outside = by_block(members, layers)
    if outside:
        names = ", ".join(layer.name for layer in outside[:5])
        raise HftcoreError(f"layers outside the blocks cannot be calibrated block by block, exclude them: {names}")
    last = max(index for index, home in enumerate(homes) if home)
    runner = runs_without_head(model, layers)
    with evaluating(model):
        runs = BlockRuns(runner, members, batches, {}, "sequential=False")
        runs.check_order()
        for index, home in enumerate(homes[: last + 1]):
            if home:
                meter = Meter(home, tokens)
                runs.run(index, meter, keeps=False)
                meter.finish()
                check_counts(meter.energy, tokens)
                yield home, meter.energy
            if index < last:
                runs.run(index)
