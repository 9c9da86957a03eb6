"""From text to a kernel: a module with a file of its own, which Triton, debuggers and profilers read."""

import hashlib
import os
import re
import tempfile
import types
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..backends import ccache


@cache
def kernel(text: str, **functions: Any) -> Any:
    """The last function of a text that finds these functions among its globals."""
    name = f"gradkit_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    module = types.ModuleType(name)
    vars(module).update(functions)
    exec(compile(text, write(f"{name}.py", text), "exec"), vars(module))  # an import would also trust a .pyc beside it
    return vars(module)[re.findall(r"^def (\w+)", text, re.M)[-1]]


def write(name: str, text: str) -> Path:
    """The file of that name with that text, in the user's own cache or else in a folder of this process."""
    with suppress(OSError):
        return into(ccache.folder(), name, text)
    return into(Path(temporary().name), name, text)


def into(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if not path.exists() or path.read_text() != text:
        handle, made = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(made).replace(path)  # whole, whoever writes it at the same time
    return path


@cache
def temporary() -> tempfile.TemporaryDirectory:
    """Goes with the process: Triton reads the source again when it compiles."""
    return tempfile.TemporaryDirectory(prefix="gradkit-")
