"""The terms of the transforms, of weight decay and of the write."""

from tests.terms import hostile, limit, rows

WINDOW = "grokfast_ma_running"
MUTANTS = (
    *rows(
        "transforms/filter.py",
        ("Grokfast EMA: filter", "return u + lamb * grad_ema", "return u", hostile("grokfast_ema")),
        ("Grokfast EMA: lamb", "return u + lamb * grad_ema", "return u + grad_ema", hostile("grokfast_ema")),
        ("Grokfast EMA: start at first", '"first": filter_step == 1', '"first": False', hostile("grokfast_ema")),
        ("Grokfast EMA: start at zero", '"first": False', '"first": True', hostile("grokfast_ema_from_zero")),
        ("Grokfast EMA: memory", '1 - alpha, "first": f', '1.0, "first": f', hostile("grokfast_ema")),
        ("Grokfast MA: filter", "u + factor * (grad_head + grad_tail)", "u", hostile(WINDOW)),
        ("Grokfast MA: what leaves the window", ", grad_tail) - grad_ring", ", grad_tail)", hostile(WINDOW)),
        ("Grokfast MA: the round before", "factor * (grad_head + grad_tail)", "factor * grad_head", hostile(WINDOW)),
        ("Grokfast MA: a new round", "where(wrap > 0.5, 0.0, grad_head) + u", "grad_head + u", hostile(WINDOW)),
        (
            "Grokfast MA: head and tail in place of a running sum",
            "grad_tail = where(wrap > 0.5, grad_head, grad_tail) - grad_ring\n"
            "    grad_head = where(wrap > 0.5, 0.0, grad_head) + u",
            "grad_tail = grad_tail - grad_ring + u\n    grad_head = grad_head * 0.0",
            limit("a_window_forgets_a_spike", "eager"),
        ),
        ("Grokfast MA: warm-up", "on = filter_step >= window or not warmup", "on = True", hostile("grokfast_ma")),
        ("Grokfast MA: no warm-up", "window or not warmup", "window", hostile(WINDOW)),
        ("Grokfast MA: count while it fills", "min(filter_step, window) if", "window if", hostile(WINDOW)),
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
        ("cautious: mask", "sign(u) * sign(g) > 0.0, u * gain", "u < 2.0, u * gain", hostile("cautious")),
        (
            "cautious: what is not finite passes",
            "where(isfinite(u), 0.0, u))",
            "0.0)",
            "test_refused.py::test_cautious_hides_no_update_that_is_not_finite[eager]",
        ),
        ("cautious: rescale", "u * gain, where", "u, where", hostile("cautious")),
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
            "if lr_ref else 1.0",
            "if lr_ref else 0.0",
            limit("independent_decay_of_a_group_that_began_at_lr_0_is_none", "eager"),
        ),
        (
            "decay: none",
            'if weight_decay == 0 or mode == "none":',
            'mode = "l2" if mode == "none" else mode\n    if weight_decay == 0:',
            hostile("sgd"),
        ),
        ("write: lr", "return p - lr * u", "return p - u", hostile("sgd")),
    ),
)
