"""The examples in docstrings and in the README run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import hftcore
import hftcore.bindings
import hftcore.kernels

ROOT = Path(__file__).resolve().parent.parent


def modules():
    for package in (hftcore, hftcore.kernels, hftcore.bindings):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".kernels.triton" not in found.name and not found.name.endswith(("__main__", "._native")):
                yield found.name


@pytest.mark.parametrize("name", sorted(set(modules())))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {
        "hftcore": hftcore,
        "torch": torch,
        **{name: getattr(hftcore, name) for name in hftcore.__all__},
        **vars(hftcore.ops),
        **vars(module),
    }
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_every_link_in_the_documents_points_at_a_file():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("bench/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
