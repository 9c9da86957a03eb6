"""The terms of the optimizers."""

from tests.terms import golden, hostile, limit, rows

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
)
