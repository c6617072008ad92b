"""A conformal gate on what an engine samples: scores each running chain span by span and ends those that are to be
taken over. Knows tensors and a calibrator, nothing of vLLM; `self_gate.py` and `self_gate_v2.py` fit it to vLLM's two
model runners.

The score of a span is its mean negative log-likelihood (nats per token) under the model that wrote it, at temperature 1
and before penalties and top-k. With one model as draft and target that is the score of ATTS (arXiv 2509.15148) where a
model verifies itself: a chain goes to a larger model when its own has become unsure of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import atts_engine.ops  # noqa: F401, registers torch.ops.atts
from atts_engine.conformal import LEVEL_ONE, Calibrator, load_calibrator
from atts_engine.errors import InputError
from atts_engine.evaluation.decisions import decision_to_json
from atts_engine.evaluation.jsonl import JsonlWriter
from atts_engine.models.fingerprint import fingerprint
from atts_engine.models.safetensors_folder import weight_files
from atts_engine.pipeline.records import Decision
from examples.vllm.request import GatedRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Integers = npt.NDArray[np.int64]
_NOTHING_HELD = -1

SETTINGS = "atts_gate"
"""The gate's place in vLLM's additional_config."""


class SpanGate:
    """Gates up to `slots` requests at once. A slot is the caller's number for a running request.

    calibrator: frozen, one that counts scores by key (mondrian, split, window, adaptive). A span has the calibration's
    draft_tokens. log: a decision log (docs/formats.md), begun anew; it makes the host wait for each verdict.

    The p-value is the plain one, (1 + #{calibration >= score}) / (n + 1): no randomness, P(p <= alpha) <= alpha.
    """

    def __init__(self, calibrator: Calibrator, slots: int, device: torch.device, log: Path | None = None) -> None:
        _check(calibrator)
        assert calibrator.meta.draft_tokens is not None
        self.span = calibrator.meta.draft_tokens
        self._calibrator = calibrator
        store = calibrator.store
        self._store = [torch.from_numpy(array).to(device) for array in (store.ring, store.size, store.head)]
        self._levels = np.array([calibrator.level(key) for key in range(calibrator.keys)])
        self._requests: dict[int, GatedRequest] = {}
        self._marks = torch.zeros(slots, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(slots, self.span, device=device)
        # Tokens of the running span that were scored; fewer than were drawn after a preemption.
        self._scored: Integers = np.zeros(slots, np.int64)
        # Logits of the last step, until the token that was drawn from them is known: of each slot its row in them, and
        # how many tokens the request had drawn before.
        self._held = torch.empty(0, 0, device=device)
        self._held_row: Integers = np.zeros(slots, np.int64)
        self._held_drawn: Integers = np.full(slots, _NOTHING_HELD, np.int64)
        self._device = device
        self._log = None if log is None else JsonlWriter(log)
        self._decisions = self._batches = 0

    def open(self, slot: int, request: GatedRequest) -> None:
        """A request takes the slot, with nothing of it seen; also one that comes back from a preemption."""
        self._requests[slot] = request
        self._marks[slot] = request.mark
        self._scored[slot] = 0
        self._held_drawn[slot] = _NOTHING_HELD

    def step(self, logits: Tensor, rows: Tensor, slots: Integers, tokens: Tensor, drawn: Integers) -> None:
        """One sampling step, before the draw: score what was drawn last, judge the spans that it ended, end the chains
        to be taken over. logits[R, V] fp32 is changed in place.

        rows[G] int64: rows of the gated requests; slots[G]: their slots; drawn[G]: tokens they have drawn so far, 0 or
        less while the prompt is not through; tokens[G] int64: the last of these, any valid id where there is none.
        """
        fresh = np.flatnonzero((drawn > 0) & (self._held_drawn[slots] == drawn - 1))
        ended = self._score(slots, tokens, drawn, fresh)
        self._held = logits[rows]
        self._held_row[slots], self._held_drawn[slots] = np.arange(len(slots)), drawn
        # Only the gate writes the mark, so that the caller may read a verdict off it.
        logits[rows, self._marks[self._to_device(slots)]] = float("-inf")
        if ended.size:
            takeover = self._judge(slots[ended], drawn[ended])
            taken = rows[self._to_device(ended)][takeover]
            logits[taken] = float("-inf")
            logits[taken, self._marks[self._to_device(slots[ended])][takeover]] = 0.0

    def _score(self, slots: Integers, tokens: Tensor, drawn: Integers, fresh: Integers) -> Integers:
        """Log-probabilities of the tokens that are new; which of slots have ended a span that is scored throughout."""
        if not fresh.size:
            return fresh
        at, held = self._held_row[slots[fresh]], self._held
        if not np.array_equal(at, np.arange(len(held))):  # the batch has changed since
            held = held[self._to_device(at)]
        if len(fresh) != len(slots):
            tokens = tokens[self._to_device(fresh)]
        slots, drawn = slots[fresh], drawn[fresh]
        place = self._to_device(slots), self._to_device((drawn - 1) % self.span)
        self._logprobs[place] = torch.ops.atts.score_logits(held, tokens)
        self._scored[slots] += 1
        complete = (drawn % self.span == 0) & (self._scored[slots] == self.span)
        self._scored[slots[drawn % self.span == 0]] = 0
        return fresh[complete]

    def _judge(self, slots: Integers, drawn: Integers) -> Tensor:
        """Verdicts on the spans that these slots hold: takeover bool[E]."""
        count = len(slots)
        requests = [self._requests[slot] for slot in slots.tolist()]
        turns = [r.turn + n // self.span - 1 for r, n in zip(requests, drawn.tolist(), strict=True)]
        keys = np.array([self._calibrator.key_of(turn) for turn in turns])
        levels = [int(self._levels[key]) if r.level is None else r.level for r, key in zip(requests, keys)]
        bounds = torch.arange(0, (count + 1) * self.span, self.span, device=self._device)
        score, _ = torch.ops.atts.span_mean(self._logprobs[self._to_device(slots)].view(-1), bounds)
        level = torch.tensor(levels, device=self._device)
        u = torch.full_like(level, LEVEL_ONE)
        insert = torch.zeros(count, dtype=torch.bool, device=self._device)
        found = torch.ops.atts.gate(score, self._to_device(keys), *self._store, level, u, insert)
        if self._log is not None:
            self._write(requests, turns, keys.tolist(), levels, [t.tolist() for t in (score, *found)])
        return found[3]

    def _write(
        self, requests: list[GatedRequest], turns: list[int], keys: list[int], levels: list[int], found: list[list[Any]]
    ) -> None:
        assert self._log is not None
        for request, turn, key, level, score, greater, ties, n, takeover, p in zip(
            requests, turns, keys, levels, *found, strict=True
        ):
            if greater < 0:  # a score that is not finite: no verdict, the chain goes on
                continue
            decision = Decision(
                decision_seq=self._decisions,
                batch=self._batches,
                problem=request.problem,
                chain=request.chain,
                turn=turn,
                key=key,
                score=score,
                n=n,
                count=greater + ties,
                ties=ties,
                k=level * (n + 1),
                level=level,
                u=LEVEL_ONE,
                p_value=p,
                verdict="takeover" if takeover else "keep",
            )
            self._log.write(decision_to_json(decision))
            self._decisions += 1
        self._batches += 1

    def _to_device(self, indices: Integers) -> Tensor:
        return torch.from_numpy(indices).to(self._device, non_blocking=True)


def gate_of(config: VllmConfig, device: torch.device) -> SpanGate:
    """The gate that vLLM's `additional_config` describes: {"atts_gate": {"calibration": FILE.npz, "log": FILE.jsonl}},
    `log` if it is wanted. InputError for settings that cannot be, for a calibration of another model than a served
    local folder's, and beside speculative decoding, whose draft tokens the gate would take for final."""
    settings = dict(config.additional_config).get(SETTINGS) or {}
    unknown = sorted(settings.keys() - {"calibration", "log"})
    if unknown or "calibration" not in settings:
        found = f"no setting {unknown[0]!r}" if unknown else "no calibration is named"
        raise InputError(f"additional_config[{SETTINGS!r}]: {found}; it takes calibration (FILE.npz) and log")
    if config.speculative_config is not None:
        raise InputError("the gate does not go with speculative decoding: leave speculative_config out")
    calibrator = load_calibrator(settings["calibration"], frozen=True)
    folder = Path(config.model_config.model)
    if folder.is_dir() and fingerprint([folder / "config.json", *weight_files(folder)]) != calibrator.meta.draft:
        raise InputError(f"{settings['calibration']} was made with another model than {folder}")
    log = settings.get("log")
    if log is not None and config.parallel_config.world_size_across_dp > 1:
        raise InputError("atts_gate: log is the file of one worker; leave it out with several")
    return SpanGate(calibrator, config.scheduler_config.max_num_seqs, device, None if log is None else Path(log))


def _check(calibrator: Calibrator) -> None:
    meta = calibrator.meta
    if not (calibrator.frozen and calibrator.on_device):
        raise InputError(f"the gate counts by key and learns nothing: it cannot take {calibrator.name}, cold or online")
    if meta.score != "mean-nll" or meta.draft_tokens is None:
        raise InputError(f"the gate needs a calibration of mean-nll over spans of tokens, not of {meta.score}")
    if meta.draft != meta.target:
        raise InputError("the gate scores a model by itself: calibrate with the same model as --draft and --target")
