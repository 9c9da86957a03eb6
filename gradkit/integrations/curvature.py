"""Sophia's estimate in a loop that is somebody else's: a pass of its own, which leaves that loop's things alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import random
from ..estimators import gnb_labels
from ..multiloss import average
from ..optim.sophia import Sophia
from ..options import brief


def estimate(
    optimizer: Sophia,
    predict: Callable[[], tuple[Tensor, Tensor | None]],
    device: torch.device,
    factor: float = 1.0,
    ignore_index: int = -100,
) -> None:
    """Let one into the optimizer's state, from labels that are drawn, over all ranks. `p.grad` is as it was.

    predict: the forward -> logits, and the labels of the data or None.
    factor: by which the loss is scaled for its backward, against an underflow; it is divided out.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in params if p.requires_grad]
    with torch.enable_grad(), drawing(device, optimizer, rank):
        pair = predict()
        if not isinstance(pair, tuple | list) or len(pair) != 2:  # a tensor of two rows would come apart as well
            raise TypeError(
                f"SophiaHessian: logits= returned {brief(pair)}: return the pair (logits, labels); labels may be None"
            )
        logits, targets = pair
        labels = gnb_labels(logits, ignore_index, targets=targets)
        counted = (labels != ignore_index).sum()
        if ranks > 1:
            dist.all_reduce(counted)
        count = int(counted)
        if not count:
            return
        classes, drawn = logits.flatten(0, -2).float(), labels.flatten()
        summed = F.cross_entropy(classes, drawn, ignore_index=ignore_index, reduction="sum")
        loss = summed * (ranks / count)  # whose mean over the ranks is that over all labels
        found: list[list[Tensor | None]]  # DDP's hooks don't see this:
        found = [list(torch.autograd.grad(loss * factor, trained, allow_unused=True))]
    if ranks > 1:
        average(found)
    grads = dict(zip(trained, found[0], strict=True))
    held = [p.grad for p in params]
    try:
        for p in params:
            g = grads.get(p)
            p.grad = g if g is None or factor == 1.0 else g.div_(factor)
        optimizer.update_hessian(batch_size=count)
    finally:
        for p, g in zip(params, held, strict=True):
            p.grad = g


@contextmanager
def drawing(device: torch.device, optimizer: Sophia, rank: int) -> Iterator[None]:
    """Random numbers that follow from the optimizer's seed, the step and the rank; those outside go on as before."""
    seed, name = int(optimizer.param_groups[0]["seed"]), random.stream("sophia_hessian")
    high, low, *_ = (int(word[0]) for word in random.words(np.arange(1), int(optimizer.clock), rank, seed, name))
    there = None if device.type == "cpu" else torch.get_device_module(device)
    with torch.random.fork_rng([device] if there else [], device_type=device.type if there else "cuda"):
        torch.default_generator.manual_seed(high << 32 | low)
        if there:
            there.manual_seed(high << 32 | low)
        yield
