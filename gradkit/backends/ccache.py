"""From C text to a loaded function: the system's compiler, and a private cache of what it made."""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# contraction would change results: a compiler that refuses this flag is not used
NEEDED = ("-O3", "-ffp-contract=off", "-std=gnu11", "-shared", "-fPIC")
WANTED = ("-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
OPENMP = rb"lib(?:gomp|i?omp)[\w-]*\.(?:so|dylib|\d)[\w.]*"
PROBE = """#include <stdint.h>
static int64_t total[64];
void run(const int64_t *job) {
  #pragma omp parallel for
  for (int i = 0; i < 64; i++) total[i] += job[0];
}
"""


class NoCompiler(RuntimeError):
    """No C compiler makes a library here; the text says why."""


class Library(NamedTuple):
    run: Callable[[int], None]
    openmp: bool  # whether `run` starts threads of its own


def build(source: str) -> Library:
    """The library of a C text that defines `void run(const int64_t *job)`: remembered, cached or compiled."""
    return _build(source, os.environ.get("CC", ""), os.environ.get("PATH", ""))


def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    found = compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
    return found if isinstance(found, str) else None


@cache
def _build(source: str, cc: str, path: str) -> Library:
    found = compiler(cc, path)
    if isinstance(found, str):
        raise NoCompiler(found)
    return obtain(source, *found)


@cache
def compiler(cc: str, path: str) -> tuple[list[str], tuple[str, ...]] | str:
    """The command of the first compiler that works and the flags it takes, or why there is none."""
    if os.name != "posix":
        return f"compiling needs a POSIX system, this is {platform.system()}"
    try:
        asked = shlex.split(cc)
    except ValueError as e:
        return f"CC={cc!r} can't be read: {e}"
    reasons = []
    for name, *arguments in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(name, path=path)
        stub = sys.platform == "darwin" and (program or "").startswith("/usr/bin/")  # it may open a dialog
        if stub and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode:
            reasons.append("Xcode's command line tools are missing: xcode-select --install")
        elif program:
            try:
                return [program, *arguments], accepted([program, *arguments])
            except NoCompiler as e:
                reasons.append(str(e))
    missing = f"CC={cc!r} was not found" if asked else "no C compiler (cc, gcc, clang) was found"
    return reasons[0] if reasons else f"{missing} on PATH; install one or set CC"


def accepted(command: list[str]) -> tuple[str, ...]:
    """The flags that a compiler takes, each refused one left out."""
    with suppress(NoCompiler):
        obtain(PROBE, command, NEEDED + WANTED)
        return NEEDED + WANTED
    flags: tuple[str, ...] = NEEDED
    obtain(PROBE, command, flags)
    for flag in WANTED:
        with suppress(NoCompiler):
            obtain(PROBE, command, (*flags, flag))
            flags = (*flags, flag)
    return flags


def obtain(source: str, command: list[str], flags: tuple[str, ...]) -> Library:
    """Load what the cache holds for this text, compiler and CPU, or make it."""
    from .. import __version__

    parts = [source, *command, *flags, version(tuple(command)), processor(), __version__]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    with suppress(OSError):  # no home, read-only, full, noexec, not ours: a folder that goes once it is loaded
        home = folder()
        for file in home.glob(f"{key}.*.so"):
            if file.name.split(".")[1] == digest(file):  # a truncated library would crash, not raise
                return load(file)
        return load(make(home, key, source, command, flags))
    try:
        with tempfile.TemporaryDirectory(prefix="gradkit-") as private:
            return load(make(Path(private), key, source, command, flags))
    except OSError as e:
        raise NoCompiler(f"the compiled library can't be stored or loaded: {e}") from None


def folder() -> Path:
    """The user's own cache; OSError where others can write, for what stands there is code."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    root = root if os.path.isabs(root) else os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        raise FileNotFoundError("no home directory")
    path = Path(root, "gradkit")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(info.st_uid != os.geteuid() for info in (path.lstat(), path.stat())):  # a link, and what it points to
        raise PermissionError(f"{path} belongs to somebody else")
    if path.stat().st_mode & 0o022:
        raise PermissionError(f"{path} can be written by others")
    return path


def make(place: Path, key: str, source: str, command: list[str], flags: tuple[str, ...]) -> Path:
    """Compile into a folder; the library's name holds the hash of its bytes, and its text stands beside it."""
    handle, made = tempfile.mkstemp(dir=place, suffix=".tmp")
    os.close(handle)
    temporary = Path(made)
    try:
        temporary.write_text(source)
        temporary.replace(place / f"{key}.c")
        call([*command, *flags, "-x", "c", "-", "-o", made, "-lm"], source)
        return temporary.replace(place / f"{key}.{digest(temporary)}.so")
    finally:
        temporary.unlink(missing_ok=True)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def load(file: Path) -> Library:
    """Open a library, but no OpenMP runtime beside torch's own: two pools fight for the cores."""
    runtimes = {name.decode() for name in re.findall(OPENMP, file.read_bytes())}
    for name in runtimes:
        try:
            ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        except OSError:
            raise NoCompiler(f"{name} would be a second OpenMP runtime") from None
    run: Any = getattr(ctypes.CDLL(str(file)), "run", None)
    if run is None:
        raise NoCompiler("the compiler made a library without the function asked for")
    run.argtypes, run.restype = [ctypes.c_void_p], None
    return Library(run, bool(runtimes))


def call(command: Sequence[str], text: str = "") -> str:
    """Run the compiler; what it printed, or NoCompiler with its first complaint."""
    plain = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=120, env=plain)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NoCompiler(f"{command[0]} can't be run: {e}") from None
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise NoCompiler(f"{command[0]} failed with {done.returncode}: {first[:200]}")
    return done.stdout.decode(errors="replace")


@cache
def version(command: tuple[str, ...]) -> str:
    return call([*command, "--version"])


@cache
def processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0] if info.exists() else platform.processor()
    named = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", first, re.M)
    return "\n".join([platform.machine(), *(named or [first])])
