"""What `--early-verdict` spares on the built-in pair: the same frozen runs without it and with it, in tokens.

    python -m bench.early_engine         # writes bench/results/early_engine.json

Tokens, not seconds: they depend on the machine only by how soon a chain hears that its span is settled. The sets of
`bench.early_verdicts`, whose verdicts may differ from the whole span's, are put beside it on the same traces.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from atts_engine.cli.main import main as atts
from atts_engine.evaluation.files import write_text
from atts_engine.evaluation.traces import read_chains
from atts_engine.pipeline.records import Chain
from bench.early_spans import read_spans
from bench.early_verdicts import study
from bench.output import out_file
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "early_engine.json"
COMMON = ["--task", "registers", "--chains", "8", "--alpha", "0.4", "--concurrency", "8"]
CALIBRATE = ["calibrate", *COMMON, "--problems-count", "96", "--seed", "7"]
RUN = ["run", *COMMON, "--problems-count", "48", "--seed", "8", "--frozen"]
CHUNKS = (2, 6)
SETS = ("settled_early", "verdicts_changed", "target_tokens_not_verified_share", "draft_tokens_not_written_share")


def run(out: Path) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = folder / "calibration.npz"
        if status := atts([*CALIBRATE, "--out", str(state)]):
            return status
        cells = []
        for takeover in ("continue", "replace"):
            for chunk in CHUNKS:
                flags = [*RUN, "--calibration", str(state), "--takeover", takeover, "--chunk-tokens", str(chunk)]
                sides: dict[str, dict[str, Any]] = {}
                for side, more in (("whole", []), ("early", ["--early-verdict"])):
                    place = folder / f"{takeover}-{chunk}-{side}"
                    figures = place.with_suffix(".json")
                    if status := atts([*flags, *more, "--out", str(place), "--json", str(figures)]):
                        return status
                    sides[side] = _counts(json.loads(figures.read_text(encoding="utf-8")))
                traces = [read_chains(folder / f"{takeover}-{chunk}-{side}" / "chains.jsonl") for side in sides]
                same = {_text(c) for c in traces[0]} == {_text(c) for c in traces[1]}
                cells.append({"takeover": takeover, "chunk_tokens": chunk, "same_text": same, **sides})
        spans = read_spans([folder / f"replace-{CHUNKS[0]}-whole" / "chains.jsonl"])
    found = study(spans, alpha=0.4, miscoverage=0.1, bins=5, seed=0, sees="both")
    sets = {name: {k: f[k] for k in SETS} for name, f in found["labels"]["score"]["spans"].items()}
    commands = [shlex.join(["atts", *words]) for words in (CALIBRATE, RUN)]
    where = provenance("python -m bench.early_engine") | {"commands": commands}
    record = {"provenance": where, "runs": cells, "sets": {"parts": found["parts"], "methods": sets}}
    write_text(out, json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


def _counts(found: dict[str, Any]) -> dict[str, Any]:
    """draft_span: tokens of the draft's spans; draft_sampled: all that it wrote, what was taken back among it."""
    lanes, takeovers = found["lanes"], found["takeovers"]
    return {
        "decisions": takeovers["decisions"],
        "rate": takeovers["rate"],
        "early": takeovers["early"],
        "draft_span": found["tokens"]["draft"],
        "draft_sampled": lanes["draft"]["sampled_tokens"],
        "target_scored": lanes["target"]["scored_tokens"],
        "target_written": found["tokens"]["target"],
        "target_computed": lanes["target"]["computed_tokens"],
        "chain_accuracy": found["chain_accuracy"],
        "majority": found["majority"],
    }


def _text(chain: Chain) -> tuple[Any, ...]:
    """What stands in the chain in the end, where a takeover replaces the span: the kept spans and the target's."""
    turns = tuple((t.takeover, t.target if t.takeover else t.draft) for t in chain.turns)
    return chain.problem_id, chain.chain, chain.final_answer, turns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, default=OUT, help="default: bench/results/early_engine.json")
    sys.exit(run(parser.parse_args().out))
