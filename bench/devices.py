"""Where steps run: how one is timed there, what memory it takes, and what the machine is called."""

import ctypes
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .protocol import Contender

Call = Callable[[], Any]
WIPED = 1 << 30  # bytes, many times any GPU's cache
WIPES = 4  # a millisecond and more: what a step takes on the host is hidden behind it, as behind a backward pass
CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "power.draw": "watts"}


class Cpu:
    """Steps return when they are done: the host's clock, and the process's resident memory."""

    key, device = "cpu", torch.device("cpu")

    def settle(self) -> None:
        """Wait for what was queued."""

    def seconds(self, call: Call) -> float:
        """What a step takes, where it runs."""
        return self.host_seconds(call)

    def host_seconds(self, call: Call) -> float:
        """What a call keeps the host busy for."""
        self.settle()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def until_done(self, call: Call) -> float:
        """From the call until everything that it queued is done."""
        return self.host_seconds(lambda: (call(), self.settle()))

    def extra_memory(self, contender: Contender) -> float | None:
        """Mebibytes by which a step's peak stands above what is held before it; None where the system can't tell."""
        contender.prepare()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # pages that an earlier step freed would hide what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident_peak()
        except (OSError, StopIteration):
            return None
        contender.step()
        return (resident_peak() - before) / 2**20

    def clocks(self) -> dict[str, float]:
        """What the device runs at now, where it can tell."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What stands in a report's head."""
        return {"name": processor(), "threads": torch.get_num_threads()}


class Gpu(Cpu):
    """Steps are queued: the device's own events, behind work that keeps the host ahead and leaves the caches cold."""

    key, device = "gpu", torch.device("cuda")

    def __init__(self) -> None:
        self.wiped = torch.empty(WIPED, dtype=torch.uint8, device=self.device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, call: Call) -> float:
        self.settle()
        for _ in range(WIPES):
            self.wiped.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return 1e-3 * self.start.elapsed_time(self.end)

    def extra_memory(self, contender: Contender) -> float | None:
        contender.prepare()
        self.settle()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        self.settle()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def clocks(self) -> dict[str, float]:
        said = zip(CLOCKS.values(), self.ask(*CLOCKS), strict=False)
        return {name: float(text) for name, text in said if text[:1].isdigit()}  # else "[N/A]"

    def ask(self, *fields: str) -> list[str]:
        """What nvidia-smi says of this GPU, read only; nothing where it is not found."""
        mine = getattr(torch.cuda.get_device_properties(self.device), "uuid", "")  # CUDA_VISIBLE_DEVICES renumbers
        command = ["nvidia-smi", f"--id=GPU-{mine}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return []
        return [cell.strip() for cell in done.stdout.splitlines()[0].split(",")]

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "arch": getattr(found, "gcnArchName", "") or f"sm_{found.major}{found.minor}",
            "processors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "driver": next(iter(self.ask("driver_version")), "unknown"),
            "runtime": torch.version.cuda or torch.version.hip,
            "triton": installed("triton"),
        }


class Interpreted(Cpu):
    """The GPU's rows in Triton's interpreter: shows that they run, and nothing about time."""

    key = "gpu"

    def facts(self) -> dict[str, Any]:
        return {"name": "interpreter", "processor": processor(), "triton": installed("triton")}


def find(key: str, quick: bool) -> type[Cpu]:
    """The kind of device that a suite needs; without one this ends, in a sentence."""
    if key == "cpu":
        return Cpu
    if torch.cuda.is_available():
        return Gpu
    if quick and os.environ.get("TRITON_INTERPRET") == "1":
        return Interpreted
    raise SystemExit(
        f"bench: torch {torch.__version__} finds no GPU here; "
        f"TRITON_INTERPRET=1 with --quick runs the same rows in Triton's interpreter"
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def compiled() -> int:
    """Kernels in Triton's cache, which this process began with empty."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return len(list(Path(folder).rglob("*.ttir"))) if folder else 0


def resident_peak() -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"
