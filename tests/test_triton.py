"""Triton kernels against the references: in the interpreter where there is no GPU (conftest.py), compiled where there
is one. What the compiler makes of them is checked by `python -m atts_triton.aot`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atts_engine import ops
from tests.triton_cases import check_gate, check_score_tokens

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))


def test_score_tokens_agrees_with_float64() -> None:
    check_score_tokens(DEVICE, DTYPES)


def test_gate_agrees_with_the_reference_to_the_bit() -> None:
    check_gate(DEVICE)


def test_tiling_is_a_function_of_the_model_and_covers_the_vocabulary() -> None:
    from atts_triton.score_tokens import MAX_SPLITS, tiling

    for vocab, hidden in ((1, 8), (48, 32), (49152, 576), (128256, 4096), (151936, 5121)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            sizes = tiling(vocab, hidden, dtype)
            columns = sizes.tiles_per_split * sizes.block_v
            assert 1 <= sizes.splits <= MAX_SPLITS
            assert (sizes.splits - 1) * columns < vocab <= sizes.splits * columns


def test_kernels_compile_without_a_gpu_and_do_not_spill(root: Path) -> None:
    """One family; `make check-gpu-code` compiles all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "atts_triton.aot", "--arch", "90", "--only", "gate"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all fit" in done.stdout


@pytest.mark.gpu
def test_a_score_does_not_depend_on_its_company_on_the_device() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 256, generator=g).bfloat16().cuda()
    weight = torch.randn(5003, 256, generator=g).bfloat16().cuda()
    ids = torch.randint(0, 5003, (700,), generator=g).cuda()
    with ops.use("triton"):
        whole = ops.score_tokens(hidden, weight, ids)
        for start, end in ((0, 1), (3, 40), (130, 700)):
            assert torch.equal(ops.score_tokens(hidden[start:end], weight, ids[start:end]), whole[start:end])
