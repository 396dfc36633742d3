"""Tiny models with many equal scores, their energies, and their checkpoints in any number of files."""

import json

import torch
from safetensors.torch import load_file, save_file

from hftcore import Energy
from hftcore.layers import find_layers


def with_ties(model, seed):
    """Few different weights, so that many scores are equal and position decides."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=draw) / 4)
    return model


def energy_of(model, seed=0):
    """Energies with zeros and equal values, and an expert that no token reached."""
    draw = torch.Generator().manual_seed(seed)
    values = {}
    for layer in find_layers(model):
        shape = (*layer.weight.shape[:-2], layer.weight.shape[-1])
        values[layer.name] = torch.randint(0, 4, shape, generator=draw).float()
        if len(shape) == 2:
            values[layer.name][1] = 0
    return Energy(values, tokens=1, samples=1)


def save_in(model, folder, files, seed):
    """The checkpoint in so many files, tensors dealt out at random."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if files > 1:
        (folder / "model.safetensors").unlink()
        places = torch.randint(files, (len(tensors),), generator=torch.Generator().manual_seed(seed)).tolist()
        places[:files] = range(files)
        where = {name: f"part-{place}.safetensors" for name, place in zip(tensors, places, strict=True)}
        for file in set(where.values()):
            save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
