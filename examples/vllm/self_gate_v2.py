"""The gate as a logits processor of vLLM's model runner V2, the default on GPUs since vLLM 0.32.

    vllm serve MODEL --logits-processors examples.vllm.self_gate_v2:SelfGate \
        --additional-config '{"atts_gate": {"calibration": "self.npz"}}'

Requests and verdicts are those of `self_gate.py`. This runner numbers running requests by slots itself and hands the
last tokens out on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from examples.vllm.request import GatedRequest
from examples.vllm.span_gate import gate_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class SelfGate(LogitsProcessor):
    """One slot of the gate for each of the runner's."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._gate = gate_of(vllm_config, req_states.device)
        self._device = req_states.device
        self._prompt_len = req_states.prompt_len
        self._gated = np.zeros(req_states.max_num_reqs, dtype=bool)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        GatedRequest.of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        request = GatedRequest.of(sampling_params)
        self._gated[req_idx] = request is not None
        if request is not None:
            self._gate.open(req_idx, request)
        return request is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = ctx.idx_mapping_np.astype(np.int64)
        at = np.flatnonzero(self._gated[slots])
        if at.size:
            slots = slots[at]
            rows = torch.from_numpy(at).to(self._device, non_blocking=True)
            # Exact without speculative decoding, which `gate_of` refuses.
            drawn = ctx.seq_lens_upper_bound_np[at].astype(np.int64) - self._prompt_len.np[slots]
            self._gate.step(logits, rows, slots, ctx.input_ids[rows].to(torch.int64), drawn)
        return logits
