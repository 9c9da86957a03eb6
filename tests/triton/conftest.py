"""Which files a run without paths takes: Triton reads TRITON_INTERPRET once, when it is imported."""

import importlib.util
import os

INTERPRETED = ["test_interpreter.py", "test_steps.py", "test_measured.py", "test_split.py"]
COMPILED = ["test_compile.py", "test_gate.py", "test_specialisation.py"]
collect_ignore = COMPILED if os.environ.get("TRITON_INTERPRET", "0") != "0" else INTERPRETED
if importlib.util.find_spec("triton") is None:  # there are wheels for Linux only
    collect_ignore = COMPILED + INTERPRETED
