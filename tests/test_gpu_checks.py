"""The checks that need a GPU (tests/gpu): their runner, and a few of their bodies in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.gpu import __main__ as runner
from tests.gpu import place
from tests.gpu.checks import NotRun, checks, rows

ROOT = Path(__file__).resolve().parent.parent
BARE = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**BARE, **environment}, capture_output=True, text=True, check=False)


@needs_no_gpu
def test_without_a_gpu_it_fails_in_a_sentence():
    done = run()
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip().endswith("finds no GPU here, and these checks need one") and done.stderr.count("\n") == 1
    assert "set TRITON_INTERPRET=1" in run("--tiny").stderr


def test_pytest_collects_none_of_them():
    assert not [file for file in (ROOT / "tests" / "gpu").iterdir() if file.name.startswith("test_")]


def outcomes(monkeypatch, *arguments, **functions):
    """The exit status of a run of these functions as a file of checks."""
    module = ModuleType("tests.gpu.made")
    vars(module).update(functions)
    monkeypatch.setattr(runner, "FILES", (module,))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return runner.main(["--tiny", *arguments])


def good(place):
    pass


def bad(place):
    raise AssertionError("not as it should be")


def impossible(place):
    raise NotRun("no tool")


def test_one_failure_fails_the_run(monkeypatch, capsys):
    assert outcomes(monkeypatch, test_good=good) == 0
    assert outcomes(monkeypatch, test_good=good, test_bad=bad) == 1
    said = capsys.readouterr().out
    assert "1 passed, 1 failed, 0 not run" in said and "not as it should be" in said and "FAILED made::bad" in said


def test_what_could_not_run_is_said_and_is_no_pass(monkeypatch, capsys):
    assert outcomes(monkeypatch, test_good=good, test_impossible=impossible) == 0
    assert "made::impossible  NOT RUN: no tool\n1 passed, 0 failed, 1 not run" in capsys.readouterr().out
    assert outcomes(monkeypatch, test_impossible=impossible) == 1
    assert outcomes(monkeypatch, "no such word", test_good=good) == 1


def test_what_is_not_begun_in_time_fails(monkeypatch, capsys):
    monkeypatch.setattr(runner, "LIMIT", -1)
    assert outcomes(monkeypatch, test_good=good) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out


def test_words_choose_among_the_names(monkeypatch, capsys):
    assert outcomes(monkeypatch, "goo", test_good=good, test_bad=bad) == 0
    assert "made::bad" not in capsys.readouterr().out


def test_each_row_is_a_check_of_its_own():
    seen = []
    module = ModuleType("made")
    module.test_all = rows({"a": (1, 2), "b": (3, 4)})(lambda place, x, y: seen.append((place, x, y)))
    found = list(checks(module))
    assert [check.name for check in found] == ["made::all[a]", "made::all[b]"]
    for check in found:
        check.run("here")
    assert seen == [("here", 1, 2), ("here", 3, 4)]


def test_every_check_has_a_name_of_its_own():
    names = [check.name for file in runner.FILES for check in checks(file)]
    assert len(names) == len(set(names)) > 200


def test_a_trace_is_counted_by_what_the_device_did():
    cats = ("kernel", "gpu_memcpy", "kernel", "cpu_op", "cuda_runtime", "gpu_user_annotation", "gpu_memset")
    events = ", ".join(f'{{"cat": "{cat}", "name": "x"}}' for cat in cats)
    counted = place.counted(f'{{"traceEvents": [{events}, {{"name": "no category"}}]}}')
    assert counted == {"kernels": 2, "copies": 1, "fills": 1}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")
def test_their_bodies_run_in_the_interpreter():
    words = [
        "laws::a_step_is_one_launch_and_one_for_each_sum[AdamW behind a global clip, few",
        "laws::no_step_waits_for_the_device[AdamW]",
        "laws::under_autocast",
        "laws::going_on_from_a_file_is_going_on[AdamW behind a window]",
        "reductions::a_global_clip_is_torchs_clip_grad_norm[ResNet-50, norm 2]",
        "reductions::a_reduction_gives_the_same_bits_however_its_blocks_race[of each tensor]",
        "hostile::hostile_gradients_do_what_they_do_in_eager[sgd]",
        "hostile::memory_that_is_not_aligned_has_eagers_bits[AdamW, bf16 Kahan, parameters 3",
        "hostile::more_elements_than_an_int32_counts_are_all_stepped[stochastic]",
        "parity::sampled_elements_follow_the_naive_reference[ademamix, ResNet-50]",
        "parity::all_elements_follow_the_naive_reference_of_sums_and_splits[cautious]",
        "parity::every_element_is_eagers[lion, ResNet-50, bf16 stochastic]",
        "parity::every_element_is_eagers_when_another_part_is_selected[randk, bf16 Kahan]",
        "parity::what_is_stored_is_the_reference_within_a_unit[adamw, bf16 Kahan]",
        "sanitizer::",
    ]
    done = run("--tiny", *words, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(words)} passed, 0 failed, 2 not run" in done.stdout, done.stdout
