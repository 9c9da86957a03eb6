"""The results as JSON, a Markdown page and a plot."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import bars
from .rows import Row

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"gradkit": "#1f6fb4", "torch": "#444444"}
PEER_COLOUR = "#d98a3d"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
Record = Mapping[str, Any]
COLUMNS = (
    "| | bytes | ResNet-50: ms | ratio | per byte | of copy | GPT-2: ms | ratio | per byte | of copy | extra MiB "
    "| start-up s | MLP us | host us | moved us | bars |"
)


def commit() -> str:
    """What was measured; "+" behind it if files had been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "gradkit", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(row: Row, rows: Mapping[str, Row], results: bars.Results) -> dict[str, Any]:
    """A row as JSON: what it is, what was measured, its bars."""
    known = {"name": row.name, "package": row.package, "algorithm": row.algorithm, "bytes": row.bytes}
    dtype = str(row.dtype).removeprefix("torch.")
    verdicts = [bar.as_json() for bar in bars.bars(row, rows, results)]
    return {**known, "dtype": dtype, **results.get(row.name, {}), "bars": verdicts}


def number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:,.{digits}f}"


def reason(row: Record) -> str:
    """Why the row has no figures, or lacks some; empty if it is complete."""
    whys = [f"{key}: {part['why']}" for key, part in row.items() if isinstance(part, dict) and "why" in part]
    same = {w.split(": ", 1)[1] for w in whys}
    return row.get("why") or (same.pop() if len(same) == 1 else "; ".join(whys))


def line(row: Record) -> str:
    """A row of the table."""
    small, large, mlp, host = (row.get(key, {}) for key in ("resnet50", "gpt2", "mlp", "host"))
    if "ms" not in small and "ms" not in large:
        return f"| {row['name']} | {row['bytes']} | {reason(row)} " + "| " * 13 + "|"
    cells = [row["name"], str(row["bytes"])]
    for part in (small, large):
        cells += [number(part.get(key), 2 if key != "ms" else 1) for key in ("ms", "ratio", "ratio_per_byte")]
        cells.append(number(100 * part["copy_share"], 0) + " %" if "copy_share" in part else "-")
    extras = [part["extra_mib"] for part in (small, large) if part.get("extra_mib") is not None]
    cells += [number(max(extras, default=None), 1), number(small.get("startup_s"), 2)]
    cells += [number(mlp.get("us"), 0), number(host.get("us"), 0), number(host.get("moved_us"), 0)]
    missed = sum(bar["verdict"] == "MISS" for bar in row["bars"])
    cells.append(f"**{missed} MISS**" if missed else "ok" if row["bars"] else "")
    return f"| {' | '.join(cells)} |"


def misses(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for bar in row["bars"]:
            if bar["verdict"] == "MISS":
                shown = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
                yield f"MISS {row['name']}: {bar['what']}: {shown}, bar {bar['limit']:.3g}"


def markdown(data: Record) -> str:
    """The page: table, misses, reasons, protocol."""
    rows = data["rows"]
    total = sum(len(row["bars"]) for row in rows)
    missed = list(misses(rows))
    machine = f"{data['cpu']}, {data['threads']} threads; torch {data['torch']}, gradkit {data['gradkit']}"
    peers = sorted({f"{r['package']} {r['version']}" for r in rows if r.get("version") and r["package"] != "torch"})
    head = [
        "# Step times on the CPU",
        f"{data['date']}, commit {data['commit']}; {machine}, Python {data['python']}; {', '.join(peers)}.",
        "Ratio: to `torch.optim.AdamW(fused=True)` in the same rounds; per byte: divided by bytes / 28, so 1.00 is "
        "fused AdamW's speed at this row's bytes.",
    ]
    table = "\n".join([COLUMNS, "|" + " --- |" * (COLUMNS.count("|") - 1), *map(line, rows)])
    mlp_torch = [row["mlp"]["torch_us"] for row in rows if "torch_us" in row.get("mlp", {})]
    beside = f"MLP: torch's default AdamW took {min(mlp_torch):.0f} to {max(mlp_torch):.0f} us beside these rows."
    verdict = [f"{total - len(missed)} of {total} bars are met.", "\n".join(f"- {m}" for m in missed)]
    clip = [
        f"- {row['name']}: {ratio:.2f} of the time of {other}, {part}"
        for row in rows
        for part in ("resnet50", "gpt2")
        for other, ratio in row.get(part, {}).get("others", {}).items()
    ]
    gaps = [f"- {row['name']}: {reason(row)}" for row in rows if reason(row)]
    pages = [*head, table, beside if mlp_torch else "", *verdict, "\n".join(clip), "\n".join(gaps)]
    pages += [f"Protocol: {data['protocol']}"]
    return "\n\n".join(p for p in pages if p) + "\n"


def plot(data: Record, file: Path) -> None:
    """Ratios to fused AdamW, a bar for each model, and a mark where the row's own limit is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [row for row in data["rows"] if "ratio" in row.get("resnet50", {}) or "ratio" in row.get("gpt2", {})]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.36 * len(rows)), constrained_layout=True)
    for y, row in enumerate(rows):
        colour = COLOURS.get(row["package"], PEER_COLOUR)
        for part, shift, alpha in (("resnet50", -0.19, 0.55), ("gpt2", 0.19, 1.0)):
            ratio = row.get(part, {}).get("ratio")
            if ratio is not None:
                axes.barh(y + shift, ratio, 0.36, color=colour, alpha=alpha)
                axes.text(ratio * 1.05, y + shift, f"{ratio:.2f}", va="center", fontsize=7, bbox=LABEL, zorder=4)
        limit = next((bar["limit"] for bar in row["bars"] if bar["what"].endswith("ratio to fused")), None)
        if limit is not None:
            axes.plot([limit, limit], [y - 0.42, y + 0.42], color="#c01f2e", linewidth=2, zorder=5)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.5, low), 1.15 * high)  # room for the last label
    axes.set_xlabel("time of a step / time of torch.optim.AdamW(fused=True), log scale", fontsize=9)
    axes.set_title(f"{data['cpu']}, {data['threads']} threads, {data['date']}", fontsize=9)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=c, label=n) for n, c in (*COLOURS.items(), ("other packages", PEER_COLOUR))]
    handles += [Patch(color="#888888", alpha=0.55, label="pale: ResNet-50, 25.6M")]
    handles += [Patch(color="#888888", label="full: GPT-2, 124M"), Patch(color="#c01f2e", label="limit for the row")]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
