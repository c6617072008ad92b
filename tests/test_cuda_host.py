"""The CUDA kernels of csrc/, compiled for the host (tests/cuda_host/), and their forms for the CPU, against torch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from atts_engine import ops
from atts_engine.ops import native
from tests.abi import DTYPES, STATUS, params

ONE = 1 << 32
COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), "")
FLAGS = (
    "-std=c++17 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off "
    "-Itests/cuda_host/include -Icsrc -Icsrc/include"
).split()  # fmt: skip
SEEDS = (1, 2, 3)
"""Orders of the warps and lanes between barriers."""


SHARED = ("-O1", "-fPIC", "-shared")


def build(root: Path, out: Path, sources: Iterable[str], *flags: str, objects: Iterable[Path] = ()) -> Path:
    """Compile C++ and CUDA sources, those of the latter as C++ too."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    built = [str(path) for path in objects]
    done = subprocess.run(
        [COMPILER, *FLAGS, *flags, "-x", "c++", *sources, "-x", "none", *built, "-o", str(out)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.cuda_host_failure.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def runtime(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs the grids, compiled."""
    return build(root, tmp_path_factory.mktemp("cuda") / "run.o", ["tests/cuda_host/run.cpp"], "-O1", "-fPIC", "-c")


@pytest.fixture(scope="session")
def host(root: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every .cu of csrc/, and the host's CUDA."""
    kernels = sorted(str(path.relative_to(root)) for path in root.glob("csrc/*.cu"))
    out = tmp_path_factory.mktemp("cuda") / "host.so"
    return load(build(root, out, ["csrc/workspace.cpp", *kernels], *SHARED, objects=[runtime]))


Form = Callable[..., int]


def _device_form(library: ctypes.CDLL, seed: int) -> Form:
    library.cuda_host_seed(ctypes.c_uint64(seed))

    def call(op: str, stream: int | None = None, **fields: torch.Tensor | int | None) -> int:
        return getattr(library, f"atts_{op}")(ctypes.byref(params(op, **fields)), ctypes.c_void_p(stream))

    return call


@pytest.fixture
def device(host: ctypes.CDLL) -> Iterator[Form]:
    """device(op, **fields) -> status of the op's form for the device."""
    host.cuda_host_reset_counts()
    host.cuda_host_batches(1)
    yield _device_form(host, 0)
    host.cuda_host_forget_memory()


def cpu_form() -> Form:
    installed = native.library()
    if installed is None:
        pytest.skip("csrc/ was not built at installation: CMake and a C++ compiler are needed")
    library = ctypes.CDLL(installed._name)  # without the argument types that the ops have

    def call(op: str, **fields: torch.Tensor | int | None) -> int:
        return getattr(library, f"atts_{op}_cpu")(ctypes.byref(params(op, **fields)))

    return call


@pytest.fixture(params=[*SEEDS, "cpu"])
def form(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Form:
    """The form for the device under some orders of its warps, and that for the CPU."""
    return cpu_form() if request.param == "cpu" else _device_form(host, request.param)


def counts(host: ctypes.CDLL) -> dict[str, int]:
    """What the host's CUDA was asked for since the test began."""
    names = ("launches", "behind", "batches", "batched", "rectangles", "copies")
    values = (ctypes.c_int64 * len(names))()
    host.cuda_host_counts(values)
    return dict(zip(names, values, strict=True))


def workspace(host: ctypes.CDLL, op: str, **fields: torch.Tensor | int | None) -> torch.Tensor:
    needed = ctypes.c_uint64()
    assert getattr(host, f"atts_{op}_workspace")(ctypes.byref(params(op, **fields)), ctypes.byref(needed)) == 0
    return torch.zeros(needed.value // 8 + 1, dtype=torch.int64)[: -(-needed.value // 8)]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


# span_mean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [31, 1, 32, 33], [500, 7, 64, 1, 129]])
def test_span_mean_has_the_bits_of_the_reference(form: Form, lengths: list[int]) -> None:
    logprob = random(sum(lengths), scale=4.0)
    if len(lengths) > 1:
        logprob[5] = float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    score, total = torch.empty(len(lengths)), torch.empty(len(lengths), dtype=torch.float64)
    fields = {"logprob": logprob, "cu_seqlens": bounds, "score": score, "sum": total}
    assert form("span_mean", **fields, tokens=len(logprob), batch=len(lengths)) == 0
    wanted_score, wanted_sum = ops.span_mean(logprob, bounds)
    assert same(score, wanted_score) and same(total, wanted_sum)


def test_span_mean_of_a_span_that_is_none(device: Form) -> None:
    logprob, error = torch.ones(8), torch.zeros(1, dtype=torch.int32)
    score, total = torch.empty(4), torch.empty(4, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 3, 9, 8])
    fields = {"logprob": logprob, "cu_seqlens": bounds, "score": score, "sum": total, "error": error}
    assert device("span_mean", **fields, tokens=8, batch=4) == 0
    assert error.item() == STATUS["ERROR_BATCH"]
    assert score[0] == -1 and score[1:].isnan().all() and total[1:].isnan().all()


# score_logits -------------------------------------------------------------------------------------------------------


def logits_of(rows: int, vocab: int, dtype: torch.dtype, stride: int, offset: int = 0) -> torch.Tensor:
    storage = torch.zeros(offset + rows * stride, dtype=dtype)
    view = storage.as_strided((rows, vocab), (stride, 1), offset)
    view.copy_(random(rows, vocab, scale=6.0))
    return view


def score(form: Form, logits: torch.Tensor, ids: torch.Tensor, **fields: torch.Tensor | int | None) -> torch.Tensor:
    logprob = torch.full((len(ids),), 7.0)
    rows, vocab = logits.shape
    arrays = {"logits": logits, "ids": ids, "logprob": logprob}
    sizes = {"rows": rows, "vocab": vocab, "logits_stride": logits.stride(0), "dtype": DTYPES[logits.dtype]}
    assert form("score_logits", **arrays, **sizes, **{"threads": 1, **fields}) == 0
    return logprob


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 9, 1000, 17001])
def test_score_logits_is_as_good_as_torch(form: Form, dtype: torch.dtype, vocab: int) -> None:
    logits = logits_of(3, vocab, dtype, vocab + vocab % 8)
    ids = torch.tensor([0, vocab - 1, vocab // 2])
    found = score(form, logits, ids)
    oracle = torch.log_softmax(logits.double(), 1).gather(1, ids[:, None])[:, 0]
    torchs = torch.log_softmax(logits.float(), 1).gather(1, ids[:, None])[:, 0]
    assert bool(((found - oracle).abs() <= 3 * (torchs - oracle).abs() + 2e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_logits_keeps_its_bits(host: ctypes.CDLL, device: Form, dtype: torch.dtype) -> None:
    """Alone or in company, aligned or not, its parts in one block or in several, in any order of these."""
    vocab = 40000  # 3 parts, of fp32 5
    logits = logits_of(3, vocab, dtype, vocab)
    ids = torch.tensor([1, 39999, 20000])
    found = score(device, logits, ids)
    shared = workspace(host, "score_logits", rows=3, vocab=vocab, logits_stride=vocab, dtype=DTYPES[dtype])
    assert shared.numel() > 512
    for seed in range(6):
        host.cuda_host_seed(ctypes.c_uint64(seed))
        apart = score(device, logits, ids, workspace=shared, workspace_bytes=8 * shared.numel())
        assert torch.equal(apart, found)
        assert not shared[:512].any()  # the tickets
    for row in range(3):
        moved = torch.zeros(vocab + 1, dtype=dtype)[1:]
        moved.copy_(logits[row])
        assert torch.equal(score(device, moved[None], ids[row : row + 1]), found[row : row + 1])


def test_score_logits_that_are_not_finite(form: Form) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(6, 9000)  # two parts
    logits[0, 8999] = nan
    logits[1, 3] = inf
    logits[2] = -inf
    logits[3, 1:] = -inf
    logits[4, :8192] = -inf
    logits[5, 8192:] = -inf
    logits[5, 3] = -inf
    found = score(form, logits, torch.tensor([5, 4, 0, 0, 8999, 3]))
    assert found[:3].isnan().all()
    assert found[3] == 0 and abs(found[4] + torch.tensor(9000.0 - 8192).log()) < 1e-6 and found[5] == -inf


def test_spans_follow_the_logits(form: Form, host: ctypes.CDLL) -> None:
    host.cuda_host_reset_counts()
    logits, ids = logits_of(70, 50, torch.bfloat16, 56), torch.arange(70) % 50
    bounds = torch.tensor([0, 40, 41, 70])
    spans, total = torch.empty(3), torch.empty(3, dtype=torch.float64)
    logprob = score(form, logits, ids, cu_seqlens=bounds, score=spans, sum=total, batch=3)
    wanted_score, wanted_sum = ops.span_mean(logprob, bounds)
    assert torch.equal(spans, wanted_score) and torch.equal(total, wanted_sum)
    assert counts(host)["behind"] in (0, 1) and counts(host)["launches"] == 2 * counts(host)["behind"]


def test_an_id_outside_the_vocabulary_gives_nan(device: Form) -> None:
    logits, error = logits_of(3, 50, torch.float32, 50), torch.zeros(1, dtype=torch.int32)
    found = score(device, logits, torch.tensor([50, 3, -1]), error=error)
    assert found[[0, 2]].isnan().all() and found[1].isfinite()
    assert error.item() == STATUS["ERROR_KEY"]


# gate ---------------------------------------------------------------------------------------------------------------


def store_of(keys: int, capacity: int) -> dict[str, torch.Tensor]:
    return {"ring": torch.zeros(keys, capacity), "size": torch.zeros(keys).long(), "head": torch.zeros(keys).long()}


def batch_of(batch: int, keys: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 40, (batch,), generator=g).float() / 4
    values[torch.rand(batch, generator=g) < 0.1] = float("nan")
    values[torch.rand(batch, generator=g) < 0.05] = float("-inf")
    return {
        "score": values,
        "key": torch.randint(0, keys, (batch,), generator=g),
        "level": torch.randint(0, ONE + 1, (batch,), generator=g),
        "u": torch.randint(1, ONE + 1, (batch,), generator=g),
        "insert": torch.rand(batch, generator=g) < 0.8,
    }


def results_of(batch: int) -> dict[str, torch.Tensor]:
    return {
        **{name: torch.full((batch,), 7, dtype=torch.int64) for name in ("greater", "ties", "n")},
        "takeover": torch.zeros(batch, dtype=torch.bool),
        "p": torch.zeros(batch, dtype=torch.float64),
    }


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("keys", "capacity"), [(1, 1), (3, 6), (1, 5000), (40, 2050)])
def test_gate_equals_the_reference(form: Form, host: ctypes.CDLL, keys: int, capacity: int, spread: bool) -> None:
    """Batches one after the other, of more rows than a block has threads and than a ring holds, on one workspace."""
    ours, wanted_store = store_of(keys, capacity), store_of(keys, capacity)
    if capacity > 1000:  # half full, so that a batch wraps around
        for store in (ours, wanted_store):
            store["ring"][:, : capacity - 40] = random(keys, capacity - 40, scale=5).mul(4).round().div(4)
            store["size"][:] = capacity - 40
            store["head"][:] = capacity - 40
    sizes = {"keys": keys, "capacity": capacity}
    shared = workspace(host, "gate", batch=300, **sizes) if spread else torch.zeros(0)
    assert (shared.numel() > 0) == (spread and capacity > 1024)
    room = {"workspace": shared, "workspace_bytes": 8 * shared.numel()} if shared.numel() else {}
    for seed, batch in enumerate((1, 17, 0, 300, 40)):
        inputs, results = batch_of(batch, keys, seed), results_of(batch)
        assert form("gate", **inputs, **results, **ours, **sizes, **room, batch=batch) == 0
        for name, value in ops.gate(**inputs, **wanted_store)._asdict().items():
            assert same(results[name], value), name
        for name, value in wanted_store.items():
            assert torch.equal(ours[name], value), name
        assert not shared.any()


def test_rows_that_the_gate_cannot_take_are_left_out(device: Form) -> None:
    for name, value, status in (
        ("key", 3, "KEY"),
        ("key", -1, "KEY"),
        ("level", ONE + 1, "VALUE"),
        ("u", 0, "VALUE"),
        ("size", 7, "STORE"),
        ("head", 6, "STORE"),
    ):
        store, inputs, results = store_of(3, 6), batch_of(8, 3, 0), results_of(8)
        inputs["score"][:] = 1.0
        inputs["insert"][:] = True
        inputs["key"][:] = torch.tensor([0, 0, 1, 2, 2, 0, 0, 0])
        bad = store | inputs
        bad[name][2 if name in inputs else 1] = value
        before = {key: tensor.clone() for key, tensor in store.items()}
        error = torch.zeros(1, dtype=torch.int32)
        assert device("gate", **inputs, **results, **store, error=error, batch=8, keys=3, capacity=6) == 0
        assert error.item() == STATUS[f"ERROR_{status}"]
        assert results["n"].tolist() == [0, 0, 7, 0, 0, 0, 0, 0]
        assert store["size"].tolist() == [5, int(before["size"][1]), 2]


# kv_append ----------------------------------------------------------------------------------------------------------


def append_case(
    dtype: torch.dtype, kv_heads: int, heads: int, dim: int, layout: str
) -> tuple[dict[str, torch.Tensor | int | None], dict[str, torch.Tensor]]:
    """Fields of a call for 13 rows of three sequences, and what it must leave in kv and q_out."""
    page, pages, lengths, news = 4, 9, [9, 3, 12], [5, 1, 7]
    rows = sum(news)
    # One projection's output: queries, keys and values of a token side by side, as a fused layer leaves them.
    width = (heads + 2 * kv_heads) * dim
    gap = {"dense": 0, "odd": 1}[layout]
    fused = random(rows, width + gap, dtype=dtype)[:, :width].view(rows, -1, dim)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    table = torch.tensor([[7, 0, 3], [1, -5, -5], [8, 2, 5]], dtype=torch.int32)
    cu_q = torch.tensor([0, *news]).cumsum(0).int()
    slots = [
        int(table[b, t // page]) * page + t % page
        for b, (length, new) in enumerate(zip(lengths, news, strict=True))
        for t in range(length - new, length)
    ]
    kv = random(2, pages * page, kv_heads, dim, dtype=dtype)
    angle = random(rows, dim // 2, scale=3.0)
    cosine, sine = angle.cos(), angle.sin()
    turned = bool(heads)
    wanted = kv.clone()
    wanted[0, slots] = ops.rope(k, cosine, sine) if turned else k
    wanted[1, slots] = v
    q_out = torch.zeros(rows, heads, dim, dtype=dtype)
    wanted_q = ops.rope(q, cosine, sine) if heads else q_out
    fields: dict[str, torch.Tensor | int | None] = {
        "k": k, "v": v, "kv": kv, "rows": rows, "kv_heads": kv_heads, "head_dim": dim, "heads": heads,
        "k_stride": k.stride(0), "k_head_stride": dim, "v_stride": v.stride(0), "v_head_stride": dim,
        "slot_count": pages * page, "dtype": DTYPES[dtype],
        "block_table": table, "cu_q": cu_q, "kv_len": torch.tensor(lengths, dtype=torch.int32),
        "page": page, "batch": 3, "table_width": 3,
    }  # fmt: skip
    if turned:
        fields |= {
            "cosine": cosine, "sine": sine, "q": q, "q_out": q_out, "q_stride": q.stride(0), "q_head_stride": dim,
            "q_out_stride": heads * dim, "q_out_head_stride": dim,
        }  # fmt: skip
    slot_tensor = torch.tensor(slots)
    return fields, {"kv": wanted, "q_out": wanted_q, "slots": slot_tensor}


def with_slots(
    fields: dict[str, torch.Tensor | int | None], slots: torch.Tensor
) -> dict[str, torch.Tensor | int | None]:
    gone = ("block_table", "cu_q", "kv_len", "page", "batch", "table_width")
    return {**{name: value for name, value in fields.items() if name not in gone}, "slots": slots}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "odd"])
@pytest.mark.parametrize(("kv_heads", "heads", "dim"), [(1, 3, 16), (2, 4, 64), (3, 0, 20), (1, 2, 6), (2, 0, 5)])
def test_append_writes_its_slots_and_turns_keys_and_queries(
    form: Form, dtype: torch.dtype, kv_heads: int, heads: int, dim: int, layout: str
) -> None:
    for named in (False, True):
        fields, wanted = append_case(dtype, kv_heads, heads, dim, layout)
        assert form("kv_append", **(with_slots(fields, wanted["slots"]) if named else fields)) == 0
        assert torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]
        if heads:
            assert torch.equal(fields["q_out"], wanted["q_out"])  # type: ignore[arg-type]


def test_queries_may_be_turned_in_place(form: Form) -> None:
    fields, wanted = append_case(torch.bfloat16, 2, 4, 64, "dense")
    in_place = {"q_out": fields["q"], "q_out_stride": fields["q_stride"]}
    assert form("kv_append", **{**fields, **in_place}) == 0
    assert torch.equal(fields["q"], wanted["q_out"]) and torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]


def test_rows_of_padding_write_nothing(form: Form) -> None:
    fields, wanted = append_case(torch.float32, 2, 0, 8, "dense")
    before = fields["kv"].clone()  # type: ignore[union-attr]
    slots = wanted["slots"].clone()
    slots[3] = -1
    assert form("kv_append", **with_slots(fields, slots)) == 0
    wanted["kv"][:, wanted["slots"][3]] = before[:, wanted["slots"][3]]
    assert torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]


def test_rows_outside_the_cache_write_nothing_on_a_device(device: Form) -> None:
    for name, value, row, status in (("slots", 36, 2, "KEY"), ("block_table", 9, 1, "KEY"), ("kv_len", 4, 0, "BATCH")):
        fields, wanted = append_case(torch.float16, 2, 0, 16, "dense")
        before, error = fields["kv"].clone(), torch.zeros(1, dtype=torch.int32)  # type: ignore[union-attr]
        if name == "slots":
            fields = with_slots(fields, wanted["slots"].clone())
        fields[name].view(-1)[row] = value  # type: ignore[union-attr]
        assert device("kv_append", **fields, error=error) == 0
        assert error.item() == STATUS[f"ERROR_{status}"]
        changed = (fields["kv"] != before).flatten(2).any(2).all(0)  # type: ignore[union-attr]
        assert changed.sum() < 13 and not torch.equal(fields["kv"], wanted["kv"])  # type: ignore[arg-type]
    # A launch that was captured for 13 rows, with fewer today.
    fields, wanted = append_case(torch.float16, 2, 4, 16, "dense")
    fields["cu_q"][3] = 9  # type: ignore[index]
    fields["kv_len"][2] = 8  # type: ignore[index]
    before, error = fields["kv"].clone(), torch.zeros(1, dtype=torch.int32)  # type: ignore[union-attr]
    assert device("kv_append", **fields, error=error) == 0
    wanted["kv"][:, wanted["slots"][9:]] = before[:, wanted["slots"][9:]]
    assert torch.equal(fields["kv"], wanted["kv"]) and error.item() == 0  # type: ignore[arg-type]
    assert not fields["q_out"][9:].any()  # type: ignore[index]


# Pages --------------------------------------------------------------------------------------------------------------

PAGE_SHAPES = [(2, 7, 4, 2, 16), (1, 5, 3, 1, 3), (3, 4, 16, 4, 80)]
"""(layers, pages, page, kv_heads, head_dim): vectors, single elements, more than one chunk of a page."""


def pool_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, int]]:
    layers, pages, page, kv_heads, dim = shape
    kv = random(layers, 2, pages, page, kv_heads, dim, dtype=dtype)
    names = ("layers", "pages", "page", "kv_heads", "head_dim")
    return kv, {**dict(zip(names, shape, strict=True)), "dtype": DTYPES[dtype]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAGE_SHAPES)
def test_pages_are_copied_gathered_and_scattered(form: Form, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    kv, sizes = pool_of(shape, dtype)
    wanted = kv.clone()
    src, dst = torch.tensor([0, 0, 2]), torch.tensor([3, 1, shape[1] - 1])
    if shape[1] == 4:
        src, dst = src[:2], dst[:2]
    ops.kv_copy_pages(wanted, src, dst)
    assert form("kv_copy_pages", kv=kv, src=src, dst=dst, count=len(src), **sizes) == 0
    assert torch.equal(kv, wanted)
    dense = torch.zeros(len(dst), shape[0], 2, *shape[2:], dtype=dtype)
    assert form("kv_gather", kv=kv, dense=dense, page_ids=dst, count=len(dst), **sizes) == 0
    assert torch.equal(dense, kv.movedim(2, 0)[dst]) and torch.equal(kv, wanted)
    other = torch.zeros_like(kv)
    assert form("kv_gather", kv=other, dense=dense, page_ids=dst, count=len(dst), scatter=1, **sizes) == 0
    assert torch.equal(other.movedim(2, 0)[dst], dense)
    assert other.count_nonzero() == dense.count_nonzero()


def test_pages_outside_the_pool_are_left_out_on_a_device(device: Form) -> None:
    kv, sizes = pool_of(PAGE_SHAPES[0], torch.float16)
    wanted, error = kv.clone(), torch.zeros(1, dtype=torch.int32)
    ops.kv_copy_pages(wanted, torch.tensor([1]), torch.tensor([4]))
    pages = {"src": torch.tensor([0, 1, -1]), "dst": torch.tensor([7, 4, 5])}
    assert device("kv_copy_pages", kv=kv, **pages, count=3, error=error, **sizes) == 0
    assert torch.equal(kv, wanted) and error.item() == STATUS["ERROR_KEY"]


@pytest.mark.parametrize("shape", PAGE_SHAPES)
def test_pages_swap_to_the_host_and_back(form: Form, host: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    kv, sizes = pool_of(shape, torch.bfloat16)
    pool = torch.zeros(6, shape[0], 2, *shape[2:], dtype=torch.bfloat16)
    host.cuda_host_memory(ctypes.c_void_p(pool.data_ptr()), ctypes.c_uint64(2 * pool.numel()), 1, 0)
    pages, slots = torch.tensor([3, 0, 2]), torch.tensor([5, 1, 2])
    lists = {"page_ids": pages, "slots": slots, "count": 3, "host_slots": 6}
    wanted, wanted_pool = kv.clone(), pool.clone()
    ops.kv_swap(wanted, wanted_pool, pages, slots, True)
    assert form("kv_swap", kv=kv, host=pool, **lists, **sizes, to_host=1) == 0
    assert torch.equal(pool, wanted_pool) and torch.equal(kv, wanted)
    kv.zero_()
    assert form("kv_swap", kv=kv, host=pool, **lists, **sizes, to_host=0) == 0
    assert torch.equal(kv[:, :, pages], wanted[:, :, pages])
    host.cuda_host_forget_memory()


@pytest.mark.parametrize(
    ("stream", "batches", "way"),
    [(2, 1, "batches"), (2, 0, "rectangles"), (None, 1, "rectangles"), (1, 1, "rectangles"), (3, 1, "rectangles")],
)
def test_the_way_a_swap_takes(host: ctypes.CDLL, device: Form, stream: int | None, batches: int, way: str) -> None:
    """In batches, unless the driver has none, or the stream is the default one or being captured."""
    kv, sizes = pool_of((70, 4, 1, 1, 2), torch.float32)
    pool = torch.zeros(3, 70, 2, 1, 1, 2)
    host.cuda_host_memory(ctypes.c_void_p(pool.data_ptr()), ctypes.c_uint64(4 * pool.numel()), 1, 0)
    host.cuda_host_batches(batches)
    pages, slots = torch.tensor([3, 0]), torch.tensor([0, 2])
    lists = {"page_ids": pages, "slots": slots, "count": 2, "host_slots": 3}
    assert device("kv_swap", stream, kv=kv, host=pool, **lists, **sizes, to_host=1) == 0
    assert torch.equal(pool[slots], kv.movedim(2, 0)[pages])
    used = counts(host)
    assert (used["batches"], used["batched"]) == ((2, 280) if way == "batches" else (0, 0))
    assert used["rectangles"] == (2 if way == "rectangles" else 0)


# A kernel with a fault ----------------------------------------------------------------------------------------------

PEAKS = "  if (lane == 0) shared.peaks[warp] = peak;\n"
FAULTS = {
    "counts-before-ticket": ("gate.cuh", "  // the counts before the ticket\n    __syncthreads();\n", "\n"),
    "ticket-before-return": (
        "gate.cuh",
        "    __syncthreads();\n    if (!is_last) return;\n",
        "    if (!is_last) return;\n",
    ),
    "peaks-before-sums": ("score_logits.cuh", PEAKS + "  __syncthreads();\n", PEAKS),
}
"""(file, what it says, what it says without one of its barriers)"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_barrier_is_found(root: Path, runtime: Path, tmp_path: Path, fault: str) -> None:
    """A copy of a kernel without one of its barriers gives a wrong result for some order of warps and blocks."""
    name, right, wrong = FAULTS[fault]
    source = (root / "csrc" / "cuda" / name).read_text()
    assert source.count(right) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / name).write_text(source.replace(right, wrong))
    kernel = tmp_path / name.removesuffix("h")  # its own folder comes before every other
    shutil.copy(root / "csrc" / kernel.name, kernel)
    others = ["csrc/span_mean.cu"] if name == "score_logits.cuh" else []
    broken = load(build(root, tmp_path / "broken.so", [str(kernel), *others], *SHARED, objects=[runtime]))

    def wrong_results(seed: int) -> bool:
        form = _device_form(broken, seed)
        if name == "score_logits.cuh":
            logits, ids = logits_of(1, 3000, torch.float32, 3000), torch.tensor([2])
            oracle = torch.log_softmax(logits.double(), 1)[0, 2]
            return not bool((score(form, logits, ids)[0] - oracle).abs() < 1e-5)
        store, inputs, results = store_of(1, 3000), batch_of(40, 1, 3), results_of(40)
        store["ring"][:], store["size"][:] = 5.0, 3000
        wanted = ops.gate(**inputs, **{key: tensor.clone() for key, tensor in store.items()})
        room = {"workspace": torch.zeros(50, dtype=torch.int64), "workspace_bytes": 400}
        status = form("gate", **inputs, **results, **store, **room, batch=40, keys=1, capacity=3000)
        return status != 0 or not all(same(results[key], value) for key, value in wanted._asdict().items())

    assert any(wrong_results(seed) for seed in range(10))


def test_no_kernel_reaches_beside_its_arrays(root: Path, tmp_path: Path) -> None:
    """tests/cuda_host/sanitize.cpp, with the address and undefined-behaviour sanitizers."""
    checks = "-fsanitize=address,undefined"
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }")
    probe = [COMPILER, checks, str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if not COMPILER or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs a C++ compiler with sanitizers")
    kernels = sorted(str(path.relative_to(root)) for path in root.glob("csrc/*.cu"))
    host_side = [f"csrc/{name}.cpp" for name in ("workspace", "gate_cpu", "paging_cpu")]
    sources = ["tests/cuda_host/run.cpp", "tests/cuda_host/sanitize.cpp", *host_side, *kernels]
    program = build(root, tmp_path / "sanitize", sources, checks, "-fno-sanitize-recover=all", "-O0")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
