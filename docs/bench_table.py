"""A hook of mkdocs: puts the committed measurements of bench/results/ into the pages that ask for them."""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"
NO_BENCH = "No measurement is committed: `bench/results/` has no `cpu-*.json`. `make bench` makes one."
NO_EVIDENCE = "No measurement of this experiment is committed. `make evidence` makes one."
PLOT = "step-times.png"


def newest(folder: Path) -> Path | None:
    """The committed benchmark with the latest date in its name."""
    return max(folder.glob("cpu-*.json"), default=None, key=lambda file: file.name)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs before the pages: the pictures stand beside the results, outside docs/."""
    from mkdocs.structure.files import File

    file = newest(RESULTS)
    if file and file.with_suffix(".png").exists():
        files.append(File.generated(config, PLOT, abs_src_path=str(file.with_suffix(".png"))))
    for picture in RESULTS.glob("evidence-*.png"):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    up = "../" * page.file.src_uri.count("/")  # to where the pictures are

    def asked_for(line: re.Match[str]) -> str:  # whole: what stands before the comment is for readers of the file
        return bench(RESULTS) if line["what"] == "bench" else evidence(RESULTS, line["key"], up)

    return re.sub(r"^.*<!-- (?P<what>bench|evidence: (?P<key>\w+)) -->$", asked_for, markdown, flags=re.M)


def bench(folder: Path) -> str:
    """The report that was written with the newest cpu-*.json, its misses in bold, and its plot."""
    file = newest(folder)
    if file is None:
        return NO_BENCH
    report = file.with_suffix(".md").read_text().split("\n", 1)[1].replace("\n- MISS ", "\n- **MISS** ")
    plot = f"![times of a step]({PLOT})" if file.with_suffix(".png").exists() else ""
    return f"From `bench/results/{file.name}`.\n\n{plot}\n\n{report.strip()}"


def evidence(folder: Path, key: str, up: str = "") -> str:
    """One experiment of evidence.json as Markdown; `up` leads from the page to the pictures."""
    file = folder / "evidence.json"
    found = json.loads(file.read_text()).get(key) if file.exists() else None
    if not found:
        return NO_EVIDENCE
    gates = "\n".join(f"- {cell(met)}: {gate}" for gate, met in found["gates"].items())
    head, *body = found["table"]
    picture = f"![loss curves]({up}{found['picture']})" if "picture" in found else ""
    date = f"{found['date']}; {found['machine']}."
    parts = [found["setting"], table(head, body), gates, picture, found.get("word", ""), date]
    return "\n\n".join(p for p in parts if p)


def table(head: list[str], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value for a table: a miss stands out."""
    if isinstance(value, bool):
        return "met" if value else "**missed**"
    return str(value).replace("|", "\\|").replace("\n", " ")
