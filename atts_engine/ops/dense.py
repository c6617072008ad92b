"""Dense layers of the decoder. Every function is row-invariant on the CPU in fp32: the bits of a row do not depend
on how many rows share the call, nor on where the row stands among them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as _torch_linear

from atts_engine.errors import InputError
from atts_engine.ops import checks, native
from atts_engine.ops.dispatch import TRITON, chosen, runs_native
from atts_engine.ops.packed import PackedWeight, Weight

ROW_MULTIPLE = 16


def pad_rows(x: Tensor) -> Tensor:
    """x[N, ...] with zero rows added until N is a multiple of 16; x itself where it already is."""
    missing = -x.shape[0] % ROW_MULTIPLE
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """A bfloat16 matrix weight[M, K] on the CPU in 12.125 bits a weight, exactly (`atts_pack_weight_params` in
    csrc/include/atts/atts.h has the format); a block of 32 x 64 weights with more than sixteen
    exponents takes 16.125. None where M is no multiple of 32 or K none of 64: such a matrix stays as it is.

    Few-row products take the time that their weights take to read. The idea is that of DFloat11 (arXiv 2504.11651),
    here with codes of one length.

    Raises InputError for another dtype, device or number of dimensions, and where csrc/ was not built.
    """
    checks.tensor("pack_weight", "weight", weight, (-1, -1), (torch.bfloat16,), weight)
    if weight.device.type != "cpu" or native.library() is None:
        raise InputError("pack_weight: packed weights are for the CPU, and need csrc/ (CMake and a C++ compiler)")
    rows, columns = weight.shape
    fits = rows > 0 and columns > 0 and rows % native.PACKED_ROWS == 0 and columns % native.PACKED_COLUMNS == 0
    return PackedWeight(native.pack_weight(weight), rows, columns) if fits else None


def unpack_weight(weight: Weight) -> Tensor:
    """The plain matrix [M, K] of a packed one, with the bits that `pack_weight` was given; a plain one as it is. Raises
    InputError for data that `pack_weight` did not make, or not of these sizes."""
    if isinstance(weight, PackedWeight):
        return native.unpack_weight(weight.data, weight.rows, weight.columns)
    return weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x[N, K] @ weight[M, K].T + bias[M] -> [N, M], in the dtype of x.

    On a CPU fp32, and bfloat16 without AMX, run in csrc/ where that was built, with fp32 sums. A packed weight gives
    the bits of the plain one; outside csrc/ it is unpacked anew for each call.

    Raises InputError where the inner sizes or the dtypes differ.
    """
    checks.linear(x, weight, bias)
    rows = x.shape[0]
    if runs_native("linear", x.device, x.dtype):
        return native.linear(x, weight, bias)
    weight = unpack_weight(weight)
    if x.is_cuda or rows % ROW_MULTIPLE == 0:
        return _torch_linear(x, weight, bias)
    # CPU BLAS takes another kernel for the rows that are left over from its tile: with 1-3 rows, and with 5-7 and
    # 9-11 when two threads cut the rows, the bits of a row change. Whole tiles take one kernel only.
    return _torch_linear(pad_rows(x), weight, bias)[:rows]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight[H] over the last dimension of x[N, H] or x[N, h, H] -> the same shape; fp32
    inside, rounded to the dtype of x and weight before the weight and after it.

    Raises InputError where weight differs from x in width or dtype.
    """
    checks.rms_norm(x, weight)
    if chosen("rms_norm", x.device) == TRITON:
        import atts_triton

        return atts_triton.rms_norm(x, weight, eps)
    if x.dim() == 3:
        return rms_norm(x.reshape(-1, x.shape[2]), weight, eps).view(x.shape)
    if runs_native("rms_norm", x.device, x.dtype):
        return native.rms_norm(x, weight, eps)
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s, weight[H], eps)) of s = x[N, H] + delta[N, H] in their dtype: a residual and the norm behind it,
    which reads it while it is at hand. Raises InputError where shapes or dtypes differ."""
    checks.add_rms_norm(x, delta, weight)
    if chosen("add_rms_norm", x.device) == TRITON:
        import atts_triton

        return atts_triton.add_rms_norm(x, delta, weight, eps)
    if runs_native("add_rms_norm", x.device, x.dtype):
        return native.add_rms_norm(x, delta, weight, eps)
    total = x + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate[N, F]) * up[N, F] -> [N, F]; fp32 inside, the dtype of gate outside.

    Written out with `exp`: torch's own CPU silu and sigmoid round differently in the tail of a vector, so an element's
    bits would depend on its place in the batch. `exp` and the four operations do not.

    Raises InputError where gate and up differ in shape or dtype.
    """
    checks.silu_mul(gate, up)
    if chosen("silu_mul", gate.device) == TRITON:
        import atts_triton

        return atts_triton.silu_mul(gate, up)
    if runs_native("silu_mul", gate.device, gate.dtype):
        return native.silu_mul(gate, up)
    wide = gate.float()
    return (wide / torch.neg(wide).exp_().add_(1.0)).mul_(up).to(gate.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x[N, h, D] by cos[N, D/2], sin[N, D/2] -> [N, h, D], halves rotated together
    (the "rotate_half" convention: element i pairs with i + D/2). cos and sin are fp32; fp32 inside, each product and
    each sum rounded on its own.

    Raises InputError for an odd D and for angles of other shapes.
    """
    checks.rope(x, cos, sin)
    if chosen("rope", x.device) == TRITON:
        import atts_triton

        return atts_triton.rope(x, cos, sin)
    if runs_native("rope", x.device, x.dtype):
        return native.rope(x, cos, sin)
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
