"""The bench's other suite, for a GPU: its rows, its bars, its path in Triton's interpreter."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as main
from bench import bars, devices, protocol, report
from bench.rows import GPU_ROWS, ROWS, SPLITS, ours_on_gpu
from bench.shapes import GPT2, LLAMA, RESNET50
from bench.suites import SUITES
from tests.test_bench import assert_bytes

ROOT = Path(__file__).resolve().parent.parent
TRITON = [row for row in GPU_ROWS.values() if row.limits == "triton"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")


@pytest.mark.parametrize("row", ours_on_gpu("eager"), ids=lambda row: row.name)
def test_bytes_of_a_row_are_those_of_its_plan(row):
    assert_bytes(row)


def test_a_row_of_ours_names_the_backend_and_what_runs_beside_it():
    """Else the GPU's bars could be met by another backend, or beside nothing."""
    assert {row.name for row in TRITON} < {row.name for row in ours_on_gpu("triton")}
    for row in TRITON:
        with pytest.raises(RuntimeError, match="backend='triton'"):
            row.make([torch.nn.Parameter(torch.ones(2, 3, dtype=row.dtype)) for _ in range(2)]).explain()
        assert all(name in GPU_ROWS for name in row.also)
    full, low = ({row.algorithm for row in TRITON if row.dtype == d} for d in (torch.float32, torch.bfloat16))
    wanted = {
        "AdamW",
        "Lion",
        "DiffGrad",
        "AdEMAMix",
        "Grokfast",
        "SPAM",
        "StableSPAM",
        "SCALE",
        *SPLITS,
        "AdamW, clip",
    }
    assert low == wanted and full == low | {"own"}
    assert {name for name, row in ROWS.items() if row.package != "gradkit"} < GPU_ROWS.keys()


def verdicts(name, parts):
    return {bar.what: bar.verdict for bar in bars.bars(GPU_ROWS[name], GPU_ROWS, {name: parts})}


@pytest.mark.parametrize(("share", "verdict"), [(0.851, "ok"), (0.849, "MISS"), (None, "MISS")])
def test_a_large_model_takes_85_percent_of_the_copy_bandwidth(share, verdict):
    found = verdicts("gradkit Lion bf16", {"llama": {"copy_share": share}})
    assert found["Llama 1B: of the time to copy its bytes"] == verdict
    assert found["GPT-2: of the time to copy its bytes"] == "MISS"


def test_adamw_is_as_fast_as_fused_on_large_models_and_clipped_on_all():
    found = verdicts("gradkit AdamW", {"gpt2": {"ratio": 1.0}, "llama": {"ratio": 1.01}})
    assert (found["GPT-2: ratio to fused"], found["Llama 1B: ratio to fused"]) == ("ok", "MISS")
    other = "torch AdamW fused, clip_grad_norm_"
    parts = {"resnet50": {"others": {other: 0.9}}, "gpt2": {"others": {other: 1.1}}}
    found = verdicts("gradkit AdamW, global clip", parts)
    said = {m.title: found[f"{m.title}: of {other}'s time"] for m in (RESNET50, GPT2, LLAMA)}
    assert said == {"ResNet-50": "ok", "GPT-2": "MISS", "Llama 1B": "MISS"}


@pytest.mark.parametrize(
    ("part", "key", "most", "bar"),
    [
        ("resnet50", "startup_s", 2.0, "start-up, s"),
        ("resnet50", "compiled_again", 0, "kernels compiled for another lr"),
        ("llama", "compiled", 0, "Llama 1B: kernels compiled for another model"),
        ("host", "us", 200.0, "host work, us"),
        ("host", "moved_us", 300.0, "host work, gradients moved, us"),
    ],
)
def test_start_up_and_the_hosts_work_have_bars(part, key, most, bar):
    assert verdicts("gradkit Grokfast", {part: {key: most}})[bar] == "ok"
    assert verdicts("gradkit Grokfast", {part: {key: most + 1}})[bar] == "MISS"
    assert verdicts("gradkit Grokfast", {})[bar] == "MISS"


@needs_no_gpu
@pytest.mark.parametrize("flags", [[], ["--quick", "--out", "nowhere"]], ids=" ".join)
def test_without_a_gpu_it_ends_in_a_sentence(flags, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench", "--on", "gpu", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("bench: torch ") and "finds no GPU here" in done.stderr


def test_what_nvidia_smi_says_is_read_and_what_it_does_not_is_left_out(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="1980, 3201, 41, [N/A]\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a-b"))
    monkeypatch.setattr(subprocess, "run", run)
    gpu = object.__new__(devices.Gpu)  # its __init__ takes memory on a GPU
    assert gpu.clocks() == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 41.0}
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-a-b"]

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu.clocks() == {}


def test_when_the_time_is_over_a_row_says_so():
    names = [main.SWEEP, "gradkit AdamW"]
    results = main.measure(SUITES["gpu"]._replace(whole=0.0), names, small=True)
    assert results == dict.fromkeys(names, {"why": "not begun: the 0 s of this suite were over"})


def test_kernels_are_counted_in_tritons_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert devices.compiled() == 0
    for key in "ab":
        (tmp_path / key).mkdir()
        (tmp_path / key / "run.ttir").write_text("")
        (tmp_path / key / "run.ptx").write_text("")
    assert devices.compiled() == 2
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert devices.compiled() == 0


def test_the_sweeps_table_is_sorted_and_marks_what_is_taken():
    row = {"chunk": 4096, "tile": 512, "warps": 4, "taken": False}
    rows = [
        {**row, "dtype": "float32", "ms": 1.0, "copy_share": 0.8},
        {**row, "dtype": "float32", "ms": 0.9, "copy_share": 0.89, "taken": True},
        {**row, "dtype": "bfloat16", "why": "OutOfResources: registers"},
    ]
    text = report.swept({"model": "GPT-2", "rows": rows})
    assert text.splitlines()[4:] == [
        "| bfloat16 | 4096 | 512 | 4 | OutOfResources: registers |  |",
        "| **float32** | **4096** | **512** | **4** | **0.900** | **89.0 %** |",
        "| float32 | 4096 | 512 | 4 | 1.000 | 80.0 % |",
    ]
    assert report.swept({"why": "took longer than 60 s"}) == "Sweep: took longer than 60 s"
    assert report.swept({}) == ""


@needs_no_gpu
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")
def test_a_quick_run_in_the_interpreter_takes_the_gpus_path(tmp_path):
    names = ["sweep", "gradkit AdamW bf16, global clip"]
    command = [sys.executable, "-m", "bench", "--on", "gpu", "--quick", "--out", str(tmp_path), "--rows", *names]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("gpu-interpreter-*.json")
    data = json.loads(file.read_text())
    (row,) = data["rows"]
    assert report.reason(row) == "" and report.reason(data["sweep"]) == "", done.stdout
    for key in ("resnet50", "gpt2", "llama"):
        assert {"ms", "fused_ms", "ratio", "copy_share", "startup_s", "compiled", "compiled_again"} <= row[key].keys()
        assert row[key]["rounds"] == 3 and GPU_ROWS[row["name"]].also[0] in row[key]["others"]
    assert row["host"].keys() == {"us", "moved_us"} and row["bars"]
    assert data["machine"]["triton"] and data["commit"] and data["protocol"].startswith("Quick")
    swept = data["sweep"]["rows"]
    assert {r["dtype"] for r in swept} == {"float32", "bfloat16"} and sum(r["taken"] for r in swept) == 2
    assert all("ms" in r for r in swept)
    page = file.with_suffix(".md").read_text()
    assert page == report.markdown(data) and "## AdamW by chunk, tile and warps" in page and page in done.stdout
    assert (find_spec("matplotlib") is None) == ("no plot" in done.stdout) != any(tmp_path.glob("*.png"))


def test_a_step_is_timed_between_events_behind_the_wipes(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            assert end is not self
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("settle"))
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: SimpleNamespace(zero_=lambda: log.append("wipe")))
    assert devices.Gpu().seconds(lambda: log.append("step")) == 0.25
    assert log == ["settle", *["wipe"] * devices.WIPES, "event", "step", "event", "wait"]


def test_extra_memory_on_a_gpu_is_the_peak_above_what_was_held(monkeypatch):
    peak = [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 100 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    contender = protocol.Contender(lambda: peak.__setitem__(0, 107 * 2**20), lambda: peak.__setitem__(0, 999 * 2**20))
    assert object.__new__(devices.Gpu).extra_memory(contender) == 7.0
