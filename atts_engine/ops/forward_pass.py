"""A decoder's whole forward pass as one call of csrc/: one for Python to make, and not eleven for each layer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atts_engine.ops import checks, native
from atts_engine.ops.dispatch import runs_native
from atts_engine.ops.packed import PackedWeight, Weight

_OPS = ("add_rms_norm", "kv_append", "linear", "paged_attention", "rms_norm", "rope", "silu_mul")
"""What the call is made of. It stands in for them where csrc/ would run each, and has their bits."""


class ForwardPass:
    """Token ids to hidden states behind the last norm, on the CPU, in the dtype of embed (`serves`).

    embed: [V, H]; norm: [H]; cos, sin: fp32 [positions, D/2], D a multiple of 16. layers: the weights of each block,
    named and shaped as `atts_decoder_layer` in csrc/include/atts/atts.h has them; qkv_bias, q_norm and k_norm may be
    None; in bfloat16 qkv, out, gate_up and down may be packed, each for itself. All are held and must not move. For
    one caller at a time: what it works in is kept from call to call.

    Raises InputError where shapes, dtypes or devices do not fit.
    """

    def __init__(
        self,
        embed: Tensor,
        layers: Sequence[Mapping[str, Weight | None]],
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        inner: int,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> None:
        vocab, hidden = embed.shape
        positions, half = cos.shape
        dim = 2 * half
        qkv = (heads + 2 * kv_heads) * dim
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "qkv": (qkv, hidden), "qkv_bias": (qkv,), "q_norm": (dim,), "k_norm": (dim,),
            "out": (hidden, heads * dim), "mlp_norm": (hidden,), "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }  # fmt: skip
        held: list[Tensor] = []
        own = embed.dtype

        def address(name: str, x: Weight | None, shape: tuple[int, ...], dtype: torch.dtype = own) -> int:
            if x is None:
                return 0
            checks.tensor("decoder", name, x, shape, (dtype,), embed)
            held.append(x.data if isinstance(x, PackedWeight) else x.contiguous())
            return held[-1].data_ptr()

        def block(layer: Mapping[str, Weight | None]) -> native.DecoderLayer:
            found = {
                f"{name}_packed" if isinstance(layer[name], PackedWeight) else name: address(name, layer[name], shape)
                for name, shape in shapes.items()
            }
            return native.DecoderLayer(**found)

        blocks = [block(layer) for layer in layers]
        self._layers = (native.DecoderLayer * len(blocks))(*blocks)
        self._params = native.DecoderParams(
            struct_size=ctypes.sizeof(native.DecoderParams),
            layer=ctypes.addressof(self._layers),
            embed=address("embed", embed, (vocab, hidden)),
            norm=address("norm", norm, (hidden,)),
            cosine=address("cos", cos, (positions, half), torch.float32),
            sine=address("sin", sin, (positions, half), torch.float32),
            layers=len(blocks),
            vocab=vocab,
            hidden=hidden,
            inner=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            max_positions=positions,
            eps=eps,
            scale=dim**-0.5,
            dtype=native.DTYPES[own],
        )
        self._dtype = own
        self._held = held
        self._pool = (len(blocks), 2, -1, -1, kv_heads, dim)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def serves(dtype: torch.dtype) -> bool:
        return dtype in native.DTYPES

    def runs(self, kv: Tensor) -> bool:
        """Whether the call can be made now: csrc/ is what runs each of its ops, and nobody has asked, by
        `ops.checked()`, to see their inputs."""
        return (
            kv.dtype is self._dtype
            and self._params.head_dim % 16 == 0
            and not checks.in_force()
            and all(runs_native(op, kv.device, kv.dtype) for op in _OPS)
        )

    def __call__(
        self, ids: Tensor, positions: Tensor, block_table: Tensor, cu_q: Tensor, kv_len: Tensor, kv: Tensor
    ) -> Tensor:
        """Hidden states [N, H]; writes the rows' keys and values to kv[L, 2, P, page, Hkv, D], dense, in place.

        ids, positions: int64 [N]; block_table: int32 [B, W]; cu_q: int32 [B + 1]; kv_len: int32 [B]: as
        `kv_slots` and `paged_attention` take them.

        Raises InputError where shapes or dtypes do not fit, for an id outside the vocabulary, a position outside the
        table of cos and sin or the row of the block table, a page outside the pool, and a batch that does not add up.
        """
        rows, batch = ids.shape[0], kv_len.shape[0]
        for name, x, shape, dtype in (
            ("ids", ids, (-1,), torch.int64),
            ("positions", positions, (rows,), torch.int64),
            ("block_table", block_table, (batch, -1), torch.int32),
            ("cu_q", cu_q, (batch + 1,), torch.int32),
            ("kv_len", kv_len, (-1,), torch.int32),
            ("kv", kv, self._pool, self._dtype),
        ):
            checks.tensor("decoder", name, x, shape, (dtype,), kv)
        checks.dense("decoder", "kv", kv)
        ids, positions, block_table, cu_q, kv_len = (
            x.contiguous() for x in (ids, positions, block_table, cu_q, kv_len)
        )
        params = self._params
        out = kv.new_empty(rows, params.hidden)
        params.ids, params.positions = ids.data_ptr(), positions.data_ptr()
        params.block_table, params.cu_q, params.kv_len = block_table.data_ptr(), cu_q.data_ptr(), kv_len.data_ptr()
        params.kv, params.out = kv.data_ptr(), out.data_ptr()
        params.rows, params.batch, params.table_width = rows, batch, block_table.shape[1]
        params.pages, params.page = kv.shape[2], kv.shape[3]
        params.threads = torch.get_num_threads()
        needed = native.decoder_workspace(params)
        if needed > self._workspace.numel():
            # Every row asks for as much: a step with a few more finds room too.
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        params.workspace, params.workspace_bytes = self._workspace.data_ptr(), self._workspace.numel()
        native.decoder(params)
        return out
