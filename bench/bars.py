"""What a row has to reach; a bar that is missed is printed as such."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .protocol import ADAMW_BYTES
from .rows import Row
from .shapes import GPT2, LLAMA, RESNET50, Shape

Results = Mapping[str, Mapping[str, Any]]  # of each row by its name; of a row: its parts by shape
MODELS = (RESNET50, GPT2)
LARGE = (GPT2, LLAMA)  # above 100M parameters: memory is what limits a GPU there
SHARE = 0.85  # of the copy bandwidth


class Bar(NamedTuple):
    """A limit, and what was measured; nothing measured is a miss."""

    what: str
    limit: float
    value: float | None

    @property
    def verdict(self) -> str:
        return "ok" if self.value is not None and self.value <= self.limit else "MISS"

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "limit": self.limit, "value": self.value, "verdict": self.verdict}


def ratio_limit(row: Row, model: Shape) -> float:
    """Of torch's fused AdamW's time: what the bytes allow, and a tenth; a fourth where roles run one by one."""
    over = 1.25 if row.roles else 1.1
    return 1.0 if row.algorithm == "AdamW" else over * row.bytes_on(model.tensors) / ADAMW_BYTES


def value(results: Results, name: str, part: str, key: str) -> float | None:
    return results.get(name, {}).get(part, {}).get(key)


def bars(row: Row, rows: Mapping[str, Row], results: Results) -> list[Bar]:
    """The bars of a row, with what it reached."""
    if row.limits == "native":
        return [*native(row, results), *faster_than_peers(row, rows, results, MODELS)]
    if row.limits == "triton":
        return [*triton(row, results), *faster_than_torch(row, results), *faster_than_peers(row, rows, results, LARGE)]
    if row.limits == "chunked":
        return [
            Bar(f"{m.title}: of torch foreach's time", 0.5, others(row, results, m.key, "torch AdamW foreach"))
            for m in MODELS
        ]
    return []


def others(row: Row, results: Results, part: str, name: str) -> float | None:
    return results.get(row.name, {}).get(part, {}).get("others", {}).get(name)


def native(row: Row, results: Results) -> Iterator[Bar]:
    for m in MODELS:
        yield Bar(f"{m.title}: ratio to fused", ratio_limit(row, m), value(results, row.name, m.key, "ratio"))
    for m in MODELS:
        yield Bar(f"{m.title}: extra memory, MiB", 16.0, value(results, row.name, m.key, "extra_mib"))
    yield Bar("start-up, s", 0.5, value(results, row.name, RESNET50.key, "startup_s"))
    yield Bar("MLP: of torch default's time", 1.0, value(results, row.name, "mlp", "ratio"))
    yield Bar("host work, us", 200.0, value(results, row.name, "host", "us"))
    yield Bar("host work, gradients moved, us", 300.0, value(results, row.name, "host", "moved_us"))


def triton(row: Row, results: Results) -> Iterator[Bar]:
    for m in LARGE:
        share = value(results, row.name, m.key, "copy_share")
        yield Bar(f"{m.title}: of the time to copy its bytes", 1 / SHARE, 1 / share if share else None)
    yield Bar("start-up, s", 2.0, value(results, row.name, RESNET50.key, "startup_s"))
    yield Bar("kernels compiled for another lr", 0.0, value(results, row.name, RESNET50.key, "compiled_again"))
    for m in LARGE:
        yield Bar(f"{m.title}: kernels compiled for another model", 0.0, value(results, row.name, m.key, "compiled"))
    yield Bar("host work, us", 200.0, value(results, row.name, "host", "us"))
    yield Bar("host work, gradients moved, us", 300.0, value(results, row.name, "host", "moved_us"))


def faster_than_torch(row: Row, results: Results) -> Iterator[Bar]:
    """AdamW than torch's fused one where memory limits; with a clip than torch's two calls, small tensors too."""
    if row.name == "gradkit AdamW":
        for m in LARGE:
            yield Bar(f"{m.title}: ratio to fused", 1.0, value(results, row.name, m.key, "ratio"))
    for other in row.also if row.algorithm == "AdamW, clip" else ():
        for m in (RESNET50, *LARGE):
            yield Bar(f"{m.title}: of {other}'s time", 1.0, others(row, results, m.key, other))


def faster_than_peers(
    row: Row, rows: Mapping[str, Row], results: Results, models: tuple[Shape, ...]
) -> Iterator[Bar]:
    """As fast as the fastest other package's version of the same algorithm; each ratio is from its own run."""
    for m in models:
        times = {
            peer.name: ratio
            for peer in rows.values()
            if peer.package not in ("gradkit", "torch") and (peer.algorithm, peer.dtype) == (row.algorithm, row.dtype)
            if (ratio := value(results, peer.name, m.key, "ratio")) is not None
        }
        if times:
            fastest = min(times, key=lambda name: times[name])
            yield Bar(f"{m.title}: ratio of {fastest}", times[fastest], value(results, row.name, m.key, "ratio"))
