"""Estimates of the Hessian's diagonal, for Sophia. Liu et al. 2023, https://arxiv.org/abs/2305.14342"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .graph import check_loss, nodes, tensors
from .options import STEPS, brief, builtin, check_choice, check_number
from .plan import compute_dtype

__all__ = ["gnb_labels", "hutchinson"]

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DISTRIBUTIONS = ("rademacher", "gaussian")
REMEDIES = {  # of errors of torch, by a part of their text
    "_scaled_dot_product": (
        "torch's fused attention has no second derivative; compute the loss under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    ),
    "through the graph a second time": "loss.backward() has freed the graph of the loss; call hutchinson before it",
}
NOISE = 1 << 24  # numbers drawn at once: what sampling labels needs beside the logits


@torch.no_grad()
def gnb_labels(logits: Tensor, ignore_index: int = -100, *, targets: Tensor | None = None) -> Tensor:
    """Labels drawn from softmax(logits), for the backward whose squared gradient estimates Gauss-Newton's diagonal.

    B * grad(mean cross-entropy on these labels)^2, B the number of labels that count, has that diagonal as its mean.

    logits: [..., classes].
    targets: the labels of the data, [...]: where they are `ignore_index`, so is what is drawn.
    """
    if isinstance(ignore_index, bool) or not isinstance(builtin(ignore_index), int):
        raise TypeError(
            f"gnb_labels: ignore_index={brief(ignore_index)}: give a whole number; the labels of the data are targets="
        )
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.dim():
        raise TypeError(f"gnb_labels: logits={brief(logits)}: give a floating tensor [..., classes]")
    shape = logits.shape[:-1]
    if targets is not None and (not isinstance(targets, Tensor) or targets.dtype not in WHOLE):
        raise TypeError(f"gnb_labels: targets={brief(targets)}: give a tensor of whole numbers [...]")
    if targets is not None and targets.shape != shape:
        raise ValueError(
            f"gnb_labels: targets of shape {tuple(targets.shape)} for logits of {tuple(logits.shape)}: "
            f"give logits [..., classes] and targets [...]"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    labels = torch.empty(len(flat), dtype=torch.int64, device=logits.device)
    rows = max(1, NOISE // max(1, flat.shape[1]))
    for part, into in zip(flat.split(rows), labels.split(rows), strict=True):
        noise = torch.empty_like(part, dtype=compute_dtype(logits.dtype)).exponential_().log_()
        into.copy_(noise.neg_().add_(part).argmax(-1))  # the largest of log p + Gumbel noise is drawn with p
    labels = labels.view(shape)
    return labels if targets is None else labels.masked_fill(targets == ignore_index, ignore_index)


def hutchinson(
    loss: Tensor, params: Iterable[Tensor | tuple[str, Tensor]], samples: int = 1, distribution: str = "rademacher"
) -> list[Tensor]:
    """The mean over samples of u * (H u), whose mean is the diagonal of the loss's Hessian: one tensor a parameter.

    Zeros for a parameter that the loss doesn't depend on, or that is frozen; entries may be negative. `p.grad` is left
    alone; the loss's graph is kept, for a `loss.backward()` behind this.

    loss: before its `backward()`; if it is scaled, so are the estimates.
    params: tensors, or (name, tensor) pairs.
    distribution: of u: "rademacher" (-1 or 1) or "gaussian".
    """
    check_number("hutchinson", "samples", samples, STEPS)
    check_choice("hutchinson", "distribution", distribution, DISTRIBUTIONS)
    params = tensors("hutchinson", params)
    check_loss("hutchinson", "loss", loss)
    found = [torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in params]
    trained = [(p, total) for p, total in zip(params, found, strict=True) if p.requires_grad]
    live = [p for p, _ in trained]
    if not live:
        return found
    if not loss.requires_grad:
        raise ValueError("hutchinson: the loss has no graph; compute it outside torch.no_grad(), and don't detach it")
    if compiled(loss):
        raise RuntimeError(
            "hutchinson: a part of the loss is from torch.compile, which has no second derivative; compute it without: "
            "with the model that torch.compile() was given"
        )
    with torch.enable_grad(), remedies():
        firsts = torch.autograd.grad(loss, live, create_graph=True, allow_unused=True)
    # without a graph a gradient is constant
    curved = [(p, g) for p, g in zip(live, firsts, strict=True) if g is not None and g.requires_grad]
    for _ in range(int(samples) if curved else 0):
        directions = {p: drawn(p, distribution) for p, _ in curved}
        with remedies():
            seconds = torch.autograd.grad(
                [g for _, g in curved], live, list(directions.values()), retain_graph=True, allow_unused=True
            )
        for (p, total), second in zip(trained, seconds, strict=True):
            if second is not None and p in directions:
                total.addcmul_(directions[p].to(total.dtype), second.to(total.dtype), value=1 / samples)
    return found


def compiled(loss: Tensor) -> bool:
    """Whether a part of its graph is torch.compile's, of which a second derivative is an error, or zeros in silence."""
    return any(type(node).__name__ == "CompiledFunctionBackward" for node in nodes(loss))


@contextmanager
def remedies() -> Iterator[None]:
    """Say what to do where torch's own message doesn't."""
    try:
        yield
    except RuntimeError as error:
        for part, remedy in REMEDIES.items():
            if part in str(error):
                raise RuntimeError(f"hutchinson: {remedy}") from error
        raise


def drawn(p: Tensor, distribution: str) -> Tensor:
    """Random numbers of mean 0 and mean square 1."""
    if distribution == "gaussian":
        return torch.randn_like(p)
    return torch.randint_like(p, 2).mul_(2).sub_(1)
