"""One row for each optimizer and transform: arguments, reference, goldens, limit identities."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

import gradkit
from gradkit import transforms as tx
from tests.curvature import BATCH, EVERY, SignedEstimates, SquaresOfGradients
from tests.reference import (
    adamw,
    adaptive_clip,
    ademamix,
    cautious,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    diffgrad,
    frugal,
    grokfast,
    grokfast_ema,
    grokfast_ma,
    lion,
    norm_growth_limit,
    scale,
    sgd,
    sophia,
    spam,
    spike_clip,
    stablespam,
    zclip,
)
from tests.reference.selection import selected
from tests.reference.trajectory import Run

BACKENDS = ("eager", "chunked", "native")
DECAYS = ("decoupled", "l2", "independent", "cautious", "none")
Links = Mapping[str, Any]  # `direction`, `filters`, `masks` of a reference run


@dataclass(frozen=True)
class Case:
    """What buys an optimizer or transform all tests."""

    name: str
    build: Callable[..., gradkit.Optimizer]  # of parameters, arguments and options
    reference: Callable[..., Links]  # of arguments
    arguments: Mapping[str, Any]
    golden: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file -> arguments that its meta leaves out
    limits: Sequence[str] = ()  # tests of test_limits.py
    exact: bool = True  # no sum and no polynomial function: backends agree in every bit
    coupled: bool = False  # one parameter's gradient changes another's step

    def optimizer(self, params: Iterable[Any], **options: Any) -> gradkit.Optimizer:
        return self.build(params, **{**self.arguments, **options})

    def run(self, start: Sequence[np.ndarray], dtype: Any = np.float64, **options: Any) -> Run:
        """The same in the reference."""
        return Run(start, **self.reference(**self.arguments), dtype=dtype, **options)


def sgd_behind(transform: Callable[..., Any]) -> Callable[..., gradkit.Optimizer]:
    """A transform as the whole optimizer: p <- p - lr transform(g)."""

    def build(params: Iterable[Any], **given: Any) -> gradkit.Optimizer:
        own = {k: given.pop(k) for k in inspect.signature(transform).parameters if k in given}
        return gradkit.Optimizer(params, gradkit.chain(transform(**own)), **given)

    return build


def cautious_adamw(params: Iterable[Any], **given: Any) -> gradkit.Optimizer:
    return gradkit.AdamW(params, transforms=[tx.cautious()], **given)


def plain_sgd(params: Iterable[Any], **given: Any) -> gradkit.Optimizer:
    return gradkit.Optimizer(params, gradkit.chain(), **given)


def direction(function: Callable[..., Any]) -> Callable[..., Links]:
    return lambda **arguments: {"direction": partial(function, **arguments)}


def filtered(function: Callable[..., Any]) -> Callable[..., Links]:
    return lambda **arguments: {"direction": sgd.direction, "filters": (partial(function, **arguments),)}


def filtered_adam(betas: Any = (0.9, 0.98), eps: float = 1e-8, **own: Any) -> Links:
    return {"direction": partial(adamw.direction, betas=betas, eps=eps), "filters": grokfast.links(**own)}


def spikes(official_quirks: bool = False, **arguments: Any) -> Links:
    whole = partial(spam.direction, zero_variance=official_quirks, **arguments)
    return {"direction": whole, "decays_after": official_quirks}


def scaled(roles: Mapping[int, tuple[str, int | None]]) -> Callable[..., gradkit.Optimizer]:
    """SCALE with the role and fan-in that a parameter's number of axes has."""

    def build(params: Iterable[Any], **given: Any) -> gradkit.Optimizer:
        given.pop("roles", None)
        groups = [
            {"params": [p], **dict(zip(("role", "fan_in"), roles.get(p.dim(), ("matrix", 1)), strict=True))}
            for p in params
        ]
        return gradkit.SCALE(groups, **given)

    return build


def frugal_of(params: Iterable[Any], **given: Any) -> gradkit.FRUGAL:
    """Runs of parameters with, and without, two axes or more are groups."""
    runs = groupby(params, lambda p: p.dim() > 1)
    groups = [{"params": list(run), "role": "matrix" if matrix else "vector"} for matrix, run in runs]
    return gradkit.FRUGAL(groups, **given)


def thinned(density: float, reset_every: int, **arguments: Any) -> Links:
    """SPAM on a part of the entries: where it isn't selected, a matrix stands still."""

    def direction(u: Any, state: Any) -> Any:
        number = state["clock"] // reset_every
        chosen = selected("randk", number, state["at"], state["shapes"], density)
        inner = state.setdefault("inner", {})
        if number != inner.setdefault("number", number):  # also where the gradient was missing at the reset
            inner.update(m=np.zeros(chosen.sum()), v=np.zeros(chosen.sum()))
        inner.update(clock=state["clock"], number=number)
        out = np.zeros_like(u)
        if chosen.any():
            out[chosen] = spam.direction(u[chosen], inner, reset_every=reset_every, zero_variance=False, **arguments)
        return out

    return {"direction": direction}


def masked_adam(**arguments: Any) -> Links:
    return {"direction": partial(adamw.direction, **arguments), "masks": (cautious.masked,)}


QUIRKS = {"official_quirks": True}
BETAS = {"betas": (0.8, 0.95)}
ADAM = {**BETAS, "eps": 1e-3}  # an eps that shows
MIX = {"betas": (0.8, 0.95, 0.99), "eps": 1e-3, "alpha": 3.0}

CASES = (
    Case(
        "adamw",
        gradkit.AdamW,
        direction(adamw.direction),
        ADAM,
        limits=("test_adamw_with_a_tiny_eps_ignores_the_gradients_scale",),
    ),
    Case(
        "adamw_amsgrad",
        gradkit.AdamW,
        direction(adamw.direction),
        {**ADAM, "amsgrad": True},
        limits=("test_amsgrad_under_growing_gradients_is_adamw",),
    ),
    Case(
        "lion",
        gradkit.Lion,
        direction(lion.direction),
        BETAS,
        golden={"lion__default": {}, "lion__wd": {}},
        limits=("test_lion_moves_every_weight_by_lr", "test_lion_ignores_the_gradients_scale"),
    ),
    Case(
        "diffgrad",
        gradkit.DiffGrad,
        direction(diffgrad.direction),
        ADAM,
        golden={"diffgrad__v2_default": {}, "diffgrad__v2_wd_l2": {}},
        limits=("test_diffgrad_under_a_constant_gradient_is_adam_at_half_the_lr",),
        exact=False,
    ),
    Case(
        "ademamix",
        gradkit.AdEMAMix,
        direction(ademamix.direction),
        MIX,
        golden={"ademamix__default": {"alpha": 2.0}},
        limits=("test_ademamix_without_alpha_is_adamw",),
    ),
    Case(
        "ademamix_warmups",
        gradkit.AdEMAMix,
        direction(ademamix.direction),
        {**MIX, "alpha_warmup": 4, "beta3_warmup": 6},
        golden={"ademamix__warmups_wd": {}},
        limits=("test_ademamix_without_alpha_is_adamw",),
    ),
    Case(
        "ademamix_without_fast",
        gradkit.AdEMAMix,
        direction(ademamix.direction),
        {**MIX, "betas": (0.0, 0.95, 0.99)},
        golden={"ademamix__beta1_zero": {}},
        limits=("test_ademamix_without_beta1_has_no_fast_momentum",),
    ),
    *(
        Case(
            f"spam{name}",
            gradkit.SPAM,
            spikes,
            {**ADAM, "threshold": 2.0, "reset_every": 3, "warmup_after_reset": 2, "clip_free_steps": 1, **more},
            golden=golden,
            limits=(
                "test_spam_without_cuts_and_resets_is_adam",
                "test_spam_with_its_bias_correction_reset_starts_anew",
            ),
        )
        for name, more, golden in (
            ("", {}, {}),
            ("_anew", {"reset_bias_correction": True}, {}),
            ("_without_bias_correction", {"correct_bias": False}, {}),
            (
                "_official",
                {"official_quirks": True, "clip_free_steps": 2},
                {
                    "spam__plain_reset_clip": {"official_quirks": True},
                    "spam__defaults_thr5000": {"official_quirks": True},
                },
            ),
        )
    ),
    *(
        Case(
            f"sophia{name}",
            cls,
            partial(sophia.links, estimates),
            {**BETAS, **EVERY, "gamma": 1.5, "eps": 0.05, "clip": 0.8, **more},
            golden=golden,
            limits=("test_sophia_without_curvature_is_sign_descent", "test_sophia_below_its_limit_is_a_newton_step"),
        )
        for name, cls, estimates, more, golden in (
            (
                "",
                SquaresOfGradients,
                sophia.squares(BATCH),
                {},
                {"sophia__g_paper_order": {}, "sophia__g_readme": {}},
            ),
            (
                "_signed",
                SignedEstimates,
                sophia.signed,
                {"gamma": 4.0, "correct_bias": True},
                {"sophia__h_levanter_default": {}},
            ),
        )
    ),
    Case(
        "grokfast_adam",
        gradkit.Grokfast,
        filtered_adam,
        {**ADAM, "alpha": 0.7, "lamb": 1.5},
        limits=("test_grokfast_without_lamb_is_adamw_with_l2",),
    ),
    Case(
        "grokfast_adam_window",
        gradkit.Grokfast,
        filtered_adam,
        {**ADAM, "filter": "ma", "window": 3, "lamb": 1.5},
        limits=("test_grokfast_without_lamb_is_adamw_with_l2",),
    ),
    Case(
        "grokfast_ema",
        sgd_behind(tx.grokfast_ema),
        filtered(grokfast_ema.filtered),
        {"alpha": 0.7, "lamb": 1.5},
        golden={"grokfast__ema_default_sgd": {}},
        limits=("test_a_filter_without_lamb_is_sgd",),
    ),
    Case(
        "grokfast_ema_from_zero",
        sgd_behind(tx.grokfast_ema),
        filtered(grokfast_ema.filtered),
        {"alpha": 0.7, "lamb": 1.5, "init": "zero"},
        limits=("test_a_filter_without_lamb_is_sgd",),
    ),
    Case(
        "grokfast_ma",
        sgd_behind(tx.grokfast_ma),
        filtered(grokfast_ma.filtered),
        {"window": 3, "lamb": 1.5},
        golden={"grokfast__ma_mean_warmup": {}},
        limits=("test_a_filter_without_lamb_is_sgd",),
    ),
    Case(
        "grokfast_ma_sum",
        sgd_behind(tx.grokfast_ma),
        filtered(grokfast_ma.filtered),
        {"window": 3, "lamb": 1.5, "mode": "sum", "warmup": False},
        limits=("test_a_filter_without_lamb_is_sgd",),
    ),
    Case(
        "grokfast_ma_running",
        sgd_behind(tx.grokfast_ma),
        filtered(grokfast_ma.filtered),
        {"window": 4, "lamb": 1.5, "warmup": False},
        limits=("test_a_filter_without_lamb_is_sgd",),
    ),
    *(
        Case(
            f"clip_by_global_norm_{norm_type}",
            sgd_behind(tx.clip_by_global_norm),
            filtered(clip_by_global_norm.filtered),
            {"max_norm": max_norm, "norm_type": norm_type},
            golden=golden,
            limits=("test_a_clip_that_is_never_reached_is_no_clip",),
            exact=False,
            coupled=True,
        )
        for norm_type, max_norm, golden in (
            (1, 30.0, {}),
            (2, 5.0, {"tx_clip_norm__l2_clip": {}}),
            (float("inf"), 1.5, {"tx_clip_norm__linf": {}}),
        )
    ),
    *(
        Case(
            f"stablespam{name}",
            gradkit.StableSPAM,
            stablespam.links,
            {**ADAM, "gammas": (0.6, 0.8, 0.9), "reset_every": 3, **more},
            golden=golden,
            limits=("test_stablespam_forgets_no_average_at_a_reset",),
            exact=False,
        )
        for name, more, golden in (
            ("", {}, {}),
            ("_amsgrad", {"amsgrad": True, "total_steps": 4, "eta_min": 0.3}, {}),
            ("_official", {"official_quirks": True}, {"stablespam__default": QUIRKS, "stablespam__resets": QUIRKS}),
            (
                "_official_cosine",
                {"official_quirks": True, "total_steps": 4, "eta_min": 0.3, "amsgrad": True},
                {"stablespam__total_T_wd": {**QUIRKS, "reset_every": None}},
            ),
        )
    ),
    *(
        Case(
            f"scale{name}",
            scaled(roles),
            scale.links,
            {"roles": roles, "momentum": 0.8, "vector_betas": (0.8, 0.95), "vector_eps": 1e-3, **more},
            limits=(
                "test_scale_gives_each_output_one_size",
                "test_scale_without_the_heads_momentum_is_sgd_behind_column_normalize",
                "test_scale_takes_vectors_as_adamw_with_vector_lr",
            ),
            exact=False,
        )
        for name, roles, more in (
            ("", {1: ("vector", None), 2: ("embedding", 0), 4: ("last", 1)}, {}),
            ("_l2", {1: ("vector", None), 2: ("last", 0), 4: ("matrix", 0)}, {"norm": "l2"}),
        )
    ),
    *(
        Case(
            f"frugal_{name}",
            frugal_of,
            frugal.links,
            {"update_gap": 3, "density": 0.5, **more},
            limits=(
                "test_frugal_of_everything_is_its_base",
                "test_frugal_of_nothing_is_the_state_free_rule",
            ),
        )
        for name, more in (
            ("blocks", {**BETAS, "base": "lion", "lr_scale": 0.5}),
            ("columns", {**ADAM, "split": "columns", "state_free_lr_scale": 0.1}),
            ("rows", {"momentum": 0.7, "split": "rows", "base": "sgdm", "state_free": "sgd"}),
        )
    ),
    Case(
        "spam_density",
        gradkit.SPAM,
        thinned,
        {
            **BETAS,
            "eps": 1e-3,
            "threshold": 2.0,
            "reset_every": 3,
            "warmup_after_reset": 2,
            "clip_free_steps": 1,
            "density": 0.5,
        },
        limits=("test_spam_of_everything_is_spam",),
    ),
    Case(
        "column_normalize",
        sgd_behind(tx.column_normalize),
        filtered(scale.filtered),
        {"norm": "rms"},
        limits=("test_scale_without_the_heads_momentum_is_sgd_behind_column_normalize",),
        exact=False,
    ),
    Case(
        "adaclip",
        sgd_behind(tx.adaclip),
        filtered(stablespam.adaclip),
        {"gamma": 0.8},
        limits=("test_adaclip_keeps_the_ratios_of_what_it_shrinks",),
        exact=False,
    ),
    Case(
        "adagn",
        sgd_behind(tx.adagn),
        filtered(stablespam.adagn),
        {"gammas": (0.5, 0.8)},
        limits=("test_adagn_ignores_the_gradients_scale",),
        exact=False,
    ),
    Case(
        "norm_growth_limit",
        sgd_behind(tx.norm_growth_limit),
        direction(norm_growth_limit.direction),
        {"gamma": 1.05},
        limits=("test_the_norm_of_an_update_grows_slowly",),
        exact=False,
    ),
    *(
        Case(
            f"zclip{name}",
            sgd_behind(tx.zclip),
            lambda **arguments: {"direction": sgd.direction, "filters": (zclip.Filter(**arguments),)},
            {"alpha": 0.8, "z_thresh": 1.0, "max_grad_norm": 7.4, "warmup_steps": 3, **more},
            golden=golden,
            limits=("test_zclip_leaves_steady_gradients_alone",),
            exact=False,
            coupled=True,
        )
        for name, more, golden in (
            ("", {}, {"tx_zclip__default_w5": {}}),
            ("_mean", {"clip_option": "mean", "max_grad_norm": None, "z_thresh": 4.0}, {}),
            ("_factor", {"clip_factor": 0.7, "max_grad_norm": None, "skip_update_on_spike": True}, {}),
            ("_percentile", {"mode": "percentile", "max_grad_norm": None}, {"tx_zclip__percentile_nomax": {}}),
        )
    ),
    Case(
        "adaptive_clip",
        sgd_behind(tx.adaptive_clip),
        filtered(adaptive_clip.filtered),
        {"clip": 0.9, "eps": 2.5},
        golden={"tx_agc__clip0.1": {}},
        limits=("test_a_clip_that_is_never_reached_is_no_clip",),
        exact=False,
    ),
    Case(
        "spike_clip",
        sgd_behind(tx.spike_clip),
        filtered(spike_clip.filtered),
        {"threshold": 2.0, "beta2": 0.9},
        limits=("test_a_clip_that_is_never_reached_is_no_clip",),
    ),
    Case(
        "clip_by_norm",
        sgd_behind(tx.clip_by_norm),
        filtered(clip_by_norm.filtered),
        {"max_norm": 3.0},
        limits=("test_a_clip_that_is_never_reached_is_no_clip",),
        exact=False,
    ),
    Case(
        "clip_by_value",
        sgd_behind(tx.clip_by_value),
        filtered(clip_by_value.filtered),
        {"limit": 0.7},
        limits=("test_a_clip_that_is_never_reached_is_no_clip",),
    ),
    Case(
        "cautious",
        cautious_adamw,
        masked_adam,
        ADAM,
        limits=("test_cautious_keeps_an_update_that_agrees_everywhere",),
        exact=False,
    ),
    Case("sgd", plain_sgd, direction(sgd.direction), {}, limits=("test_an_empty_chain_is_sgd",)),
)
BY_NAME = {case.name: case for case in CASES}
