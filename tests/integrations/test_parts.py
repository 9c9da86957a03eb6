"""What the callbacks of all frameworks stand on: Sophia's estimate, and the figures of a step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradkit
from gradkit import transforms
from gradkit.integrations import curvature
from gradkit.integrations.figures import by_name, clips, overall


def likeliest(logits: Tensor, ignore_index: int = -100, *, targets: Tensor) -> Tensor:
    """In place of `gnb_labels`: nothing is drawn."""
    return logits.argmax(-1).masked_fill(targets == ignore_index, ignore_index)


def linear() -> tuple[nn.Linear, gradkit.Sophia, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    labels = torch.ones(6, dtype=torch.int64)
    labels[4:] = -100
    return model, gradkit.Sophia(model.parameters(), lr=1e-2), torch.randn(6, 4), labels


def estimated(seed: int = 0, steps: int = 0, around: int = 0) -> Tensor:
    """h of the weight behind one estimate of drawn labels."""
    model, optimizer, x, labels = linear()
    optimizer.param_groups[0]["seed"] = seed
    optimizer.param_groups[0]["clock"].fill_(steps)
    torch.manual_seed(around)
    curvature.estimate(optimizer, lambda: (model(x), labels), torch.device("cpu"))
    torch.testing.assert_close(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(around)))
    return optimizer.state[model.weight]["hessian"]


def test_what_is_drawn_follows_from_seed_and_step_and_torchs_numbers_go_on():
    first = estimated()
    assert torch.equal(first, estimated(around=1))
    assert not torch.equal(first, estimated(steps=10)) and not torch.equal(first, estimated(seed=1))


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_an_estimate_is_that_of_the_loop_of_ones_own(factor, monkeypatch):
    monkeypatch.setattr(curvature, "gnb_labels", likeliest)
    (model, optimizer, x, labels), (twin, other, *_) = linear(), linear()
    model.weight.grad = torch.ones(3, 4)
    curvature.estimate(optimizer, lambda: (model(x), labels), torch.device("cpu"), factor)
    assert torch.equal(model.weight.grad, torch.ones(3, 4)) and model.bias.grad is None
    F.cross_entropy(twin(x), likeliest(twin(x), targets=labels)).backward()
    other.update_hessian(batch_size=4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert other.state[q]["hessian"].all()
        torch.testing.assert_close(optimizer.state[p]["hessian"], other.state[q]["hessian"], rtol=1e-5, atol=0)


def test_a_batch_without_labels_gives_no_estimate():
    model, optimizer, x, labels = linear()
    curvature.estimate(optimizer, lambda: (model(x), labels.fill_(-100)), torch.device("cpu"))
    assert not optimizer.state


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 3), (torch.ones(2, 3),), {"logits": 0, "labels": 0}])
def test_what_is_no_pair_of_logits_and_labels_is_named(wrong):
    model, optimizer, *_ = linear()
    with pytest.raises(TypeError, match=r"SophiaHessian: logits= returned .*: return the pair \(logits, labels\)"):
        curvature.estimate(optimizer, lambda: wrong, torch.device("cpu"))
    assert not optimizer.state and model.weight.grad is None


def test_parameters_go_by_their_names_in_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    unnamed, named = gradkit.Lion([*model.parameters()][::-1]), gradkit.Lion(model.named_parameters())
    for optimizer in (unnamed, named):
        optimizer.stats(every=1)
        model(torch.randn(3, 2)).square().sum().backward()
        optimizer.step()
        seen = by_name(optimizer, model)
        assert set(seen) == {"0.weight", "0.bias", "1.weight"}
        for mine in seen.values():
            assert mine["update_to_weight"] == mine["update_norm"] / mine["weight_norm"]
    assert seen["0.bias"]["grad_norm"] == pytest.approx(model[0].bias.grad.norm().item())


def test_figures_of_all_parameters_are_weighed_by_their_entries():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))

    norms = {"update_norm": 3.0, "weight_norm": 6.0}
    seen = {
        "a": {**norms, "clip.clipped": 0.5, "x.spikes": 2.0, "resets": 1.0, "update_to_weight": 0.5},
        "b": {"update_norm": 4.0, "weight_norm": 8.0, "clip.clipped": 1.0, "x.spikes": 3.0, "resets": 1.0},
    }
    assert overall(seen, Model()) == {
        "update_norm": 5.0,
        "weight_norm": 10.0,
        "update_to_weight": 0.5,
        "clip.clipped": 0.875,
        "x.spikes": 5.0,
        "resets": 1.0,
    }


def test_what_clips_is_what_counts_what_it_cuts():
    both = transforms.zclip(), transforms.spike_clip(name="spikes"), transforms.adaptive_clip(), transforms.adaclip()
    neither = transforms.grokfast_ema(), transforms.adagn(), transforms.cautious()
    assert clips([*both, *neither]) == ["zclip", "spikes", "adaptive_clip", "adaclip"]
