"""The cases of `python -m bench.kernels` under pytest-benchmark, one test for each of our implementations.

    python -m pytest bench/kernels --benchmark-only --benchmark-columns=median,iqr,ops --benchmark-group-by=param:case

Without rotation of inputs and without CUDA graphs: for a look at one change. The table's figures are those to compare.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atts_engine import ops
from bench.kernels.cases import Case, cases
from bench.kernels.devices import synchronise
from bench.kernels.run import implementations

pytest.importorskip("pytest_benchmark", reason="the extra dev brings pytest-benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = [
    pytest.param(case, impl, id=f"{case.op} {case.label} {impl}")
    for case in cases("8b" if DEVICE.type == "cuda" else "135m", torch.bfloat16)
    for impl in implementations(case, DEVICE)
]


@pytest.mark.parametrize(("case", "impl"), RUNS)
def test_op(benchmark: Any, case: Case, impl: str) -> None:
    arguments = case.make(DEVICE, 0)
    function = getattr(ops, case.op)

    def call() -> None:
        function(*arguments)
        synchronise(DEVICE)

    with ops.use(impl):
        benchmark(call)
