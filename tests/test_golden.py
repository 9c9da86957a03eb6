"""What the authors' own code computed, on every backend and in the references that other tests rely on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradkit
from gradkit.multiloss import CAGrad, PCGrad
from tests.cases import BACKENDS, BY_NAME, CASES, Case
from tests.reference import frugal, pixelwise_clip, sophia, vanishing_gradient_penalty
from tests.reference.trajectory import Run
from tests.runs import ran_on, replay
from tests.tolerance import assert_follows, tolerance

FOLDER = Path(__file__).parent / "golden"
OURS = {
    **{"window_size": "window", "filter_type": "mode"},  # the authors' names that differ
    **{"DeltaT": "reset_every", "warmup_steps": "warmup_after_reset", "grad_accu_steps": "clip_free_steps"},
    **{"update_proj_gap": "reset_every", "total_T": "total_steps"},
    **{"rho": "gamma", "k": "hessian_every", "bias_correction": "correct_bias"},
}
LEFT_OUT = ("density_param_idx", "bs", "hess_order", "coord_choice")  # no arguments of ours, or by other names
RUNS = [(case.name, file) for case in CASES for file in case.golden if not file.startswith("tx_")]
ZCLIPS = [(case.name, file) for case in CASES for file in case.golden if file.startswith("tx_zclip")]
AGC = "tx_agc__clip0.1"
PCGRADS = (
    "tx_pcgrad__torch_2task_mean",
    "tx_pcgrad__torch_3task_multihead",
    "tx_pcgrad__torch_4task_allconflict_seed1",
)
CAGRADS = {
    "tx_cagrad__toy2_c0.5": ({"c": 0.5, "rescale": 2}, 1e-4),
    "tx_cagrad__nyuv2_3task_rescale1": ({"c": 0.5}, 1e-3),
}
OTHERS = ("tx_pgc__nhwc", "tx_pascanu_reg__transcribed", *PCGRADS, *CAGRADS)  # no part of a step: the last tests
CLIPS = [(case.name, file) for case in CASES for file in case.golden if file.startswith("tx_clip")]
SCALES = {
    "scale__default": {"lr": 1e-3},
    "scale__wd_adamlr": {
        **{"lr": 0.01, "weight_decay": 0.1, "momentum": 0.8, "vector_lr": 0.02},
        **{"vector_betas": (0.9, 0.95), "vector_eps": 1e-6},
    },
}
SPLITS = {
    "frugal__block_random": {"split": "blocks"},
    "frugal__block_density0": {"split": "blocks"},
    "frugal__coord_columns": {"split": "columns"},
    "frugal__coord_sgd_momentum": {"split": "columns", "base": "sgdm", "official_quirks": True},
    "spam__density05": {"official_quirks": True, "density": 0.5},
}


class Golden:
    """One file: arrays by name, and what its run was called with."""

    def __init__(self, file: str):
        with np.load(FOLDER / f"{file}.npz") as arrays:
            self.arrays: Mapping[str, np.ndarray] = dict(arrays)
        self.meta = json.loads(str(self.arrays["meta"].reshape(-1)[0]))
        given = self.meta["hyperparameters"]
        given = {**given.get("optimizer_kwargs", {}), **given.get("filter", given)}
        self.labels, self.late = given.get("bs"), given.get("hess_order") == "after"
        given = {k: v for k, v in given.items() if k not in LEFT_OUT and not (k == "density" and v is None)}
        self.arguments = {OURS.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        self.count = sum(k.startswith("init_") for k in self.arrays)

    def each(self, kind: str, t: int | None = None) -> list[np.ndarray]:
        key = kind if t is None else f"{kind}_{t}"
        return [self.arrays[f"{key}_{i}"] for i in range(self.count)]

    def steps(self, kind: str) -> list[list[np.ndarray]]:
        return [self.each(kind, t) for t in range(1, self.meta["T"] + 1)]

    def params(self) -> list[torch.Tensor]:
        return [torch.tensor(x, requires_grad=True) for x in self.each("init")]

    def optimizer(self, case: Case, file: str, params: list[torch.Tensor], **options: Any) -> Any:
        arguments = {**self.arguments, **case.golden[file], **options}
        return fed(self, params, arguments) if self.curved else case.build(params, **arguments)

    def reference(self, case: Case, **arguments: Any) -> Mapping[str, Any]:
        if not self.curved:
            return case.reference(**arguments)
        return sophia.links(lambda t, *_: self.estimates(t), **arguments)

    @property
    def curved(self) -> bool:
        """Whether the run has estimates of curvature."""
        return any(k.startswith("hess_") for k in self.arrays)

    def curvature(self, t: int) -> list[np.ndarray] | None:
        """What came before step t: an estimate, or the gradient of the drawn labels."""
        known = f"hess_{t - self.late}_0" in self.arrays
        return self.each("hess", t - self.late) if known else None

    def estimates(self, t: int) -> list[np.ndarray] | None:
        given = self.curvature(t)
        return [self.labels * g.astype(np.float64) ** 2 for g in given] if given and self.labels else given

    def assert_followed(self, seen: list[list[np.ndarray]]) -> None:
        expected = [self.each("init"), *self.steps("param")]
        assert len(expected) == self.meta["T"] + 1 > 10
        for ours, theirs in zip(seen, zip(*expected, strict=True), strict=True):
            relative = tolerance("golden", torch.float32)
            assert_follows(ours, theirs, relative, self.meta["max_abs_single_step_change"])


def fed(golden: Golden, params: list[torch.Tensor], arguments: Mapping[str, Any]) -> gradkit.Sophia:
    """Sophia with the run's own estimates."""
    optimizer = gradkit.Sophia(params, **arguments)

    def feed(*_: Any) -> None:
        given = golden.curvature(int(optimizer.param_groups[0]["clock"]) + 1)
        if given and golden.labels:
            kept = [p.grad for p in params]
            for p, g in zip(params, given, strict=True):
                p.grad = torch.tensor(g)
            optimizer.update_hessian(batch_size=golden.labels)
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad
        elif given:
            optimizer.update_hessian(estimates=list(map(torch.tensor, given)))

    optimizer.register_step_pre_hook(feed)
    return optimizer


def test_every_golden_file_is_replayed():
    alone = {AGC, *OTHERS, *SCALES, *SPLITS}
    assert {file for _, file in RUNS + CLIPS + ZCLIPS} | alone == {x.stem for x in FOLDER.glob("*.npz")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "file"), RUNS)
def test_a_golden_run_is_followed(name, file, backend):
    golden = Golden(file)
    params = golden.params()
    optimizer = golden.optimizer(BY_NAME[name], file, params, backend=backend)
    seen = replay(optimizer, params, golden.steps("grad"), backend=backend)
    golden.assert_followed([[x.numpy() for x in one] for one in seen])


@pytest.mark.parametrize(("name", "file"), RUNS)
def test_the_reference_follows_the_golden_run(name, file):
    golden = Golden(file)
    given = {**golden.arguments, **BY_NAME[name].golden[file]}
    lr, weight_decay = given.pop("lr"), given.pop("weight_decay", 0.0)
    mode = "l2" if name == "diffgrad" else "decoupled"
    run = Run(golden.each("init"), **golden.reference(BY_NAME[name], **given), weight_decay=weight_decay, mode=mode)
    values = [golden.each("init"), *(run.step(row, lr, lr) for row in golden.steps("grad"))]
    golden.assert_followed([list(one) for one in zip(*values, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["grokfast_ema", "grokfast_ma"])
def test_the_filtered_gradient_is_the_authors(name, backend):
    (file,) = BY_NAME[name].golden
    golden = Golden(file)
    params = golden.params()
    optimizer = golden.optimizer(BY_NAME[name], file, params, backend=backend)
    relative = tolerance("golden", torch.float32)
    for t, row in enumerate(golden.steps("grad"), 1):
        for p, g in zip(params, row, strict=True):
            p.grad = torch.tensor(g)
        for p, theirs in zip(params, golden.each("filtered", t), strict=True):
            links = optimizer.trace(p)
            ours = dict(links[:-1])
            assert len(ours) == 1 and links[-1][0] == "write"
            (filtered,) = ours.values()
            np.testing.assert_allclose(filtered.numpy(), theirs, relative, relative * np.abs(theirs).max())
        optimizer.step()
    assert ran_on(optimizer) == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "file"), CLIPS)
def test_clipping_by_global_norm_is_torchs(name, file, backend):
    """One step of SGD at lr 1 from zero leaves minus the clipped gradients."""
    golden = Golden(file)
    arrays = golden.arrays
    grads = [arrays[f"grad_{i}"] for i in range(3)]
    params = [torch.zeros(g.shape, requires_grad=True) for g in grads]
    optimizer = BY_NAME[name].build(params, lr=1.0, backend=backend, **golden.arguments)
    seen = replay(optimizer, params, [grads], backend=backend)
    for i, (_, after) in enumerate(seen):
        clipped = arrays[f"out_{i}"]
        assert np.abs(clipped).max() < np.abs(grads[i]).max()
        np.testing.assert_allclose(-after.numpy(), clipped, rtol=tolerance("golden", torch.float32), atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "file"), ZCLIPS)
def test_zclip_cuts_and_remembers_as_the_authors_do(name, file, backend):
    """Thirty steps of SGD at lr 1, each from zero; five spikes among them."""
    golden = Golden(file)
    arrays, arguments = golden.arrays, {k: v for k, v in golden.meta["hyperparameters"].items() if k != "eps"}
    shapes = [arrays[f"grad_0_{k}"].shape for k in "ab"]
    params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = BY_NAME[name].build(params, lr=1.0, backend=backend, **arguments)
    cut = 0
    for t in range(30):
        grads = [arrays[f"grad_{t}_{k}"] for k in "ab"]
        for p, g in zip(params, grads, strict=True):
            p.detach().zero_()
            p.grad = torch.tensor(g)
        optimizer.step()
        for p, g, k in zip(params, grads, "ab", strict=True):
            np.testing.assert_allclose(-p.detach().numpy(), arrays[f"out_{t}_{k}"], rtol=1e-6)
            cut += not np.allclose(g, arrays[f"out_{t}_{k}"])
        if not np.isnan(arrays["mean"][t]):
            kept = [float(optimizer.param_groups[0][f"zclip.{n}"]) for n in ("mean", "var")]
            np.testing.assert_allclose(kept, [arrays["mean"][t], arrays["var"][t]], rtol=1e-6)
    assert cut >= 8 and ran_on(optimizer) == {backend}


# the authors' layouts: which of their dimensions make up a row, and which are reduced
UNITS = {"lin": ((1,), (0,)), "lin_big": ((1,), (0,)), "conv": ((3,), (2, 0, 1)), "mh": ((1, 2), (0,))}


def as_rows(name: str, x: np.ndarray) -> np.ndarray:
    """As torch lays out a weight: outputs first. A head's two output dimensions become one."""
    if name not in UNITS:
        return x
    units, rest = UNITS[name]
    return np.ascontiguousarray(x.transpose(units + rest).reshape(-1, *(x.shape[d] for d in rest)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_clip_cuts_as_the_authors_do(backend):
    """One step of SGD at lr 1; the parameters' own size matters here, so the differences are compared."""
    arrays = Golden(AGC).arrays
    names = ["lin", "bias", "conv", "gain", "lin_big", "mh"]
    weights, grads, clipped = ([as_rows(n, arrays[f"{kind}_{n}"]) for n in names] for kind in ("param", "grad", "out"))
    dtype, absolute = (torch.float32, 5e-7) if backend == "triton" else (torch.float64, 1e-9)  # of weights around 1
    params = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in weights]
    arguments = Golden(AGC).meta["hyperparameters"]
    optimizer = BY_NAME["adaptive_clip"].build(params, lr=1.0, backend=backend, **arguments)
    seen = replay(optimizer, params, [grads], backend=backend)
    for (before, after), theirs in zip(seen, clipped, strict=True):
        np.testing.assert_allclose((before - after).numpy(), theirs, rtol=2e-6, atol=absolute)
    assert sum(not np.allclose(g, c) for g, c in zip(grads, clipped, strict=True)) == 5


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_pixelwise_clip_is_the_authors_with_channels_last_and_first(channel_dim):
    golden = Golden("tx_pgc__nhwc")
    given, expected = (np.moveaxis(golden.arrays[name], -1, channel_dim) for name in ("grad", "out_type0"))
    clip = golden.arguments["clip"]
    assert not np.array_equal(given, expected)
    image = torch.zeros(given.shape, requires_grad=True)
    gradkit.transforms.pixelwise_clip(clip, channel_dim)(image).backward(torch.tensor(given))
    reference = pixelwise_clip.clipped(given.astype(np.float64), clip, channel_dim, "inf")
    for ours in (image.grad.numpy(), reference):
        np.testing.assert_allclose(ours, expected, rtol=tolerance("golden", torch.float32), atol=0)


def test_the_vanishing_gradient_penalty_is_the_authors():
    """Their states are rows, h W: W is the transpose of torch's weight_hh."""
    arrays = Golden("tx_pascanu_reg__transcribed").arrays
    weight = torch.tensor(arrays["W_hh"].T, requires_grad=True)
    hidden = [torch.tensor(h, requires_grad=True) for h in arrays["h"]]
    for h, grad in zip(hidden, arrays["dE_dh"], strict=True):
        h.grad = torch.tensor(grad)
    omega = gradkit.losses.vanishing_gradient_penalty(hidden, weight, squared=True)
    omega.backward()
    doubled = (arrays[name].astype(np.float64) for name in ("h", "dE_dh"))
    reference = vanishing_gradient_penalty.penalty(*doubled, arrays["W_hh"].T.astype(np.float64), "tanh", True)
    relative, largest = tolerance("golden", torch.float32), np.abs(arrays["grad_W_hh"]).max()
    for value, grad in ((omega.item(), weight.grad.numpy()), reference):
        np.testing.assert_allclose(value, arrays["omega"], rtol=relative)
        np.testing.assert_allclose(grad.T, arrays["grad_W_hh"], rtol=relative, atol=relative * largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", SCALES)
def test_scale_is_the_authors(file, backend):
    golden = Golden(file)
    params = golden.params()
    roles = ("embedding", "matrix", "vector", "last")
    groups = [{"params": [p], "role": role} for p, role in zip(params, roles, strict=True)]
    optimizer = gradkit.SCALE(groups, backend=backend, **SCALES[file])
    seen = replay(optimizer, params, golden.steps("grad"), backend=backend)
    golden.assert_followed([[x.numpy() for x in one] for one in seen])


class Recorded(gradkit.Choices):
    """What the authors' run selected: each parameter's mask at the first step of a turn."""

    def __init__(self, golden: Golden, period: int, first: int):
        self.golden, self.period, self.first = golden, period, first

    def mask(self, turn: Any, index: int) -> np.ndarray:
        return self.golden.arrays[f"mask_{max(1, turn.refresh * self.period + self.first)}_{index}"]

    def tensors(self, turn: Any, group: int, count: int) -> list[int]:
        return [j for j in range(count) if self.mask(turn, j + 1).all()]  # behind the regular one

    def within(self, turn: Any, index: int, count: int) -> np.ndarray:
        mask = self.mask(turn, index)
        return np.flatnonzero(mask.all(0) if turn.kind == "columns" else mask.ravel())


def split_run(golden: Golden, file: str, **options: Any) -> tuple[list[torch.Tensor], gradkit.Optimizer]:
    """Parameters, and FRUGAL or SPAM with what was selected for them."""
    params, given = golden.params(), {**golden.arguments, **SPLITS[file], **options}
    if file.startswith("spam"):
        density = given.pop("density")
        groups = [{"params": [p], "density": density if i in (1, 3) else None} for i, p in enumerate(params)]
        optimizer = gradkit.SPAM(groups, **given)
        optimizer.choices = Recorded(golden, given["reset_every"], 0)
    else:
        groups = [{"params": params[:1], "role": "vector"}, {"params": params[1:], "role": "matrix"}]
        optimizer = gradkit.FRUGAL(groups, **given)
        optimizer.choices = Recorded(golden, given["update_gap"], 1)
    return params, optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", SPLITS)
def test_a_split_is_the_authors(file, backend):
    golden = Golden(file)
    params, optimizer = split_run(golden, file, backend=backend)
    seen = replay(optimizer, params, golden.steps("grad"), backend=backend)
    golden.assert_followed([[x.numpy() for x in one] for one in seen])


@pytest.mark.parametrize("file", [file for file in SPLITS if file.startswith("frugal")])
def test_the_reference_of_frugal_follows_the_golden_run(file):
    golden = Golden(file)
    given = {**golden.arguments, **SPLITS[file]}
    lr, weight_decay = given.pop("lr"), given.pop("weight_decay", 0.0)
    links = frugal.links(masks=lambda t, i: golden.arrays[f"mask_{t}_{i}"], **given)
    run = Run(golden.each("init"), **links, weight_decay=weight_decay, mode="decoupled")
    values = [golden.each("init"), *(run.step(row, lr, lr) for row in golden.steps("grad"))]
    golden.assert_followed([list(one) for one in zip(*values, strict=True)])


def test_frugal_without_the_quirk_starts_sgd_as_torch_does():
    file = "frugal__coord_sgd_momentum"
    golden = Golden(file)
    params, optimizer = split_run(golden, file, official_quirks=False, density=1.0)
    optimizer.choices = gradkit.Choices()
    theirs = golden.params()
    plain = torch.optim.SGD(theirs, lr=golden.arguments["lr"], momentum=0.9)
    gap = golden.arguments["update_gap"]
    seen = replay(optimizer, params, golden.steps("grad")[:gap])
    expected = replay(plain, theirs, golden.steps("grad")[:gap])
    for ours, those in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours[-1], those[-1])


@pytest.mark.parametrize("file", PCGRADS)
def test_pcgrad_is_the_ports_with_its_orders(file):
    """Each entry is a parameter, since in one run some have a gradient of a part of the tasks."""
    arrays = Golden(file).arrays
    given = [
        [torch.tensor(g) if has else None for g, has in zip(*row, strict=True)]
        for row in zip(arrays["grads"], arrays["has_grad"], strict=True)
    ]
    ours = PCGrad().combine(given, arrays["orders"].tolist())
    values = np.array([0.0 if g is None else g.item() for g in ours], np.float32)  # the port makes zeros of None
    relative = tolerance("golden", torch.float32)
    np.testing.assert_allclose(values, arrays["out"], rtol=0, atol=relative * np.abs(arrays["out"]).max())
    assert [g is None for g in ours] == [not any(has) for has in arrays["has_grad"].T]


@pytest.mark.parametrize("file", CAGRADS)
def test_cagrad_is_the_authors_within_what_their_solvers_reach(file):
    arguments, within = CAGRADS[file]
    arrays = Golden(file).arrays
    (ours,) = CAGrad(**arguments).combine([[torch.tensor(g)] for g in arrays["grads"]])
    np.testing.assert_allclose(ours.numpy(), arrays["out"], rtol=0, atol=within)
    assert np.abs(ours.numpy() - arrays["grads"].mean(0)).max() > 0.1
