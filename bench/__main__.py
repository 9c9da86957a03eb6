"""`python -m bench [--on gpu]`: every row in a process of its own; writes JSON, a Markdown table and a plot."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import gradkit

from . import devices, report
from .shapes import RACED, Shape, quick
from .suites import SUITES, Suite

RESULTS = report.ROOT / "bench" / "results"
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
SWEEP = "sweep"  # of the GPU's launch constants; a part of its suite beside the rows


def run(module: str, *arguments: str, limit: float) -> dict[str, Any]:
    """What a module measures in a fresh process with empty caches; the parts done before it failed are kept."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        env = {**os.environ, **{key: os.path.join(folder, key.lower()) for key in CACHES}}
        env["PYTHONPATH"] = os.pathsep.join(x for x in (str(report.ROOT), os.environ.get("PYTHONPATH")) if x)
        out, err = Path(folder, "out"), Path(folder, "err")
        why = ""
        with out.open("w") as o, err.open("w") as e:
            try:
                code = subprocess.run(command, stdout=o, stderr=e, env=env, timeout=limit, cwd=folder).returncode
                last = err.read_text(errors="replace").strip().splitlines()[-1:]
                why = f"ended with {code}: {' '.join(last)}" if code else ""
            except subprocess.TimeoutExpired:
                why = f"took longer than {limit:.0f} s"
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


def raced(suite: Suite) -> list[Shape]:
    keys = {shape.key for shape in suite.shapes}
    return [m for m in RACED if m.key in keys]


def brief(name: str, parts: dict[str, Any], suite: Suite, seconds: float) -> str:
    """A line of progress."""
    ratios = [f"{parts.get(m.key, {}).get('ratio', float('nan')):6.2f}" for m in raced(suite)]
    return f"{name:<40} {' '.join(ratios)}  {report.reason(parts)[:100]} ({seconds:.0f} s)"


def measure(suite: Suite, names: list[str], small: bool) -> dict[str, dict[str, Any]]:
    """The parts of each row, and of the sweep; nothing is begun when the suite's time is over."""
    flags, results, end = ["--quick"] if small else [], {}, time.monotonic() + suite.whole
    for name in names:
        start = time.monotonic()
        limit = min(suite.limit, end - start)
        if limit <= 0:
            results[name] = {"why": f"not begun: the {suite.whole:.0f} s of this suite were over"}
        elif name == SWEEP:
            results[name] = run("bench.sweep", *flags, limit=limit)
        else:
            results[name] = run("bench.worker", name, "--on", suite.key, *flags, limit=limit)
        print(brief(name, results[name], suite, time.monotonic() - start), flush=True)
    return results


def document(suite: Suite, results: dict[str, dict[str, Any]], small: bool, commit: str) -> dict[str, Any]:
    """What is written."""
    rows = {name: suite.rows[name] for name in results if name != SWEEP}
    machine: Mapping[str, Any] = next((r.pop("machine") for r in results.values() if "machine" in r), {})
    for parts in results.values():
        parts.pop("machine", None)
    threads = machine.get("threads", torch.get_num_threads())
    on_cpu = {"cpu": machine.get("name", devices.processor()), "threads": threads}
    return {
        "date": date.today().isoformat(),
        "title": suite.title,
        "commit": commit,
        "device": suite.key,
        **(on_cpu if suite.key == "cpu" else {"machine": machine}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradkit": gradkit.__version__,
        "protocol": ("Quick: tiny shapes, 3 rounds, no result. " if small else "") + suite.protocol,
        "shapes": {s.key: [len(s.tensors), s.elements] for s in (quick(suite.shapes) if small else suite.shapes)},
        "rows": [report.record(row, rows, results) for row in rows.values()],
        **({SWEEP: results[SWEEP]} if SWEEP in results else {}),
    }


def amended(old: dict[str, Any], new: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """A whole result with some rows measured anew, which say when; their bars look at its other rows too."""
    same = ("cpu", "machine", "threads", "python", "torch", "shapes", "protocol")
    if differ := [key for key in same if json.loads(json.dumps(new.get(key))) != old.get(key)]:
        raise SystemExit(f"another {' and '.join(differ)} than the committed result's: measure all rows")
    since = {"commit": new["commit"], "date": new["date"]}
    parts = {row["name"]: row for row in old["rows"]} | {row["name"]: {**row, "since": since} for row in new["rows"]}
    known = [suite.rows[name] for name in suite.rows if name in parts]
    return {**old, "rows": [report.record(row, suite.rows, parts) for row in known]}


def write(data: dict[str, Any], out: Path) -> str:
    """The files' paths, as a text."""
    name = data.get("machine", {}).get("name", "")
    file = out / "-".join(x for x in (data["device"], re.sub(r"\W+", "-", name.lower()), data["date"]) if x)
    file.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    file.with_suffix(".md").write_text(report.markdown(data))
    if find_spec("matplotlib") is None:
        return f"{file}.json, .md; no plot, since matplotlib is not installed"
    report.plot(data, file.with_suffix(".png"))
    if data["device"] == "cpu":
        report.plot(report.short(data), out / "step-times.png")
    return f"{file}.json, .md, .png"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--on", choices=SUITES, default="cpu", help="where (cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 3 rounds: shows that it runs, no more")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these, into the newest result; or {SWEEP}")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results)")
    parser.add_argument("--commit", help="what is measured, where the checkout came without git")
    options = parser.parse_args()
    suite = SUITES[options.on]
    known = [*([SWEEP] if suite.key == "gpu" else []), *suite.rows]
    names = options.rows or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no rows of this suite: {', '.join(unknown)}; there are: {', '.join(known)}")
    if options.out is None and options.quick:
        parser.error("--quick takes --out: what it writes is no result")
    committed = max(RESULTS.glob(f"{suite.key}-*.json"), default=None, key=lambda file: file.name)
    part = options.out is None and options.rows is not None
    if part and (committed is None or SWEEP in names):
        parser.error("--rows takes --out: there is no committed result that they belong to")
    devices.find(suite.key, options.quick)
    out, commit = options.out or RESULTS, options.commit or report.commit()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'ratio to fused AdamW':<40} {', '.join(m.title for m in raced(suite))}", flush=True)
    data = document(suite, measure(suite, names, options.quick), options.quick, commit)
    if part and committed:
        data = amended(json.loads(committed.read_text()), data, suite)
    wrote = write(data, out)
    print(f"\n{report.markdown(data)}\nwrote {wrote}")


if __name__ == "__main__":
    main()
