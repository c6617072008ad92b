"""Tensors on the devices of `tests.cuda_streams`: torch's CUDA interface on a machine without a GPU.

Inside `pretend_cuda` a tensor made on a CUDA device is a `DeviceTensor`. What it will hold is an ordinary tensor, full
of nonsense (NaN, absurd integers) until the work that computes it has run. An operation makes its results at once, as
torch does, and queues what computes them on the current stream; views share memory at once; what needs a value on the
host waits for the current stream, as CUDA does. A kernel of Triton or csrc/ is one piece of work, which runs the torch
reference of its op: what is tested is where and when it is launched. torch's own operators run on the device of their
tensors, those kernels on the current device, and they refuse tensors of another one.

Copies are CUDA's. Those that do not block read and write page-locked memory when they run; pageable memory they read at
once, and to write it they wait. Freed memory is written over behind all that its stream has queued so far; page-locked
memory is kept until the copies that use it have run. A captured graph holds the work between its two ends, with the
tensors and the Python numbers of that moment.

Not here: copies from device to device, events inside a capture, FlashInfer, memory that runs out, time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from atts_engine import ops
from atts_engine.ops import cuda as ops_cuda
from tests.cuda_kernels import csrc_call, triton_launcher
from tests.cuda_streams import Graph, Machine, Memory, Order, Pool, Work

atts_triton = pytest.importorskip("atts_triton", reason="triton is not installed")

CUDA = torch.device("cuda", 0)
FREE_BYTES = 1 << 30
_OURS = ("cuda", "meta")
"""Device types that mean the device. C++ takes a `DeviceTensor` for a meta tensor: a build of torch without CUDA has
nothing that it could ask about a CUDA tensor."""
_aten = torch.ops.aten
_HOST_READS = (_aten._local_scalar_dense.default, _aten.equal.default)
_HOST_SIZES = (_aten.nonzero.default, _aten.masked_select.default)
_MASKABLE = (_aten.index.Tensor, _aten.index_put_.default)
_EMPTY = ("aten::empty", "aten::new_empty")


class _Lease:
    """Held by every tensor over an allocation. Its end frees the memory."""

    def __init__(self, machine: Machine, memory: Memory) -> None:
        self.memory = memory
        weakref.finalize(self, machine.free, memory).atexit = False


class DeviceTensor(torch.Tensor):
    """held: what it holds once all that was queued has run. lease: its allocation."""

    held: torch.Tensor
    lease: _Lease
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, lease: _Lease) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        tensor.held, tensor.lease = held, lease
        return tensor

    device = property(lambda self: torch.device("cuda", self.lease.memory.stream.device))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside `pretend_cuda`, or on a thread that was started outside")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def record_stream(self, stream: Any) -> None:
        self.lease.memory.recorded.add(stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"


class Gpu:
    """What torch and its allocators do for tensors on the devices of a machine."""

    def __init__(self, order: Order, devices: int) -> None:
        self.machine = Machine(order, devices)
        self.waits_fail = False
        """Whether `torch.cuda.set_sync_debug_mode` says so."""
        self._locked: dict[int, Memory] = {}
        """Page-locked allocations by address."""
        self._shapes: dict[Any, list[Any]] = {}

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, device: int | None = None
    ) -> DeviceTensor:
        """Fresh memory of the device's current stream, or of the graph that it captures. device: None for the current
        one."""
        with _outside():
            held = (
                torch.empty(shape, dtype=dtype) if stride is None else torch.empty_strided(shape, stride, dtype=dtype)
            )
            whole = held.as_strided((held.untyped_storage().nbytes() // held.itemsize,), (1,), 0)
            _spoil(whole)
        stream = self.machine.current if device is None else self.machine.current_on(device)
        pool = stream.capture.pool if stream.capture is not None else None
        return DeviceTensor(held, _Lease(self.machine, Memory(partial(_spoil, whole), stream, pool)))

    def page_locked(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """On the host. Like torch's allocator it gives the memory to nobody else before the copies have run: their
        work holds it."""
        count = int(np.prod(shape))
        raw = np.full(max(1, count * dtype.itemsize), 0xFF, dtype=np.uint8)
        address = raw.ctypes.data
        self._locked[address] = Memory(lambda: None)
        weakref.finalize(raw, self._locked.pop, address).atexit = False
        return torch.from_numpy(raw)[: count * dtype.itemsize].view(dtype).view(shape)

    def queue(
        self,
        name: str,
        run: Callable[[], object],
        reads: Sequence[Any] = (),
        writes: Sequence[Any] = (),
        device: int | None = None,
    ) -> None:
        """One kernel or one copy on the current stream of a device, None: the current one, which must be that of the
        tensors. reads, writes: the tensors that it touches. run: works on what they hold, and must not refer to a
        `DeviceTensor`, as a queued kernel keeps no memory alive."""

        def inside() -> None:
            with _outside():
                run()

        place = self.machine.device if device is None else device
        elsewhere = [t.device for t in (*reads, *writes) if isinstance(t, DeviceTensor) and t.device.index != place]
        if elsewhere:
            raise RuntimeError(f"{name} on cuda:{place} touches a tensor on {elsewhere[0]}")
        read, written = ([m for t in some if (m := self._memory(t)) is not None] for some in (reads, writes))
        self.machine.put(Work(name, inside, read, written), place)

    def dispatch(self, mode: TorchDispatchMode, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator of torch."""
        place = kwargs.get("device")
        if kwargs.get("pin_memory"):
            return self.page_locked(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        tensors = _tensors(args, kwargs)
        if func is _aten.is_pinned.default:
            return self._memory(args[0]) is not None
        if not (place is not None and place.type in _OURS or any(isinstance(t, DeviceTensor) for t in tensors)):
            return func(*args, **kwargs)
        if func is _aten.linear.default:
            # One kernel, and one in which a row's bits do not depend on its batch: results are compared to the bit.
            func = torch.ops.atts.linear.default
        elif _is_composite(func):
            with mode:
                return func.decompose(*args, **kwargs)
        if func is _aten._to_copy.default:
            return self._to(*args, **kwargs)
        if func is _aten.copy_.default and not all(isinstance(t, DeviceTensor) for t in args[:2]):
            return self._copy(*args, **kwargs)
        if func in _HOST_READS:
            self.queue(func.name(), lambda: None, reads=tensors, device=self._device_of(tensors))
            self._wait(tensors)
            return func(*_held(args), **_held(kwargs))
        if func in _HOST_SIZES or (func in _MASKABLE and any(_is_mask(t) for t in tensors[1:])):
            # How much a mask holds is known to the device first.
            self._wait(tensors)
            if func is _aten.index_put_.default:
                return self._launch(func, args, kwargs)
            found = func(*_held(args), **_held(kwargs))
            return self._launch(func, args, kwargs, [(found.shape, found.dtype, found.stride())])
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            whole = next(t for t in tensors if isinstance(t, DeviceTensor))
            views = func(*_held(args), **_held(kwargs))
            with torch.inference_mode(whole.is_inference()):
                if isinstance(views, torch.Tensor):
                    return DeviceTensor(views, whole.lease)
                return [DeviceTensor(view, whole.lease) for view in views]
        return self._launch(func, args, kwargs)

    def _launch(self, func: Any, args: Any, kwargs: dict[str, Any], results: list[Any] | None = None) -> Any:
        """Queue an operator that writes its results, or some of its arguments."""
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.name in given]
        anew = all(r.alias_info is None for r in schema.returns)
        if results is None:
            results = self._results(func, args, kwargs) if anew else []
        tensors = _tensors(args, kwargs)
        device = self._device_of(tensors, kwargs.get("device"))
        made = [self.empty(*result, device) for result in results]
        if not func.name().startswith(_EMPTY):
            inner, named = _held(args, keep=True), _held(kwargs, keep=True)
            outs = [t.held for t in made]

            def run() -> None:
                found = func(*inner, **named)
                values = found if isinstance(found, tuple | list) else (found,)
                for out, value in zip(outs, values, strict=bool(outs)):
                    out.copy_(value)

            reads = [t for t in tensors if not any(t is w for w in written)]
            self.queue(func.name(), run, reads, [*written, *made], device)
        if not anew:
            return written[0] if len(written) == 1 else tuple(written)
        if not schema.returns:
            return None
        return made[0] if len(schema.returns) == 1 else tuple(made)

    def _results(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[Any, torch.dtype, Any]]:
        """(shape, dtype, stride) of what an operator returns."""
        key = func, _key(args), _key(kwargs.items())
        if key not in self._shapes:
            found = func(*_as_meta(args), **_as_meta(kwargs))
            tensors = found if isinstance(found, tuple | list) else () if found is None else (found,)
            self._shapes[key] = [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]
        return self._shapes[key]

    def _to(self, source: torch.Tensor, **options: Any) -> torch.Tensor:
        """`Tensor.to`, where it is not known to be a view of the tensor itself."""
        dtype = options.get("dtype") or source.dtype
        place = options.get("device")
        to_host = place is not None and place.type not in _OURS
        if isinstance(source, DeviceTensor) and not to_host:
            if place is not None and place.type == "cuda" and place != source.device:
                raise RuntimeError("a copy from device to device is not modelled")
            if dtype is source.dtype:
                return source
            return self._launch(_aten._to_copy.default, (source,), {"dtype": dtype})
        waits = not options.get("non_blocking", False)
        if not to_host:
            return self._copy(self.empty(source.shape, dtype, device=self._device_of((), place)), source, not waits)
        target = torch.empty(source.shape, dtype=dtype) if waits else self.page_locked(source.shape, dtype)
        return self._copy(target, source, not waits)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Between host and device."""
        host = source if isinstance(target, DeviceTensor) else target
        locked, device = self._memory(host) is not None, self._device_of((target, source))
        if self.machine.current_on(device).capture is not None and not locked:
            raise RuntimeError("operation not permitted when stream is capturing: a copy of pageable memory")
        to, of = _held(target), _held(source)
        if host is source and not locked:
            of = of.clone()
        name = f"copy to the {'device' if host is source else 'host'}"
        self.queue(name, lambda: to.copy_(of), [source], [target], device)
        if not non_blocking or (host is target and not locked):
            self._wait((target, source))
        return target

    def _wait(self, tensors: Sequence[Any]) -> None:
        """An operation that cannot do without: for what the current stream of its device has queued so far."""
        if self.waits_fail:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.machine.current_on(self._device_of(tensors)).synchronize()

    def _device_of(self, tensors: Sequence[Any], place: torch.device | None = None) -> int:
        """Where an operator runs: on its tensors' device, or that which it names, else the current one."""
        found = [t.device.index for t in tensors if isinstance(t, DeviceTensor)]
        if found:
            return found[0]
        named = place is not None and place.type == "cuda" and place.index is not None
        return place.index if named else self.machine.device

    def launches(self, name: str, tensors: Sequence[Any]) -> None:
        """A kernel of ours goes to the current device: raises where its tensors are on another."""
        place = self.machine.device
        for tensor in tensors:
            if isinstance(tensor, DeviceTensor) and tensor.device.index != place:
                raise RuntimeError(f"{name} is launched on cuda:{place} and its tensors are on {tensor.device}")

    def _memory(self, tensor: torch.Tensor) -> Memory | None:
        """Of a tensor that lies on the device or in page-locked memory."""
        if isinstance(tensor, DeviceTensor):
            return tensor.lease.memory
        return self._locked.get(tensor.untyped_storage().data_ptr())


class _Mode(TorchDispatchMode):
    """Of one thread."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.dispatch(self, func, args, kwargs or {})


@contextmanager
def pretend_cuda(order: Order, devices: int = 1) -> Iterator[Gpu]:
    """CUDA devices are there, for this thread and those that it starts inside. In the end all that was queued runs."""
    gpu = Gpu(order, devices)
    machine = gpu.machine
    plain_tensor, plain_run = torch.tensor, threading.Thread.run

    def number(place: Any) -> int:
        index = place if isinstance(place, int | None) else torch.device(place).index
        return machine.device if index is None else index

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        # It hides its copy from modes.
        made = plain_tensor(data, dtype=dtype)
        on_host = device is None or torch.device(device).type == "cpu"
        return made if on_host else made.to(torch.device("cuda", number(device)))

    def run_thread(thread: threading.Thread) -> None:
        with _Mode(gpu):
            plain_run(thread)

    def set_sync_debug_mode(mode: str) -> None:
        gpu.waits_fail = mode == "error"

    cuda = {
        "CUDAGraph": partial(Graph, machine),
        "Event": lambda enable_timing=False, blocking=False: machine.new_event(enable_timing),
        "Stream": lambda place=None, priority=0: machine.new_stream(number(place), priority),
        "_lazy_init": lambda: None,
        "current_device": lambda: machine.device,
        "current_stream": lambda place=None: machine.current_on(number(place)),
        "default_stream": lambda place=None: machine.defaults[number(place)],
        "device": lambda place: machine.on_device(number(place)),
        "device_count": lambda: devices,
        "get_device_name": lambda place=None: "a pretended GPU",
        "graph": lambda graph, pool=None, stream=None, capture_error_mode="global": machine.capture(
            graph, pool, stream
        ),
        "graph_pool_handle": Pool,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: machine.current.capture is not None,
        "mem_get_info": lambda place=None: (FREE_BYTES, FREE_BYTES),
        "set_sync_debug_mode": set_sync_debug_mode,
        "stream": machine.on,
        "synchronize": lambda place=None: machine.synchronize(number(place)),
    }
    triton = {name: triton_launcher(name, gpu.launches) for name in atts_triton.__all__}
    csrc = {"_call": csrc_call(gpu.queue), "lacking": dict}
    with ExitStack() as stack:
        for owner, attributes in ((torch.cuda, cuda), (atts_triton, triton), (ops_cuda, csrc)):
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(ops_cuda._Workspaces, "held", {}))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_thread))
        stack.enter_context(ops.use(None))  # what runs on a CUDA device is decided anew, now and behind this
        stack.enter_context(_Mode(gpu))
        yield gpu
        for device in range(devices):
            machine.synchronize(device)


def _outside() -> AbstractContextManager[object]:
    """What runs here is neither seen by modes nor held to the rules of tensors made in inference mode."""
    return _beyond_modes() if torch._C._len_torch_dispatch_stack() else torch.inference_mode()


@contextmanager
def _beyond_modes() -> Iterator[None]:
    with _disable_current_modes(), torch.inference_mode():
        yield


def _spoil(whole: torch.Tensor) -> None:
    """NaN, or an integer that is no index, id, length or count."""
    with _outside():
        if whole.dtype.is_floating_point:
            whole.fill_(torch.nan)
        elif whole.dtype in (torch.int64, torch.int32):
            whole.fill_(torch.iinfo(whole.dtype).min // 3)
        else:
            whole.fill_(0xFF if whole.dtype is torch.uint8 else 1)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, torch.Tensor)]
    return found


def _over(value: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of an operator, each changed."""
    if isinstance(value, dict):
        return {name: _over(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_over(each, change) for each in value]
    return change(value)


def _held(value: Any, *, keep: bool = False) -> Any:
    """Arguments as the host has them. keep: for later, with copies of its own tensors, as a kernel is launched with the
    numbers of the moment."""

    def change(each: Any) -> Any:
        if isinstance(each, DeviceTensor):
            return each.held
        if keep and isinstance(each, torch.Tensor):
            return each.clone()
        if isinstance(each, torch.device):
            return torch.device("cpu")
        return each

    return _over(value, change)


def _as_meta(value: Any) -> Any:
    def change(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
        return torch.device("meta") if isinstance(each, torch.device) else each

    return _over(value, change)


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list | tuple) or hasattr(value, "__iter__") and not isinstance(value, str):
        return tuple(_key(each) for each in value)
    return type(value), value
