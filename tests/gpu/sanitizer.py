"""NVIDIA's compute-sanitizer over a few steps: memory that is no tensor's, and races in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .checks import NotRun, rows
from .place import Place

ROOT = Path(__file__).resolve().parents[2]
FOUND_AN_ERROR = 9
LIMIT = 120  # seconds; a step under the tool takes a hundred times as long
# each allocation by itself: inside one large one, of torch's cache, an access beyond a tensor would be no error
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def watched(place: Place, *tool: str) -> None:
    command = [*tool, sys.executable, "-m", "tests.gpu.one_step", *(["--tiny"] if place.device.type == "cpu" else [])]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **UNCACHED}, capture_output=True, text=True, timeout=LIMIT
    )
    said = (done.stdout + done.stderr)[-4000:]
    assert done.returncode != FOUND_AN_ERROR, f"{tool[0]} found an error:\n{said}"
    assert done.returncode == 0 and "stepped" in done.stdout, f"{command} ended with {done.returncode}:\n{said}"


def test_the_steps_to_be_watched_run_by_themselves(place: Place) -> None:
    watched(place)


@rows({tool: (tool,) for tool in ("memcheck", "racecheck")})
def test_compute_sanitizer_finds_nothing(place: Place, tool: str) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if place.device.type != "cuda" or torch.version.hip:
        raise NotRun("compute-sanitizer watches NVIDIA's GPUs")
    if not found:
        raise NotRun("compute-sanitizer was not found on the PATH or in /usr/local/cuda/bin")
    watched(place, found, "--tool", tool, "--error-exitcode", str(FOUND_AN_ERROR))
