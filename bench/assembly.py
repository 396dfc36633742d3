"""What the machine code of a compiled Triton kernel looks like: registers, spills, the width of its loads."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # the triton package carries them


def inspect(compiled: Any, target: str) -> dict[str, Any]:
    """Facts of a `triton.compile` result.

    Returns:
        registers (a thread; vector registers on AMD), stack (bytes of local memory a thread), spills, wide_loads (of 128 bits) among
        loads (from global memory), load_bits (the widest), shared (bytes a program), instructions, flushes (denormals to zero).
    """
    found = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    return found | {"shared": compiled.metadata.shared}


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    # from global memory to registers or straight to shared memory
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.\S*|\bUTMALDG\S*", code)
    widths = [_bits(load) for load in loads]
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": widths.count(128),
        "loads": len(loads),
        "load_bits": max(widths, default=0),
        "flushes": ".ftz" in compiled.asm["ptx"],
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


def _bits(load: str) -> int:
    """Of one load a thread: 32 unless it says more; the bulk copies of Hopper move whole tiles."""
    said = re.search(r"\.(64|128)\b", load)
    return 128 if load.startswith("UTMALDG") else int(said[1]) if said else 32


def _amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    loads = re.findall(r"\b(?:global|buffer)_load_\S+", code)
    widths = [128 if "dwordx4" in load else 64 if "dwordx2" in load else 32 for load in loads]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", code),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", code),
        # scalar registers (lane predicates) that do not fit are kept in lanes of vector registers: no memory is touched
        "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", code),
        "wide_loads": widths.count(128),
        "loads": len(loads),
        "load_bits": max(widths, default=0),
        # bits 4-5 of the mode register: 3 keeps float32 denormals
        "flushes": not re.search(r"\.amdhsa_float_denorm_mode_32 3", code),
        "instructions": len(re.findall(r"^\t[vsgdb]\w*_", code, re.M)),
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output lacks {pattern!r}; this version of Triton prints something else")
    return int(found[1])
