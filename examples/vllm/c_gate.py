"""Verdicts from log-probabilities, by the C library alone: for a process that has numpy and no torch, such as a client
of vLLM. The ring buffers are numpy arrays, which `atts_gate_cpu` reads and writes in place.

    gate = CGate("libatts.so", "self.npz")
    scores, takeovers = gate.judge([[-0.1, -2.3, ...], ...], turns=[0, 1])

The log-probabilities of a span are those that vLLM replies with: `logprobs: 0` of what a model drew, or
`prompt_logprobs: 0` where another one scores it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LEVEL_ONE = 1 << 32
ABI = (0, 5)  # major and minor: before 1.0 a minor version may change the structs


def _struct(name: str, arrays: str, counts: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, type]] = [("struct_size", ctypes.c_uint64)]
    fields += [(field, ctypes.c_void_p) for field in arrays.split()]
    fields += [(field, ctypes.c_int64) for field in counts.split()]  # workspace_bytes is unsigned, and 0 here
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_SPAN_MEAN = _struct("atts_span_mean_params", "logprob cu_seqlens score sum error", "tokens batch")
_GATE = _struct(
    "atts_gate_params",
    "score key level u insert ring size head greater ties n takeover p workspace error",
    "workspace_bytes batch keys capacity",
)


class CGate:
    """A conformal gate over the store of a calibration file (docs/formats.md), which learns if `learn` is set.

    The p-value is the plain one, tested at the file's alpha. OSError where the library cannot be loaded, RuntimeError
    with the library's own words for what it refuses.
    """

    def __init__(self, library: str | os.PathLike[str], calibration: str | os.PathLike[str], *, learn: bool = False):
        self._library = ctypes.CDLL(os.fspath(library))
        if divmod(self._library.atts_version() // 100, 100) != ABI:
            raise RuntimeError(f"{library} has ABI {self._library.atts_version()}, this file {ABI}")
        self._library.atts_strerror.restype = ctypes.c_char_p
        with np.load(calibration, allow_pickle=False) as file:
            self.ring, self.size, self.head = file["ring"], file["size"], file["head"]
            alpha = json.loads(str(file["meta"]))["alpha"]
        self._level = math.ceil(alpha * LEVEL_ONE)
        self._learn = learn

    def judge(
        self, spans: Sequence[Sequence[float]], turns: Sequence[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """(score[B] in nats per token, takeover[B]) of B spans of log-probabilities and their chains' turns."""
        batch, (keys, capacity) = len(spans), self.ring.shape
        logprob = np.array([value for span in spans for value in span], np.float32)
        bounds = np.cumsum([0, *(len(span) for span in spans)], dtype=np.int64)
        score, total = np.empty(batch, np.float32), np.empty(batch, np.float64)
        means = {"logprob": logprob, "cu_seqlens": bounds, "score": score, "sum": total}
        self._call("atts_span_mean_cpu", _SPAN_MEAN, means, tokens=len(logprob), batch=batch)
        takeover = np.empty(batch, np.uint8)
        arrays = {
            "score": score,
            "key": np.minimum(np.array(turns, np.int64), keys - 1),
            "level": np.full(batch, self._level, np.int64),
            "u": np.full(batch, LEVEL_ONE, np.int64),
            "insert": np.full(batch, self._learn, np.uint8),
            "ring": self.ring,
            "size": self.size,
            "head": self.head,
            "takeover": takeover,
            "p": np.empty(batch, np.float64),
        }
        arrays |= {name: np.empty(batch, np.int64) for name in ("greater", "ties", "n")}
        self._call("atts_gate_cpu", _GATE, arrays, batch=batch, keys=keys, capacity=capacity)
        return score, takeover.astype(bool)

    def _call(self, name: str, kind: type[ctypes.Structure], arrays: dict[str, npt.NDArray], **counts: int) -> None:
        pointers = {field: array.ctypes.data for field, array in arrays.items()}
        status = getattr(self._library, name)(ctypes.byref(kind(ctypes.sizeof(kind), **pointers, **counts)))
        if status:
            raise RuntimeError(f"{name}: {self._library.atts_strerror(status).decode()}")
