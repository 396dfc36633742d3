"""Run with one commit's hftcore: prepares cases and makes their own call."""

from typing import Any

import torch

from hftcore.bench.cases import CASES
from hftcore.bench.job import Job
from hftcore.bench.worker import serve


def prepare(request: dict[str, Any]) -> Job:
    """The job of a case; its answer was checked once."""
    case = CASES[request["case"]]
    job = case.prepare(request["shape"], getattr(torch, request["dtype"]), torch.device("cpu"))
    job.check(job.answer(job.ours()))
    return job


if __name__ == "__main__":
    serve(prepare)
