"""Keep the source folders `kernels/`, `bindings/` and `bench/` from being importable as top-level packages."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
