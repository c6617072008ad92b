"""Solve one problem with the built-in pair and look at what the vote was made of.

python examples/solve.py
"""

from __future__ import annotations

from atts_engine import ATTSParams, Engine, EngineConfig

PROBLEM = "a = 85; b = a-43; c = b*3; d = c+61; e = d-98; e?"


def main() -> None:
    # The built-in pair thinks in steps of about 16 tokens, so its spans are short.
    params = ATTSParams(chains=8, turns=16, draft_tokens=24, target_tokens=24, alpha=0.4, seed=0)
    with Engine(EngineConfig(draft="tiny-draft", target="tiny-target")) as engine:
        solution = engine.solve(PROBLEM, params)

    print(f"{PROBLEM}\nanswer: {solution.answer}   votes: {solution.votes}")
    for chain in solution.chains:
        taken = sum(turn.takeover for turn in chain.turns)
        print(
            f"chain {chain.chain}: {chain.final_answer} after {len(chain.turns)} turns, {taken} taken over, "
            f"{chain.draft_tokens} draft and {chain.target_tokens} target tokens"
        )


if __name__ == "__main__":
    main()
