"""Maps the top-level folders to import names and builds the optional native CPU library."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

FOLDERS = {
    "hftcore": "hftcore",
    "hftcore.kernels": "kernels",
    "hftcore.bindings": "bindings",
    "hftcore.bench": "bench",
}

# plain C interface, loaded with ctypes; optional: without a compiler the torch fallback serves
NATIVE = Extension(
    "hftcore.kernels.native._native",
    sources=["kernels/native/native.cpp"],
    depends=[str(path) for path in sorted(Path("kernels/native").glob("*.h"))],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for root, folder in FOLDERS.items()
        for name in [root, *(f"{root}.{child}" for child in find_packages(folder))]
    ],
    ext_modules=[NATIVE] if platform.system() != "Windows" else [],
)
