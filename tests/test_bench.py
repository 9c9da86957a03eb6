"""The bench: its shapes, its arithmetic, its record. Nothing here depends on how fast anything is."""

import itertools
import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import __main__ as main
from bench import bars, devices, protocol, report
from bench.rows import BF16_BYTES, BF16_ROLES, BYTES, ROLES, ROWS, SPLITS, Row, of, roles_of
from bench.shapes import FULL, GPT2, LLAMA, MLP, ON_GPU, RESNET50, quick
from bench.suites import SUITES
from bench.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
NATIVE = [row for row in ROWS.values() if row.limits == "native"]
CPU = devices.Cpu()
HERE = CPU.device
MISSING = Row("nobody", "no-such-package", "AdamW", 28, of("no_such_package_of_anybody", "AdamW"))


def test_shapes_are_those_of_the_models():
    assert (len(RESNET50.tensors), RESNET50.elements) == (161, 25_557_032)
    assert (len(GPT2.tensors), GPT2.elements) == (148, 124_439_808)
    assert (len(LLAMA.tensors), LLAMA.elements) == (146, 1_235_814_400)
    assert (len(MLP.tensors), MLP.elements) == (4, 10_010)


def test_every_shape_has_at_least_nine_rounds():
    assert all(shape.rounds >= protocol.LEAST_ROUNDS for shape in (*FULL, *ON_GPU))


def test_race_interleaves_and_rotates():
    order, ticks = [], itertools.count()

    def one_tick(step):
        step()
        return float(next(ticks))

    contenders = {
        name: protocol.Contender(lambda name=name: order.append(name), lambda name=name: order.append(f"before {name}"))
        for name in "abc"
    }
    times = protocol.race(contenders, 3, one_tick)
    assert [name for name in order if len(name) == 1] == list("abcbcacab")
    assert order[:2] == ["before a", "a"]
    assert times == {"a": [0.0, 5.0, 7.0], "b": [1.0, 3.0, 8.0], "c": [2.0, 4.0, 6.0]}


def test_preparing_is_not_timed():
    now = [0.0]

    def later(seconds):
        now[0] += seconds

    def taken(step):
        start = now[0]
        step()
        return now[0] - start

    contender = protocol.Contender(lambda: later(1.0), lambda: later(100.0))
    assert protocol.race({"row": contender}, 2, taken) == {"row": [1.0, 1.0]}


def test_figures_are_medians_and_ratios():
    times = {"row": [2e-3, 9e-3, 3e-3], "fused": [2e-3, 2e-3, 7e-3], "copy": [1e-3, 1e-3, 1e-3], "other": [6e-3] * 3}
    part = protocol.figures(times, "row", elements=1_000_000, bytes_=42)
    assert part["rounds"] == 3
    assert (part["ms"], part["ms_low"], part["ms_high"], part["fused_ms"]) == pytest.approx((3.0, 2.0, 9.0, 2.0))
    assert part["ratio"] == pytest.approx(1.5)
    assert part["ratio_per_byte"] == pytest.approx(1.5 / (42 / 28))
    assert part["copy_gb_s"] == pytest.approx(8.0)
    assert part["copy_share"] == pytest.approx((42e6 / 3e-3) / (8e6 / 1e-3))
    assert part["others"] == pytest.approx({"other": 0.5})


@pytest.mark.parametrize(
    ("rounds", "seconds", "left"), [(300, 1e-4, 300), (300, 0.02, 100), (300, 60.0, 9), (3, 60.0, 3)]
)
def test_slow_rows_get_fewer_rounds_but_never_too_few(rounds, seconds, left):
    assert protocol.affordable(rounds, seconds) == left


def test_gradients_that_a_step_changes_or_drops_are_put_back():
    model = protocol.Model(((3,), (2, 2)), HERE)
    before = [g.clone() for g in model.grads]

    def spoil():
        model.params[0].grad.mul_(2)
        model.params[1].grad = None

    contender = model.contender(spoil)
    contender.prepare()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.params, before, strict=True))


def test_gradients_that_a_step_leaves_alone_stay_the_same_tensors():
    model = protocol.Model(((3,),), HERE)
    contender = model.contender(lambda: None)
    assert contender.prepare is protocol.nothing
    assert model.params[0].grad is model.grads[0]


def test_moved_gradients_are_other_tensors_of_the_same_values():
    model = protocol.Model(((3,),), HERE)
    contender = model.moving(lambda: None)
    seen = []
    for _ in range(3):
        contender.prepare()
        seen.append(model.params[0].grad)
    assert seen[0] is seen[2] and seen[0] is not seen[1]
    assert torch.equal(seen[0], seen[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc, which only Linux has")
def test_extra_memory_sees_a_temporary_that_is_gone_after_the_step():
    size = 64 * 2**20
    extra = CPU.extra_memory(protocol.Contender(lambda: torch.ones(size // 4).sum()))
    if extra is None:
        pytest.skip("this kernel doesn't let a process clear its peak")
    assert 60 < extra < 80
    assert CPU.extra_memory(protocol.Contender(lambda: None)) < 4


@pytest.mark.parametrize("row", [r for r in ROWS.values() if r.package == "gradkit"], ids=lambda r: r.name)
def test_bytes_of_a_row_are_those_of_its_plan(row):
    assert_bytes(row)


def assert_bytes(row):
    """Of a hidden matrix, a last one and a vector: each role's own where they differ."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=row.dtype)) for shape in ((2, 4), (3, 2), (3,))]
    told = re.findall(r"launches: .*; (\d+) bytes an element", row.make(params).explain())
    assert {*told} == {str(n) for n in (row.roles.values() or [row.bytes])} and row.bytes == int(told[0])


def test_roles_have_the_mean_of_their_bytes():
    row = ROWS["gradkit SCALE"]
    assert row.bytes_on(RESNET50.tensors) == pytest.approx(16 + 12 * (2_048_000 + 54_120) / RESNET50.elements)
    assert row.bytes_on(GPT2.tensors) == pytest.approx(16 + 12 * (3072 * 768 + 121_344) / GPT2.elements)
    assert ROWS["gradkit Lion"].bytes_on(GPT2.tensors) == 20
    assert bars.ratio_limit(row, GPT2) == pytest.approx(1.25 * row.bytes_on(GPT2.tensors) / 28)
    assert roles_of(((3,), (2, 2), (4, 1, 1), (5,))) == ["vector", "matrix", "last", "vector"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_splits_bytes_are_those_of_what_it_selects(split):
    """As explain() tells them, for a model's shapes."""
    row = ROWS[f"gradkit {split}"]
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in RESNET50.tensors]
    lines = re.findall(
        r"tensors, (\d+) elements.*\n(?:  .*\n)*?  launches: .*; ([\d.]+) bytes", row.make(params).explain()
    )
    told = sum(int(n) * float(each) for n, each in lines) / RESNET50.elements
    assert row.bytes_on(RESNET50.tensors) == pytest.approx(told, rel=2e-3)  # explain() rounds, and columns are whole


def test_the_optimizers_and_the_chain_have_bars():
    wanted = {"AdamW", "Lion", "DiffGrad", "AdEMAMix", "Grokfast", "SPAM", "StableSPAM", "SCALE", *SPLITS, "own"}
    assert wanted <= {row.algorithm for row in NATIVE}
    assert BYTES.keys() == BF16_BYTES.keys() and ROLES.keys() == BF16_ROLES.keys()


def test_the_own_chain_has_five_links():
    explained = ROWS["gradkit, own chain of five links"].make([torch.nn.Parameter(torch.ones(3))]).explain()
    links = re.search(r"chain: (.*)", explained).group(1).split(" -> ")
    assert links[-2:] == ["decay", "write"] and len(links) == 7


@pytest.mark.parametrize(("ratio", "verdict"), [(0.99, "ok"), (1.0, "ok"), (1.01, "MISS"), (math.nan, "MISS")])
def test_adamw_may_take_as_long_as_fused(ratio, verdict):
    found = bars.bars(ROWS["gradkit AdamW"], {}, {"gradkit AdamW": {"resnet50": {"ratio": ratio}}})
    assert [b.verdict for b in found if b.what == "ResNet-50: ratio to fused"] == [verdict]


def test_other_rows_may_take_a_tenth_more_than_their_bytes():
    assert bars.ratio_limit(ROWS["gradkit Lion"], GPT2) == pytest.approx(1.1 * 20 / 28)
    assert bars.ratio_limit(ROWS["gradkit AdEMAMix"], GPT2) == pytest.approx(1.1 * 36 / 28)
    assert bars.ratio_limit(ROWS["gradkit SPAM"], GPT2) == pytest.approx(1.1)  # AdamW's bytes, not AdamW's bar
    assert bars.ratio_limit(ROWS["gradkit StableSPAM"], GPT2) == pytest.approx(1.1 * 36 / 28)


@pytest.mark.parametrize("algorithm", ["SPAM", "StableSPAM"])
def test_a_peers_version_stands_beside_ours(algorithm):
    results = {name: {"gpt2": {"ratio": 2.0}} for name in (f"gradkit {algorithm}", f"pytorch_optimizer {algorithm}")}
    found = bars.bars(ROWS[f"gradkit {algorithm}"], ROWS, results)
    assert f"GPT-2: ratio of pytorch_optimizer {algorithm}" in [bar.what for bar in found]


def test_what_was_not_measured_is_a_miss():
    assert {bar.verdict for bar in bars.bars(ROWS["gradkit Lion"], {}, {})} == {"MISS"}


def test_chunked_has_to_be_twice_as_fast_as_foreach():
    row = ROWS["gradkit AdamW chunked"]
    results = {row.name: {key: {"others": {"torch AdamW foreach": r}} for key, r in (("resnet50", 0.4), ("gpt2", 0.6))}}
    assert [bar.verdict for bar in bars.bars(row, {}, results)] == ["ok", "MISS"]


def test_a_row_has_to_beat_the_fastest_peer_of_its_algorithm():
    results = {
        "gradkit Lion": {"resnet50": {"ratio": 0.8}, "gpt2": {"ratio": 0.8}},
        "torch-optimi Lion": {"resnet50": {"ratio": 0.9}, "gpt2": {"ratio": 0.7}},
        "bitsandbytes Lion": {"resnet50": {"ratio": 5.0}, "gpt2": {"ratio": 5.0}},
        "heavyball AdamW": {"resnet50": {"ratio": 0.1}, "gpt2": {"ratio": 0.1}},
    }
    found = bars.bars(ROWS["gradkit Lion"], ROWS, results)
    assert [(b.limit, b.verdict) for b in found if "torch-optimi" in b.what] == [(0.9, "ok"), (0.7, "MISS")]
    assert not any("heavyball" in b.what for b in found)


def test_a_package_that_cannot_be_imported_is_a_row_with_the_reason():
    parts = dict(Worker(MISSING, {}, CPU).measure(quick(FULL)))
    row = report.record(MISSING, {}, {"nobody": parts})
    assert row["resnet50"]["why"].startswith("ModuleNotFoundError: No module named 'no_such_package_of_anybody'")
    data = {"device": "cpu", "shapes": {shape.key: [] for shape in FULL}}
    line = report.line(row, data)
    assert "No module named" in line and line.count("|") == len(report.columns(data)) + 1


def test_what_an_optimizer_raises_is_a_row_with_the_reason():
    def cannot(params):
        raise NotImplementedError("needs a GPU\nand more")

    parts = dict(Worker(Row("no", "no", "AdamW", 28, cannot), {}, CPU).measure(quick(FULL)))
    assert report.reason({"name": "no", **parts}) == "NotImplementedError: needs a GPU"


def test_parts_are_found_between_what_a_package_prints():
    assert main.collect('hello\n{"mlp": {"us": 1}}\n3\n{"host": {"us": 2}}\n') == {"mlp": {"us": 1}, "host": {"us": 2}}


def test_a_quick_run_writes_the_record_the_table_and_the_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib, of the extra bench")
    names = ["gradkit Lion", "flashoptim FlashLion", "gradkit SCALE"]
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(tmp_path), "--rows", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("cpu-*.json")
    data = json.loads(file.read_text())
    assert {"date", "commit", "device", "cpu", "threads", "python", "torch", "gradkit", "protocol"} <= data.keys()
    ours, peer, roles = data["rows"]
    for part in (ours["resnet50"], ours["gpt2"], roles["gpt2"]):
        assert {"ms", "fused_ms", "ratio", "ratio_per_byte", "copy_share", "extra_mib", "startup_s"} <= part.keys()
        assert part["rounds"] == 3
    for row in (ours, roles):
        assert row["mlp"].keys() >= {"us", "torch_us", "ratio"} and row["host"].keys() >= {"us", "moved_us"}
    assert ours["bars"] and not peer["bars"]
    assert find_spec("flashoptim") or peer["resnet50"]["why"].startswith("ModuleNotFoundError")
    page = file.with_suffix(".md").read_text()
    assert all(name in page for name in names)
    for picture in (file.with_suffix(".png"), tmp_path / "step-times.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    short = report.short(data)
    assert [*short["shapes"]] == ["gpt2"] and {row["dtype"] for row in short["rows"]} == {"float32"}
    assert all(line in page and line in done.stdout for line in report.misses(data["rows"]))
    anew = {**data, "rows": [{**ours, "host": {"us": 1.0, "moved_us": 1.0}}], "commit": "abc", "date": "2099-01-01"}
    both = main.amended(data, anew, SUITES["cpu"])
    first, *others = both["rows"]
    assert first["since"] == {"commit": "abc", "date": "2099-01-01"} and first["host"]["us"] == 1.0
    assert [bar["value"] for bar in first["bars"] if bar["what"].startswith("host")] == [1.0, 1.0]
    assert all(row in data["rows"] for row in others) and len(others) == 2 and both["commit"] == data["commit"]
    assert "Measured 2099-01-01 at commit abc: gradkit Lion." in report.markdown(both)
    with pytest.raises(SystemExit, match="another torch than the committed result's"):
        main.amended(data, {**anew, "torch": "1.0"}, SUITES["cpu"])


def test_a_miss_is_printed_plainly():
    row = report.record(ROWS["gradkit Lion"], {}, {"gradkit Lion": {"resnet50": {"ratio": 0.95}}})
    assert "MISS gradkit Lion: ResNet-50: ratio to fused: 0.95, bar 0.786" in report.misses([row])
    assert "MISS gradkit Lion: host work, us: not measured, bar 200" in report.misses([row])
