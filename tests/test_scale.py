"""SCALE's groups: roles, fan-in, the vectors' lr, the state of a model by role, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

import gradkit
from tests.cases import BACKENDS
from tests.contract.rows import assert_moved, assert_same, everything, values
from tests.llama import small, train
from tests.tolerance import tolerance

each_backend = pytest.mark.parametrize("backend", BACKENDS)
CLOSE = tolerance("reference", torch.float32)


def test_only_the_head_and_vectors_have_state():
    model = small()
    optimizer = gradkit.SCALE(gradkit.param_groups(model))
    train(optimizer, model, range(2))
    for name, p in model.named_parameters():
        wanted = {"lm_head": {"exp_avg"}, "norm": {"step", "exp_avg", "exp_avg_sq"}}
        assert {*optimizer.state[p]} == next((x for part, x in wanted.items() if part in name), set()), name


@each_backend
def test_a_run_with_every_role_goes_on_from_a_file(backend):
    runs = []
    for stops in (False, True):
        model = small()
        optimizer = gradkit.SCALE(gradkit.param_groups(model), weight_decay=0.1, backend=backend)
        start = values(model.parameters())
        train(optimizer, model, range(2))
        if stops:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            model = copy.deepcopy(model)
            optimizer = gradkit.SCALE(gradkit.param_groups(model), lr=9.0, norm="l2", backend=backend)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        train(optimizer, model, range(2, 4))
        runs.append(everything(optimizer, list(model.parameters())))
    assert_same(*runs)
    assert_moved(start, runs[0]["parameters"])


def test_vector_lr_is_the_lr_of_vectors_so_one_schedule_scales_all():
    model = small()
    optimizer = gradkit.SCALE(gradkit.param_groups(model), lr=0.1, vector_lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for factor in (1.0, 0.5):
        rates = {g["role"]: g["lr"] for g in optimizer.param_groups}
        wanted = {"matrix": 0.1, "embedding": 0.1, "last": 0.1, "vector": 0.02}
        assert rates == {role: pytest.approx(lr * factor) for role, lr in wanted.items()}
        train(optimizer, model, range(1))
        schedule.step()
    p, v = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    groups = [{"params": [p], "role": "matrix"}, {"params": [v], "role": "vector", "lr": 0.5}]
    assert gradkit.SCALE(groups, vector_lr=0.01).param_groups[1]["lr"] == 0.5


def test_l2_decay_is_in_what_is_normalised():
    """Behind the normalisation it would change the size of the step."""
    p = torch.full((2, 4), 3.0, requires_grad=True)
    p.grad = torch.zeros_like(p)
    gradkit.SCALE([{"params": [p], "role": "matrix"}], lr=0.5, weight_decay=0.1, decay="l2").step()
    torch.testing.assert_close(p.detach(), torch.full((2, 4), 2.5))


def test_the_tokens_of_a_batch_share_the_step_of_the_vocabulary():
    """Rows without a gradient stay; those with one move by sqrt(vocabulary / tokens present) of lr."""
    table = torch.zeros(100, 4, requires_grad=True)
    table.grad = torch.zeros_like(table)
    table.grad[:4] = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    gradkit.SCALE([{"params": [table], "role": "embedding"}], lr=0.01).step()
    assert not table[4:].any()
    torch.testing.assert_close(table[:4].abs().detach(), torch.full((4, 4), 0.05))


def test_a_tied_head_has_momentum_where_the_user_says_so():
    for overrides, wanted in ((None, set()), ({"lm_head.weight": "last"}, {"exp_avg"})):
        model = small()
        model.lm_head.weight = model.embed_tokens.weight
        optimizer = gradkit.SCALE(gradkit.param_groups(model, overrides=overrides))
        train(optimizer, model, range(1))
        assert {*optimizer.state[model.lm_head.weight]} == wanted


@each_backend
@pytest.mark.parametrize("role", ["matrix", "last"])
def test_a_weight_that_lies_inputs_first_takes_the_step_of_its_transpose(role, backend):
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    linear, conv1d = start.clone().requires_grad_(), start.t().contiguous().requires_grad_()
    for p, fan_in in ((linear, 1), (conv1d, 0)):
        group = {"params": [p], "role": role, "fan_in": fan_in}
        optimizer = gradkit.SCALE([group], lr=0.1, weight_decay=0.1, backend=backend)
        for t in range(3):
            g = torch.randn(5, 3, generator=torch.Generator().manual_seed(t))
            p.grad = g if fan_in else g.t().contiguous()
            optimizer.step()
    torch.testing.assert_close(conv1d.t(), linear, rtol=CLOSE, atol=CLOSE)
    assert not torch.allclose(linear, start, atol=0.05)


def test_a_gpt2_of_hugging_face_trains_as_one_of_linear_layers():
    """Its layers hold their weights inputs first; only the roles know."""
    hf = pytest.importorskip("transformers", reason="Hugging Face's models come with the extra [transformers]")
    words = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False, **words)
    model = hf.GPT2LMHeadModel(config).eval()
    twin = copy.deepcopy(model)
    for module in [m for m in twin.modules() if type(m).__name__ == "Block" or hasattr(m, "c_proj")]:
        for name, layer in [(n, x) for n, x in module.named_children() if type(x).__name__ == "Conv1D"]:
            linear = nn.Linear(*layer.weight.shape)
            linear.weight.data, linear.bias.data = layer.weight.data.t().contiguous(), layer.bias.data
            setattr(module, name, linear)
    start = values(model.parameters())
    for net in (model, twin):
        optimizer = gradkit.SCALE(gradkit.param_groups(net), lr=0.01, weight_decay=0.1)
        for t in range(3):
            tokens = torch.randint(20, (3, 8), generator=torch.Generator().manual_seed(t))
            net(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    turned = 0
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        inputs_first = "c_" in name and p.dim() == 2
        turned += inputs_first
        torch.testing.assert_close(p.t() if inputs_first else p, q, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
    assert turned == 8
    assert_moved([x for x in start if x.dim() > 1], [p.detach() for p in model.parameters() if p.dim() > 1])


def test_plain_parameters_go_by_shape_with_one_warning():
    model = small()
    with pytest.warns(UserWarning, match="the groups have no role, so shapes decide") as seen:
        optimizer = gradkit.SCALE(model.parameters())
    assert len(seen) == 1 and seen[0].filename == __file__
    assert [(g["role"], g["weight_decay"]) for g in optimizer.param_groups] == [("matrix", 0.0), ("vector", 0.0)]
    train(optimizer, model, range(1))
    assert not optimizer.state[model.lm_head.weight] and optimizer.state[model.norm.weight]


def matrix(*shape: int, **group: object) -> dict:
    return {"params": [torch.ones(shape, requires_grad=True)], "role": "matrix", **group}


REFUSED = [  # groups, and what is said of them
    ([matrix(2, 2, role="head")], "role='head': use one of 'matrix', 'embedding', 'last', 'vector'"),
    ([matrix(2, 2, role=None)], r"a group has no role: use gradkit.param_groups\(model\), or one of 'matrix'"),
    ([matrix(3, role="vector")], "no matrix among the parameters, and vectors get AdamW: use gradkit.AdamW"),
    (
        [matrix(3)],
        r"a parameter of shape \(3,\) can't be 'matrix', which needs two axes; give it the role 'vector', or",
    ),
    ([matrix(role="last")], r"a parameter of shape \(\) can't be 'last', which needs two axes"),
    ([matrix(2, 3, fan_in=2)], r"fan_in=2 is no axis of a parameter of shape \(2, 3\): use one of 0, 1"),
    ([matrix(2, 3, fan_in=-1, role="embedding")], r"fan_in=-1 is no axis of a parameter of shape \(2, 3\)"),
    ([matrix(2, 3, fan_in="in")], r"fan_in='in' is no axis of a parameter of shape \(2, 3\)"),
]


@pytest.mark.parametrize(("groups", "message"), REFUSED, ids=[x[1][:40] for x in REFUSED])
def test_groups_that_make_no_sense_are_refused(groups, message):
    with pytest.raises(ValueError, match=f"SCALE: {message}"):
        gradkit.SCALE(copy.deepcopy(groups))
    if groups[0]["role"] != "vector":
        optimizer = gradkit.SCALE([matrix(2, 2)])
        with pytest.raises(ValueError, match=f"SCALE: {message}"):
            optimizer.add_param_group(groups[0])
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        (
            "matrix",
            (12,),
            r"a parameter of shape \(12,\) can't be 'matrix', which needs two axes; .* or make the groups",
        ),
        ("last", (12,), r"a parameter of shape \(12,\) can't be 'last', which needs two axes"),
        ("last", (4, 3), r"the slot 'exp_avg' of a parameter of shape \(4, 3\) is \(3, 4\), it needs \(4, 3\)"),
    ],
)
def test_a_parameter_that_has_another_shape_by_now_is_refused(role, shape, message):
    """As the flat parameters of an older sharding wrapper."""
    p = torch.ones(3, 4, requires_grad=True)
    optimizer = gradkit.SCALE([{"params": [p], "role": role}])
    p.grad = torch.ones(3, 4)
    optimizer.step()
    p.data, p.grad = torch.ones(shape), None
    p.grad = torch.ones(shape)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"SCALE: {message}"):
        optimizer.step()
    assert_same(optimizer.state_dict(), before)
    assert torch.equal(p.detach(), torch.ones(shape))


def test_a_role_edited_to_one_that_there_isnt_is_refused_at_the_step():
    optimizer = gradkit.SCALE([matrix(2, 2)])
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["role"] = "head"
    with pytest.raises(ValueError, match="SCALE: role='head': use one of"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2))
