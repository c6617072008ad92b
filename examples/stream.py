"""Watch chains while they are written: an async iterator of typed events. Leaving it early cancels what still runs.

python examples/stream.py
"""

from __future__ import annotations

import asyncio

from atts_engine import (
    AsyncEngine,
    ATTSParams,
    ChainEvent,
    EngineConfig,
    SolutionEvent,
    TokensEvent,
    VerdictEvent,
)

PROBLEM = "a = 37; b = a*5; c = b-64; d = c+88; d?"


async def main() -> None:
    params = ATTSParams(chains=3, turns=16, draft_tokens=24, target_tokens=24, alpha=0.4, seed=1)
    async with await AsyncEngine.create(EngineConfig(draft="tiny-draft", target="tiny-target")) as engine:
        async for event in engine.generate(PROBLEM, params):
            match event:
                case TokensEvent(chain=chain, author=author, text=text):
                    print(f"chain {chain}  {author:>6}  {text!r}")
                case VerdictEvent(chain=chain, score=score, p_value=p, takeover=takeover):
                    verdict = "taken over" if takeover else "kept"
                    print(f"chain {chain}  {verdict}: {score:.4f} nats per token, p = {p:.3f}")
                case ChainEvent(chain=chain):
                    print(f"chain {chain.chain}  ends ({chain.finish}) with {chain.final_answer}")
                case SolutionEvent(solution=solution):
                    print(f"answer: {solution.answer}   votes: {solution.votes}")


if __name__ == "__main__":
    asyncio.run(main())
