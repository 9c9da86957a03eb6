"""Every named term of every optimizer, transform and decay, and the tests that see it turned off."""

from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """One term, where it stands (exactly once in its file), what stands there instead, and which tests see it."""

    term: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


def hostile(case: str, scenario: str = "smooth", backend: str = "eager") -> str:
    return f"test_reference.py::test_hostile_gradients_do_what_the_paper_says[{case}-{scenario}-{backend}]"


def limit(name: str, *parameters: str) -> str:
    return f"test_limits.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def law(name: str, *parameters: str) -> str:
    return f"test_laws.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def golden(case: str, file: str) -> str:
    return f"test_golden.py::test_a_golden_run_is_followed[{case}-{file}-eager]"


def rows(file: str, *given: tuple[str, str, str, tuple[str, ...] | str]) -> Iterator[Mutant]:
    for term, text, instead, tests in given:
        yield Mutant(term, f"gradkit/{file}", text, instead, (tests,) if isinstance(tests, str) else tests)


WINDOW = "grokfast_ma_running"
STALLS = "stochastic_and_kahan_follow_float32_where_nearest_stalls"
MUTANTS = (
    *rows(
        "optim/adamw.py",
        ("AdamW: memory of the mean", '"w1": 1 - b1', '"w1": 1.0', hostile("adamw")),
        ("AdamW: memory of the mean square", '"k2": b2, "w2": 1 - b2', '"k2": 0.0, "w2": 1.0', hostile("adamw")),
        ("AdamW: bias correction of the mean", '"a": 1 / (1 - b1**step)', '"a": 1.0', hostile("adamw")),
        ("AdamW: bias correction of the mean square", '"b": (1 - b2**step) ** -0.5', '"b": 1.0', hostile("adamw")),
        ("AdamW: eps", '"e": eps', '"e": 0.0', hostile("adamw")),
        (
            "AdamW: root of the mean square",
            "a / (sqrt(exp_avg_sq) * b + e)",
            "a / (exp_avg_sq * b + e)",
            hostile("adamw"),
        ),
        (
            "AMSGrad: maximum",
            "maximum(max_exp_avg_sq, exp_avg_sq)",
            "maximum(exp_avg_sq, exp_avg_sq)",
            hostile("adamw_amsgrad"),
        ),
        (
            "AMSGrad: use of the maximum",
            "(sqrt(max_exp_avg_sq) * b",
            "(sqrt(exp_avg_sq + 0.0) * b",
            hostile("adamw_amsgrad"),
        ),
    ),
    *rows(
        "optim/lion.py",
        (
            "Lion: sign",
            "sign(lerp(exp_avg, u, w1))",
            "lerp(exp_avg, u, w1)",
            limit("lion_moves_every_weight_by_lr", "eager"),
        ),
        ("Lion: momentum in the direction", "sign(lerp(exp_avg, u, w1))", "sign(u)", hostile("lion")),
        ("Lion: beta1", '"w1": 1 - betas[0]', '"w1": 1 - betas[1]', hostile("lion")),
        ("Lion: beta2", '"w2": 1 - betas[1]', '"w2": 1 - betas[0]', hostile("lion")),
    ),
    *rows(
        "optim/diffgrad.py",
        ("DiffGrad: friction", "friction * exp_avg * a", "exp_avg * a", hostile("diffgrad")),
        ("DiffGrad: size of the change", "absolute(previous_grad - u)", "(previous_grad - u)", hostile("diffgrad")),
        (
            "DiffGrad: previous gradient",
            "exp_avg, exp_avg_sq, u\n",
            "exp_avg, exp_avg_sq, previous_grad\n",
            hostile("diffgrad"),
        ),
        ("DiffGrad: correction of the mean square", "(1 - b2**step) ** 0.5 /", "1 /", hostile("diffgrad")),
        ("DiffGrad: correction of the mean", "0.5 / (1 - b1**step)", "0.5", hostile("diffgrad")),
        ("DiffGrad: eps", '"e": eps', '"e": 0.0', hostile("diffgrad")),
        ("DiffGrad: l2 by default", '"decay", "l2"', '"decay", "decoupled"', golden("diffgrad", "diffgrad__v2_wd_l2")),
    ),
    *rows(
        "optim/ademamix.py",
        ("AdEMAMix: slow momentum", "(exp_avg * a + alpha_t * exp_avg_slow)", "(exp_avg * a)", hostile("ademamix")),
        (
            "AdEMAMix: fast momentum",
            "(exp_avg * a + alpha_t * exp_avg_slow)",
            "(alpha_t * exp_avg_slow)",
            hostile("ademamix"),
        ),
        ("AdEMAMix: beta3", '"w3": 1 - b3', '"w3": 1 - b2', hostile("ademamix")),
        ("AdEMAMix: alpha's warm-up", "alpha * min(1.0, step / alpha_warmup)", "alpha", hostile("ademamix_warmups")),
        (
            "AdEMAMix: end of alpha's warm-up",
            "min(1.0, step / alpha_warmup)",
            "(step / alpha_warmup)",
            hostile("ademamix_warmups"),
        ),
        (
            "AdEMAMix: beta3's warm-up",
            "if beta3_warmup and step < beta3_warmup",
            "if False",
            hostile("ademamix_warmups"),
        ),
        ("AdEMAMix: end of beta3's warm-up", " and step < beta3_warmup", "", hostile("ademamix_warmups")),
        (
            "AdEMAMix: half-life of beta3's warm-up",
            "0.5 ** (1 / ((1 - done) * half_life(b1) + done * half_life(b3) + 1))",
            "(1 - done) * b1 + done * b3",
            hostile("ademamix_warmups"),
        ),
        ("AdEMAMix: bias correction of the mean", '"a": 1 / (1 - b1**step)', '"a": 1.0', hostile("ademamix")),
        (
            "AdEMAMix: bias correction of the mean square",
            '"b": (1 - b2**step) ** -0.5',
            '"b": 1.0',
            hostile("ademamix"),
        ),
        ("AdEMAMix: eps", '"e": eps', '"e": 0.0', hostile("ademamix")),
        ("AdEMAMix: float32 slow momentum", ", dtype=torch.float32)", ")", limit("the_slow_momentum_stays_float32")),
        (
            "AdEMAMix, beta1 = 0: gradient",
            "(u + alpha_t * exp_avg_slow)",
            "(alpha_t * exp_avg_slow)",
            hostile("ademamix_without_fast"),
        ),
        ("AdEMAMix, beta1 = 0: slow momentum", "(u + alpha_t * exp_avg_slow)", "u", hostile("ademamix_without_fast")),
        (
            "AdEMAMix, beta1 = 0: no fast slot",
            'ademamix if group["betas"][0] else ademamix_without_fast',
            "ademamix",
            limit("ademamix_without_beta1_has_no_fast_momentum"),
        ),
    ),
    *rows(
        "optim/grokfast.py",
        (
            "Grokfast: l2 by default",
            '"decay", "l2"',
            '"decay", "decoupled"',
            limit("grokfast_without_lamb_is_adamw_with_l2", "ema", "eager"),
        ),
        ("Grokfast: filter", "            moving if", "            chain() if", hostile("grokfast_adam_window")),
    ),
    *rows(
        "transforms/filter.py",
        ("Grokfast EMA: filter", "return u + lamb * grad_ema", "return u", hostile("grokfast_ema")),
        ("Grokfast EMA: lamb", "return u + lamb * grad_ema", "return u + grad_ema", hostile("grokfast_ema")),
        ("Grokfast EMA: start at the first gradient", '"first": step == 1', '"first": False', hostile("grokfast_ema")),
        ("Grokfast EMA: start at zero", '"first": False', '"first": True', hostile("grokfast_ema_from_zero")),
        ("Grokfast EMA: memory", '"w": 1 - alpha, "first": step', '"w": 1.0, "first": step', hostile("grokfast_ema")),
        ("Grokfast MA: filter", "u + factor * (grad_head + grad_tail)", "u", hostile(WINDOW)),
        ("Grokfast MA: what leaves the window", ", grad_tail) - grad_ring", ", grad_tail)", hostile(WINDOW)),
        ("Grokfast MA: the round before", "factor * (grad_head + grad_tail)", "factor * grad_head", hostile(WINDOW)),
        ("Grokfast MA: a new round", "where(wrap > 0.5, 0.0, grad_head) + u", "grad_head + u", hostile(WINDOW)),
        (
            "Grokfast MA: head and tail in place of a running sum",
            "grad_tail = where(wrap > 0.5, grad_head, grad_tail) - grad_ring\n    grad_head = where(wrap > 0.5, 0.0, grad_head) + u",
            "grad_tail = grad_tail - grad_ring + u\n    grad_head = grad_head * 0.0",
            limit("a_window_forgets_a_spike", "eager"),
        ),
        ("Grokfast MA: warm-up", "on = step >= window or not warmup", "on = True", hostile("grokfast_ma")),
        ("Grokfast MA: no warm-up", "on = step >= window or not warmup", "on = step >= window", hostile(WINDOW)),
        ("Grokfast MA: count while it fills", "min(step, window) if", "window if", hostile(WINDOW)),
        ("Grokfast MA: sum", 'if mode == "mean" else 1.0', "if True else 1.0", hostile("grokfast_ma_sum")),
        ("Grokfast MA: lamb", "lamb / count if on", "1.0 / count if on", hostile(WINDOW)),
    ),
    *rows(
        "transforms/clip.py",
        ("clip: coefficient", "return u * coef", "return u", hostile("clip_by_global_norm_2")),
        (
            "clip, 2-norm: at most 1",
            "minimum(max_norm / (sqrt(total) + 1e-6), 1.0)",
            "max_norm / (sqrt(total) + 1e-6)",
            limit("a_clip_that_is_never_reached_is_no_clip", "clip_by_norm", "eager"),
        ),
        (
            "clip, other norms: at most 1",
            "minimum(max_norm / (norm + 1e-6), 1.0)",
            "max_norm / (norm + 1e-6)",
            limit("a_clip_that_is_never_reached_is_no_clip", "clip_by_global_norm_inf", "eager"),
        ),
        ("clip, 2-norm: root", "(sqrt(total) + 1e-6)", "(total + 1e-6)", hostile("clip_by_norm")),
        (
            "clip, 2-norm: floor",
            "(sqrt(total) + 1e-6)",
            "sqrt(total)",
            limit("a_clip_divides_by_the_norm_and_a_floor", "clip_by_norm", "eager"),
        ),
        (
            "clip, other norms: floor",
            "(norm + 1e-6)",
            "norm",
            limit("a_clip_divides_by_the_norm_and_a_floor", "clip_by_global_norm_inf", "eager"),
        ),
        (
            "clip, 1-norm: magnitude",
            "def magnitudes(u):\n    return absolute(u)",
            "def magnitudes(u):\n    return u",
            hostile("clip_by_global_norm_1"),
        ),
        (
            "clip, inf-norm: magnitude",
            "def largest(u):\n    return absolute(u)",
            "def largest(u):\n    return u",
            hostile("clip_by_global_norm_inf"),
        ),
        (
            "clip, inf-norm: maximum",
            'reduce={"norm": "max"}',
            'reduce={"norm": "sum"}',
            hostile("clip_by_global_norm_inf"),
        ),
        (
            "clip: over all tensors",
            'scope="all", reduce={"total": "sum"}',
            'scope="tensor", reduce={"total": "sum"}',
            hostile("clip_by_global_norm_2"),
        ),
        (
            "clip by norm: each tensor",
            'scope="tensor", reduce={"total": "sum"}',
            'scope="all", reduce={"total": "sum"}',
            hostile("clip_by_norm"),
        ),
        ("clip by value", "where(absolute(u) > limit, sign(u) * limit, u)", "u", hostile("clip_by_value")),
        ("clip by value: sign", "sign(u) * limit, u)", "limit, u)", hostile("clip_by_value")),
    ),
    *rows(
        "transforms/mask.py",
        ("cautious: mask", "where(sign(u) * sign(g) > 0.0, u * gain, 0.0)", "u * gain", hostile("cautious")),
        ("cautious: rescale", "u * gain, 0.0)", "u, 0.0)", hostile("cautious")),
        (
            "cautious: limit of the rescale",
            "maximum(kept, 1e-3)",
            "kept",
            limit("cautious_multiplies_by_at_most_a_thousand", "eager"),
        ),
    ),
    *rows(
        "transforms/decay.py",
        ("decay: l2", "return u + weight_decay * p", "return u", hostile("sgd")),
        (
            "decay: decoupled",
            "def decay(u, p, keep):\n    return p * keep",
            "def decay(u, p, keep):\n    return p",
            hostile("sgd"),
        ),
        ("decay: decoupled by lr", "1 - lr * weight_decay}", "1 - weight_decay}", hostile("sgd")),
        ("decay: cautious", "where(sign(u) * sign(p) > 0.0, p * keep, p)", "p * keep", hostile("sgd")),
        ("decay: cautious at all", "where(sign(u) * sign(p) > 0.0, p * keep, p)", "p", hostile("sgd")),
        ("decay: independent of lr's size", "1 - lr / lr_ref * weight_decay", "1 - lr * weight_decay", hostile("sgd")),
        (
            "decay: independent, by the schedule",
            "1 - lr / lr_ref * weight_decay",
            "1 - weight_decay",
            hostile("sgd", "schedule"),
        ),
        (
            "decay: independent from lr 0",
            " if lr_ref else 1.0",
            "",
            limit("independent_decay_of_a_group_that_began_at_lr_0_is_none", "eager"),
        ),
        ("decay: none", ' or mode == "none"', ' or mode == "none" and lost', hostile("sgd")),
        ("write: lr", "return p - lr * u", "return p - u", hostile("sgd")),
    ),
    *rows(
        "chain.py",
        (
            "l2 after the filters",
            "of(user, Stage.GRAD) + of(own, Stage.GRAD) + (l2.place() if l2 else [])",
            "(l2.place() if l2 else []) + of(user, Stage.GRAD) + of(own, Stage.GRAD)",
            hostile("grokfast_ema"),
        ),
    ),
    *rows(
        "plan.py",
        (
            "a late parameter's own row",
            "np.array([distinct[key] for key in keys]",
            "np.array([0 for key in keys]",
            hostile("adamw", "late"),
        ),
        ("ring position, eager", "int(self.positions[t]) % len(slot)", "0", hostile(WINDOW)),
    ),
    *rows(
        "backends/eager.py",
        (
            "maximize, eager",
            "            g = -g\n",
            "            pass\n",
            "test_reference.py::test_maximize_climbs_what_the_reference_descends[lion-eager]",
        ),
        (
            "Kahan's compensation, eager",
            "p = p + part.residual.to(b.compute)",
            "p = p + 0.0",
            law(STALLS, "dtype0", "eager"),
        ),
        (
            "stochastic bits, eager",
            "bits = random.philox(element,",
            "bits = 0 * random.philox(element,",
            law(STALLS, "dtype0", "eager"),
        ),
        ("stochastic bits of each step, eager", "int(b.clock)", "0", law(STALLS, "dtype0", "eager")),
    ),
    *rows(
        "backends/native.py",
        (
            "ring position, native",
            "b.positions % [len(t) for t in ring]",
            "b.positions % 1",
            hostile(WINDOW, backend="native"),
        ),
    ),
    *rows(
        "backends/csource.py",
        (
            "maximize, native",
            '["g = -g;"] * batch.program.maximize',
            "[]",
            "test_reference.py::test_maximize_climbs_what_the_reference_descends[lion-native]",
        ),
        ("Kahan's compensation, native", '}(P_rest[i])"', '}(P_rest[i]) * 0"', law(STALLS, "dtype0", "native")),
        ("stochastic bits, native", 'bits = f"philox(', 'bits = f"0u * philox(', law(STALLS, "dtype0", "native")),
        ("stochastic bits by seed, native", "(uint32_t)seed", "0u", law("the_seed_chooses_the_random_bits")),
    ),
)
