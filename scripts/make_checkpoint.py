"""Make a checkpoint of a wanted size with random weights, and an energy for it, to try and to time the streaming commands.

    python scripts/make_checkpoint.py OUT --shape 13b --dtype bfloat16 --shard-gb 5

Weights are drawn block by block, so memory stays small. The folder loads with `from_pretrained`; it has no tokenizer.
"""

import argparse
import json
from pathlib import Path

import torch

from hftcore.bindings.checkpoints.skeleton import load_skeleton
from hftcore.energy import Energy
from hftcore.layers import find_layers

# hidden size, intermediate size, layers, heads, key-value heads; the Llama models of that size
SHAPES = {
    "tiny": (256, 688, 4, 4, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "3b": (3072, 8192, 28, 24, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
BLOCK = 1 << 22  # weights drawn at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="In place of the shape's own, where the disk has no room for all.")
    parser.add_argument("--dtype", choices=CODES, default="bfloat16")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="Largest size of a file, in 1e9 bytes.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hidden, inner, layers, heads, groups = SHAPES[options.shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": options.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": options.vocabulary,
        "dtype": options.dtype,
    }
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model = load_skeleton(options.out)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards = split(shapes, getattr(torch, options.dtype).itemsize, int(options.shard_gb * 1e9))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write(options.out / file, {name: shapes[name] for name in names}, options.dtype, options.seed)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (options.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    draw = torch.Generator().manual_seed(options.seed)
    energies = {layer.name: torch.rand(layer.weight.shape[-1], generator=draw) * 4 for layer in find_layers(model)}
    Energy(energies, tokens=1, samples=1).save(options.out.with_name(f"{options.out.name}.energy.safetensors"))


def split(shapes: dict[str, tuple[int, ...]], item: int, limit: int) -> list[list[str]]:
    """Names for each file, in order, each file at most `limit` bytes unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = torch.Size(shape).numel() * item
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def write(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """One safetensors file: norms are ones, everything else is normal with deviation 0.02."""
    kind = getattr(torch, dtype)
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = position + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # one block of noise at shifting offsets: drawing all of it would take longer than what is to be timed
    draw = torch.Generator().manual_seed(seed)
    noise = (torch.randn(2 * BLOCK, generator=draw) * 0.02).to(kind)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = torch.Size(shape).numel()
            while left:
                count = min(left, BLOCK)
                start = int(torch.randint(BLOCK, (), generator=draw))
                block = torch.ones(count, dtype=kind) if "norm" in name else noise[start : start + count]
                out.write(block.contiguous().view(torch.uint8).numpy().tobytes())
                left -= count


if __name__ == "__main__":
    main()
