"""Parameters that are tensors around others, as torchao's: they have no memory of their own, which eager needs not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gradkit
from gradkit.multiloss import CAGrad, PCGrad
from gradkit.transforms import clip_by_global_norm, grokfast_ema


class Around(Tensor):
    """Holds another tensor, on which every operation acts."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Around":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(inner, (args, kwargs or {}))
        out = func(*given[0], **given[1])
        changed = func._schema.name.endswith("_")
        return args[0] if changed else tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, out)


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, Around) else x


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.tensor([1.0, -2.0, 3.0])
    return nn.Parameter(Around(start.clone())), nn.Parameter(start.clone())


@pytest.mark.parametrize("cls", [gradkit.AdamW, gradkit.Lion, gradkit.StableSPAM, gradkit.DiffGrad])
def test_a_step_is_that_of_the_tensor_inside(cls):
    params = pair()
    for p in params:
        optimizer = cls([p], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            p.square().sum().backward()
            optimizer.step()
        detours = "a tensor around others has no memory of its own" in optimizer.explain()
        assert detours == (p is params[0])
    torch.testing.assert_close(inner(params[0].data), params[1].data)
    assert not torch.equal(params[1], pair()[1])


def test_transforms_in_front_of_another_optimizer():
    params = pair()
    for p in params:
        optimizer = torch.optim.SGD([p], lr=0.1)
        gradkit.attach(optimizer, clip_by_global_norm(1.0), grokfast_ema())
        for _ in range(3):
            optimizer.zero_grad()
            p.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(inner(params[0].data), params[1].data)


@pytest.mark.parametrize("method", [PCGrad, CAGrad])
def test_several_losses(method):
    params = pair()
    for p in params:
        gradkit.backward([p.square().sum(), (p - 5).square().sum(), -p.sum()], [p], method())
    torch.testing.assert_close(inner(params[0].grad), params[1].grad)
