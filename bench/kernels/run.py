"""Every provider of a case, made ready, compared and timed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atts_engine import ops
from atts_engine.ops import native
from bench.kernels.cases import Case
from bench.kernels.devices import Facts, Runner, bytes_allocated, input_sets, one_line, race
from bench.kernels.peers import PEERS, why_absent
from bench.kernels.table import Row, limit


def implementations(case: Case, device: torch.device) -> list[str]:
    """Ours that differ on this case: native has no kernels of its own for some dtypes, and Triton on a CPU is its
    interpreter, whose time means nothing."""
    left_out = {"triton"} if device.type == "cpu" else set()
    if case.dtype not in native.DTYPES:
        left_out.add("native")
    able = (impl for impl in ops.IMPLEMENTATIONS if ops.obstacle(case.op, impl, device) is None)
    return [impl for impl in able if impl not in left_out]


def measure_case(
    case: Case,
    device: torch.device,
    facts: Facts,
    rounds: int,
    absent: dict[str, str],
    *,
    only_kernels: bool = False,
    without: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of all providers that run here. absent: gains, by name, why one was left out. only_kernels: without the
    reference where another implementation runs. without: implementations and packages to leave out, and why."""
    without = without or {}
    sets, cold = input_sets(case.bytes, facts.cache)
    inputs = [case.make(device, seed) for seed in range(sets)]
    able = [impl for impl in implementations(case, device) if impl not in without]
    if only_kernels and len(able) > 1:
        able.remove("reference")
    runners = [_ours(case, impl, inputs) for impl in able]
    signs = {runner.name: 1 for runner in runners}
    for peer in PEERS.get(case.op, ()):
        reason = without.get(peer.package) or why_absent(peer, device)
        if reason is None:
            try:
                runners.append(Runner(peer.name, [peer.build(*given) for given in inputs]))
                runners[-1].calls[0]()
                signs[peer.name] = peer.sign
            except Exception as error:  # whatever another project's code raises for what it cannot do
                reason = one_line(error)
                runners = [runner for runner in runners if runner.name != peer.name]
        if reason is not None:
            absent[peer.name] = reason
    for name, reason in race(device, runners, rounds).items():
        ours = name in ops.IMPLEMENTATIONS
        absent[f"{case.op} {case.label}, {name}" if ours else name] = reason
        runners = [runner for runner in runners if runner.name != name]
    differences = _differences(case, device, runners, signs)
    least, bound = limit(case, facts)
    rows = []
    for runner in runners:
        with runner.scope():
            allocated = bytes_allocated(device, runner.calls[0])
        ours = runner.name in ops.IMPLEMENTATIONS
        dtype = str(case.dtype).removeprefix("torch.")
        facts_of = (runner.median(), least, bound, allocated, differences[runner.name], runner.graph, cold)
        part = any(peer.less for peer in PEERS.get(case.op, ()) if peer.name == runner.name)
        rows.append(Row(case.op, case.label, dtype, runner.name, ours, part, *facts_of))
    return rows


def _ours(case: Case, impl: str, inputs: list[tuple[Any, ...]]) -> Runner:
    function = getattr(ops, case.op)
    return Runner(impl, [partial(function, *given) for given in inputs], partial(ops.use, impl))


def _differences(
    case: Case, device: torch.device, runners: list[Runner], signs: dict[str, int]
) -> dict[str, float | None]:
    """Largest difference of each provider's floating result from our reference's. Ops that write to what they are given
    have no floating result."""
    with ops.use("reference"):
        wanted = getattr(ops, case.op)(*case.make(device, 0))
    found: dict[str, float | None] = {}
    for runner in runners:
        if not isinstance(wanted, Tensor) or not wanted.is_floating_point() or not signs[runner.name]:
            found[runner.name] = None
            continue
        with runner.scope():
            got = runner.calls[0]()
        assert isinstance(got, Tensor)
        difference = got.detach().reshape(wanted.shape).double() * signs[runner.name] - wanted.double()
        found[runner.name] = float(difference.abs().max())
    return found
