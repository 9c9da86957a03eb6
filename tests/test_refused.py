"""What can't be stepped is refused in one sentence, before anything changed; what looks odd and can is right."""

import pickle

import pytest
import torch

import gradkit
from tests.cases import BACKENDS

each_backend = pytest.mark.parametrize("backend", BACKENDS)


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


def test_an_argument_of_no_link_in_a_group_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'clip_by_norm.max_nrm' belongs to no link.*'clip_by_norm.max_norm'"):
        gradkit.AdamW([{"params": [p], "clip_by_norm.max_nrm": 2.0}], transforms=[gradkit.transforms.clip_by_norm(1.0)])


def test_a_refused_group_leaves_the_users_dict_alone():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gradkit.AdamW([p])
    for wrong in ({"params": [q], "lr": -1.0}, {"params": [p]}):
        given = dict(wrong)
        with pytest.raises(ValueError):
            optimizer.add_param_group(wrong)
        assert wrong == given and len(optimizer.param_groups) == 1
    right = {"params": [q]}
    optimizer.add_param_group(right)
    assert optimizer.param_groups[1] is right and right["lr"] == 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradkit.rule(slots="exp_avg"), r"slots='exp_avg' is one string; give a tuple, .*\('exp_avg',\)"),
        (lambda: gradkit.rule(uses="exp_avg"), "uses='exp_avg' is one string"),
        (lambda: gradkit.rule(stage="GRAD"), "stage='GRAD'; use one of Stage.GRAD, Stage.PRECONDITION"),
        (lambda: gradkit.measure(scope="all", reduce={"t": "sum"}, gives="c", finish=doubled), "gives='c' is one str"),
        (
            lambda: gradkit.measure(scope="all", reduce={"t": "sum"}, gives=("c",), finish=doubled, stage=0),
            "stage=0; use one of",
        ),
    ],
)
def test_names_are_tuples_and_stages_are_stages(make, message):
    with pytest.raises(TypeError, match=f"passes: {message}"):
        make()(passes)


def passes(u):
    return u * 1.0


def doubled(t):
    return t * 2.0


def test_a_ring_of_another_length_is_refused_before_anything_changed():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.Grokfast([p], filter="ma", window=3)
    optimizer.step()
    file = optimizer.state_dict()
    for slot, wrong in (("grad_ring", torch.zeros(5, 2)), ("exp_avg", torch.zeros(()))):
        bad = {**file, "state": {0: {**file["state"][0], slot: wrong}}}
        before = optimizer.state[p]["exp_avg"]
        with pytest.raises(ValueError, match=f"Grokfast.load_state_dict: '{slot}' of parameter 0 has shape"):
            optimizer.load_state_dict(bad)
        assert optimizer.state[p]["exp_avg"] is before


def test_a_file_of_another_chain_leaves_no_slots_that_nothing_holds():
    first = gradkit.Optimizer([torch.nn.Parameter(torch.ones(2))], gradkit.transforms.grokfast_ema())
    first.param_groups[0]["params"][0].grad = torch.ones(2)
    first.step()
    q = torch.nn.Parameter(torch.ones(2))
    second = gradkit.Optimizer([q], gradkit.transforms.clip_by_norm(1.0))
    second.load_state_dict(first.state_dict())
    assert not second.state[q].keys() & {"grad_ema"}


@each_backend
def test_cautious_hides_no_update_that_is_not_finite(backend):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([float("nan"), float("inf"), 1.0])
    chain = gradkit.transforms.cautious()
    gradkit.Optimizer([p], chain, lr=0.5, backend=backend).step()
    assert p.isnan().tolist() == [True, False, False] and p[1] == -float("inf") and p[2] < 1.0


def test_a_slow_momentum_close_to_one_warms_up():
    from gradkit.optim.ademamix import ademamix_scalars

    for beta in (1 - 1e-8, 1 - 1e-10, 1 - 2**-53):
        weights = [ademamix_scalars((0.9, 0.999, beta), 5.0, 1e-8, t, None, 100)["w3"] for t in range(1, 101)]
        assert all(0.0 <= b <= a for a, b in zip(weights, weights[1:], strict=False)) and weights[-1] == 1 - beta


@each_backend
def test_a_transposed_parameter_at_the_same_address_is_planned_anew(backend):
    """`p.data = p.data.t()` keeps the address, the shape if square, and the number of elements."""
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = gradkit.Optimizer([p], gradkit.transforms.clip_by_value(9.0), lr=1.0, backend=backend)
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    p.data = p.data.t()
    optimizer.step()
    assert p.tolist() == [[-2.0, -5.0], [-5.0, -8.0]]


@each_backend
def test_a_gradient_with_a_negative_bit_is_read_as_what_it_is(backend):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch._neg_view(torch.ones(3))
    gradkit.Optimizer([p], gradkit.transforms.clip_by_value(9.0), lr=1.0, backend=backend).step()
    assert p.tolist() == [1.0] * 3


@gradkit.rule(uses=("exp_avg",), stage=gradkit.Stage.UPDATE)
def adds_the_mean(u, exp_avg):
    return u + exp_avg, exp_avg


def test_a_named_borrower_finds_the_slot_of_another_chain():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.Lion([p], lr=1.0, transforms=[gradkit.chain(adds_the_mean).named("mine")])
    optimizer.step()
    assert optimizer.state[p].keys() == {"exp_avg"} and p.tolist() == pytest.approx([-1.01] * 2)


class Holder:
    @gradkit.rule
    def inner(u):
        return u * 2.0


def test_a_rule_in_a_class_pickles_and_one_that_is_hidden_does_not():
    assert pickle.loads(pickle.dumps(Holder.inner)) is Holder.inner
    hidden = gradkit.rule(passes)  # the module's name is the plain function's
    with pytest.raises(pickle.PicklingError, match="passes"):
        pickle.dumps(hidden)


def test_a_step_is_not_captured_in_a_graph(monkeypatch):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.AdamW([p])
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="AdamW: a CUDA graph would repeat this step's numbers"):
        optimizer.step()
    assert not optimizer.state and optimizer.param_groups[0]["clock"] == 0 and p.tolist() == [1.0, 1.0]


@each_backend
def test_a_parameter_that_became_a_part_of_its_memory_leaves_the_rest_alone(backend):
    memory, gradient = torch.zeros(8), torch.ones(8)
    p = torch.nn.Parameter(memory)
    optimizer = gradkit.Optimizer([p], gradkit.transforms.clip_by_value(9.0), lr=1.0, backend=backend)
    p.grad = gradient
    optimizer.step()
    p.grad, p.data = None, memory[:4]
    p.grad = gradient[:4]
    optimizer.step()
    assert memory.tolist() == [-2.0] * 4 + [-1.0] * 4


@each_backend
def test_a_gradient_is_asked_for_its_sign_in_each_step(backend):
    p, gradient = torch.nn.Parameter(torch.zeros(3)), torch.ones(3)
    optimizer = gradkit.Optimizer([p], gradkit.transforms.clip_by_value(9.0), lr=1.0, backend=backend)
    for g in (gradient, torch._neg_view(gradient)):  # one address
        p.grad = g
        optimizer.step()
    assert p.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("key", "value"), [("lr", -1.0), ("lr", float("nan")), ("eps", -1.0), ("betas", (0.9, 1.5)), ("weight_decay", -5.0)]
)
def test_a_value_that_was_edited_between_steps_has_its_range_too(key, value):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.AdamW([p])
    optimizer.step()
    before = p.tolist()
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"AdamW: {key}.*: give a number"):
        optimizer.step()
    assert p.tolist() == before and optimizer.param_groups[0]["clock"] == 1


def test_a_rule_alone_is_a_chain():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    gradkit.Optimizer([p], Holder.inner, lr=1.0, transforms=[Holder.inner]).step()
    assert p.tolist() == [-4.0] * 2
    with pytest.raises(ValueError, match="ranges=.'beat': ....: there is no such argument; it has beta"):
        gradkit.chain(Holder.inner, name="x", beta=1.0, ranges={"beat": gradkit.options.FRACTION})


def test_links_that_are_no_chain_are_named():
    class Forgets(gradkit.Optimizer):
        def links(self, group):
            return None

    with pytest.raises(TypeError, match=r"Forgets: links\(\) returned None; return chain"):
        Forgets([torch.nn.Parameter(torch.ones(2))])


def test_a_file_that_lacks_a_slot_or_has_an_argument_too_many_says_so(caplog):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.AdamW([p], transforms=[gradkit.transforms.clip_by_norm(1.0)])
    optimizer.step()
    file = optimizer.state_dict()
    del file["state"][0]["exp_avg"]
    gradkit.AdamW([torch.nn.Parameter(torch.ones(2))]).load_state_dict(file)
    lacks, idle = (record.getMessage() for record in caplog.records)
    assert lacks == "AdamW: the state dict lacks exp_avg: it starts fresh"
    assert idle == "AdamW: the state dict's clip_by_norm.max_norm belongs to no link here: give the same transforms="


def test_a_file_of_another_transform_says_what_it_lacks_and_what_is_left(caplog):
    """The numbers of measures, too."""
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.Lion([p], transforms=[gradkit.transforms.adaclip()])
    optimizer.step()
    other = gradkit.Lion([torch.nn.Parameter(torch.ones(2))], transforms=[gradkit.transforms.adagn()])
    other.load_state_dict(optimizer.state_dict())
    lacks, idle = (record.getMessage() for record in caplog.records)
    assert lacks == "Lion: the state dict lacks adagn_step, norm_avg, norm_sq_avg: it starts fresh"
    assert "the state dict's absmax_avg, adaclip.gamma, adaclip_step belongs to no link here" in idle


def test_what_users_keep_in_a_group_is_theirs():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = gradkit.AdamW([{"params": [p], "tag": torch.ones(3)}])
    optimizer.step()
    optimizer.param_groups[0]["tag"] = torch.zeros(3)
    optimizer.step()
    assert optimizer.param_groups[0]["clock"] == 2
