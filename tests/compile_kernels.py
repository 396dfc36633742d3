"""Compile every Triton kernel for every target without a device and print what the machine code looks like, as JSON lines.

Run by `test_compile.py` in a process of its own: compilation is impossible once Triton's interpreter is on.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hftcore.kernels import launch, triton_energy, triton_matrix, triton_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cases():
    """Name, kernel, dtype, constants, warps: what the launchers would ask for, by shape."""
    for dtype in POINTER:
        # float16 differs from bfloat16 in one conversion: the widest rows in registers stand for it
        shapes = [(4096, 11008)]
        if dtype is not torch.float16:
            shapes += [(4096, 256), (11008, 4096), (8192, 28672)]
        for M, N in shapes:
            tile = launch.row_tile(M, N, N, 1)
            constants = {"RESIDENT": tile.block_n >= N, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            for mask, reference in ((0, 0), (1, 0), (0, 1))[: 3 if N == 4096 else 1]:
                flags = {"INVERT": False, "HAS_REFERENCE": bool(reference), "TO_MASK": bool(mask)}
                name = f"prune_rows {M}x{N}" + " mask" * mask + " reference" * reference
                yield name, triton_rows._prune_rows_kernel, dtype, constants | flags, tile.num_warps
        if dtype is torch.float16:
            continue
        flags = {"INVERT": False, "HAS_REFERENCE": False, "TO_MASK": False}
        tile = launch.group_tile(4096)
        constants = {"m": 4, "WIDTH": 4, "BLOCK_N": tile.block_n} | flags
        yield "prune_groups 2:4", triton_rows._prune_groups_kernel, dtype, constants, tile.num_warps
        tile = launch.band_tile(4096, 4096, 4096, 1)
        block = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        plain = block | {"HAS_REFERENCE": False}
        yield "score_histogram", triton_matrix._score_histogram_kernel, dtype, plain, tile.num_warps
        yield "tie_counts", triton_matrix._tie_counts_kernel, dtype, plain, tile.num_warps
        yield "cut", triton_matrix._cut_kernel, dtype, block | flags, tile.num_warps
        energy = launch.energy_tile(8192, 4096)
        constants = {"HAS_KEEP": True, "TOKENS": energy.tokens, "BLOCK_T": energy.block_t, "BLOCK_N": energy.block_n}
        yield "column_energy", triton_energy._column_energy_kernel, dtype, constants, energy.num_warps
    yield "column_energy combine", triton_energy._combine_kernel, torch.float32, {"BLOCK_N": launch.COMBINE}, 1
    yield "prune_groups pack", triton_rows._pack_kernel, torch.uint8, {"BLOCK_N": launch.group_tile(4096).block_n}, 2


def source(kernel, dtype: torch.dtype, constants: dict) -> ASTSource:
    """The specialisation the launcher would make for contiguous, aligned tensors with sizes that 16 divides."""
    fixed = {
        "norm_ptr": "*fp32",
        "mask_ptr": "*u8",
        "flags_ptr": "*u8",
        "keep_ptr": "*i1",
        "partial_ptr": "*fp64",
        "energy_ptr": "*fp32",
        "spoiled_ptr": "*i64",
        "counts_ptr": "*i64",
        "ties_ptr": "*i64",
        "quota_ptr": "*i64",
        "quantile": "fp32",
    }
    divisible = {"M", "N", "T", "stride_wm", "stride_rm", "stride_xt"}
    constants = dict(constants)
    constants |= dict.fromkeys({"stride_wn", "stride_rn", "stride_xn", "stride_k"} & set(kernel.arg_names), 1)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = fixed.get(name) or (POINTER[dtype] if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name in divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def nvidia(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"\bLDG\S*", code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": sum(".128" in load for load in loads),
        "loads": len(loads),
        "flushes": ".ftz" in compiled.asm["ptx"],
        "shared": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


def amd(compiled) -> dict:
    code = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1])  # noqa: E731
    loads = re.findall(r"\b(?:global|buffer)_load_\S+", code)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        # scalar registers (lane predicates) are kept in lanes of vector registers: no memory is touched
        "scalar_spills": number("sgpr_spill_count"),
        "wide_loads": sum("dwordx4" in load for load in loads),
        "loads": len(loads),
        # bits 4-5 of the mode register: 3 keeps float32 denormals
        "flushes": not re.search(r"\.amdhsa_float_denorm_mode_32 3", code),
        "shared": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\t[vsgdb]\w*_", code, re.M)),
    }


def main(names: list[str]) -> None:
    for target in names:
        for name, kernel, dtype, constants, warps in cases():
            compiled = triton.compile(
                source(kernel, dtype, constants), target=TARGETS[target], options={"num_warps": warps} | launch.EXACT
            )
            found = amd(compiled) if target.startswith("gfx") else nvidia(compiled)
            case = {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "target": target, "warps": warps}
            print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
