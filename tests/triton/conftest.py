"""Which of the two files a run without paths takes: Triton reads TRITON_INTERPRET once, when it is imported."""

import importlib.util
import os

collect_ignore = ["test_compile.py" if os.environ.get("TRITON_INTERPRET", "0") != "0" else "test_interpreter.py"]
if importlib.util.find_spec("triton") is None:  # there are wheels for Linux only
    collect_ignore = ["test_compile.py", "test_interpreter.py"]
