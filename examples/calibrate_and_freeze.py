"""Learn calibration scores on some problems, save them, and run others with the calibration frozen.

With a frozen calibration a chain depends on its seed alone: run in company or run alone, it is the same chain.

    python examples/calibrate_and_freeze.py [FILE.npz]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from atts_engine import AsyncEngine, ATTSParams, Chain, EngineConfig, Problem
from atts_engine.conformal import Mondrian, load_calibrator
from atts_engine.evaluation.registers import heldout


def problems(count: int, seed: int) -> list[Problem]:
    return [Problem(p.id, p.problem, p.answer, i) for i, p in enumerate(heldout(count, seed, steps=(4, 5)))]


def written(chains: tuple[Chain, ...]) -> list[tuple[str, str | None]]:
    return [(turn.draft, turn.target) for chain in chains for turn in chain.turns]


async def main(path: Path) -> None:
    params = ATTSParams(chains=4, turns=16, draft_tokens=24, target_tokens=24, alpha=0.4)
    async with await AsyncEngine.create(EngineConfig(draft="tiny-draft", target="tiny-target")) as engine:
        meta = engine.calibration_meta(params)
        learning = Mondrian(params.alpha, meta=meta)
        await asyncio.gather(*(engine.solve(p, params, calibrator=learning) for p in problems(6, seed=1)))
        learning.save(path)
        print(f"{path.name}: {int(learning.store.size.sum())} scores, by turn {learning.store.size[:6].tolist()} ...")

        # A file made with other models, another prompt or another span length would be refused by name.
        frozen = load_calibrator(path, expect=meta, frozen=True)
        fresh = problems(3, seed=2)
        together = await asyncio.gather(*(engine.solve(p, params, calibrator=frozen) for p in fresh))
        alone = await engine.solve(fresh[-1], params, calibrator=frozen)

    for problem, solution in zip(fresh, together, strict=True):
        print(f"{problem.problem}  {solution.answer} (gold {problem.answer}), votes {solution.votes}")
    same = written(together[-1].chains) == written(alone.chains)
    print(f"the last problem by itself: {'the same chains' if same else 'other chains'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "calibration.npz"))
