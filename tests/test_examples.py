"""The examples, the demo and the evidence rows run as a user runs them and print what shows that they did."""

import importlib
import json
import os
import re
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
OURS = ("AdamW", "AdEMAMix", "DiffGrad", "Lion")
ROWS = ("diffgrad", "grokfast", "ademamix", "spikes", "memory", "pcgrad")
THRIFTY = ("AdamW", "FRUGAL", "FRUGAL, density 0", "SCALE", "SCALE, momentum 0", "torch.optim.SGD")
TUNED = ("AdamW, tuned", "Grokfast, tuned")
SURVIVORS = ("AdamW, norm clip", "AdamW, zclip", "AdamW, spike clip", "SPAM", "StableSPAM")


def run(folder: Path, script: str, *arguments: str, path: tuple[Path, ...] = ()) -> str:
    """The output of a script that must succeed, started in an empty folder."""
    # One thread: on models this small a second one only waits, for milliseconds a step where others use the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(output: str) -> dict[str, list[str]]:
    """The demo's table: name -> train loss, held-out loss, ms a step, state bytes."""
    rows = re.findall(r"^(\S+) +lr \S+ +([\d.]+) +([\d.]+) +([\d.]+) +([\d,]+)$", output, re.MULTILINE)
    return {name: values for name, *values in rows}


def assert_drawn(file: Path, output: str) -> None:
    """A picture is there, large enough to be one, and the output says where."""
    picture = file.read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and width >= 1000 and height >= 500 and len(picture) > 20_000
    assert f"picture: {file.resolve()}" in output


@pytest.fixture
def survive_spikes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, imported as its neighbours import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("survive_spikes")


@pytest.fixture
def grokking(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, of another."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("grokking")


def test_swapped_optimizer_resumes_bitwise(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/swap_optimizer.py")
    losses = dict(re.findall(r"^(gradkit\.Lion(?:, resumed)?) +loss ([\d.]+)", output, re.MULTILINE))
    assert len(losses) == 2 and len(set(losses.values())) == 1, output
    assert "equal bit for bit" in output


def test_own_rule_trains_and_shows_its_plan(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/your_own_rule.py")
    assert "mean_absolute -> decay -> write" in output and "28 bytes an element" in output
    assert re.search(r"backend: (native|chunked)", output), output
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert last < first / 10
    assert output.rstrip().endswith("the step did what the trace showed")


def test_own_chain_trains_bfloat16(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/your_own_chain.py")
    assert "write-back stochastic" in output and "ema_filter -> sign_of_momentum" in output
    losses = dict(re.findall(r"^(\w+ +\w+) +([\d.]+) +\d+%$", output, re.MULTILINE))
    full, nearest, stochastic = (float(loss) for loss in losses.values())
    assert abs(stochastic - full) < (nearest - full) / 2


def test_long_memory_trains_each_way_with_three_seeds(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/long_memory.py", "--steps", "5")
    rows = dict(re.findall(r"^(clipping[\w ,]*?) {2,}((?: *\d+% at 5){3})$", output, re.MULTILINE))
    assert list(rows) == ["clipping alone", "clipping and penalty", "clipping alone, orthogonal start"], output
    assert "ok:" not in output, "a short run must not claim what a whole one shows"


def test_demo_compares_five_and_draws_them(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/demo.py", "--steps", "20")
    rows = table(output)
    assert set(rows) == {*OURS, "torch.optim.AdamW"}, output
    # The same algorithm on the same batches: after twenty steps rounding has not grown into the printed digits.
    assert abs(float(rows["AdamW"][1]) - float(rows["torch.optim.AdamW"][1])) <= 0.002
    size = {name: int(values[3].replace(",", "")) for name, values in rows.items()}
    assert size["AdamW"] == size["torch.optim.AdamW"] and size["Lion"] < 0.51 * size["AdamW"]
    assert output.count(" 20/20 ") == 5 and "\r" not in output
    assert_drawn(tmp_path / "demo.png", output)


def test_demo_without_matplotlib_still_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the next import of it raises ImportError
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "1", "--out", str(tmp_path / "demo.png")])
    importlib.import_module("demo").main()
    output = capsys.readouterr().out
    assert set(table(output)) == {*OURS, "torch.optim.AdamW"}
    assert "matplotlib is missing" in output and not (tmp_path / "demo.png").exists()


def test_survivors_of_spikes_are_compared_and_drawn(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/survive_spikes.py", "--steps", "20")
    rows = re.findall(r"^(\S.*?) {2,}\S.*? +[\d.]+ +(?:-?\d+%|-)$", output, re.MULTILINE)
    assert rows == ["AdamW, no spikes", "AdamW", *SURVIVORS], output
    assert "Spikes at steps 17\n" in output and output.count(" 20/20 ") == len(rows)
    assert_drawn(tmp_path / "survive_spikes.png", output)


def test_spikes_strike_the_same_entries_of_the_same_steps(survive_spikes: Any) -> None:
    first, again, other = (survive_spikes.Spikes(400, seed) for seed in (3, 3, 4))
    assert first.steps == again.steps != other.steps and len(first.steps) == 19 and first.steps[0] > 20
    calm, step = next(n for n in range(21, 400) if n not in first.steps), first.steps[0]
    p, q = (torch.nn.Parameter(torch.zeros(100, 100)) for _ in range(2))
    p.grad, q.grad = torch.ones(100, 100), torch.ones(100, 100)
    first.strike(calm, [p])
    assert torch.equal(p.grad, torch.ones(100, 100))
    first.strike(step, [p])
    again.strike(step, [q])
    assert torch.equal(p.grad, q.grad) and set(p.grad.unique().tolist()) == {1.0, 1000.0}
    assert (p.grad == 1000).double().mean().item() == pytest.approx(0.1, abs=0.015)


def test_spikes_reach_the_optimizer_of_a_spiked_run_alone(survive_spikes: Any) -> None:
    corpus = survive_spikes.language_model.Corpus(survive_spikes.text.load())
    clean, spiked = survive_spikes.entries()[:2]
    at_end = [survive_spikes.train(entry, corpus, 4, 0) for entry in (clean, spiked)]
    (struck,) = survive_spikes.Spikes(4, 0).steps
    assert clean.losses[:struck] == spiked.losses[:struck], "a spike is felt from the step after it on"
    assert abs(at_end[0] - at_end[1]) > 1e-3


@pytest.mark.parametrize(("loss", "share"), [(1.5, "0%"), (1.2, "75%"), (1.1, "100%"), (1.0, "125%"), (1.7, "-50%")])
def test_what_is_recovered_is_a_share_of_what_the_spikes_cost(survive_spikes: Any, loss: float, share: str) -> None:
    assert survive_spikes.recovered(loss, clean=1.1, spiked=1.5) == share
    assert survive_spikes.recovered(loss, clean=1.5, spiked=1.5) == "-", "nothing was lost"


def test_small_memory_measures_what_the_roles_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run(tmp_path, "examples/small_memory.py", "--steps", "3")
    rows = re.findall(r"^(\S.*?) {2,}\S.*?  +[\d.]+ +([\d,]+) +([\d.]+)% +[\d.]+$", output, re.MULTILINE)
    held = {name: int(size.replace(",", "")) for name, size, _ in rows}
    assert tuple(held) == THRIFTY, output
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("small_memory")
    model = example.build(len(set(example.text.load())), 0)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    table, head = model.embedding.weight.numel(), model.head.weight.numel()
    everything = matrices + norms + table + head
    assert held["AdamW"] == 8 * everything and held["torch.optim.SGD"] == 4 * everything
    assert held["FRUGAL"] == 8 * (matrices / 4 + norms + table + head)
    assert held["FRUGAL, density 0"] == 8 * (norms + table + head)
    assert held["SCALE"] == 8 * norms + 4 * head and held["SCALE, momentum 0"] == 8 * norms
    assert rows[1][2] == f"{100 * held['FRUGAL'] / held['AdamW']:.1f}"
    assert_drawn(tmp_path / "small_memory.png", output)


def test_small_memory_clips_the_gradients_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, before the optimizer."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("small_memory")
    corpus, seen = example.language_model.Corpus(example.text.load()), []

    def sees(groups: Any, steps: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=100.0)  # what follows a step of that has large gradients
        params = [p for g in optimizer.param_groups for p in g["params"]]
        optimizer.register_step_pre_hook(lambda *_: seen.append(torch.nn.utils.get_total_norm(p.grad for p in params)))
        return optimizer

    example.train(example.Costed("SGD", "", sees, ""), corpus, 3, 0)
    assert len(seen) == 3 and max(seen) == pytest.approx(1.0, abs=1e-4)


def test_the_models_positions_turn_and_do_not_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of a query and a key depends on how far apart they are, not on where."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    rotated = importlib.import_module("small_memory").rotated
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there, here = (rotated(x.expand(1, 1, 12, 16))[0, 0] for x in (q, k))
    products = there @ here.T
    for apart in range(12):
        along = products.diagonal(-apart)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-5)  # angles are float32
    assert len({round(x, 9) for x in products[:, 0].tolist()}) == 12
    torch.testing.assert_close(there.norm(dim=-1), q.norm().expand(12), rtol=1e-6, atol=0)


def test_evidence_rows_run(tmp_path: Path) -> None:
    output = run(tmp_path, "bench/evidence.py", "--cap", "5", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "evidence.json").read_text())
    assert set(rows) == set(ROWS)
    for row in rows.values():
        assert set(row["gates"].values()) == {None}, "a capped run must not claim that a gate is met"
        assert all(gate in output for gate in row["gates"]) and "torch" in row["machine"]
    assert (tmp_path / "evidence.md").read_text().count("\n## ") == len(ROWS)
    for name in ("grokfast", "spikes", "memory"):
        assert_drawn(tmp_path / f"evidence-{name}.png", output)


def test_evidence_goes_on_with_the_rows_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"title": "T", "setting": "s", "table": [["", "a"], ["b", "c"]], "gates": {"gate": False}}
    kept |= {"word": "w", "date": "d", "seconds": 1, "machine": "m"}
    (tmp_path / "evidence.json").write_text(json.dumps({"ademamix": kept}))
    monkeypatch.syspath_prepend(str(ROOT))
    arguments = ["evidence.py", "--only", "diffgrad", "--cap", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    importlib.import_module("bench.evidence").main()
    rows = json.loads((tmp_path / "evidence.json").read_text())
    assert rows["ademamix"] == kept and set(rows) == {"ademamix", "diffgrad"}
    assert "- NOT MET: gate" in (tmp_path / "evidence.md").read_text(), "a missed gate stands on the page"


def test_committed_evidence_has_every_row_judged() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "evidence.json").read_text())
    assert set(rows) == set(ROWS)
    page = (ROOT / "bench" / "results" / "evidence.md").read_text()
    for row in rows.values():
        assert row["title"] in page and None not in row["gates"].values()
        assert "picture" not in row or (ROOT / "bench" / "results" / row["picture"]).stat().st_size > 20_000


def test_two_tasks_go_three_ways_and_are_drawn(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/pcgrad_two_tasks.py", "--steps", "300")
    rows = re.findall(r"^(\S.*?) {2,}(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+) +(\d+%|-)$", output, re.MULTILINE)
    ways = {name: (float(one), float(two), share) for name, one, two, _, share in rows}
    assert list(ways) == ["sum of losses", "PCGrad", "CAGrad"], output
    assert ways["sum of losses"] != ways["PCGrad"] != ways["CAGrad"]
    assert ways["sum of losses"][2] == "-" and int(ways["PCGrad"][2].rstrip("%")) > 5
    assert_drawn(tmp_path / "pcgrad_two_tasks.png", output)


def test_one_new_line_under_lightning_trains_and_resumes(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/lightning_drop_in.py", "--epochs", "4")
    names = re.findall(r"^(\S.*?) {2,}accuracy [\d.]+%$", output, re.MULTILINE)
    assert names == ["torch's AdamW", "torch's AdamW behind zclip", "gradkit.Lion"], output
    moves = re.findall(r"^  batch +(\d+): a step moves the weights by ([\d.]+)% of their norm$", output, re.MULTILINE)
    assert [int(batch) for batch, _ in moves] == [4, 8, 12, 16] and all(float(move) > 0 for _, move in moves)
    assert output.rstrip().endswith("equal bit for bit") and not [*tmp_path.iterdir()]


def test_one_line_is_attached_to_torchs_adamw(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/attach_to_torch_adamw.py", "--steps", "60")
    rows = dict(re.findall(r"^AdamW, (\S.*?) {2,}loss ([\d.]+)$", output, re.MULTILINE))
    assert {"clean batches", "broken batches", "with zclip"} <= {*rows}, output
    assert float(rows["with zclip"]) < float(rows["broken batches"])
    assert "chain: zclip.energy -> zclip.scale" in output and "equal bit for bit" in output


def test_trainer_takes_each_optimizer_and_resumes(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/transformers_trainer.py", "--steps", "4")
    rows = re.findall(r"^(\S+) +(\d\.\d{4})   (-|\d\.\de-\d\d -> \d\.\de-\d\d)$", output, re.MULTILINE)
    losses = {name: float(loss) for name, loss, _ in rows}
    assert tuple(losses) == ("torch.optim.AdamW", "AdamW", "AdEMAMix", "Lion", "Sophia", "SCALE"), output
    assert abs(losses["AdamW"] - losses["torch.optim.AdamW"]) <= 0.0002
    assert [ratio == "-" for *_, ratio in rows] == [True, *[False] * 5]
    assert "AdEMAMix and Sophia end in the same weights bit for bit" in output


def test_grokking_compares_all_and_draws_them(tmp_path: Path) -> None:
    output = run(tmp_path, "examples/grokking.py", "--steps", "5")
    rows = re.findall(r"^(\S.*?) {2,}(\S.*?)(?: +> 5 \(0\.\d\d\)){2}$", output, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 12, output
    assert {name for name, _ in rows} == {"Adam", "AdamW", "Grokfast, EMA", "Grokfast, MA", *TUNED}
    assert_drawn(tmp_path / "grokking.png", output)


def test_a_run_ends_when_it_understands(grokking: Any) -> None:
    """With small embeddings plain Adam does within three hundred steps."""
    (small,) = (r for r in chain(*grokking.runs().values()) if r.name == "Adam" and r.embedding < 1)
    small.train(1000, seed=0)
    *before, (end, share) = small.held_out
    assert end == grokking.reached(small.held_out) < 1000 and end % 20 == 0
    assert max(right for _, right in before) < 0.95 <= share and grokking.cell(small.held_out) == str(end)
    assert grokking.reached(small.batches) < end, "known first, then understood"


def test_halves_of_the_table_are_all_products_once(grokking: Any) -> None:
    x, y, held_out, answers = grokking.products(0)
    tokens, products = torch.cat((x, held_out)).tolist(), torch.cat((y, answers)).tolist()
    assert sorted((a, b) for a, _, b, _ in tokens) == [(a, b) for a in range(67) for b in range(1, 67)]
    assert all(a * b % 67 == product for (a, _, b, _), product in zip(tokens, products, strict=True))
    assert len(x) == len(held_out) and {(times, equals) for _, times, _, equals in tokens} == {(67, 68)}
    assert not torch.equal(x, grokking.products(1)[0])


def test_what_the_multiplier_looks_up_is_attention(grokking: Any) -> None:
    torch.manual_seed(0)
    model = grokking.Multiplier().double()
    tokens = grokking.products(0)[0][:50]
    x = model.tokens(tokens) + model.places.weight
    seen = model.norm1(x)
    query, (key, value) = model.query(seen[:, -1:]), model.key_value(seen).chunk(2, -1)
    q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in (query, key, value))
    last = x[:, -1] + model.out(torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, 0].flatten(1))
    expected = model.head(model.norm3(last + model.mlp(model.norm2(last))))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_all_that_multiply_start_alike_and_see_the_same(grokking: Any) -> None:
    """Their gradients are equal while nothing moves; small embeddings change the embeddings alone."""

    def gradients(seed: int) -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = []

        def still(params: Any) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(params, lr=0.0)
            held = optimizer.param_groups[0]["params"]
            optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in held]))
            return optimizer

        grokking.Run("", "", still, "").train(7, seed)
        return seen

    one, again, other = gradients(0), gradients(0), gradients(1)
    assert len(one) == 7
    for step in range(7):
        assert all(map(torch.equal, one[step], again[step]))
        assert not any(map(torch.equal, one[step], other[step]))
    torch.manual_seed(0)
    whole = grokking.Multiplier().state_dict()
    torch.manual_seed(0)
    for name, weight in grokking.Multiplier(0.02).state_dict().items():
        assert torch.equal(weight, whole[name] * 0.02 if name in ("tokens.weight", "places.weight") else whole[name])
