"""The gate as a logits processor of vLLM's model runner V1 (vLLM 0.32: CPU, and GPUs with VLLM_USE_V2_MODEL_RUNNER=0).

    vllm serve MODEL --logits-processors examples.vllm.self_gate:SelfGate \
        --additional-config '{"atts_gate": {"calibration": "self.npz"}}'

A request is gated if it says so: {"stop_token_ids": [MARK], "vllm_xargs": {"atts_turn": 0, "atts_mark": MARK}}. On a
takeover the token MARK, which the model cannot write otherwise, ends it: finish_reason "stop", stop_reason MARK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from atts_engine.errors import InputError
from examples.vllm.request import GatedRequest
from examples.vllm.span_gate import Integers, gate_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class SelfGate(LogitsProcessor):
    """Keeps a slot of the gate for each gated request, whatever row of the persistent batch it is moved to."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._gate = gate_of(vllm_config, device)
        self._device = device
        self._free = list(range(vllm_config.scheduler_config.max_num_seqs))
        # By row: the slot, and the request's own list of the tokens it has drawn, which grows.
        self._running: dict[int, tuple[int, list[int]]] = {}
        self._rows = torch.empty(0, dtype=torch.int64, device=device)
        self._slots: Integers = np.zeros(0, np.int64)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        GatedRequest.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._leave(row)
        for row, params, _, output_ids in batch_update.added:
            self._leave(row)
            request = GatedRequest.of(params)
            if request is not None:
                slot = self._free.pop()
                self._gate.open(slot, request)
                self._running[row] = slot, output_ids
        for source, target, direction in batch_update.moved:
            moved, met = self._running.pop(source, None), self._running.pop(target, None)
            if direction == MoveDirectionality.SWAP:
                self._place(source, met)
            elif met is not None:
                self._free.append(met[0])
            self._place(target, moved)
        self._rows = torch.tensor(list(self._running), dtype=torch.int64, device=self._device)
        self._slots = np.array([slot for slot, _ in self._running.values()], np.int64)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._running:
            return logits
        # The interface hands tokens out as lists: the one loop over rows.
        last = [ids[-1] if ids else 0 for _, ids in self._running.values()]
        if min(last) < 0:
            raise InputError(
                "vLLM withholds the tokens of the last step: name the processor in --logits-processors, or start with "
                "--no-async-scheduling where it is an entry point"
            )
        drawn = np.array([len(ids) for _, ids in self._running.values()], np.int64)
        tokens = torch.tensor(last, dtype=torch.int64).to(self._device, non_blocking=True)
        self._gate.step(logits, self._rows, self._slots, tokens, drawn)
        return logits

    def _leave(self, row: int) -> None:
        left = self._running.pop(row, None)
        if left is not None:
            self._free.append(left[0])

    def _place(self, row: int, running: tuple[int, list[int]] | None) -> None:
        if running is not None:
            self._running[row] = running
