"""Gradients, parameters, slots and groups that can't be stepped: refused in one sentence, before anything changed."""

import pytest
import torch

import gradkit


def test_a_gradient_of_integers_is_refused_before_anything_changed():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad_dtype = None
    p.grad = torch.ones(2, dtype=torch.int32)
    optimizer = gradkit.AdamW([p])
    with pytest.raises(TypeError, match="AdamW: the gradient of parameter 0 is torch.int32: use one of"):
        optimizer.step()
    assert not optimizer.state and p.tolist() == [1.0, 1.0]


def test_an_expanded_parameter_is_refused_before_anything_changed():
    p = torch.nn.Parameter(torch.ones(1)).detach().expand(4).requires_grad_()
    p.grad = torch.ones(4)
    optimizer = gradkit.Lion([p])
    with pytest.raises(RuntimeError, match="Lion: parameter 0 is expanded.*contiguous"):
        optimizer.step()
    assert not optimizer.state


def test_torchs_flags_are_refused_in_a_group_too():
    with pytest.raises(ValueError, match="AdamW: fused=True has no meaning here.*backend="):
        gradkit.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "fused": True}])


def test_a_slot_holds_floats():
    with pytest.raises(TypeError, match="Slot.'n', dtype=torch.int32.: use a floating torch.dtype"):
        gradkit.Slot("n", dtype=torch.int32)


@gradkit.rule(slots=("compensation",))
def keeps_the_optimizers(u, compensation):
    return u, compensation


def test_a_slot_has_not_the_name_of_the_optimizers_own():
    with pytest.raises(ValueError, match="keeps_the_optimizers owns a slot named 'compensation'.*rename"):
        gradkit.Optimizer([torch.nn.Parameter(torch.ones(2))], gradkit.chain(keeps_the_optimizers))


def test_the_first_group_may_be_removed():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gradkit.AdamW([{"params": [p]}, {"params": [q]}])
    del optimizer.param_groups[0]
    q.grad = torch.ones(2)
    optimizer.step()
    assert q[0] < 1.0


@pytest.mark.parametrize(
    ("transform", "key", "value"),
    [
        (gradkit.transforms.clip_by_norm(1.0), "clip_by_norm.max_norm", -5.0),
        (gradkit.transforms.clip_by_value(1.0, name="cut"), "cut.limit", float("nan")),
        (gradkit.transforms.grokfast_ema(), "grokfast_ema.alpha", 3.0),
        (gradkit.transforms.grokfast_ma(), "grokfast_ma.window", 0),
        (gradkit.transforms.grokfast_ma(), "grokfast_ma.mode", "bogus"),
    ],
)
def test_a_transforms_argument_in_a_group_has_its_range_too(transform, key, value):
    with pytest.raises(ValueError, match=f"{key.split('.')[1]}={value!r}: "):
        gradkit.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], key: value}], transforms=[transform])
