"""What acts on the gradient of a tensor in backward, before it reaches the parameters.

Pixelwise gradient clipping: Pan et al. 2023, https://arxiv.org/abs/2310.12474
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from ..options import LIMIT, brief, check_number


def pixelwise_clip(
    max_norm: float, channel_dim: int, ord: str | int = "inf", scaler: GradScaler | None = None
) -> "PixelwiseClip":
    """Clip the gradient of an image pixel by pixel: `image = clip(image)` in the forward, with what this returns.

        g <- g min(1, max_norm / |g|)        g: the gradient of one pixel, a vector over `channel_dim`

    ord: the norm: "inf", the largest magnitude, as in the authors' code, or 2, the paper's.
    scaler: the GradScaler of the loss, whose factor `max_norm` gets too.
    A pixel with a gradient that is not finite doesn't become finite.
    """
    who = "pixelwise_clip"
    check_number(who, "max_norm", max_norm, LIMIT)
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        shown = f"{who}: channel_dim={brief(channel_dim)}"
        raise TypeError(f"{shown}: give a whole number, e.g. 1 for [batch, channel, y, x]")
    if ord not in ("inf", 2):
        raise ValueError(f"{who}: ord={ord!r}: use 'inf' or 2")
    if not isinstance(scaler, GradScaler | None):
        raise TypeError(f"{who}: scaler={brief(scaler)}: give the torch.amp.GradScaler of the loss, or None")
    return PixelwiseClip(float(max_norm), channel_dim, ord, scaler if scaler and scaler.is_enabled() else None)


@dataclass(frozen=True)
class PixelwiseClip:
    """Made by `pixelwise_clip()`; called on a tensor in the forward."""

    max_norm: float
    channel_dim: int
    ord: str | int
    scaler: GradScaler | None

    def __call__(self, image: Tensor) -> Tensor:
        """The tensor, unchanged; what comes back to it in backward is clipped."""
        if not isinstance(image, Tensor):
            raise TypeError(f"pixelwise_clip: called on {brief(image)}: give the tensor whose gradient it clips")
        if not -image.dim() <= self.channel_dim < image.dim():
            raise ValueError(
                f"pixelwise_clip: channel_dim={self.channel_dim} is no dimension of a tensor of shape "
                f"{tuple(image.shape)}; give the one that holds the channels"
            )
        return Clipped.apply(image, self)

    def clipped(self, grad: Tensor) -> Tensor:
        """The gradient with each pixel's norm at most max_norm, times the scaler's factor."""
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        limit = torch.full((), self.max_norm, dtype=wide.dtype, device=wide.device)
        if self.scaler is not None:
            limit = self.scaler.scale(limit)  # get_scale() would wait for the device
        norm = wide.abs().amax(self.channel_dim, keepdim=True)
        if self.ord == 2:
            unit = torch.where(norm == 0.0, 1.0, norm)  # squares of the gradient itself could overflow
            norm = unit * torch.linalg.vector_norm(wide / unit, dim=self.channel_dim, keepdim=True)
        return (wide * (limit / norm).clamp(max=1.0)).to(grad.dtype)


class Clipped(torch.autograd.Function):
    """The identity. Unlike a tensor's hook it is traced by torch.compile, and leaves other uses of the tensor alone."""

    @staticmethod
    def forward(image: Tensor, clip: PixelwiseClip) -> Tensor:
        return image.view_as(image)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PixelwiseClip], output: Tensor) -> None:
        ctx.clip = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.clip.clipped(grad), None
