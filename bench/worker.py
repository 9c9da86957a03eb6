"""Measures one row in its own process: `python -m bench.worker NAME`; a line of JSON for each part, as it is done."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from . import protocol
from .protocol import Contender, Model
from .rows import LR, ROWS, Row, WithClip
from .shapes import FULL, QUICK, Shape

Part = dict[str, Any]
Timed = Callable[[], Any]


def fused(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def timed(call: Timed) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def warm(model: Model, step: Timed) -> Contender:
    """The row's contender after its warm-up steps."""
    contender = model.contender(step)
    for _ in range(protocol.WARM_UP):
        contender.prepare()
        contender.step()
    contender.prepare()
    return contender


def one_model(row: Row, shape: Shape) -> Part:
    """Time, ratios and extra memory on a model's shapes; the first call in a process also tells the start-up."""
    model = Model(shape.tensors, row.dtype)
    constructing, optimizer = timed(lambda: row.make(model.params))
    first, _ = timed(optimizer.step)
    model.give()
    contender = warm(model, optimizer.step)
    extra = protocol.extra_memory(contender)
    contenders = {"fused": of_other(fused, shape), "copy": protocol.copying(model.elements), row.name: contender}
    contenders |= {name: of_other(ROWS[name].make, shape) for name in row.also}
    seconds = protocol.race(contenders, 1)[row.name][0]
    times = protocol.race(contenders, min(shape.rounds, max(protocol.LEAST_ROUNDS, int(10 / seconds))))
    part = protocol.figures(times, row.name, model.elements, row.bytes)
    step = median(times[row.name])
    return {**part, "extra_mib": extra, "construct_s": constructing, "first_step_s": first, "startup_s": first - step}


def of_other(make: Callable[[Any], Any], shape: Shape) -> Contender:
    """Another contender in the same rounds, float32, on tensors of its own."""
    model = Model(shape.tensors)
    return warm(model, make(model.params).step)


def mlp(row: Row, shape: Shape) -> Part:
    """Microseconds of a step on a small model, beside torch's default AdamW, with torch's clipping if the row clips."""
    model, other = Model(shape.tensors, row.dtype), Model(shape.tensors)
    default = WithClip(other.params) if "clip" in row.algorithm else torch.optim.AdamW(other.params, lr=LR)
    contenders = {"row": warm(model, row.make(model.params).step), "torch": warm(other, default.step)}
    seconds = sum(times[0] for times in protocol.race(contenders, 1).values())
    times = protocol.race(contenders, protocol.affordable(shape.rounds, seconds))
    us = {name: 1e6 * median(t) for name, t in times.items()}
    return {"rounds": len(times["row"]), "us": us["row"], "torch_us": us["torch"], "ratio": us["row"] / us["torch"]}


def host(row: Row, shape: Shape) -> Part:
    """Microseconds of a step that has next to nothing to compute."""
    part: Part = {}
    for key in ("us", "moved_us"):
        model = Model(shape.tensors, row.dtype)
        step = row.make(model.params).step
        contender = warm(model, step)
        if key == "moved_us":
            contender = model.moving(step)
        seconds = protocol.race({key: contender}, 1)[key][0]
        part[key] = 1e6 * median(protocol.race({key: contender}, protocol.affordable(shape.rounds, seconds))[key])
    return part


def measure(row: Row, shapes: tuple[Shape, ...]) -> Iterator[tuple[str, Part]]:
    """Each part under its key; one that can't run is a reason, and so is a package that can't be imported."""
    for shape in shapes:
        part = {"mlp": mlp, "host": host}.get(shape.key, one_model)
        try:
            yield shape.key, part(row, shape)
        except Exception as e:  # whatever another package raises is this row's result
            yield shape.key, {"why": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"}
            if isinstance(e, ImportError):
                return


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    row = ROWS[options.name]
    print(json.dumps({"version": installed(row.package), "threads": torch.get_num_threads()}), flush=True)
    for key, part in measure(row, QUICK if options.quick else FULL):
        print(json.dumps({key: part}), flush=True)


if __name__ == "__main__":
    main()
