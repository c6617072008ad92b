"""atts-engine: asynchronous test-time scaling of language models (ATTS, arXiv 2509.15148)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atts_engine.config import ATTSParams, EngineConfig, SamplingParams
    from atts_engine.engine import AsyncEngine, Engine
    from atts_engine.errors import AttsError, ChainError, InputError, LaneError, QueueFull
    from atts_engine.pipeline import (
        Chain,
        ChainEvent,
        ChunkScore,
        Decision,
        Problem,
        Solution,
        SolutionEvent,
        TokensEvent,
        Turn,
        VerdictEvent,
    )

__version__ = "0.1.0"

_HOMES = {
    "atts_engine.config": ("ATTSParams", "EngineConfig", "SamplingParams"),
    "atts_engine.engine": ("AsyncEngine", "Engine"),
    "atts_engine.errors": ("AttsError", "ChainError", "InputError", "LaneError", "QueueFull"),
    "atts_engine.pipeline": (
        "Chain",
        "ChainEvent",
        "ChunkScore",
        "Decision",
        "Problem",
        "Solution",
        "SolutionEvent",
        "TokensEvent",
        "Turn",
        "VerdictEvent",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ATTSParams",
    "AsyncEngine",
    "AttsError",
    "Chain",
    "ChainError",
    "ChainEvent",
    "ChunkScore",
    "Decision",
    "Engine",
    "EngineConfig",
    "InputError",
    "LaneError",
    "Problem",
    "QueueFull",
    "SamplingParams",
    "Solution",
    "SolutionEvent",
    "TokensEvent",
    "Turn",
    "VerdictEvent",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that the calibrators (numpy only) and `atts --help` do not wait for torch.
    if name in _HOME_OF:
        import importlib

        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
