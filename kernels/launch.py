"""Launch numbers of the Triton kernels: tile shapes and warps by op and shape. The only home of such numbers.

A row is kept in registers as int32 keys, 64 a thread at most, while it fits one program; `tests/test_compile.py` holds that
none of these choices spills to memory.
"""

from typing import NamedTuple

WIDEST_IN_REGISTERS = 16384  # columns


EXACT = {"enable_fp_fusion": False}  # rounding as written, whatever the default of the Triton at hand
COMBINE = 32  # columns of a program that adds partial energies: few, so that many run


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _warps(elements: int, each: int) -> int:
    """Warps of 32 threads with `each` elements a thread, between 1 and 8."""
    return min(8, max(1, power_of_two(elements) // (32 * each)))


def row_tile(M: int, N: int, row_stride: int, column_stride: int, element_size: int) -> Tile:
    """`block_n >= N` means that whole rows fit: they are then read once and kept."""
    if abs(row_stride) < abs(column_stride) and M > 1 and N > 1:
        return Tile(16, 256, 8)  # a transposed view: neighbours in memory are rows
    if N > WIDEST_IN_REGISTERS:
        return Tile(1, 2048, 8)
    block_n = max(16, power_of_two(N))
    if block_n <= 128:
        # every thread of a warp holds the state of all its rows: few of them then, but 16 bytes for each lane of AMD's 64
        block_m = 8 if block_n <= 32 else 16 // element_size
        return Tile(min(block_m, power_of_two(M)), block_n, max(1, block_n // 64))
    block_m = min(max(1, 1024 // block_n), power_of_two(M))
    return Tile(block_m, block_n, _warps(block_m * block_n, 64))


def group_tile(N: int) -> Tile:
    block_n = min(2048, max(64, power_of_two(N)))
    return Tile(1, block_n, _warps(block_n, 16))


def band_tile(M: int, N: int, row_stride: int, column_stride: int) -> Tile:
    """Tiles of the ops that pass over a matrix once."""
    if abs(row_stride) < abs(column_stride) and M > 1 and N > 1:
        return Tile(64, 64, 4)
    block_n = min(2048, max(16, power_of_two(N)))
    block_m = min(max(1, 2048 // block_n), power_of_two(M))
    return Tile(block_m, block_n, _warps(block_m * block_n, 16))


class BlockTile(NamedTuple):
    blocks: int  # whose sums one program carries
    width: int  # columns of each that are loaded at a time
    num_warps: int


def block_tile(bn: int) -> BlockTile:
    # handing columns over costs `width` operations a weight, so it is no more than one wide load needs
    return BlockTile(128, min(8, power_of_two(bn)), 4)


def histogram_copies(bins: int) -> int:
    """Copies of a histogram that share its atomic additions, summed at the end."""
    return max(1, min(32, (1 << 17) // bins))


class EnergyTile(NamedTuple):
    block_t: int  # tokens summed in float32
    block_n: int
    tokens: int  # tokens of one program, a multiple of block_t
    num_warps: int


def energy_tile(T: int, N: int) -> EnergyTile:
    # long runs for wide inputs; narrow ones need the parallelism of more programs over tokens
    return EnergyTile(64, 64 if N < 8192 else 128, 512 if T * N > 1 << 22 else 128, 4)


class ProductTile(NamedTuple):
    """A tile [block_m, block_n] of a matrix product, and how much of the inner axis is multiplied at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


def _side(n: int, most: int) -> int:
    return min(most, max(16, power_of_two(n)))  # a tensor core takes no less than 16


def gram_tile(T: int, element_size: int) -> ProductTile:
    side = _side(T, 64)  # the accumulators of two products share the registers
    return ProductTile(side, side, 128 // element_size, 8 if element_size == 4 else 4)


def outer_tile(M: int, N: int, element_size: int) -> ProductTile:
    block_m, block_n = _side(M, 128), _side(N, 128)
    return ProductTile(block_m, block_n, 128 // element_size, 8 if block_m * block_n >= 1 << 14 else 4)


STRIPE = 2048  # columns of the vocabulary that one program folds


def logit_tile(element_size: int) -> ProductTile:
    # a deeper tile of float32 spills on Triton 3.6
    return ProductTile(64, 128, 64 // element_size, 8)


def logit_gradient_tile(element_size: int) -> ProductTile:
    # a wider tile of float32 spills on sm_80
    return ProductTile(64, 64, 32, 8) if element_size == 4 else ProductTile(64, 128, 32, 8)
