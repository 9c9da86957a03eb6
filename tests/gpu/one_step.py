"""Two steps of all that a kernel can hold, for a tool that watches memory: `python -m tests.gpu.one_step`."""

import sys

import torch

import gradkit
from gradkit.transforms import clip_by_global_norm, clip_by_norm, grokfast_ma
from tests.runs import ran_on

from .place import Place, find, give, parameters

SHAPES = [(3, 5), (1,), (0,), (4097,), (70, 129), (8192,)]
LINKS = [grokfast_ma(window=2), clip_by_global_norm(1.0), clip_by_norm(0.5)]


def steps(place: Place) -> None:
    for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "kahan")):
        whole = parameters(place, [(n + 1,) for n in (1000, 4096)], dtype)
        views = [x.detach()[1:].requires_grad_() for x in whole]  # not aligned
        params = [*parameters(place, SHAPES, dtype), *views]
        optimizer = gradkit.AdamW(params, transforms=LINKS, rounding=rounding, backend=place.backend)
        assert ran_on(optimizer) == {place.backend}
        for t in range(2):
            give(params, t)
            optimizer.step()
        place.settle()
        assert all(p.isfinite().all() for p in params)


if __name__ == "__main__":
    steps(find("--tiny" in sys.argv))
    print("stepped")
