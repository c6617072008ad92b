"""Part 3: every op in every implementation against float64, bits of a score alone and in company, and the engine
against `transformers`. FlashInfer's kernels, which are still being compiled then (ahead.py), are left to the part
`kernels`, whose table says how far each result is from the reference's."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from atts_engine import ops
from atts_engine.ops import native
from bench.gpu_proof import oracle_models
from bench.gpu_proof.context import Context, Found, Line, OutOfTime, one_line
from bench.gpu_proof.exact import ORACLES, WRITTEN, excess, poisoned, relative
from bench.kernels.cases import SIZES, Case, cases
from bench.kernels.devices import synchronise

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What is served first comes first: time may run out, as every dtype has kernels of its own to compile."""
MOST_FLOPS = 1e12
"""Of a case that float64 computes again."""
ALIKE = 0.9
"""Share of drawn ids, and of verdicts of scores that have an error, that must be the reference's: the noise is a hash,
but its logarithm's last bits may decide between two tokens. Everything else that is moved or decided must be equal."""


def measure(ctx: Context, found: Found) -> None:
    if not found:
        seed = 0 if ctx.dry else random.SystemRandom().randrange(1 << 30)
        found |= {"seed": seed, "ops": [], "invariance": [], "models": {}}
    late = False
    try:
        _collect(ctx, found["seed"], found)
    except OutOfTime:
        late = True
    wrong = [f"{c['op']} {c['impl']} {c['dtype']}" for c in found["ops"] if not c["right"]]
    wrong += [f"{c['op']} {c['impl']} {c['dtype']}: a row's bits" for c in found["invariance"] if not c["same"]]
    wrong += [name for name, model in found["models"].items() if model.get("right") is False]
    if wrong:
        raise RuntimeError(f"{len(wrong)} cells are wrong, {wrong[0]} first")
    if late:
        raise OutOfTime


def _collect(ctx: Context, seed: int, found: Found) -> None:
    oracle_models.measure(ctx, found["models"])
    for impl in ops.IMPLEMENTATIONS:
        for dtype in _dtypes(impl, ctx.device):
            if all((c["impl"], c["dtype"]) != (impl, _name(dtype)) for c in found["invariance"]):
                lost = ctx.begin(f"bits of scores, {impl} {_name(dtype)}")
                found["invariance"] += [_lost(lost, impl, dtype)] if lost else _invariance(impl, dtype, ctx, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch cannot compute deterministically: only its poison is wanted
        done = {(c["op"], c["case"], c["dtype"], c["impl"]) for c in found["ops"]}
        for case, impl in _cells(ctx):
            cell = {"op": case.op, "case": case.label, "dtype": _name(case.dtype), "impl": impl, "error": None}
            if tuple(cell.values())[:4] in done:
                continue
            if (lost := ctx.begin(" ".join(map(str, tuple(cell.values())[:4])))) is not None:
                found["ops"].append(cell | {"error": lost, "right": False})
                continue
            found["ops"].append(cell | _judged(case, impl, ctx.device, seed))
            if found["ops"][-1]["error"]:
                ctx.survived()


def _lost(error: str, impl: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"op": "score_tokens", "impl": impl, "dtype": _name(dtype), "same": False, "error": error}


def _cells(ctx: Context) -> Iterable[tuple[Case, str]]:
    seen = set()
    for dtype in DTYPES:
        for size in ("tiny",) if ctx.dry else ("135m", "8b"):
            for case in cases(size, dtype):
                name = (case.op, case.label, case.dtype)  # some are of fp32 whatever is asked for; once is enough
                if name in seen or (case.flops > MOST_FLOPS and case.op in ORACLES):
                    continue
                seen.add(name)
                able = (i for i in ops.IMPLEMENTATIONS if ops.obstacle(case.op, i, ctx.device) is None)
                yield from ((case, i) for i in able if case.dtype in _dtypes(i, ctx.device))


def _dtypes(impl: str, device: torch.device) -> tuple[torch.dtype, ...]:
    if impl == "native":  # for others it runs the reference
        return tuple(native.DTYPES)
    if device.type == "cpu" and impl == "triton":  # its interpreter multiplies bfloat16 wrongly
        return torch.float16, torch.float32
    if impl == "flashinfer":
        return ()
    return DTYPES


def _judged(case: Case, impl: str, device: torch.device, seed: int) -> dict[str, Any]:
    """`excess` as in exact.py, or for what has no error the share of elements that are the reference's."""
    try:
        got = _outcome(case, impl, device, seed)
        wanted = _outcome(case, "reference", device, seed)
        oracle = ORACLES.get(case.op)
        if oracle is not None:
            truth = oracle(*case.make(device, seed))
            value = max(_finite(excess(g, w, t)) for g, w, t in zip(got, wanted, truth, strict=True))
            off = max(_finite(relative(g, t)) for g, t in zip(got, truth, strict=True))
            return {"excess": value, "relative": off, "right": value <= 1.0 and (impl != "reference" or off < 4)}
        if case.op == "score_gate":  # scores as span_mean's, verdicts exact unless a p-value lies within the error
            alike = min(_close(g, w) for g, w in zip(got, wanted, strict=True))
        else:
            alike = min(_equal(g, w) for g, w in zip(got, wanted, strict=True))
        return {"alike": alike, "right": alike >= (ALIKE if case.op in ("sample", "score_gate") else 1.0)}
    except Exception as error:  # a kernel that does not compile here must not hide the others
        return {"error": one_line(error), "right": False}


def _outcome(case: Case, impl: str, device: torch.device, seed: int) -> list[Tensor]:
    """What the op returns, and then what it has written to its arguments."""
    given = case.make(device, seed)
    with ops.use(impl), poisoned():
        result = getattr(ops, case.op)(*given)
        synchronise(device)  # kv_swap's copies to the host are compared there
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [x for x in returned if isinstance(x, Tensor)] + [given[i] for i in WRITTEN.get(case.op, ())]


def _finite(x: float) -> float:
    """JSON has no infinity and no NaN; either is as wrong as can be."""
    return x if math.isfinite(x) else 1e9


def _equal(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return 0.0
    same = (a == b) | ((a != a) & (b != b))
    return float(same.double().mean()) if a.numel() else 1.0


def _close(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return _equal(a, b)
    return float(torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True).double().mean())


def _invariance(impl: str, dtype: torch.dtype, ctx: Context, seed: int) -> list[dict[str, Any]]:
    """Whether rows of the scoring ops have the same bits alone, in pieces, and all together."""
    s = SIZES["tiny" if ctx.dry else "8b"]
    rows = 9 if ctx.dry else 200
    told = []
    for op in ("score_tokens", "score_logits"):
        if ops.obstacle(op, impl, ctx.device) is not None:
            continue
        g = torch.Generator(ctx.device).manual_seed(seed)
        ids = torch.randint(0, s.vocab, (rows,), generator=g, device=ctx.device)
        shapes = (rows, s.hidden), (s.vocab, s.hidden), (rows, s.vocab)
        inputs = [torch.randn(shape, generator=g, device=ctx.device) for shape in shapes]
        if ctx.dry and impl == "triton":
            # Quarters: their products add up without rounding. The interpreter's BLAS rounds by a row's place.
            inputs = [(x * 4).round() / 4 for x in inputs]
        hidden, weight, logits = (x.to(dtype) for x in inputs)
        cuts = [slice(0, 1), slice(rows - 1, rows), slice(rows // 3, rows // 3 + 5), slice(1, rows)]
        with ops.use(impl):
            if op == "score_logits":
                whole, *parts = (ops.score_logits(logits[cut], ids[cut]) for cut in (slice(0, rows), *cuts))
            else:
                whole, *parts = (ops.score_tokens(hidden[cut], weight, ids[cut]) for cut in (slice(0, rows), *cuts))
        same = all(torch.equal(part, whole[cut]) for part, cut in zip(parts, cuts, strict=True))
        told.append({"op": op, "impl": impl, "dtype": _name(dtype), "same": same})
    return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lines(found: Found) -> list[Line]:
    told = []
    for impl in dict.fromkeys(c["impl"] for c in found.get("ops", ())):
        of = [c for c in found["ops"] if c["impl"] == impl]
        worst = max((c["excess"] for c in of if "excess" in c), default=0.0)
        off = max((c["relative"] for c in of if "relative" in c), default=0.0)
        ratio = f"largest error {worst:.2f} of what is allowed"
        if impl == "reference":  # the measure of the others cannot be its own
            ratio = f"norm of the error at most {off:.2f} roundings"
        told.append((f"ops right, {impl}", f"{sum(c['right'] for c in of)} of {len(of)}", ratio))
    same = found.get("invariance", ())
    if same:
        told.append(("scores alone as in company", f"{sum(c['same'] for c in same)} of {len(same)}", "bit for bit"))
    return told + oracle_models.lines(found.get("models", {}))
