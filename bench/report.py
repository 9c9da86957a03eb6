"""The results as JSON, a Markdown page and a plot."""

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from . import bars
from .rows import Row
from .shapes import RACED, Shape

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"gradkit": "#1f6fb4", "torch": "#444444"}
PEER_COLOUR = "#d98a3d"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
Record = Mapping[str, Any]
OF_MODEL = ("ms", "ratio", "per byte", "of copy")
HOST_COLUMNS = ("host us", "moved us")
SLOW = ("chunked", "eager", "default")  # ways to run an optimizer that has a faster one


def commit() -> str:
    """What was measured; "+" behind it if files had been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "gradkit", "triton_kernels", "bench/*.py")
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


def models(data: Record) -> list[Shape]:
    """Those that were timed."""
    return [shape for shape in RACED if shape.key in data["shapes"]]


def columns(data: Record) -> list[str]:
    """The table's head; the first two are the row's name and its bytes."""
    of_models = [f"{m.title}: {name}" if name == OF_MODEL[0] else name for m in models(data) for name in OF_MODEL]
    mlp = ["MLP us"] if "mlp" in data["shapes"] else []
    kernels = ["kernels"] if data["device"] == "gpu" else []
    return ["", "bytes", *of_models, "extra MiB", "start-up s", *kernels, *mlp, *HOST_COLUMNS, "bars"]


def line(row: Record, data: Record) -> str:
    """A row of the table."""
    parts = [row.get(m.key, {}) for m in models(data)]
    head = columns(data)
    if not any("ms" in part for part in parts):
        return f"| {row['name']} | {row['bytes']} | {reason(row)} " + "| " * (len(head) - 3) + "|"
    cells = [row["name"], str(row["bytes"])]
    for part in parts:
        cells += [number(part.get(key), 2 if key != "ms" else 1) for key in ("ms", "ratio", "ratio_per_byte")]
        cells.append(number(100 * part["copy_share"], 0) + " %" if "copy_share" in part else "-")
    extras = [part["extra_mib"] for part in parts if part.get("extra_mib") is not None]
    cells += [number(max(extras, default=None), 1), number(parts[0].get("startup_s"), 2)]
    cells += [number(parts[0].get("compiled"), 0)] * ("kernels" in head)
    cells += [number(row.get("mlp", {}).get("us"), 0)] * ("MLP us" in head)
    cells += [number(row.get("host", {}).get(key), 0) for key in ("us", "moved_us")]
    missed = sum(bar["verdict"] == "MISS" for bar in row["bars"])
    cells.append(f"**{missed} MISS**" if missed else "ok" if row["bars"] else "")
    return f"| {' | '.join(cells)} |"


def misses(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for bar in row["bars"]:
            if bar["verdict"] == "MISS":
                shown = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
                yield f"MISS {row['name']}: {bar['what']}: {shown}, bar {bar['limit']:.3g}"


def machine(data: Record) -> str:
    """What it ran on."""
    if data["device"] == "cpu":
        return f"{data['cpu']}, {data['threads']} threads; torch {data['torch']}, gradkit {data['gradkit']}"
    known = ", ".join(f"{key} {x}" for key, x in data["machine"].items() if key != "name")
    return f"{data['machine'].get('name', 'unknown')} ({known}); torch {data['torch']}, gradkit {data['gradkit']}"


def table(head: Sequence[str], lines: Iterable[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), "|" + " --- |" * len(head), *lines])


def markdown(data: Record) -> str:
    """The page: table, misses, reasons, protocol."""
    rows = data["rows"]
    total = sum(len(row["bars"]) for row in rows)
    missed = list(misses(rows))
    peers = sorted({f"{r['package']} {r['version']}" for r in rows if r.get("version") and r["package"] != "torch"})
    words = [f"{data['date']}, commit {data['commit']}; {machine(data)}, Python {data['python']}", ", ".join(peers)]
    head = [
        f"# {data.get('title', 'Step times on the CPU')}",
        "; ".join(w for w in words if w) + ".",
        "Ratio: to `torch.optim.AdamW(fused=True)` in the same rounds; per byte: divided by bytes / 28, so 1.00 is "
        "fused AdamW's speed at this row's bytes.",
        table(columns(data), (line(row, data) for row in rows)),
    ]
    mlp_torch = [row["mlp"]["torch_us"] for row in rows if "torch_us" in row.get("mlp", {})]
    if mlp_torch:
        took = f"{min(mlp_torch):.0f} to {max(mlp_torch):.0f} us"
        head.append(f"MLP: torch's default AdamW took {took} beside these rows.")
    later: dict[str, list[str]] = {}
    for row in rows:
        if "since" in row:
            later.setdefault(f"{row['since']['date']} at commit {row['since']['commit']}", []).append(row["name"])
    head += [f"Measured {when}: {', '.join(names)}." for when, names in later.items()]
    verdict = [f"{total - len(missed)} of {total} bars are met.", "\n".join(f"- {m}" for m in missed)]
    clip = [
        f"- {row['name']}: {ratio:.2f} of the time of {other}, {m.key}"
        for row in rows
        for m in models(data)
        for other, ratio in row.get(m.key, {}).get("others", {}).items()
    ]
    gaps = [f"- {row['name']}: {reason(row)}" for row in rows if reason(row)]
    pages = [*head, *verdict, "\n".join(clip), "\n".join(gaps), swept(data.get("sweep", {}))]
    pages += [f"Protocol: {data['protocol']}"]
    return "\n\n".join(p for p in pages if p) + "\n"


def swept(sweep: Record) -> str:
    """The sweep of launch constants, fastest first for each kind; bold: what the library takes."""
    if not sweep:
        return ""
    if "rows" not in sweep:
        return f"Sweep: {sweep['why']}"
    head = ("parameters", "chunk", "tile", "warps", "ms", "of copy")
    lines = []
    for row in sorted(sweep["rows"], key=lambda row: (row["dtype"], row.get("ms", float("inf")))):
        cells = [row["dtype"], *(str(row[key]) for key in head[1:4])]
        cells += [row["why"], ""] if "why" in row else [number(row["ms"], 3), number(100 * row["copy_share"], 1) + " %"]
        lines.append("| " + " | ".join(f"**{x}**" if row["taken"] and x else x for x in cells) + " |")
    return "\n\n".join([f"## AdamW by chunk, tile and warps, {sweep['model']}", table(head, lines)])


def short(data: Record) -> dict[str, Any]:
    """What the README shows: the largest model in float32, each algorithm beside its peers, not each way to run it."""
    model = models(data)[-1].key
    rows = [{**r, "bars": []} for r in data["rows"] if r["dtype"] == "float32" and r["name"].split()[-1] not in SLOW]
    algorithms = list(dict.fromkeys(r["algorithm"] for r in rows))
    rows.sort(key=lambda r: algorithms.index(r["algorithm"]))
    return {**data, "shapes": {model: data["shapes"][model]}, "rows": rows}


def plot(data: Record, file: Path) -> None:
    """Ratios to fused AdamW, a bar for each model, and a mark where the row's own limit is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shown = models(data)
    rows = [row for row in data["rows"] if any("ratio" in row.get(m.key, {}) for m in shown)]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.18 * len(shown) * len(rows)), constrained_layout=True)
    height, shades = 0.72 / len(shown), [(k + 1.2) / (len(shown) + 0.2) for k in range(len(shown))]
    for y, row in enumerate(rows):
        colour = COLOURS.get(row["package"], PEER_COLOUR)
        for k, (m, shade) in enumerate(zip(shown, shades, strict=True)):
            ratio, at = row.get(m.key, {}).get("ratio"), y + (k - (len(shown) - 1) / 2) * (height + 0.02)
            if ratio is not None:
                axes.barh(at, ratio, height, color=colour, alpha=shade)
                axes.text(ratio * 1.05, at, f"{ratio:.2f}", va="center", fontsize=7, bbox=LABEL, zorder=4)
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
    axes.set_title(fill(f"{machine(data)}, {data['date']}", 100), fontsize=9)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=c, label=n) for n, c in (*COLOURS.items(), ("other packages", PEER_COLOUR))]
    sizes = [f"{m.title}, {data['shapes'][m.key][1] / 1e6:,.0f}M" for m in shown]
    handles += [Patch(color="#888888", alpha=shade, label=x) for shade, x in zip(shades, sizes, strict=True)]
    handles += [Patch(color="#c01f2e", label="limit for the row")] * any(row["bars"] for row in rows)
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
