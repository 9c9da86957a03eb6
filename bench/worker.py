"""Measures one row in its own process: `python -m bench.worker NAME`; a line of JSON for each part, as it is done."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch

from . import devices, protocol
from .devices import Cpu
from .protocol import Contender, Model
from .rows import LR, Row, WithClip
from .shapes import Shape, quick
from .suites import SUITES

Part = dict[str, Any]
Timed = Callable[[], Any]


def fused(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


FUSED = Row("torch AdamW fused", "torch", "AdamW", protocol.ADAMW_BYTES, fused)


def warm(model: Model, step: Timed) -> Contender:
    """The row's contender after its warm-up steps."""
    contender = model.contender(step)
    for _ in range(protocol.WARM_UP):
        contender.prepare()
        contender.step()
    contender.prepare()
    return contender


class Worker:
    """One row on one device."""

    def __init__(self, row: Row, rows: Mapping[str, Row], place: Cpu):
        self.row, self.place = row, place
        self.beside = [rows[name] for name in row.also]  # take a step in the same rounds

    def model(self, shape: Shape, row: Row) -> Model:
        return Model(shape.tensors, self.place.device, row.dtype)

    def other(self, row: Row, shape: Shape) -> Contender:
        """Another row's contender, on tensors of its own."""
        model = self.model(shape, row)
        return warm(model, row.make(model.params).step)

    def one_model(self, shape: Shape) -> Part:
        """Time, ratios and extra memory on a model's shapes; the first call in a process also tells the start-up."""
        row, place = self.row, self.place
        model, made, kernels = self.model(shape, row), [], devices.compiled()
        constructing = place.until_done(lambda: made.append(row.make(model.params)))
        (optimizer,) = made
        first = place.until_done(optimizer.step)
        compiled = devices.compiled() - kernels
        model.give()
        contender = warm(model, optimizer.step)
        extra = place.extra_memory(contender)
        contenders = {"fused": self.other(FUSED, shape), "copy": protocol.copying(model.elements, place.device)}
        contenders |= {row.name: contender, **{x.name: self.other(x, shape) for x in self.beside}}
        seconds = protocol.race(contenders, 1, place.seconds)[row.name][0]
        rounds = min(shape.rounds, max(protocol.LEAST_ROUNDS, int(10 / seconds)))
        times = protocol.race(contenders, rounds, place.seconds)
        clocks = place.clocks()
        part = protocol.figures(times, row.name, model.elements, row.bytes_on(shape.tensors))
        step = median(times[row.name])
        part |= {"extra_mib": extra, "construct_s": constructing, "first_step_s": first, "startup_s": first - step}
        if row.limits == "triton":
            part |= {"compiled": compiled, "compiled_again": self.another_lr(optimizer, contender), "clocks": clocks}
        return part

    def another_lr(self, optimizer: torch.optim.Optimizer, contender: Contender) -> int:
        """Kernels that are compiled when nothing but the learning rate changes."""
        before = devices.compiled()
        for lr in (0.5 * LR, 0.0, 1.0):
            for group in optimizer.param_groups:
                group["lr"] = lr
            contender.prepare()
            contender.step()
        self.place.settle()
        return devices.compiled() - before

    def mlp(self, shape: Shape) -> Part:
        """Microseconds of a step on a small model, beside torch's default AdamW, with torch's clipping if it clips."""
        model, other = self.model(shape, self.row), self.model(shape, FUSED)
        default = WithClip(other.params) if "clip" in self.row.algorithm else torch.optim.AdamW(other.params, lr=LR)
        contenders = {"row": warm(model, self.row.make(model.params).step), "torch": warm(other, default.step)}
        seconds = sum(times[0] for times in protocol.race(contenders, 1, self.place.seconds).values())
        times = protocol.race(contenders, protocol.affordable(shape.rounds, seconds), self.place.seconds)
        us = {name: 1e6 * median(t) for name, t in times.items()}
        return {"rounds": len(times["row"]), "us": us["row"], "torch_us": us["torch"], "ratio": us["row"] / us["torch"]}

    def host(self, shape: Shape) -> Part:
        """Microseconds of a step that has next to nothing to compute."""
        part: Part = {}
        for key in ("us", "moved_us"):
            model = self.model(shape, self.row)
            step = self.row.make(model.params).step
            contender = warm(model, step)
            if key == "moved_us":
                contender = model.moving(step)
            seconds = protocol.race({key: contender}, 1, self.place.host_seconds)[key][0]
            rounds = protocol.affordable(shape.rounds, seconds)
            part[key] = 1e6 * median(protocol.race({key: contender}, rounds, self.place.host_seconds)[key])
        return part

    def measure(self, shapes: tuple[Shape, ...]) -> Iterator[tuple[str, Part]]:
        """Each part under its key; one that can't run is a reason, and so is a package that can't be imported."""
        for shape in shapes:
            part = {"mlp": self.mlp, "host": self.host}.get(shape.key, self.one_model)
            try:
                yield shape.key, part(shape)
            except Exception as e:  # whatever another package raises is this row's result
                why = str(e).strip().splitlines()
                yield shape.key, {"why": f"{type(e).__name__}: {why[0] if why else ''}"}
                if isinstance(e, ImportError):
                    return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--on", choices=SUITES, default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    suite = SUITES[options.on]
    row, place = suite.rows[options.name], devices.find(options.on, options.quick)()
    print(json.dumps({"version": devices.installed(row.package), "machine": place.facts()}), flush=True)
    shapes = quick(suite.shapes) if options.quick else suite.shapes
    for key, part in Worker(row, suite.rows, place).measure(shapes):
        print(json.dumps({key: part}), flush=True)


if __name__ == "__main__":
    main()
