"""`python -m bench`: every row in a process of its own; writes JSON, a Markdown table and a plot."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import gradkit

from . import protocol, report
from .rows import ROWS
from .shapes import FULL, QUICK

RESULTS = report.ROOT / "bench" / "results"
LIMIT = 150  # seconds that one row may take; heavyball compiles anew for each shape
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def run_row(name: str, quick: bool) -> dict[str, Any]:
    """The parts of a row, measured in a fresh process with empty caches; those done before it failed are kept."""
    command = [sys.executable, "-m", "bench.worker", name, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        env = {**os.environ, **{key: os.path.join(folder, key.lower()) for key in CACHES}}
        env["PYTHONPATH"] = os.pathsep.join(x for x in (str(report.ROOT), os.environ.get("PYTHONPATH")) if x)
        out, err = Path(folder, "out"), Path(folder, "err")
        why = ""
        with out.open("w") as o, err.open("w") as e:
            try:
                code = subprocess.run(command, stdout=o, stderr=e, env=env, timeout=LIMIT, cwd=folder).returncode
                last = err.read_text(errors="replace").strip().splitlines()[-1:]
                why = f"ended with {code}: {' '.join(last)}" if code else ""
            except subprocess.TimeoutExpired:
                why = f"took longer than {LIMIT} s"
        return {**collect(out.read_text(errors="replace")), **({"why": why} if why else {})}


def collect(output: str) -> dict[str, Any]:
    """The worker's parts; another package may print between them."""
    parts: dict[str, Any] = {}
    for text in output.splitlines():
        try:
            part = json.loads(text)
        except ValueError:
            continue
        if isinstance(part, dict):
            parts |= part
    return parts


def brief(name: str, parts: dict[str, Any], seconds: float) -> str:
    """A line of progress."""
    ratios = [f"{parts.get(key, {}).get('ratio', float('nan')):6.2f}" for key in ("resnet50", "gpt2")]
    return f"{name:<40} {' '.join(ratios)}  {report.reason(parts)[:100]} ({seconds:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 3 rounds: shows that it runs, no more")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="only these rows")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results)")
    options = parser.parse_args()
    if options.out is None and (options.quick or len(options.rows) < len(ROWS)):
        parser.error("--quick and --rows take --out: what they write is no whole result")
    out, results, commit = options.out or RESULTS, {}, report.commit()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'ratio to fused AdamW':<40} ResNet  GPT-2", flush=True)
    for name in options.rows:
        start = time.perf_counter()
        results[name] = run_row(name, options.quick)
        print(brief(name, results[name], time.perf_counter() - start), flush=True)
    data = {
        "date": date.today().isoformat(),
        "commit": commit,
        "device": "cpu",
        "cpu": protocol.cpu(),
        "threads": next((r["threads"] for r in results.values() if "threads" in r), torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradkit": gradkit.__version__,
        "protocol": ("Quick: tiny shapes, 3 rounds, no result. " if options.quick else "") + protocol.PROTOCOL,
        "shapes": {s.key: [len(s.tensors), s.elements] for s in (QUICK if options.quick else FULL)},
        "rows": [report.record(ROWS[name], {n: ROWS[n] for n in results}, results) for name in results],
    }
    file = out / f"cpu-{data['date']}"
    file.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    page = report.markdown(data)
    file.with_suffix(".md").write_text(page)
    report.plot(data, file.with_suffix(".png"))
    print(f"\n{page}\nwrote {file}.json, .md, .png")


if __name__ == "__main__":
    main()
