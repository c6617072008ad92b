"""A vLLM worker whose prompt log-probabilities come from `torch.ops.atts.score_tokens`: hidden states times LM head,
tile by tile, so that the prompt's logits [tokens, vocabulary] never exist.

    vllm serve MODEL --worker-cls examples.vllm.scoring_worker.ScoringWorker

Requests and replies stay as they are: /v1/completions with `prompt_logprobs: 0` scores a prompt. A request for the
likeliest tokens too (`prompt_logprobs: 1` and more) needs the logits and takes vLLM's path. Ranks cost a second product
with the LM head; --additional-config '{"atts_scoring": {"ranks": false}}' saves it, and every rank is 0 then.

For model runner V1, one worker per model, and an LM head that is neither quantised nor adapted by LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors

import atts_engine.ops  # noqa: F401, registers torch.ops.atts
from atts_engine.errors import InputError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_TILE = 8192
"""Vocabulary columns of a tile, and rows of one, where ranks are counted: 16 MiB of logits at most."""
_ROWS = 512


class ScoringWorker(Worker):
    """The platform's worker with `TiledPromptLogprobs` in its model runner."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        if self.use_v2_model_runner:
            raise InputError("ScoringWorker fits model runner V1: set VLLM_USE_V2_MODEL_RUNNER=0")
        head = TiledHead(self.model_runner.get_model(), self.vllm_config)
        self.model_runner._get_prompt_logprobs_dict = TiledPromptLogprobs(self.model_runner, head)


class TiledHead:
    """Scores of hidden states under a model's LM head. InputError, naming it, for what the op does not compute."""

    def __init__(self, model: torch.nn.Module, config: VllmConfig) -> None:
        head, processor, mode = model.lm_head, model.logits_processor, config.model_config.logprobs_mode
        lacking = {
            "a model on several workers": config.parallel_config.world_size > 1,
            "LoRA": config.lora_config is not None,
            "a quantised LM head": not isinstance(
                head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod
            ),
            "an LM head with a bias": getattr(head, "bias", None) is not None,
            "scaled logits": processor.scale != 1.0,
            f"logprobs_mode {mode}": not mode.endswith("logprobs"),
        }
        for what, present in lacking.items():
            if present:
                raise InputError(f"ScoringWorker does not compute {what}: serve this model without it")
        self._weight = head.weight.data[: processor.org_vocab_size]
        self._softcap = processor.soft_cap or 0.0
        self._ranks = dict(config.additional_config).get("atts_scoring", {}).get("ranks", True)

    def score(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(logprob[T] fp32, rank[T] int64) of ids[T] int64 after hidden[T, H]; the likeliest token has rank 1."""
        logprob = torch.ops.atts.score_tokens(hidden, self._weight, ids, self._softcap)
        if not self._ranks:
            return logprob, torch.zeros_like(ids)
        ranks = [self._rank(hidden[at : at + _ROWS], ids[at : at + _ROWS]) for at in range(0, len(ids), _ROWS)]
        return logprob, torch.cat(ranks)

    def _rank(self, hidden: Tensor, ids: Tensor) -> Tensor:
        # The soft cap is monotonic: ranks need none.
        own = (hidden.float() * self._weight[ids].float()).sum(1, keepdim=True).to(hidden.dtype)
        rank = torch.ones_like(ids)
        for first in range(0, len(self._weight), _TILE):
            tile = torch.nn.functional.linear(hidden, self._weight[first : first + _TILE])
            inside = torch.nonzero((ids >= first) & (ids < first + _TILE))[:, 0]
            tile[inside, ids[inside] - first] = float("-inf")  # its own logit counts once, however it is rounded
            rank += (tile >= own).sum(1)
        return rank


class TiledPromptLogprobs:
    """Stands in for the runner's `_get_prompt_logprobs_dict`, which multiplies with the LM head, takes the softmax and
    gathers: the bookkeeping of chunked prompts stays vLLM's, the three calls are answered by a `TiledHead`."""

    def __init__(self, runner: GPUModelRunner, head: TiledHead) -> None:
        self._runner, self._plain = runner, runner._get_prompt_logprobs_dict
        self._stand_ins = _Unmultiplied(), _Scorer(runner, head)

    def __call__(self, hidden: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, LogprobsTensors | None]:
        runner = self._runner
        model, sampler = runner.model, runner.sampler
        runner.model, runner.sampler = self._stand_ins
        try:
            return self._plain(hidden, num_scheduled_tokens)
        finally:
            runner.model, runner.sampler = model, sampler


class _Unmultiplied:
    """In the model's place: hands the hidden states on where logits are asked for."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden


class _Scorer:
    """In the sampler's place: is given hidden states as logits and as their softmax."""

    def __init__(self, runner: GPUModelRunner, head: TiledHead) -> None:
        self._model, self._sampler, self._head = runner.model, runner.sampler, head

    def compute_logprobs(self, hidden: Tensor) -> Tensor:
        return hidden

    def gather_logprobs(self, hidden: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        if num_logprobs:
            logits = self._model.compute_logits(hidden)
            return self._sampler.gather_logprobs(self._sampler.compute_logprobs(logits), num_logprobs, token_ids)
        logprob, rank = self._head.score(hidden, token_ids)
        return LogprobsTensors(token_ids[:, None].to(torch.int32), logprob[:, None], rank)
