"""What Triton compiles, without a GPU: a driver that has none notes what would be compiled, and launches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

_SPY = """
import numpy as np
import torch
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from atts_engine import ops
from atts_engine.conformal import GateRequest, RingStore
from atts_engine.evaluation.simulation.catalogue import MODELS
from atts_engine.ops import dispatch
from atts_engine.runtime.gating import DeviceGate, ScoredSpan
from atts_engine.runtime.runner import Runner, _idle_arrays, _warm_shapes
from bench.gpu_proof.models import random_model

CPU = torch.device("cpu")
compiled = []


class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *_): return None
    def run(self, *_): return None


def compile(self, key, signature, device, *_):
    compiled.append(self.fn.__qualname__)
    self.device_caches[device][0][key] = Kernel()
    return Kernel()


# Nothing is computed, and what nobody wrote must look like ids.
torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros
JITFunction._do_compile = compile
driver.set_active(Driver())
dispatch._triton_devices = lambda: frozenset({"cpu"})
ops.use("triton")
"""
_LANE = """
TOKENS, PAGE = 1024, 16
for name in ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b"):
    # Heads as they are; the rest as small as may be, with an odd number of splits of the vocabulary.
    config = replace(MODELS[name], num_layers=1, vocab_size=128 * 119, hidden_size=64, intermediate_size=64)
    runner = Runner(random_model(name, config, CPU, torch.bfloat16).decoder, 2049, PAGE, CPU, torch.bfloat16)

    @torch.inference_mode()
    def step(rows, sequences, pages):
        arrays = _idle_arrays(rows, sequences, pages)
        logits, _ = runner._forward(arrays, None)
        runner._sample(arrays, logits)

    for shape in _warm_shapes(TOKENS, runner._max_pages, PAGE):
        step(*shape)
    warm = len(compiled)
    for sequences in (1, 3, 16, 100):
        for rows in (1, 2, 3, 65, 66, 130, 257, 1000):
            for pages in (1, 33, 300, 2048):
                if rows >= sequences:
                    step(rows, sequences, pages)
                    assert compiled[warm:] == [], (name, rows, sequences, pages, compiled[warm:])


def decide(spans, capacity):
    request = GateRequest(RingStore(3, capacity), key=0, level=0, u=1, insert=True)
    DeviceGate(CPU).decide([ScoredSpan(np.zeros(7, dtype=np.float32), request)] * spans)


decide(1, 16)
warm = len(compiled)
for spans in (1, 2, 3, 64):
    decide(spans, 4096)
assert compiled[warm:] == [], compiled[warm:]
assert {"_attend_kernel", "_gate_kernel", "_span_kernel"} <= set(compiled)
"""


def test_a_lane_that_was_warmed_up_compiles_nothing(root: Path) -> None:
    """Whatever the number of rows, sequences and pages of a step, and of spans of a verdict."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _SPY + _LANE]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
