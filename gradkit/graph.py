"""What stands behind a loss: its graph, and the parameters that gradients are wanted of."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .options import brief


def tensors(who: str, params: Iterable[Tensor | tuple[str, Tensor]]) -> list[Tensor]:
    """The parameters, of whichever form optimizers take."""
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"{who}: params={brief(params)}: give a list of tensors, or model.parameters()")
    found = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in params]
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"{who}: params[{i}] is {brief(p)}; give tensors or (name, tensor) pairs; an optimizer's are "
                f"[p for group in optimizer.param_groups for p in group['params']]"
            )
    if not found:
        raise ValueError(f"{who}: params is empty; an iterator such as model.parameters() can be read only once")
    return found


def check_loss(who: str, name: str, loss: Tensor) -> None:
    """Raise if this is nothing that could go backward."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: {name}={brief(loss)}: give the tensor, not its item()")
    if loss.numel() != 1:
        raise ValueError(f"{who}: {name} has the shape {tuple(loss.shape)}; give one number, its mean() or sum()")


def nodes(loss: Tensor) -> set[Any]:
    """Every node of a loss's graph; those of parameters have a `variable`."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen
