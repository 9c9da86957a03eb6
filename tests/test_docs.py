"""Every page of docs/ and the README: its code runs, its links resolve, its signatures and names are the package's."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import operator
import os
import re
import subprocess
import sys
import types
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gradkit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("README.md")])
FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NOT_CALLED = {"Chain", "RuleError", "Stage"}  # made by chain(), raised, and members of an enum


class Block(NamedTuple):
    language: str
    title: str
    text: str
    line: int  # of its first line of text, from 1
    end: int  # of its closing fence


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for m in FENCE.finditer(text):
        start, end = (text.count("\n", 0, at) + 1 for at in (m.start("text"), m.end()))
        found.append(Block(m["language"], m["title"] or "", m["text"], start, end))
    return found


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def signatures(pages: list[Path]) -> dict[str, str]:
    """`gradkit.name` -> the text between its parentheses, as the pages print it."""
    lines = [line for p in pages for b in blocks(p) if b.title == "signature" for line in b.text.split("\n") if line]
    return {name: rest.removesuffix(")") for name, rest in (line.split("(", 1) for line in lines)}


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def public(dotted: str) -> Any:
    """What a user finds under `gradkit.<name>`."""
    if dotted.startswith("gradkit.integrations."):  # which nothing imports by itself
        importlib.import_module(dotted.rpartition(".")[0])
    return operator.attrgetter(dotted.removeprefix("gradkit."))(gradkit)


def lookup(dotted: str) -> Any:
    """The object of a dotted name: the longest part that is a module, then attributes."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):  # gradkit.chain is a module and, as an attribute, a function
            found: Any = importlib.import_module(".".join(parts[:n]))
            break
    for k, part in enumerate(parts[n:]):
        assert hasattr(found, part), f"{dotted}: there is no {part} in {'.'.join(parts[: n + k])}"
        found = getattr(found, part)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in, which modules can be imported from; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on models this small a second one only waits, long where others use the machine
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run the blocks in order in one namespace: a module whose line numbers are the page's; check what they print."""
    found = blocks(page)
    lines = [""] * (page.read_text().count("\n") + 1)
    for b in (b for b in found if b.language == "python"):
        lines[b.line - 1 : b.end - 1] = b.text.splitlines()
    file = folder / f"{page.stem.replace('-', '_')}_page.py"  # rules read their own source
    file.write_text("\n".join(lines))
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    sys.modules[file.stem] = module
    for k, b in enumerate(found):
        if b.language != "python":
            continue
        if b.title.endswith(".py"):
            (folder / b.title).write_text(b.text)
            importlib.import_module(Path(b.title).stem)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (b.line - 1) + b.text, str(file), "exec"), vars(module))
        after = found[k + 1] if k + 1 < len(found) else b
        if after.title == "prints" and after.line == b.end + 2:
            same = doctest.OutputChecker().check_output(after.text, printed.getvalue(), doctest.ELLIPSIS)
            assert same, f"{names(page)}:{after.line}: the page says\n{after.text}it prints\n{printed.getvalue()}"
    return vars(module)


# Lightning's, on a machine with many cores: that more processes could load a page's few rows.
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=names)
def test_code_on_a_page_runs_and_prints_what_the_page_says(page, folder):
    run_page(page, folder)


def test_every_printed_block_follows_the_code_that_prints_it():
    for page in PAGES:
        found = blocks(page)
        for before, b in zip([None, *found], found, strict=False):
            if b.title == "prints":
                assert before and before.language == "python" and b.line == before.end + 2, f"{names(page)}:{b.line}"


@pytest.mark.parametrize("backend", ["eager", "chunked", "native"])
def test_the_toy_optimizer_of_the_page_computes_its_docstring_on_every_backend(backend, folder):
    page = DOCS / "own-optimizer.md"
    toy = next(b for b in blocks(page) if b.title.endswith(".py"))
    (folder / toy.title).write_text(toy.text)
    SoftMomentum = importlib.import_module(Path(toy.title).stem).SoftMomentum
    lr, beta, floor, decay = 1e-2, 0.8, 0.1, 0.5
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    optimizer = SoftMomentum([p], lr=lr, beta=beta, floor=floor, weight_decay=decay, backend=backend)
    expected, m = p.detach().clone(), torch.zeros_like(p)
    for t in range(1, 8):
        p.grad = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        optimizer.step()
        m = beta * m + (1 - beta) * p.grad
        unbiased = m / (1 - beta**t)
        expected = (1 - lr * decay) * expected - lr * unbiased / (unbiased.abs() + floor)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)
    assert f"backend: {backend} (" in optimizer.explain()


def block_of(page: Path, heading: str) -> str:
    """The first code under a heading."""
    text = page.read_text().split(f"\n{heading}\n", 1)[1]
    return next(m["text"] for m in FENCE.finditer(text) if m["language"] == "python")


def test_the_accumulation_of_the_page_is_the_estimate_of_the_whole_batch():
    """Whatever the number of labels in each micro-batch."""
    import torch.nn.functional as F

    def likeliest(logits, *, targets):
        return logits.argmax(-1).masked_fill(targets == -100, -100)

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = gradkit.Sophia(model.parameters())
    names = {"torch": torch, "F": F, "gnb_labels": likeliest, "model": model, "optimizer": optimizer}
    exec(block_of(DOCS / "optimizers" / "sophia.md", "### Accumulation"), names)
    x, y = names["x"], names["y"]
    counts = [int((part != -100).sum()) for part in y.split(4)]
    assert len(set(counts)) > 1, counts
    whole = gradkit.Sophia(model.parameters())
    F.cross_entropy(model(x), likeliest(model(x), targets=y)).backward()
    whole.update_hessian(batch_size=sum(counts))
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p]["hessian"], whole.state[p]["hessian"])


def test_hutchinsons_parts_on_the_page_are_of_the_whole_loss():
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def gradients(loss, params):  # linear, as the estimate, and not random
        return list(torch.autograd.grad(loss, [*params], retain_graph=True))

    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(8, 5), torch.randn(4, 6, 8), torch.randint(5, (4, 6))
    names = {"torch": torch, "F": F, "SDPBackend": SDPBackend, "sdpa_kernel": sdpa_kernel, "hutchinson": gradients}
    names |= {"model": model, "x": x, "y": y}
    text = (DOCS / "estimators.md").read_text()
    exec(next(m["text"] for m in FENCE.finditer(text) if "part = hutchinson" in m["text"]), names)
    whole = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(names["estimates"], gradients(whole, model.parameters()))


@pytest.mark.parametrize("name, printed", sorted(signatures(PAGES).items()))
def test_a_printed_signature_is_the_real_one(name, printed):
    real = inspect.signature(public(name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in real.parameters.values()]
    text = str(inspect.Signature(bare)).removeprefix("(").removesuffix(")")
    printed_ast, real_ast = (ast.dump(ast.parse(f"def f({s}): pass")) for s in (printed, text))
    assert printed_ast == real_ast, f"{name}: the page has ({printed}), the code ({text})"


def test_every_public_callable_has_its_signature_on_a_page():
    wanted = {f"gradkit.{n}" for n in gradkit.__all__ if callable(getattr(gradkit, n)) and n not in NOT_CALLED}
    for module in (gradkit.transforms, gradkit.losses, gradkit.estimators, gradkit.multiloss):
        wanted |= {f"{module.__name__}.{n}" for n in module.__all__}
    wanted |= {f"gradkit.integrations.lightning.{n}" for n in lookup("gradkit.integrations.lightning").__all__}
    wanted -= {"gradkit.integrations.lightning.MultiLoss"}  # a base class
    assert wanted - signatures(PAGES).keys() == set()


def test_an_optimizers_page_explains_each_of_its_arguments():
    for page in (DOCS / "optimizers").glob("[!i]*.md"):
        rows = set(re.findall(r"^\| `(\w+)` \|", page.read_text(), re.M))
        (name,) = signatures([page])
        missing = set(inspect.signature(public(name)).parameters) - rows
        assert not missing, f"{names(page)}: {missing}"


def test_an_optimizers_page_names_its_state():
    for page in (DOCS / "optimizers").glob("[!i]*.md"):
        (name,) = signatures([page])
        shapes = {"matrix": (2, 2), "last": (2, 2), "vector": 2}  # four of each, of which FRUGAL selects one
        of = {role: [torch.nn.Parameter(torch.zeros(s)) for _ in range(4)] for role, s in shapes.items()}
        groups = [{"params": params, "role": role} for role, params in of.items()]
        optimizer = public(name)(groups)
        optimizer.init_state()
        held = {slot for state in optimizer.state.values() for slot in state}
        told = set(re.findall(r"`(\w+)`", re.findall(r"^State: .*$", page.read_text(), re.M)[0]))
        assert held and held <= told, f"{names(page)}: {held - told}"


def test_every_public_name_stands_in_the_docs():
    text = "\n".join(p.read_text() for p in DOCS.rglob("*.md"))
    wanted = [
        *gradkit.__all__,
        *gradkit.transforms.__all__,
        *gradkit.losses.__all__,
        *gradkit.multiloss.__all__,
        *gradkit.options.Options.__annotations__,
    ]
    wanted += [m.name for m in gradkit.Stage] + list(gradkit.ops.OPS) + list(gradkit.options.DECAYS)
    missing = [n for n in wanted if not re.search(rf"[`\".]{re.escape(n)}\b", text)]
    assert missing == []


def slug(heading: str) -> str:
    """The anchor that the site gives a heading."""
    plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_internal_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{names(page)}: {link}"
        headings = [slug(h) for h in re.findall(r"^#+ (.*)$", prose(target), re.M)] if target.suffix == ".md" else []
        assert not anchor or anchor in headings, f"{names(page)}: {link}: the page has {headings}"


def test_the_sites_menu_lists_every_page_once():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_what_the_way_of_a_gradient_names_exists():
    text = prose(DOCS / "one-gradient.md")
    dotted = set(re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\(\))?`", text)) - {"p.grad"}
    files = {n for n in dotted if n.endswith((".py", ".h"))} | set(re.findall(r"`([\w/]+/\w+\.(?:py|h))`", text))
    for name in dotted - files:
        lookup(f"gradkit.{name}")
    for name in files:
        assert (ROOT / "gradkit" / name).exists(), name
    modules = {p.stem for p in (ROOT / "gradkit").glob("[a-z]*.py")} - {"py"}
    assert len(dotted - files) > 25
    assert modules - {n.split(".")[0] for n in dotted} == set(), "a module that the page doesn't mention"


def bench_table() -> Any:
    spec = importlib.util.spec_from_file_location("bench_table", DOCS / "bench_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measurement_is_also_one_click_away_where_no_hook_runs():
    """On GitHub the comments are nothing; on the site their whole line becomes the table."""
    hook = bench_table()
    asking = [p for p in PAGES if "<!-- " in p.read_text()]
    assert len(asking) >= 6
    for page in asking:
        lines = [x for x in page.read_text().splitlines() if "<!-- " in x]
        assert all(re.fullmatch(r"\[[\w ]+\]\((\.\./)+bench/results\S*\) <!-- [\w: ]+ -->", x) for x in lines), lines
        file = types.SimpleNamespace(src_uri=str(page.relative_to(DOCS)))
        shown = hook.on_page_markdown(page.read_text(), page=types.SimpleNamespace(file=file))
        assert "<!-- " not in shown and "bench/results)" not in shown and "evidence.md#" not in shown
        assert "| --- |" in shown


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs and mkdocs-material come with the extra [docs], which is not installed here")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's notice about its own future, not about our pages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site" / "one-gradient" / "index.html").exists()
    assert 'src="../../evidence-spikes.png"' in (tmp_path / "site" / "optimizers" / "spam" / "index.html").read_text()


def test_the_newest_measurements_stand_on_the_page_and_misses_stand_out(tmp_path):
    hook = bench_table()
    assert hook.bench(tmp_path) == hook.NO_BENCH
    assert hook.evidence(tmp_path, "lion") == hook.NO_EVIDENCE
    for day in "2026-02-01", "2026-01-31":
        (tmp_path / f"cpu-{day}.json").write_text("{}")
        (tmp_path / f"cpu-{day}.md").write_text(f"# Title\n\nof {day}\n\n- MISS Lion: start-up\n")
    text = hook.bench(tmp_path)
    assert "of 2026-02-01" in text and "01-31" not in text and "# Title" not in text
    assert text.endswith("- **MISS** Lion: start-up")
    one = {"setting": "s", "table": [["a"], ["1|2"]], "gates": {"g": False}, "word": "w", "date": "d", "machine": "m"}
    (tmp_path / "evidence.json").write_text(json.dumps({"lion": one, "spam": one | {"picture": "p.png"}}))
    text = hook.evidence(tmp_path, "lion")
    assert "- **missed**: g" in text and r"| 1\|2 |" in text and "![" not in text
    assert "](../p.png)" in hook.evidence(tmp_path, "spam", "../")


def test_a_committed_report_is_the_one_of_its_measurements():
    from bench import report

    for file in (ROOT / "bench" / "results").glob("[cg]pu-*.json"):
        assert report.markdown(json.loads(file.read_text())) == file.with_suffix(".md").read_text(), file.name
