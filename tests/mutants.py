"""Turn off one term after another in a copy of the package: each time the tests named beside it must fail.

`python -m tests.mutants [part of a name]`. A term whose mutant survives is one that no test protects.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  # before the fork, as torch: once for all children
import pytest
import torch
import torch._dynamo

from tests.terms import Mutant, attach, backward, engine, integrations, lightning, optimizers, transforms

ROOT = Path(__file__).parent.parent
NEEDED = ("gradkit", "tests", "bench", "triton_kernels", "pyproject.toml")
MUTANTS = (
    *optimizers.MUTANTS,
    *transforms.MUTANTS,
    *backward.MUTANTS,
    *attach.MUTANTS,
    *engine.MUTANTS,
    *integrations.MUTANTS,
    *lightning.MUTANTS,
)
WORKERS = min(2, os.cpu_count() or 1)


def copy_project(folder: Path, mutant: Mutant | None) -> None:
    """What the tests need, with one term turned off; the text must stand there exactly once."""
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder / name)
    if mutant:
        path = folder / mutant.file
        text = path.read_text()
        if text.count(mutant.text) != 1:
            raise SystemExit(
                f"{mutant.term}: {mutant.text!r} stands {text.count(mutant.text)} times in {mutant.file}, not once"
            )
        path.write_text(text.replace(mutant.text, mutant.instead))


def run_tests(folder: str, tests: tuple[str, ...], log: str) -> None:
    """In a child that has torch, and nothing of gradkit yet; its exit code is pytest's."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "gradkit")]:
        del sys.modules[name]
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        # plugins are loaded before the fork: no reason to fail
        quiet = ("-q", "-x", "-p", "no:cacheprovider", "--durations=0", "-Wignore::pytest.PytestAssertRewriteWarning")
        code = int(pytest.main([*(f"tests/{t}" for t in tests), *quiet]))
        import gradkit

        if not str(gradkit.__file__).startswith(folder):
            print("the tests ran on", gradkit.__file__)
            code = 100
    os._exit(code)


def run_all(
    jobs: list[tuple[Mutant | None, tuple[str, ...]]], folder: Path
) -> Iterator[tuple[Mutant | None, int, str]]:
    """Each with pytest's exit code and what it printed; as many at once as there are workers."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(enumerate(jobs)), []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            i, (mutant, tests) = waiting.pop(0)
            copy, log = folder / str(i), folder / f"{i}.txt"
            copy.mkdir()
            copy_project(copy, mutant)
            child = fork.Process(target=run_tests, args=(str(copy), tests, str(log)))
            child.start()
            running.append((mutant, child, copy, log))
        multiprocessing.connection.wait([child.sentinel for _, child, _, _ in running])
        for row in [r for r in running if not r[1].is_alive()]:
            running.remove(row)
            mutant, child, copy, log = row
            shutil.rmtree(copy)
            yield mutant, int(child.exitcode or 0), log.read_text() if log.exists() else ""


def main(part: str = "") -> int:
    """0 if the tests pass as they are, and every mutant is killed by a test that fails."""
    begun = time.monotonic()
    mutants = [m for m in MUTANTS if part in m.term]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        needed = sorted({t for m in mutants for t in m.tests})
        halves = [tuple(needed[i::WORKERS]) for i in range(WORKERS)]
        for _, code, said in run_all([(None, tests) for tests in halves if tests], folder):
            if code:
                print(f"the tests fail without any mutant (pytest's exit code {code}):\n{said}")
                return 1
        for copy in folder.iterdir():
            copy.unlink()
        alive = []
        for mutant, code, said in run_all([(m, m.tests) for m in mutants], folder):
            assert mutant
            killed = code == pytest.ExitCode.TESTS_FAILED and "AssertionError" in said  # a crash proves less
            print(f"{'killed' if killed else 'ALIVE':8}{mutant.term:60}{mutant.file}", flush=True)
            if not killed:
                alive.append(mutant.term)
                print(said if code else f"  these tests stay green: {', '.join(mutant.tests)}")
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants killed in {time.monotonic() - begun:.0f} s")
    return bool(alive) or not mutants


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
