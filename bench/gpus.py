"""GPUs as data sheets, the occupancy their limits allow, and the time a roofline gives. Nothing here was measured."""

from dataclasses import dataclass

from hftcore.bench.job import Work


@dataclass(frozen=True)
class Gpu:
    """One model of GPU, by its maker's figures.

    Fields:
        target: what its kernels are compiled for.
        units: streaming multiprocessors, or compute units.
        clock: highest, in Hz.
        bandwidth: of its memory, bytes a second.
        tensor: dense bfloat16 operations a second.
        lanes: 32-bit integer or comparison results a unit and clock.
        fused: float32 multiply-adds a unit and clock, without tensor cores.
    """

    name: str
    target: str
    units: int
    clock: float
    bandwidth: float
    tensor: float
    lanes: int
    fused: int


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12, 312e12, 64, 64),
    Gpu("H100", "sm_90", 132, 1.98e9, 3.35e12, 989e12, 64, 128),
    Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12, 989e12, 64, 128),
    Gpu("B200", "sm_100", 148, 1.97e9, 8.0e12, 2250e12, 64, 128),
    Gpu("MI300X", "gfx942", 304, 2.1e9, 5.3e12, 1307e12, 64, 128),
)


@dataclass(frozen=True)
class Limits:
    """What the programs of one unit share.

    Fields:
        registers: 32-bit, of a unit; step: a thread's are rounded up to a multiple.
        width: threads of a warp (wavefront); warps, programs: at most so many at a time.
        shared: bytes; reserved: of them, for each program.
    """

    registers: int
    step: int
    width: int
    warps: int
    programs: int
    shared: int
    reserved: int


LIMITS = {
    "sm_80": Limits(65536, 8, 32, 64, 32, 164 << 10, 1024),
    "sm_90": Limits(65536, 8, 32, 64, 32, 228 << 10, 1024),
    "sm_100": Limits(65536, 8, 32, 64, 32, 228 << 10, 1024),
    # four SIMDs with 512 vector registers a lane, at most eight wavefronts each
    "gfx942": Limits(4 * 512 * 64, 8, 64, 32, 32, 64 << 10, 0),
}


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Share of a unit's warps that can be there at once, by registers, shared memory and programs.

    Args:
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.

    >>> occupancy("sm_90", 168, 0, 8)
    0.125
    >>> occupancy("sm_90", 32, 0, 4)
    1.0
    """
    limits = LIMITS[target]
    rounded = -(-max(registers, 1) // limits.step) * limits.step
    by_registers = limits.registers // (rounded * limits.width * warps)
    taken = shared + limits.reserved
    by_shared = limits.shared // taken if taken else limits.programs
    return min(by_registers, by_shared, limits.programs, limits.warps // warps) * warps / limits.warps


def roofline(gpu: Gpu, work: Work, on_tensor_cores: bool) -> tuple[float, str]:
    """The least time the work can take, and what sets it.

    Args:
        on_tensor_cores: whether the products are of bfloat16 or float16; those of float32 are not rounded to TF32 here.

    Returns:
        (seconds, "memory", "products" or "steps").
    """
    multiply = gpu.tensor if on_tensor_cores else 2 * gpu.fused * gpu.units * gpu.clock
    times = {
        "memory": work.bytes / gpu.bandwidth,
        "products": work.products / multiply,
        "steps": work.steps / (gpu.lanes * gpu.units * gpu.clock),
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound
