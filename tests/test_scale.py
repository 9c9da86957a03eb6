"""SCALE's groups: roles, fan-in, the vectors' lr, and what is refused."""

import pytest
import torch

import gradkit


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    embed, first, norm, head = (
        torch.nn.Embedding(9, 4),
        torch.nn.Linear(4, 6),
        torch.nn.LayerNorm(6),
        torch.nn.Linear(6, 9),
    )
    return torch.nn.ModuleDict({"embed": embed, "first": first, "norm": norm, "lm_head": head})


def stepped(optimizer: gradkit.Optimizer) -> gradkit.Optimizer:
    torch.manual_seed(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_groups_by_role_give_state_to_the_head_and_vectors_only():
    model = net()
    optimizer = gradkit.SCALE(gradkit.param_groups(model), lr=0.1, vector_lr=0.01)
    assert {g["role"]: g["lr"] for g in optimizer.param_groups} == {
        "matrix": 0.1,
        "embedding": 0.1,
        "last": 0.1,
        "vector": 0.01,
    }
    stepped(optimizer)
    held = {n: {*optimizer.state[p]} for n, p in model.named_parameters()}
    assert held["embed.weight"] == held["first.weight"] == set() and held["lm_head.weight"] == {"exp_avg"}
    assert held["norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_a_transposed_weight_takes_the_same_step():
    """As Hugging Face's Conv1D holds it: inputs first."""
    start = torch.randn(5, 3)
    linear, conv1d = start.clone().requires_grad_(), start.t().contiguous().requires_grad_()
    for p, fan_in in ((linear, 1), (conv1d, 0)):
        optimizer = gradkit.SCALE([{"params": [p], "role": "matrix", "fan_in": fan_in}], lr=0.1)
        for t in range(3):
            g = torch.randn(5, 3, generator=torch.Generator().manual_seed(t))
            p.grad = g if fan_in else g.t().contiguous()
            optimizer.step()
    torch.testing.assert_close(conv1d.t(), linear, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(linear, start)


def test_an_own_lr_of_a_vector_group_stays():
    p, v = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    groups = [{"params": [p], "role": "matrix"}, {"params": [v], "role": "vector", "lr": 0.5}]
    assert gradkit.SCALE(groups, vector_lr=0.01).param_groups[1]["lr"] == 0.5


def test_plain_parameters_go_by_shape_with_one_warning():
    with pytest.warns(UserWarning, match="the groups have no role, so shapes decide") as seen:
        optimizer = gradkit.SCALE(net().parameters())
    assert len(seen) == 1 and [g["role"] for g in optimizer.param_groups] == ["matrix", "vector"]
    stepped(optimizer)


def test_what_cannot_be_is_refused():
    p, v = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="role='head': use one of"):
        gradkit.SCALE([{"params": [p], "role": "head"}])
    with pytest.raises(ValueError, match="a group has no role: use gradkit.param_groups"):
        gradkit.SCALE([{"params": [p]}])
    with pytest.raises(ValueError, match="no matrix among the parameters"):
        gradkit.SCALE([{"params": [v], "role": "vector"}])
    with pytest.raises(ValueError, match="norm='max': use one of 'rms', 'l2'"):
        gradkit.SCALE([{"params": [p], "role": "matrix"}], norm="max")
    with pytest.raises(ValueError, match=r"momentum=1.0: give a number in \[0, 1\)"):
        gradkit.SCALE([{"params": [p], "role": "matrix"}], momentum=1.0)
