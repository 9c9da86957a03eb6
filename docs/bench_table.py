"""A hook of mkdocs: puts the committed measurements of bench/results/ into the pages that ask for them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"
NO_BENCH = "No measurement is committed: `bench/results/` has no `cpu-*.json`. `make bench` makes one."
NO_EVIDENCE = "No measurement of this experiment is committed. `make evidence` makes one."


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    if "<!-- bench -->" in markdown:
        markdown = markdown.replace("<!-- bench -->", bench(RESULTS))
    while "<!-- evidence: " in markdown:
        key = markdown.split("<!-- evidence: ", 1)[1].split(" -->", 1)[0]
        markdown = markdown.replace(f"<!-- evidence: {key} -->", evidence(RESULTS, key))
    return markdown


def bench(folder: Path) -> str:
    """The newest cpu-*.json as Markdown."""
    files = [(str(data.get("date", "")), file.name, data) for file in folder.glob("cpu-*.json") if (data := read(file))]
    if not files:
        return NO_BENCH
    _, name, data = max(files, key=lambda f: f[:2])
    facts = [f"- {k}: {cell(v)}" for k, v in flat(data).items() if not isinstance(v, list)]
    parts = [f"From `bench/results/{name}`.", "\n".join(facts)]
    for key, rows in data.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            parts += [f"## {key}", rows_table([flat(r) for r in rows])]
    return "\n\n".join(p for p in parts if p)


def evidence(folder: Path, key: str) -> str:
    """One experiment of evidence.json as Markdown."""
    found = read(folder / "evidence.json").get(key)
    if not found:
        return NO_EVIDENCE
    gates = "\n".join(f"- {cell(met)}: {gate}" for gate, met in found["gates"].items())
    head, *body = found["table"]
    parts = [found["setting"], table(head, body), gates, found.get("word", ""), f"{found['date']}; {found['machine']}."]
    return "\n\n".join(p for p in parts if p)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by a space."""
    out: dict[str, Any] = {}
    for k, v in data.items():
        out |= flat(v, f"{prefix}{k} ") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def rows_table(rows: list[dict[str, Any]]) -> str:
    head = list(dict.fromkeys(k for r in rows for k in r))
    return table(head, [[r.get(k) for k in head] for r in rows])


def table(head: list[str], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value for a table: a miss stands out."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "met" if value else "**missed**"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
