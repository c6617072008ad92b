"""One public function per kernel. Each docstring is the contract; the torch reference serves every device
and is the oracle; `chosen` tells which implementation runs. Tensors that do not fit an op's contract raise InputError
(checks.py). All are also registered as torch.ops.atts.*"""

from __future__ import annotations

from atts_engine.ops.attention import Scratch, paged_attention
from atts_engine.ops.checks import checked
from atts_engine.ops.dense import add_rms_norm, linear, pack_weight, rms_norm, rope, silu_mul, unpack_weight
from atts_engine.ops.dispatch import (
    IMPLEMENTATIONS,
    Obstacle,
    available,
    capturable,
    chosen,
    obstacle,
    packing_obstacle,
    runs_native,
    use,
)
from atts_engine.ops.forward_pass import ForwardPass
from atts_engine.ops.gating import GateResult, gate
from atts_engine.ops.library import register
from atts_engine.ops.packed import PackedWeight, Weight
from atts_engine.ops.paging import (
    kv_append,
    kv_copy_pages,
    kv_gather,
    kv_scatter,
    kv_slots,
    kv_swap,
    rope_kv_append,
)
from atts_engine.ops.sampling import sample
from atts_engine.ops.scoring import score_logits, score_tokens, span_mean, token_confidence
from atts_engine.ops.verdicts import ScoreGateResult, score_gate

__all__ = [
    "IMPLEMENTATIONS",
    "ForwardPass",
    "GateResult",
    "Obstacle",
    "PackedWeight",
    "ScoreGateResult",
    "Scratch",
    "Weight",
    "add_rms_norm",
    "available",
    "capturable",
    "checked",
    "chosen",
    "gate",
    "kv_append",
    "kv_copy_pages",
    "kv_gather",
    "kv_scatter",
    "kv_slots",
    "kv_swap",
    "linear",
    "obstacle",
    "pack_weight",
    "packing_obstacle",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv_append",
    "runs_native",
    "sample",
    "score_gate",
    "score_logits",
    "score_tokens",
    "silu_mul",
    "span_mean",
    "token_confidence",
    "unpack_weight",
    "use",
]

_LIBRARY = register()
