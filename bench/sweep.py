"""AdamW by chunk, tile and warps, from which the table of launch constants is chosen: `python -m bench.sweep`."""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

import gradkit

from . import devices, protocol
from .devices import Cpu
from .protocol import Contender, Model
from .rows import BF16_BYTES, BYTES, LR
from .shapes import GPT2, SMALL, Shape

BYTES_OF = {torch.float32: BYTES["AdamW"], torch.bfloat16: BF16_BYTES["AdamW"]}
ROUNDS = 15


def cuts(taken: Any) -> Iterator[Any]:
    """What the library takes, and others: elements of a lane 4 or 8, warps 4 or 8, tiles of a block 1 to 64."""
    found = [taken]
    for wide, warps, tiles in itertools.product((1, 2), (4, 8), (1, 4, 8, 16, 64)):
        found.append(taken._replace(lanes=wide * taken.lanes, warps=warps, apply=tiles))
    yield from dict.fromkeys(found)


def contenders(model: Model, candidates: list[Any]) -> dict[Any, Contender]:
    """One optimizer and its state; each contender takes the step with kernels of its own."""
    from gradkit.triton_kernels.launch import Kernels

    optimizer = gradkit.AdamW(model.params, lr=LR, backend="triton")
    optimizer.step()
    (batch,) = optimizer._plans["step"].batches

    def stepping(kernels: Kernels) -> Callable[[], None]:
        def step() -> None:
            batch.backend.kernels = kernels
            optimizer.step()

        return step

    return {cut: Contender(stepping(Kernels(batch, cut))) for cut in candidates}


def works(contender: Contender, place: Cpu) -> str:
    """Why it doesn't, in a line: a compiler may refuse what needs too many registers."""
    try:
        for _ in range(1 + protocol.WARM_UP):
            contender.step()
        place.settle()
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
    return ""


def sweep(place: Cpu, shape: Shape, dtype: torch.dtype, candidates: list[Any], rounds: int) -> list[dict[str, Any]]:
    """A row for each candidate, all of them and a copy interleaved."""
    model = Model(shape.tensors, place.device, dtype)
    entered = contenders(model, candidates)
    whys = {cut: works(contender, place) for cut, contender in entered.items()}
    running: dict[Any, Contender] = {cut: x for cut, x in entered.items() if not whys[cut]}
    copy = {"copy": protocol.copying(model.elements, place.device)}
    times = protocol.race({**running, **copy}, rounds, place.seconds)
    of_copy = protocol.COPY_BYTES / median(times["copy"])
    rows = []
    for cut in candidates:
        row = {"dtype": str(dtype).removeprefix("torch."), "chunk": cut.apply * cut.tile, "tile": cut.tile}
        row |= {"warps": cut.warps, "taken": cut == candidates[0]}
        if whys[cut]:
            rows.append(row | {"why": whys[cut]})
        else:
            seconds = median(times[cut])
            rows.append(row | {"ms": 1e3 * seconds, "copy_share": BYTES_OF[dtype] / seconds / of_copy})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    place = devices.find("gpu", options.quick)()
    from gradkit.triton_kernels.launch import shape

    candidates = list(cuts(shape()))
    model, rounds = GPT2, ROUNDS
    if options.quick:
        candidates, model, rounds = candidates[:3], GPT2._replace(tensors=SMALL), 3
    rows: list[dict[str, Any]] = []
    for dtype in BYTES_OF:
        rows += sweep(place, model, dtype, candidates, rounds)
        made = {"machine": place.facts(), "model": model.title, "rows": rows, "clocks": place.clocks()}
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
