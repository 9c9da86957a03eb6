"""Bad input: every error names the argument, its value and what to do, and comes before anything has changed."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import chain, rule
from gradkit import transforms as tx
from tests.heads import LastLayers, Matrices

CLASSES = (
    gradkit.AdamW,
    gradkit.Lion,
    gradkit.DiffGrad,
    gradkit.AdEMAMix,
    gradkit.Grokfast,
    gradkit.SPAM,
    gradkit.StableSPAM,
    gradkit.Sophia,
    LastLayers,
    Matrices,
)
HAVE_BETAS = tuple(c for c in CLASSES if c is not LastLayers)
NAN, INF = math.nan, math.inf
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
NOT_NEGATIVE, FRACTION = "give a number >= 0", "give a number in [0, 1)"
BACKENDS = "use one of 'auto', 'eager', 'chunked', 'native', 'triton'"
DECAYS = "use one of 'decoupled', 'l2', 'independent', 'cautious', 'none'"
ROUNDINGS = "use one of 'nearest', 'stochastic', 'kahan'"
DTYPES = "use None or one of torch.float32, torch.float64, torch.bfloat16, torch.float16"
VALUES: list[tuple[dict[str, Any], type, str]] = [  # of every class: argument, error, what the message says
    ({"lr": -1e-3}, ValueError, f"lr=-0.001: {NOT_NEGATIVE}"),
    ({"lr": NAN}, ValueError, f"lr=nan: {NOT_NEGATIVE}"),
    ({"lr": INF}, ValueError, f"lr=inf: {NOT_NEGATIVE}"),
    ({"lr": "1e-3"}, TypeError, f"lr='1e-3': {NOT_NEGATIVE}"),
    ({"lr": None}, TypeError, f"lr=None: {NOT_NEGATIVE}"),
    ({"lr": True}, TypeError, f"lr=True: {NOT_NEGATIVE}"),
    ({"lr": torch.tensor(-1.0)}, ValueError, f"lr=tensor(-1.): {NOT_NEGATIVE}"),
    ({"lr": torch.ones(2)}, TypeError, "lr=tensor([1., 1.]): a tensor hyperparameter is 0-d"),
    ({"weight_decay": -0.1}, ValueError, f"weight_decay=-0.1: {NOT_NEGATIVE}"),
    ({"weight_decay": NAN}, ValueError, f"weight_decay=nan: {NOT_NEGATIVE}"),
    ({"backend": "cuda"}, ValueError, f"backend='cuda': {BACKENDS}"),
    ({"backend": "nativ"}, ValueError, f"backend='nativ': {BACKENDS}; did you mean 'native'?"),
    ({"decay": "l1"}, ValueError, f"decay='l1': {DECAYS}"),
    ({"decay": None}, ValueError, f"decay=None: {DECAYS}"),
    ({"rounding": "random"}, ValueError, f"rounding='random': {ROUNDINGS}"),
    ({"seed": -1}, ValueError, "seed=-1: give a whole number in [0, 2**32)"),
    ({"seed": 1.5}, ValueError, "seed=1.5: give a whole number in [0, 2**32)"),
    ({"seed": 2**40}, ValueError, f"seed={2**40}: give a whole number in [0, 2**32)"),
    ({"state_dtype": "float32"}, TypeError, f"state_dtype='float32': {DTYPES}"),
    ({"state_dtype": torch.int8}, TypeError, f"state_dtype=torch.int8: {DTYPES}"),
    ({"decoy": "l2"}, TypeError, "unexpected argument decoy='l2'; did you mean 'decay'?"),
    ({"wd": 0.1}, TypeError, "unexpected argument wd=0.1"),
    ({"transforms": [tx.clip_by_norm]}, TypeError, "is no chain or transform; call it"),
    ({"transforms": tx.clip_by_norm(1.0)}, TypeError, "transforms="),
]
BETAS: list[tuple[dict[str, Any], type, str]] = [  # of every class that has them
    ({"betas": (0.9,)}, ValueError, "betas=(0.9,): give "),
    ({"betas": (0.1, 0.2, 0.3, 0.4)}, ValueError, "betas=(0.1, 0.2, 0.3, 0.4): give "),
    ({"betas": 0.9}, ValueError, "betas=0.9: give "),
]
HAVE_EPS = (gradkit.AdamW, gradkit.DiffGrad, gradkit.AdEMAMix, gradkit.Grokfast, gradkit.SPAM, gradkit.Sophia, Matrices)
OF_TWO = (gradkit.AdamW, gradkit.Lion, gradkit.DiffGrad, gradkit.Grokfast, gradkit.SPAM, gradkit.Sophia, Matrices)
ONE_UP, SHARE = "give a whole number >= 1", "give a number in [0, 1]"
KINDS = "use one of 'blocks', 'columns', 'rows', 'randk'"
ORDERS = "use one of 'random', 'ascending', 'descending', 'mirror'"
OWN: list[tuple[Any, dict[str, Any], type, str]] = [  # of some classes
    *((c, {"eps": x}, ValueError, f"eps={x}: give a number > 0") for c in HAVE_EPS for x in (0.0, -1e-8, NAN)),
    *((c, {"betas": (0.9, x)}, ValueError, f"betas[1]={x}: {FRACTION}") for c in OF_TWO for x in (1.0, -0.1, NAN)),
    *((c, {"betas": (1.0, 0.9)}, ValueError, f"betas[0]=1.0: {FRACTION}") for c in OF_TWO),
    *((c, {"betas": (0.9, 0.9, 0.9)}, ValueError, "give 2 numbers, e.g. betas=(0.9") for c in OF_TWO),
    (gradkit.AdEMAMix, {"betas": (0.9, 0.999, 1.0)}, ValueError, f"betas[2]=1.0: {FRACTION}"),
    (gradkit.AdEMAMix, {"betas": (0.9, 0.99)}, ValueError, "give 3 numbers, e.g. betas=(0.9, 0.999, 0.9999)"),
    (gradkit.AdEMAMix, {"alpha": -1.0}, ValueError, f"alpha=-1.0: {NOT_NEGATIVE}"),
    (gradkit.AdEMAMix, {"alpha_warmup": 0}, ValueError, f"alpha_warmup=0: {ONE_UP} or None"),
    (gradkit.AdEMAMix, {"alpha_warmup": 2.5}, ValueError, f"alpha_warmup=2.5: {ONE_UP} or None"),
    (gradkit.AdEMAMix, {"beta3_warmup": -3}, ValueError, f"beta3_warmup=-3: {ONE_UP} or None"),
    (gradkit.Sophia, {"gamma": 0.0}, ValueError, "gamma=0.0: give a number > 0"),
    (gradkit.Sophia, {"clip": 0.0}, ValueError, "clip=0.0: give a number > 0"),
    (gradkit.Sophia, {"hessian_every": 0}, ValueError, f"hessian_every=0: {ONE_UP}"),
    (gradkit.Lion, {"eps": 1e-8}, TypeError, "unexpected argument eps=1e-08"),
    (gradkit.Grokfast, {"alpha": 1.0}, ValueError, f"alpha=1.0: {FRACTION}"),
    (gradkit.Grokfast, {"lamb": -1.0}, ValueError, f"lamb=-1.0: {NOT_NEGATIVE}"),
    (gradkit.Grokfast, {"window": 0}, ValueError, f"window=0: {ONE_UP}"),
    (gradkit.Grokfast, {"window": 2.5}, ValueError, f"window=2.5: {ONE_UP}"),
    (gradkit.Grokfast, {"filter": "fir"}, ValueError, "filter='fir': use one of 'ema', 'ma'"),
    (gradkit.Grokfast, {"mode": "median"}, ValueError, "mode='median': use one of 'mean', 'sum'"),
    *((LastLayers, {"momentum": x}, ValueError, f"momentum={x}: {FRACTION}") for x in (1.0, -0.1, NAN)),
    (LastLayers, {"norm": "max"}, ValueError, "norm='max': use one of 'rms', 'l2'"),
    (LastLayers, {"norm": 2}, ValueError, "norm=2: use one of 'rms', 'l2'"),
    (LastLayers, {"vector_lr": -1e-3}, ValueError, f"vector_lr=-0.001: {NOT_NEGATIVE} or None"),
    (LastLayers, {"vector_betas": (0.9, 1.0)}, ValueError, f"vector_betas[1]=1.0: {FRACTION}"),
    (LastLayers, {"vector_betas": 0.9}, ValueError, "vector_betas=0.9: give 2 numbers"),
    (LastLayers, {"vector_eps": 0.0}, ValueError, "vector_eps=0.0: give a number > 0"),
    (LastLayers, {"betas": (0.9, 0.99)}, TypeError, "unexpected argument betas=(0.9, 0.99)"),
    *((Matrices, {"density": x}, ValueError, f"density={x}: {SHARE}") for x in (-0.1, 1.5, NAN)),
    (Matrices, {"density": None}, TypeError, f"density=None: {SHARE}"),
    *((Matrices, {"update_gap": x}, ValueError, f"update_gap={x}: {ONE_UP}") for x in (0, 1.5, -2)),
    (Matrices, {"update_gap": None}, TypeError, f"update_gap=None: {ONE_UP}"),
    (Matrices, {"split": "svd"}, ValueError, f"split='svd': {KINDS}"),
    (Matrices, {"split": None}, ValueError, f"split=None: {KINDS}"),
    (Matrices, {"block_order": "up"}, ValueError, f"block_order='up': {ORDERS}"),
    (Matrices, {"state_free": "adam"}, ValueError, "state_free='adam': use one of 'signsgd', 'sgd', 'none'"),
    (Matrices, {"base": "sgd"}, ValueError, "base='sgd': use one of 'adamw', 'lion', 'sgdm'; did you mean 'sgdm'?"),
    (Matrices, {"momentum": 1.0}, ValueError, f"momentum=1.0: {FRACTION}"),
    (Matrices, {"lr_scale": -1.0}, ValueError, f"lr_scale=-1.0: {NOT_NEGATIVE}"),
    (Matrices, {"state_free_lr_scale": NAN}, ValueError, f"state_free_lr_scale=nan: {NOT_NEGATIVE}"),
    (Matrices, {"reset_state": "no"}, TypeError, "reset_state='no': use True or False"),
    *((gradkit.SPAM, {"density": x}, ValueError, f"density={x}: {SHARE} or None") for x in (2, -0.5, NAN)),
]
NORMS = (tx.clip_by_norm, tx.clip_by_global_norm)
TRANSFORMS: list[tuple[Any, dict[str, Any], type, str]] = [
    *((t, {"max_norm": x}, ValueError, f"max_norm={x}: give a number > 0") for t in NORMS for x in (0.0, -1.0, NAN)),
    (tx.clip_by_global_norm, {"max_norm": 1.0, "norm_type": 3}, ValueError, "norm_type=3: use 1, 2 or float('inf')"),
    (tx.clip_by_value, {"limit": 0.0}, ValueError, "limit=0.0: give a number > 0"),
    (tx.clip_by_value, {"limit": "1"}, TypeError, "limit='1': give a number > 0"),
    (tx.clip_by_value, {"limit": 1.0, "name": "a b"}, ValueError, "name='a b'; use letters, digits and _"),
    (tx.grokfast_ema, {"alpha": 1.0}, ValueError, f"alpha=1.0: {FRACTION}"),
    (tx.grokfast_ema, {"init": "one"}, ValueError, "init='one': use one of 'first', 'zero'"),
    (tx.grokfast_ma, {"window": 0}, ValueError, f"window=0: {ONE_UP}"),
    (tx.grokfast_ma, {"lamb": NAN}, ValueError, f"lamb=nan: {NOT_NEGATIVE}"),
    (tx.grokfast_ma, {"warmup": "no"}, TypeError, "warmup='no': use True or False"),
    (tx.zclip, {"skip_update_on_spike": "no"}, TypeError, "skip_update_on_spike='no': use True or False"),
    (
        tx.adagn,
        {"gammas": (0.7, 0.9, 0.9)},
        ValueError,
        "gammas=(0.7, 0.9, 0.9): give 2 numbers, e.g. gammas=(0.7, 0.9)",
    ),
    (tx.adagn, {"gammas": 0.7}, ValueError, "gammas=0.7: give 2 numbers"),
    (tx.adagn, {"gammas": (0.7, 1.0)}, ValueError, f"gammas[1]=1.0: {FRACTION}"),
    (tx.adaptive_clip, {"exclude": "head.*"}, TypeError, "exclude='head.*': give a tuple of patterns of names"),
    (
        tx.adaptive_clip,
        {"exclude": (torch.ones(2),)},
        TypeError,
        "exclude=(tensor([1., 1.]),): give a tuple of patterns",
    ),
    (
        tx.clip_by_norm,
        {"max_norm": torch.ones(3, 64, 64)},
        TypeError,
        "max_norm=a Tensor of shape (3, 64, 64) and dtype",
    ),
    (tx.grokfast_ma, {"mode": "max"}, ValueError, "mode='max': use one of 'mean', 'sum'"),
    (tx.column_normalize, {"norm": "max"}, ValueError, "norm='max': use one of 'rms', 'l2'"),
]


def model() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 2).requires_grad_(), torch.randn(4).requires_grad_()]


def stepped(cls: Any, **given: Any) -> tuple[Any, list[Tensor]]:
    params = model()
    optimizer = cls(params, **given)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer, params


def snapshot(optimizer: Any, params: list[Tensor]) -> str:
    """All that could have changed, as text that shows every bit."""
    torch.set_printoptions(precision=17)
    try:
        return repr((copy.deepcopy(optimizer.state_dict()), [p.detach() for p in params], [p.grad for p in params]))
    finally:
        torch.set_printoptions(profile="default")


def shown(x: Any) -> str:
    """An id for a case, the same in each process."""
    return getattr(x, "__name__", re.sub(r" at 0x\w+", "", str(x))[:60])


def of_classes(cases: list[Any], of_betas: list[Any]) -> Any:
    """Each class with each case; those of betas with classes that have some."""
    rows = [(c, *case) for c in CLASSES for case in (*cases, *(of_betas if c in HAVE_BETAS else []))]
    return pytest.mark.parametrize(("cls", "argument", "kind", "message"), rows, ids=shown)


@of_classes(VALUES, BETAS)
def test_a_bad_value_of_any_optimizer_is_named_with_what_would_do(cls, argument, kind, message):
    with pytest.raises(kind) as raised:
        cls(model(), **argument)
    said = str(raised.value)
    assert said.startswith(cls.__name__) and message in said, said


@pytest.mark.parametrize(("cls", "argument", "kind", "message"), OWN, ids=shown)
def test_a_bad_value_of_its_own_is_named_with_what_would_do(cls, argument, kind, message):
    with pytest.raises(kind) as raised:
        cls(model(), **argument)
    said = str(raised.value)
    assert said.startswith(cls.__name__) and message in said, said


@pytest.mark.parametrize(("transform", "argument", "kind", "message"), TRANSFORMS, ids=shown)
def test_a_bad_value_of_a_transform_is_named_when_it_is_called(transform, argument, kind, message):
    with pytest.raises(kind) as raised:
        transform(**argument)
    said = str(raised.value)
    assert ("name" in argument or said.startswith(transform.__name__)) and message in said, said


def named(**given: Any) -> gradkit.AdamW:
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    group = {"params": list(net.named_parameters()), **given.pop("group", {})}
    return gradkit.AdamW([group], **given)


OF_GROUPS: list[tuple[Any, dict[str, Any], type, str]] = [  # a transform, what a group says of it
    (tx.adaptive_clip(exclude=("head",)), {}, ValueError, "'head' matches no parameter; did you mean 'head.*'?"),
    (
        tx.adaptive_clip(exclude=("hed.bias",)),
        {},
        ValueError,
        "'hed.bias' matches no parameter; did you mean 'head.bias'?",
    ),
    (
        tx.adaptive_clip(),
        {"adaptive_clip.exclude": True},
        TypeError,
        "adaptive_clip.exclude=True: give a tuple of patterns",
    ),
    (
        tx.adaptive_clip(),
        {"adaptive_clip.excluded": "yes"},
        TypeError,
        "adaptive_clip.excluded='yes': use True or False",
    ),
    (tx.zclip(), {"zclip.skip_update_on_spike": "no"}, TypeError, "zclip.skip_update_on_spike='no': use True or False"),
    (
        tx.adagn(),
        {"adagn.gammas": (0.7,)},
        ValueError,
        "adagn.gammas=(0.7,): give 2 numbers, e.g. adagn.gammas=(0.7, 0.9)",
    ),
]


@pytest.mark.parametrize(("transform", "group", "kind", "message"), OF_GROUPS, ids=[x[3][:30] for x in OF_GROUPS])
def test_a_bad_value_for_a_transform_in_a_group_is_named_with_what_would_do(transform, group, kind, message):
    with pytest.raises(kind) as raised:
        named(transforms=[transform], group=group)
    assert str(raised.value).startswith("AdamW: ") and message in str(raised.value), raised.value


def test_numbers_of_one_name_ask_for_another():
    """Those of measures as the slots of rules; the name that is asked for helps."""
    says = r"of the slot 'absmax_avg': adaclip.largest_entry and largest_entry; .* e.g. adaclip\(name='second'\)$"
    with pytest.raises(ValueError, match=says):
        gradkit.StableSPAM(model(), transforms=[tx.adaclip()])
    gradkit.StableSPAM(model(), transforms=[tx.adaclip(name="second")])


def test_a_value_that_would_fill_the_screen_is_named_by_its_kind():
    with pytest.raises(TypeError) as raised:
        gradkit.AdamW(model(), transforms=tx.adaclip())  # type: ignore[arg-type]
    assert str(raised.value).startswith("AdamW: transforms=a Chain: give a list")


IN_GROUPS = [case for case in VALUES if next(iter(case[0])) not in ("backend", "decoy", "wd", "transforms")]


@of_classes(IN_GROUPS, BETAS)
def test_a_bad_value_of_a_group_adds_no_group(cls, argument, kind, message):
    optimizer, params = stepped(cls)
    before = snapshot(optimizer, params)
    for add in (
        lambda: cls([{"params": model()}, {"params": model(), **argument}]),
        lambda: optimizer.add_param_group({"params": model(), **argument}),
    ):
        with pytest.raises(kind) as raised:
            add()
        said = str(raised.value)
        assert said.startswith(cls.__name__) and message in said, said
    assert snapshot(optimizer, params) == before


EDITS: list[tuple[dict[str, Any], type, str]] = [
    ({"decay": "l1", "weight_decay": 0.1}, ValueError, f"decay='l1': {DECAYS}"),
    ({"lr": None}, TypeError, "lr=None"),
    ({"lr": "fast"}, TypeError, "lr='fast'"),
    ({"rounding": "random"}, ValueError, f"rounding='random': {ROUNDINGS}"),
    ({"weight_decay": (0.1,)}, TypeError, "weight_decay=(0.1,)"),
]


@of_classes(EDITS, [({"betas": (0.9,)}, ValueError, "betas=(0.9,): give ")])
def test_a_group_edited_to_what_cannot_run_is_refused_at_the_step(cls, argument, kind, message):
    """A number out of its range is the user's own, as in torch; a value of another kind has no meaning."""
    optimizer, params = stepped(cls)
    optimizer.param_groups[0].update(argument)
    before = snapshot(optimizer, params)
    with pytest.raises(kind) as raised:
        optimizer.step()
    assert message in str(raised.value) and snapshot(optimizer, params) == before


@pytest.mark.parametrize("cls", [c for c in HAVE_BETAS if c is not gradkit.Lion], ids=lambda c: c.__name__)
def test_a_derive_that_fails_in_the_middle_of_a_run_changes_nothing(cls):
    """beta1 = 1 divides by zero: an error of Python's own, but before clock and counters have moved."""
    optimizer, params = stepped(cls)
    group = optimizer.param_groups[0]
    group["betas"] = (1.0, *group["betas"][1:])
    before = snapshot(optimizer, params)
    with pytest.raises((ZeroDivisionError, ValueError)):
        optimizer.step()
    assert snapshot(optimizer, params) == before


@each_class
@pytest.mark.parametrize("argument", [{"backend": "eager"}, {"transforms": ()}], ids=str)
def test_what_belongs_to_the_optimizer_is_refused_in_a_group(cls, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {name}= belongs to the optimizer"):
        cls([{"params": model(), **argument}])


@each_class
def test_no_parameters_are_refused_as_in_torch(cls):
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="empty parameter list"):
            cls(nothing)
    with pytest.raises(TypeError):
        cls(torch.ones(2))
    with pytest.raises(TypeError):
        cls([{"params": {torch.ones(2)}}])
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="leaf"):
        cls([p * 2])


@each_class
def test_the_triton_backend_on_the_cpu_is_refused(cls):
    params = model()
    optimizer = cls(params, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer, params)
    for call in (optimizer.step, optimizer.explain):
        with pytest.raises(RuntimeError, match="backend='triton' can't run: Triton needs a GPU.* on cpu; use"):
            call()
    assert snapshot(optimizer, params) == before and not optimizer.state


@each_class
def test_the_native_backend_without_a_compiler_is_refused(cls, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    params = model()
    optimizer = cls(params, backend="native")
    for p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"backend='native' can't run: .*no-such-compiler.*; use backend='auto'"):
        optimizer.step()
    assert snapshot(optimizer, params) == before and not optimizer.state


def test_an_optimizer_needs_a_chain():
    with pytest.raises(TypeError, match=r"Optimizer: give a chain: Optimizer\(params, chain\(\.\.\.\)\)"):
        gradkit.Optimizer(model())
    with pytest.raises(TypeError, match="no chain or transform; call it"):
        gradkit.Optimizer(model(), tx.grokfast_ema)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clip_by_norm is no link.*call a transform: clip_by_norm"):
        chain(tx.clip_by_norm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="derive= takes a function decorated with @gradkit.derive"):
        chain(derive=lambda step: {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k need name="):
        chain(k=1.0)
    with pytest.raises(ValueError, match=r"Slot\('s', kind='row'\): use 'param' or 'ring'"):
        gradkit.Slot("s", kind="row")


def test_trace_wants_a_parameter_with_a_gradient():
    params = model()
    optimizer = gradkit.Lion(params)
    params[0].grad = torch.ones_like(params[0])
    for bad in (params[1], torch.ones(3, 2)):
        with pytest.raises(ValueError, match="trace: give a parameter of this optimizer that has a gradient"):
            optimizer.trace(bad)


@rule
def asks_for_more(u, strength):
    return u * strength


def test_a_scalar_that_is_text_is_no_number():
    with pytest.raises(TypeError, match="asks_for_more: the scalar 'strength' is 'much'; a rule takes numbers only"):
        gradkit.Optimizer(model(), chain(asks_for_more, name="x", strength="much"))


def test_nothing_in_the_order_of_slots_shape_is_taken_for_another():
    """A slot of another shape that the user put there is named at the step."""
    optimizer, params = stepped(gradkit.Lion)
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(5)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"slot 'exp_avg' of .*shape \(3, 2\) is \(5,\), it needs \(3, 2\)"):
        optimizer.step()
    assert snapshot(optimizer, params) == before
