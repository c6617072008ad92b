"""Triton kernels against the references: in the interpreter here, in a process of its own since Triton reads
TRITON_INTERPRET when a kernel is defined; compiled, and to the bit, where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atts_engine import ops

pytest.importorskip("triton", reason="triton is not installed")

_INTERPRETED = """
import sys
import torch
from tests.triton_cases import check_gate, check_score_tokens

torch.set_num_threads(1)
check_score_tokens("cpu", (torch.float32, torch.float16))
check_gate("cpu")
"""


def test_kernels_in_the_interpreter(root: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", _INTERPRETED]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiling_is_a_function_of_the_model_and_covers_the_vocabulary() -> None:
    from atts_triton.score_tokens import MAX_SPLITS, tiling

    for vocab, hidden in ((1, 8), (48, 32), (49152, 576), (128256, 4096), (151936, 5121)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            sizes = tiling(vocab, hidden, dtype)
            columns = sizes.tiles_per_split * sizes.block_v
            assert 1 <= sizes.splits <= MAX_SPLITS
            assert (sizes.splits - 1) * columns < vocab <= sizes.splits * columns


def test_gate_compiles_without_a_gpu_and_does_not_spill() -> None:
    from atts_triton.aot import compile_variant, variants

    gate = next(variant for variant in variants() if variant.name == "gate")
    usage = compile_variant(gate, 90)
    assert usage.local == 0
    assert usage.registers <= 255


@pytest.mark.gpu
def test_kernels_on_the_device() -> None:
    from tests.triton_cases import check_gate, check_score_tokens

    check_score_tokens("cuda", (torch.float32, torch.float16, torch.bfloat16))
    check_gate("cuda")


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
