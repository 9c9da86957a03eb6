"""Terms of a loss that are there for its gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .options import brief, check_choice, check_flag

__all__ = ["vanishing_gradient_penalty"]

SLOPES: dict[str, Callable[[Tensor], Tensor]] = {  # derivatives of the nonlinearities, from their values
    "tanh": lambda h: 1 - h * h,
    "sigmoid": lambda h: h * (1 - h),
    "relu": lambda h: (h > 0).to(h.dtype),
    "linear": torch.ones_like,
}
FROM_A_LOOP = (
    "from a loop over torch.nn.RNNCell (the output of torch.nn.RNN doesn't get the gradients that come back through "
    "time)"
)
FLOOR = 1e-10  # of a gradient's norm: the authors' 1e-20 of its square


def vanishing_gradient_penalty(
    hidden: Sequence[Tensor], weight: Tensor, *, nonlinearity: str = "tanh", squared: bool = False
) -> Tensor:
    """How much the gradient's norm changes from each hidden state of an RNN to the one before: a loss of its own.

        d_t = dE/dh_t        x_t = (d_t sigma'(h_t)) W        Omega = mean over t and batch of (|x_t| / |d_t| - 1)^2

    hidden: the states h_1 ... h_T of the loop, each [batch, size], whose gradients `h.retain_grad()` has kept; so
        this is called after `loss.backward()`. They and their gradients are constants here.
    weight: W, the recurrent weight [size, size], as `torch.nn.RNNCell.weight_hh`; the only one that gets a gradient.
    nonlinearity: of the states: "tanh", "sigmoid", "relu" or "linear".
    squared: the ratio's square in place of the ratio: the authors' code, where False is the paper.
    Where |d_t| < 1e-10 there is nothing to keep, and the state doesn't count.
    Pascanu et al. 2013, https://arxiv.org/abs/1211.5063
    """
    who = "vanishing_gradient_penalty"
    check_choice(who, "nonlinearity", nonlinearity, SLOPES)
    check_flag(who, "squared", squared)
    check_states(who, hidden, weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):  # gradients of 1e-8 and less are 0 in float16
        h = torch.stack([x.detach() for x in hidden]).to(dtype)
        delta = torch.stack([x.grad.detach() for x in hidden if x.grad is not None]).to(dtype)
        x = (delta * SLOPES[nonlinearity](h)) @ weight.to(dtype)
    norm = torch.linalg.vector_norm(delta, dim=-1)
    gone = norm < FLOOR
    ratio = torch.linalg.vector_norm(x, dim=-1) / torch.where(gone, 1.0, norm)
    change = torch.where(gone, 0.0, (ratio * ratio if squared else ratio) - 1.0)
    return (change * change).sum() / (~gone).sum().clamp(min=1)


def check_states(who: str, hidden: Sequence[Tensor], weight: Tensor) -> None:
    """Raise if these are not the states of one recurrent layer and their gradients."""
    if not isinstance(hidden, list | tuple):
        raise TypeError(
            f"{who}: hidden is a {type(hidden).__name__}; give a list with the state of each time step, {FROM_A_LOOP}"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"{who}: weight is {brief(weight)}; give the recurrent weight, as cell.weight_hh")
    size = weight.shape[0] if weight.dim() else 0
    if weight.shape != (size, size):
        raise ValueError(
            f"{who}: weight is {tuple(weight.shape)}; give the recurrent weight [size, size] of a plain RNN, e.g. "
            f"cell.weight_hh of torch.nn.RNNCell"
        )
    if not hidden:
        raise ValueError(f"{who}: hidden is empty; give the states of all time steps")
    for t, h in enumerate(hidden):
        if not isinstance(h, Tensor):
            raise TypeError(f"{who}: hidden[{t}] is {brief(h)}; give tensors [batch, size]")
        if h.shape != hidden[0].shape or h.shape[-1:] != (size,):
            raise ValueError(
                f"{who}: hidden[{t}] is {tuple(h.shape)}, hidden[0] {tuple(hidden[0].shape)}, weight "
                f"{tuple(weight.shape)}; give states [batch, size] of one batch"
            )
        if t and h._base is not None and h._base is hidden[0]._base:
            raise ValueError(f"{who}: hidden[0] and hidden[{t}] are parts of one tensor; give states {FROM_A_LOOP}")
        if not (h.is_leaf or h.retains_grad) or h.grad is None:
            raise ValueError(
                f"{who}: hidden[{t}] has no gradient; call h.retain_grad() on each state in the forward, "
                f"and this function after loss.backward()"
            )
