"""Settings of one request."""

from __future__ import annotations

from dataclasses import dataclass

from atts_engine.errors import InputError
from atts_engine.pipeline.settings import Gated, Options, Settings, make_settings
from atts_engine.pipeline.voting import VOTES
from atts_engine.runtime.records import SamplingParams

TAKEOVERS = ("continue", "replace")
POLICIES = ("threshold", "exact-count")


@dataclass(frozen=True, slots=True)
class ATTSParams:
    """How the chains of a problem are written.

    chains: m; turns: at most; draft_tokens, target_tokens: span lengths K_d, K_t in tokens; alpha: nominal
    takeover rate. strategy: a name of `STRATEGIES` (docs/strategies.md); options: its own settings that are not at
    their defaults. policy: "threshold" (each verdict stands alone), "exact-count" (as many takeovers of a problem as
    alpha gives it, within one). takeover: the target continues after the draft span, or replaces it. vote: "majority"
    or "weighted". early_verdict: a draft span ends behind the token after which nothing could save it from being taken
    over; with strategy "atts", policy "threshold", a frozen calibrator and one tokenizer only.
    Raises `InputError` for a value outside its range.
    """

    chains: int = 8
    turns: int = 15
    draft_tokens: int = 500
    target_tokens: int = 500
    alpha: float = 0.4
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    strategy: str = "atts"
    options: Options = ()
    policy: str = "threshold"
    takeover: str = "continue"
    vote: str = "majority"
    early_verdict: bool = False

    def __post_init__(self) -> None:
        for name in ("chains", "turns", "draft_tokens", "target_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number, 1 or more, not {value!r}")
        if not 0.0 < self.alpha < 1.0:
            raise InputError(f"alpha must be inside (0, 1), not {self.alpha}")
        choices = (("policy", POLICIES), ("takeover", TAKEOVERS), ("vote", VOTES))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.early_verdict and self.strategy != "atts":
            raise InputError(f"early_verdict belongs to the strategy atts, not to {self.strategy}")
        if self.early_verdict and self.policy != "threshold":
            raise InputError(
                f"early_verdict takes no policy but threshold: {self.policy} moves the level while a span is written"
            )
        settings = make_settings(self.strategy, self.options)
        if self.early_verdict and settings.score != "mean-nll":
            raise InputError(f"early_verdict is for mean-nll over spans of tokens, not for {settings.score}")
        self.sampling(0)

    @property
    def replaces(self) -> bool:
        """Whether a takeover takes the draft's span back."""
        own = self.settings
        takeover = own.takeover if isinstance(own, Gated) else None
        return (takeover or self.takeover) == "replace"

    @property
    def settings(self) -> Settings:
        """Those of the strategy."""
        return make_settings(self.strategy, self.options)

    def sampling(self, key: int, *, logprobs: bool = False, stop: tuple[str, ...] = ()) -> SamplingParams:
        """Sampling of one chain's spans on one lane; `key` is the chain's stream there."""
        return SamplingParams(
            self.temperature, self.top_k, self.top_p, self.min_p, seed=key, stop=stop, logprobs=logprobs
        )

    @property
    def token_limit(self) -> int:
        """Tokens a chain may hold after its prompt: what a single model may write in the place of all turns."""
        return self.turns * (self.draft_tokens + self.target_tokens)
