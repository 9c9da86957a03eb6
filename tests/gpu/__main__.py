"""`python -m tests.gpu [WORD ...]`: the checks whose names hold one of the words, or all; fails without a GPU."""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence

import torch

import gradkit

from . import hostile, laws, parity, reductions, sanitizer
from .checks import Check, NotRun, checks
from .place import Place, find

FILES = (laws, reductions, hostile, sanitizer, parity)  # what takes longest comes last
SLOWEST = 8
LIMIT = 560  # seconds: a check that is not begun by then fails


def outcome(check: Check, place: Place) -> str:
    """Empty where the check passed."""
    try:
        check.run(place)
    except NotRun as e:
        return f"NOT RUN: {e}"
    except Exception:
        return f"FAILED\n{traceback.format_exc()}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in Triton's interpreter: shows that they run")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args(arguments)
    place = find(options.tiny)
    gc.freeze()  # the collector looks only at what the checks leave: 0.2 s less after each of them
    print(f"gradkit {gradkit.__version__}, torch {torch.__version__}, {place.describe()}", flush=True)
    asked = [c for f in FILES for c in checks(f) if not options.words or any(w in c.name for w in options.words)]
    seconds, outcomes, begin = {}, {}, time.perf_counter()
    for check in asked:
        start = time.perf_counter()
        late = f"FAILED: not begun within {LIMIT} s" if start - begin > LIMIT else ""
        outcomes[check.name] = late or outcome(check, place)
        seconds[check.name] = time.perf_counter() - start
        print(f"{seconds[check.name]:6.1f} s  {check.name}  {outcomes[check.name] or 'ok'}", flush=True)
        gc.collect()
        place.tidy()
    failed = [name for name, text in outcomes.items() if text.startswith("FAILED")]
    missing = {name: text for name, text in outcomes.items() if text.startswith("NOT RUN")}
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:SLOWEST]
    print("\nslowest: " + "; ".join(f"{name} {seconds[name]:.1f} s" for name in slowest))
    print("\n".join(f"{name}  {text}" for name, text in missing.items()))
    passed = len(asked) - len(failed) - len(missing)
    took = time.perf_counter() - begin
    print(f"{passed} passed, {len(failed)} failed, {len(missing)} not run, in {took:.0f} s", flush=True)
    for name in failed:
        print(f"FAILED {name}")
    gc.unfreeze()  # what is frozen at the end counts as leaked
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
