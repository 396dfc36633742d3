"""The cases as pytest-benchmark sees them: `pytest tests/test_bench_cases.py --benchmark-enable` times the quick shapes.

Without that option every case runs once on its smallest shape, untimed.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from hftcore.bench.cases import CASES
from hftcore.bench.job import QUICK, UnavailableError, shape_of

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc):
    is_timed = not metafunc.config.getoption("benchmark_disable") or metafunc.config.getoption("benchmark_enable")
    wanted = [
        (name, shape, dtype)
        for name, case in CASES.items()
        for shape in (case.shapes if is_timed else case.shapes[:1])
        for dtype in case.dtypes
        if shape in QUICK
    ]
    names = [f"{name} {shape} {str(dtype).removeprefix('torch.')}" for name, shape, dtype in wanted]
    metafunc.parametrize(("name", "shape", "dtype"), wanted, ids=names)


def test_case(benchmark, name, shape, dtype):
    try:
        job = CASES[name].prepare(shape, dtype, CPU)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    work = CASES[name].work

    def restore():
        job.restore()  # whose result would be taken for arguments

    try:
        answer = benchmark.pedantic(job.ours, setup=restore, rounds=5, warmup_rounds=1)
        job.check(job.answer(answer))
    finally:
        job.close()
    if work:
        ideal = work(shape_of(shape, dtype), dtype.itemsize)
        benchmark.extra_info |= {"bytes_moved": ideal.bytes, "products": ideal.products}
