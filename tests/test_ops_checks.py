"""What ops refuse, each with one line that names the op and the argument: shapes, dtypes and devices always, values on
the CPU or inside `ops.checked()`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atts_engine import ops
from atts_engine.config import EngineConfig
from atts_engine.errors import InputError
from atts_engine.ops import checks
from tests.test_ops_library import arguments

Changes = dict[str, Callable[[Tensor], Tensor]]


def call(op: str, **changes: Callable[[Tensor], Tensor]) -> None:
    given = arguments(op)
    getattr(ops, op)(**(given | {name: change(given.get(name)) for name, change in changes.items()}))


def half(x: Tensor) -> Tensor:
    return x.half()


def short(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


@pytest.mark.parametrize("change", [half, short, elsewhere])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("linear", "weight"),
        ("rms_norm", "weight"),
        ("add_rms_norm", "delta"),
        ("add_rms_norm", "weight"),
        ("silu_mul", "up"),
        ("rope", "cos"),
        ("rope", "sin"),
        ("kv_append", "v"),
        ("kv_append", "slots"),
        ("kv_copy_pages", "dst"),
        ("kv_swap", "slots"),
        ("paged_attention", "cu_q"),
        ("paged_attention", "kv_len"),
        ("score_tokens", "weight"),
        ("score_tokens", "ids"),
        ("score_logits", "ids"),
        ("gate", "key"),
        ("gate", "size"),
        ("gate", "insert"),
        ("sample", "temperature"),
        ("sample", "position"),
    ],
)
def test_shape_dtype_and_device_of_every_argument(op: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    # Which of two lengths is wrong is not known: a shorter kv_len shows as a block table that is too long.
    named = "block_table" if (name, change) == ("kv_len", short) else name
    with pytest.raises(InputError, match=f"^{op}: {named} does not fit: it must be .*, not "):
        call(op, **{name: change})


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("linear", {"x": lambda x: x[0]}, "x does not fit"),
        ("linear", {"bias": lambda _: torch.zeros(3)}, "bias does not fit"),
        ("rope", {"x": lambda x: x[..., :7]}, "do not halve"),
        ("paged_attention", {"q": lambda q: q[:, :3].contiguous()}, "3 heads of q does not fit 2 heads"),
        ("paged_attention", {"q": lambda q: q[0, 0]}, "q does not fit"),
        ("kv_append", {"kv_layer": lambda kv: kv.transpose(0, 1).contiguous().transpose(0, 1)}, "must be contiguous"),
        ("kv_append", {"slots": lambda s: s + 24}, "slots holds 28, which is outside the cache"),
        ("kv_copy_pages", {"dst": lambda dst: dst + 9}, "dst holds 1[0-9], which is outside the pool"),
        ("kv_copy_pages", {"src": lambda src: src - 9}, "src holds -9, which is outside the pool"),
        ("kv_copy_pages", {"dst": torch.zeros_like}, "dst names 0 twice"),
        ("kv_swap", {"slots": lambda slots: slots + 9}, "slots holds 1[0-9], which is outside the host's pool"),
        ("kv_swap", {"pages": lambda pages: pages + 9}, "pages holds 1[0-9], which is outside the pool"),
        ("kv_swap", {"slots": torch.zeros_like}, "slots names 0 twice"),
        ("kv_swap", {"to_host": lambda _: False, "pages": torch.zeros_like}, "pages names 0 twice"),
        ("paged_attention", {"block_table": lambda t: t - 1}, r"block_table\[0, 0\] is -1, which is outside the pool"),
        ("score_tokens", {"ids": lambda ids: ids + 40}, "ids holds 44, which is outside the vocabulary"),
        ("score_tokens", {"hidden": lambda h: h.repeat(1, 2)[:, ::2]}, "the rows of hidden have gaps"),
        ("score_tokens", {"weight": lambda w: w.T.contiguous().T}, "the rows of weight have gaps"),
        ("score_logits", {"ids": lambda ids: ids - 1}, "ids holds -1, which is outside the vocabulary"),
        ("span_mean", {"cu_seqlens": lambda cu: cu + 1}, "cu_seqlens runs 1 .. 6 for 5 tokens"),
        ("span_mean", {"cu_seqlens": lambda cu: cu[:0]}, "cu_seqlens has no bound"),
        ("span_mean", {"cu_seqlens": lambda _: torch.tensor([0, 3, 3, 5])}, "a span without tokens"),
        ("gate", {"key": lambda key: key - 1}, "key holds -1, which is outside the store"),
        ("gate", {"ring": lambda ring: ring.T.contiguous().T}, "ring must be contiguous"),
        ("gate", {"ring": lambda ring: ring[:, :0].contiguous()}, "a ring holds 1 to"),
        ("sample", {"logits": lambda logits: logits[:, :0]}, "logits has no column"),
    ],
)
def test_what_the_cpu_always_finds(op: str, changes: Changes, said: str) -> None:
    with pytest.raises(InputError, match=f"^{op}: .*{said}"):
        call(op, **changes)


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("kv_append", {"slots": lambda slots: slots * 0 + 5}, "slots names 5 twice"),
        ("paged_attention", {"kv_len": lambda n: n + 40}, "kv_len holds 49, which is outside a row of the block table"),
        ("paged_attention", {"kv_len": lambda n: n * 0}, "more query rows than tokens"),
        ("paged_attention", {"cu_q": lambda cu: cu + 1}, r"cu_q runs 1 \.\. 6 for 5 rows"),
        ("gate", {"level": lambda level: level - 9}, "level holds -8, which is outside the levels"),
        ("gate", {"u": torch.zeros_like}, "u holds 0, which is outside the uniforms"),
        ("gate", {"size": lambda size: size + 5}, "size holds 5, which is outside a ring"),
        ("gate", {"head": lambda head: head - 1}, "head holds -1, which is outside a ring"),
        ("sample", {"top_k": lambda k: k - 1}, "top_k holds -1"),
        ("sample", {"temperature": lambda t: t * float("nan")}, "temperature must be 0 .. inf in every row"),
        ("sample", {"top_p": lambda p: p + 1}, "top_p must be 0 .. 1.0 in every row"),
    ],
)
def test_what_is_found_where_values_are_checked(op: str, changes: Changes, said: str) -> None:
    with ops.checked(), pytest.raises(InputError, match=f"^{op}: .*{said}"):
        call(op, **changes)


@pytest.mark.parametrize("op", ops.available())
def test_good_inputs_pass_every_check(op: str) -> None:
    with ops.checked():
        call(op)


def test_keys_that_lie_in_the_cache_they_are_written_to() -> None:
    kv_layer = torch.zeros(2, 6, 4, 2, 8)
    k, v = kv_layer[0, 0, :2], torch.zeros(2, 2, 8)
    with ops.checked(), pytest.raises(InputError, match="kv_append: k lies in the memory of kv_layer"):
        ops.kv_append(k, v, kv_layer, torch.tensor([5, 6]))
    rows = torch.zeros(9, 3)
    checks.apart("op", "x", rows[:4], "y", rows[4:])
    checks.apart("op", "x", rows[:0], "y", rows)
    with pytest.raises(InputError, match="x lies in"):
        checks.apart("op", "x", rows[:, 0], "y", rows[5:6])


def test_rows_that_fill_a_step_up_may_share_a_slot_of_page_0() -> None:
    with ops.checked():
        call("kv_append", slots=torch.zeros_like)


def test_checking_is_one_setting_for_the_process_and_is_given_back() -> None:
    def twice(slots: Tensor) -> Tensor:
        return slots * 0 + 5

    with ops.checked():
        assert not ops.capturable("linear", "cuda")
        with ops.checked(False):
            call("kv_append", slots=twice)
            assert ops.capturable("linear", "cuda")
        with pytest.raises(InputError, match="twice"):
            call("kv_append", slots=twice)
    assert not checks.in_force()


def test_the_engine_takes_the_names_that_the_ops_know() -> None:
    assert EngineConfig("tiny-draft", "tiny-target", ops="reference", check_ops=True).check_ops
    with pytest.raises(InputError, match="ops must be one of reference, triton"):
        EngineConfig("tiny-draft", "tiny-target", ops="cutlass")
