"""Sampling by the Gumbel-max trick: one read of the logits where no filter is on, no sort where one is.

Launch 1, `_split_kernel`: a program owns one row and one split of its vocabulary. It leaves the largest logit and the
largest perturbed logit of the split, each with the lowest id that has it. A row that is greedy or filtered needs only
the first, and makes no noise. For others noise is exact where it can matter: every token has a cheap upper bound, and
the tokens are evaluated from the largest bound down until no bound reaches the best value. That is one token of a
split in most cases.

Launch 2, `_finish_kernel`: a program owns one row and merges its splits. For most rows that is all. A filtered row is
then read again, by this program alone. Which rows are filtered is decided here, on the device: nothing waits for the
host, and the launches depend on shapes only.

Filters keep the first few tokens in the order (value descending, id ascending), so a token is kept where the mass
ahead of it is too small to fill top_p. That is tested for the token that would be drawn, not for all: find the best
perturbed token; measure the mass ahead of it; where that rejects it, everything after it is rejected too, and the
best of what lies ahead is the next to be tested. The result is the best of the kept tokens. A round leaves a uniform
share of the mass, so 1 + ln(1 / top_p) rounds are expected, and each takes at least one token away. top_k comes before
top_p and sets its base, so the k-th largest value is found first: a radix select over the order-preserving integer
image of the scaled logits, in four histograms.

Numerics: scaled = logit / temperature is rounded to nearest, as torch's is, so that ties are the reference's. A mass is
exp(scaled - largest), held as an integer in units of 2^-44: sums are exact in any order, at most 2^62, and what is cut
off is below 2^-26 of the total. The exponentials are fp32 with a relative error of some 2^-19. So top_p's border is
exact but for a token whose mass ahead is within 2^-18 of the total from it: such a one may fall on either side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atts_triton.variants import POINTERS, Variant

SPLIT = 2048
"""Columns of a split: a row of 150 000 has a program for every second SM of an H100."""
_SPLIT_WARPS = 4
_MERGE = 128
_BLOCK = 4096
_FINISH_WARPS = 16
_NONE = tl.constexpr(0x7FFFFFFF)  # an id after every token's
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_LOW_63 = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_LN_2 = tl.constexpr(0.6931471805599453)
_SLACK = tl.constexpr(1e-4)
_RELATIVE_SLACK = tl.constexpr(1e-6)
_MASS_ONE = tl.constexpr(2.0**44)


@triton.jit
def _mix(x):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64, where shifts are logical and products wrap."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def stream_of(seed, position):
    """State (uint64) from which the bits of all tokens at a position (int64) of a seed (int64) are made."""
    seed = seed.to(tl.uint64)
    return _mix(_mix(position.to(tl.uint64) * _GOLDEN + seed) + seed)


@triton.jit
def token_bits(stream, column):
    """63 uniform bits (int64, not negative) of a token id (int32) in a stream."""
    return (_mix(stream + (column.to(tl.int64) + 1).to(tl.uint64) * _GOLDEN) & _LOW_63).to(tl.int64)


@triton.jit
def gumbel_of(bits):
    """Standard Gumbel noise (fp32) of 63 uniform bits.

    It is -log(E) of the exponential E = -log1p(-v), and the largest noise is that of the smallest v, so E must keep
    v's relative precision: what rounding took from 1 - v is given back to its logarithm. Rounding took nothing where v
    is 1/2 or more, and below that dividing it by 1 - v would change no more than the last bit.
    """
    v = tl.maximum(bits.to(tl.float32) * 2.0**-63, 2.0**-64)
    rest = 1.0 - v
    return -tl.log((v - (1.0 - rest)) - tl.log(rest))


@triton.jit
def _bound(raw, temperature, bits):
    """No less than the perturbed logit of a token, with neither logarithm nor division; -inf where that cannot win.

    Noise is at most -log(v). A float's bits, read as an integer and divided by 2^23, are 127 + log2 of it or less, and
    at most 0.09 less. Of v the upper 32 bits are taken, which is less again. What is rounded, here and in the perturbed
    logit itself, stays far below the two slacks.
    """
    inverse = tl.minimum(tl.math.div_rn(1.0, temperature), _LARGEST)
    scaled = raw * inverse
    upper = (bits >> 31).to(tl.uint32).to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    noise = (159.0 * _LN_2 + _SLACK) - upper * (_LN_2 * 2.0**-23)
    return tl.where(scaled > float("-inf"), scaled + tl.abs(scaled) * _RELATIVE_SLACK + noise, float("-inf"))


@triton.jit
def _best(bound, first, column, logits, temperature, stream, best, best_id):
    """(best, best_id), or the token from first on that has a larger perturbed logit, or an equal one and a lower id.

    Evaluates tokens from the largest bound down until no bound reaches the best value.
    """
    most, place = tl.max(bound, 0, return_indices=True)
    while (most > float("-inf")) & (most >= best):
        found = first + place
        scaled = tl.math.div_rn(tl.load(logits + found).to(tl.float32), temperature)
        value = scaled + gumbel_of(token_bits(stream, found))
        better = (value > best) | ((value == best) & (found < best_id))
        best = tl.where(better, value, best)
        best_id = tl.where(better, found, best_id)
        bound = tl.where(column == found, float("-inf"), bound)
        most, place = tl.max(bound, 0, return_indices=True)
    return best, best_id


@triton.jit
def _filters(top_k, top_p, min_p, V):
    """Whether any filter can take a token away."""
    return ((top_k > 0) & (top_k < V)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _temperature(temperature_ptr, row):
    # An infinite one would make NaN of tokens at -inf. NaN stays.
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature == float("inf"), _LARGEST, temperature)


@triton.jit
def _scaled(logits, column, V, temperature):
    """Scaled logits (fp32) of columns of a row; -inf past its end."""
    raw = tl.load(logits + column, mask=column < V, other=float("-inf"))
    return tl.math.div_rn(raw.to(tl.float32), temperature)


@triton.jit
def _first_largest(value, column, eligible):
    """(the largest value, the lowest eligible id that has it or _NONE)."""
    largest = tl.max(tl.where(eligible, value, float("-inf")), 0)
    return largest, tl.min(tl.where(eligible & (value == largest), column, _NONE), 0)


@triton.jit(
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=[
        "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "position_ptr", "value_ptr", "id_ptr",
    ],
)  # fmt: skip
def _split_kernel(
    logits_ptr,  # [B, V]
    temperature_ptr,  # [B] fp32
    top_k_ptr,  # [B] int64
    top_p_ptr,  # [B] fp32
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    value_ptr,  # [2, B, splits] fp32: largest logit, largest perturbed logit
    id_ptr,  # [2, B, splits] int32
    V,
    logits_stride,
    splits,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    logits = logits_ptr + row * logits_stride
    column = split * SPLIT + tl.arange(0, SPLIT)
    inside = column < V
    raw = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
    # NaN counts as +inf, which no row may hold either: a maximum alone would pass over it.
    peak, peak_id = _first_largest(tl.where(raw == raw, raw, float("inf")), column, inside)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), _NONE, tl.int32)
    temperature = _temperature(temperature_ptr, row)
    filtered = _filters(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), V)
    if (temperature > 0.0) & (not filtered):
        stream = stream_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        bound = _bound(raw, temperature, token_bits(stream, column))
        best, best_id = _best(bound, split * SPLIT, column, logits, temperature, stream, best, best_id)
    at = row * splits + split
    other = tl.num_programs(0).to(tl.int64) * splits
    tl.store(value_ptr + at, peak)
    tl.store(id_ptr + at, peak_id)
    tl.store(value_ptr + other + at, best)
    tl.store(id_ptr + other + at, best_id)


@triton.jit
def _merged(value_ptr, id_ptr, splits, MERGE: tl.constexpr):
    """(value, id) of the first largest of a row's splits."""
    value = tl.full((MERGE,), float("-inf"), tl.float32)
    column = tl.full((MERGE,), _NONE, tl.int32)
    for first in range(0, splits, MERGE):
        split = first + tl.arange(0, MERGE)
        other = tl.load(value_ptr + split, mask=split < splits, other=float("-inf"))
        other_id = tl.load(id_ptr + split, mask=split < splits, other=_NONE)
        ahead = (other > value) | ((other == value) & (other_id < column))
        value = tl.where(ahead, other, value)
        column = tl.where(ahead, other_id, column)
    return _first_largest(value, column, column < _NONE)


@triton.jit
def _kth_largest(logits, V, temperature, k, BLOCK: tl.constexpr):
    """The k-th largest scaled logit of a row, 1 <= k <= V: a radix select, eight bits at a time from the top."""
    wanted = k.to(tl.int32)
    key = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)  # a mask of the bits of key that are found
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            scaled = _scaled(logits, column, V, temperature)
            bits = tl.where(scaled == 0.0, 0.0, scaled).to(tl.uint32, bitcast=True)  # -0 is 0
            image = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)  # as integers these have the floats' order
            live = (column < V) & (((image ^ key) & known) == 0)
            counts += tl.histogram(((image >> shift) & 255).to(tl.int32), 256, mask=live)
        at_least = tl.cumsum(counts, 0, reverse=True)
        found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(tl.arange(0, 256) > found, counts, 0), 0)
        key = key | (found.to(tl.uint32) << shift)
        known = (known >> 8) | 0xFF000000
    return tl.where((key >> 31) != 0, key ^ 0x80000000, ~key).to(tl.float32, bitcast=True)


@triton.jit
def _ahead(logits, V, temperature, top, kth, min_p, stream, value, column_of_value, BLOCK: tl.constexpr):
    """Of the tokens that top_k left and that come before (value, column) in the order of the filters: (their mass, the
    best perturbed of those that min_p left too, or _NONE).

    top: the row's largest scaled logit.
    """
    mass = tl.zeros((BLOCK,), tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), _NONE, tl.int32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        raw = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        scaled = tl.math.div_rn(raw, temperature)
        before = (scaled > value) | ((scaled == value) & (column < column_of_value))
        before = before & (column < V) & (scaled >= kth)
        relative = tl.exp(scaled - top)
        mass += tl.where(before, relative * _MASS_ONE, 0.0).to(tl.int64)
        eligible = before & (scaled > float("-inf")) & ((relative >= min_p) | (scaled == top))
        # With top_k or min_p, and in later rounds, most blocks have none.
        if tl.max(eligible.to(tl.int32), 0) > 0:
            bound = tl.where(eligible, _bound(raw, temperature, token_bits(stream, column)), float("-inf"))
            best, best_id = _best(bound, first, column, logits, temperature, stream, best, best_id)
    return tl.sum(mass, 0), best_id


@triton.jit(
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=[
        "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "position_ptr", "value_ptr", "id_ptr",
    ],
)  # fmt: skip
def _finish_kernel(
    logits_ptr,  # [B, V]
    temperature_ptr,  # [B] fp32
    top_k_ptr,  # [B] int64
    top_p_ptr,  # [B] fp32
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    value_ptr,  # [2, B, splits] fp32
    id_ptr,  # [2, B, splits] int32
    drawn_ptr,  # [B] int64
    V,
    logits_stride,
    splits,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = row * splits
    peak, peak_id = _merged(value_ptr + at, id_ptr + at, splits, MERGE)
    at += tl.num_programs(0).to(tl.int64) * splits
    best, drawn = _merged(value_ptr + at, id_ptr + at, splits, MERGE)
    temperature = _temperature(temperature_ptr, row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    answer = (tl.abs(peak) < float("inf")) & (temperature == temperature)
    top = tl.math.div_rn(peak, tl.where(temperature > 0.0, temperature, 1.0))
    random = (temperature > 0.0) & (tl.abs(top) < float("inf"))
    if answer & random & _filters(top_k, top_p, min_p, V):
        logits = logits_ptr + row * logits_stride
        stream = stream_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        kth = tl.full((), float("-inf"), tl.float32)
        if (top_k > 0) & (top_k < V):
            kth = _kth_largest(logits, V, temperature, top_k, BLOCK)
        # Every token comes before (-inf, _NONE): the first round finds the total and the first to be tested.
        drawn = tl.full((), _NONE, tl.int32)
        value = tl.full((), float("-inf"), tl.float32)
        enough = tl.zeros((), tl.float64)
        searching = drawn == _NONE
        while searching:
            mass, earlier = _ahead(logits, V, temperature, top, kth, min_p, stream, value, drawn, BLOCK)
            rejected = (drawn == _NONE) | (mass.to(tl.float64) >= enough)
            enough = tl.where(drawn == _NONE, top_p.to(tl.float64) * mass.to(tl.float64), enough)
            searching = rejected & (earlier < _NONE)
            drawn = tl.where(searching, earlier, drawn)
            searching = searching & (top_p < 1.0)
            raw = tl.load(logits + drawn, mask=searching, other=0.0)
            value = tl.math.div_rn(raw.to(tl.float32), temperature)
    # A temperature that takes the largest out of fp32's range is as good as 0.
    drawn = tl.where(random & (drawn < _NONE), drawn, peak_id)
    tl.store(drawn_ptr + row, tl.where(answer, drawn, -1).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One id for each row of logits[B, V] -> ids[B] int64; see `atts_engine.ops.sample`.

    logits fp32, fp16 or bf16; temperature, top_p, min_p fp32[B]; top_k, seed, position int64[B]. The host reads none of
    them, and the launches depend on shapes alone. Raises ValueError for other dtypes and an empty vocabulary.
    """
    if logits.dtype not in POINTERS:
        raise ValueError(f"sample takes logits of fp32, fp16 or bf16, not {logits.dtype}")
    rows, vocab = logits.shape
    if not vocab:
        raise ValueError("sample needs a vocabulary of one token or more")
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return drawn
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    temperature, top_p, min_p = (t.float().contiguous() for t in (temperature, top_p, min_p))
    top_k, seed, position = (t.long().contiguous() for t in (top_k, seed, position))
    splits = triton.cdiv(vocab, SPLIT)
    value = torch.empty((2, rows, splits), dtype=torch.float32, device=logits.device)
    column = torch.empty((2, rows, splits), dtype=torch.int32, device=logits.device)
    arguments = (logits, temperature, top_k, top_p, min_p, seed, position, value, column)
    _split_kernel[(rows, splits)](
        *arguments,
        vocab,
        logits.stride(0),
        splits,
        SPLIT=SPLIT,
        num_warps=_SPLIT_WARPS,
        enable_fp_fusion=False,
    )
    _finish_kernel[(rows,)](
        *arguments,
        drawn,
        vocab,
        logits.stride(0),
        splits,
        MERGE=_MERGE,
        BLOCK=_BLOCK,
        num_warps=_FINISH_WARPS,
        enable_fp_fusion=False,
    )
    return drawn


def variants() -> Iterator[Variant]:
    """What `sample` launches: for each dtype, rows whose length and stride are multiples of 16 and others."""
    for pointer in POINTERS.values():
        signature = {
            "logits_ptr": pointer, "temperature_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp32",
            "min_p_ptr": "*fp32", "seed_ptr": "*i64", "position_ptr": "*i64", "value_ptr": "*fp32", "id_ptr": "*i32",
            "V": "i32", "logits_stride": "i32", "splits": "i32",
        }  # fmt: skip
        for even in (True, False):
            multiples = frozenset({"V", "logits_stride"}) if even else frozenset()
            name = f"{pointer[1:]} {'V % 16 = 0' if even else 'any V'}"
            options = {"num_warps": _SPLIT_WARPS, "enable_fp_fusion": False}
            yield Variant(f"sample split {name}", _split_kernel, signature, {"SPLIT": SPLIT}, options, multiples)
            yield Variant(
                f"sample finish {name}",
                _finish_kernel,
                signature | {"drawn_ptr": "*i64"},
                {"MERGE": _MERGE, "BLOCK": _BLOCK},
                {"num_warps": _FINISH_WARPS, "enable_fp_fusion": False},
                multiples,
            )
