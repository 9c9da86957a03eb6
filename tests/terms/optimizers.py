"""The terms of the optimizers."""

from tests.terms import golden, hostile, limit, rows

PICKS = "test_split.py::test_the_smallest_random_numbers_are_selected[columns-0.29]"
CUT = "test_split.py::test_a_density_as_in_the_authors_code"
BLOCKS = "test_split.py::test_blocks_follow_each_other[{}]"
CHANCE = "test_split.py::test_the_authors_draw_each_entry_by_itself"
NO_DECAY = "test_split.py::test_the_authors_density_has_no_decay"
SLEEPS = "test_split.py::test_a_parameter_without_gradient_at_a_refresh_takes_its_turn"
PLACE = "test_bad_splits.py::test_a_place_among_all_is_a_part_of_the_selection"
STATE_AT = "test_split.py::test_another_seed_is_another_selection"
MEANS = "the_mean_over_samples_is_the_diagonal"
LABELS = "labels_are_drawn_with_their_probabilities"
IGNORED = "labels_have_the_shape_of_the_targets_and_ignore_what_they_ignore"


def estimator(name: str) -> str:
    return f"test_estimators.py::test_{name}"


def split(name: str, *parameters: str) -> str:
    return f"test_split.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def ways(way: str) -> str:
    return split("frugals_other_ways_are_the_references", way, "smooth", "eager")


def selects(file: str) -> str:
    return f"test_golden.py::test_a_split_is_the_authors[{file}-eager]"


def scales(file: str) -> str:
    return f"test_golden.py::test_scale_is_the_authors[{file}-eager]"


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
        "optim/stablespam.py",
        (
            "StableSPAM: cosine of beta1",
            "b1, g1 = b1 * s, g1 * s",
            "b1, g1 = b1, g1 * s",
            hostile("stablespam_amsgrad"),
        ),
        (
            "StableSPAM: cosine of gamma1",
            "b1, g1 = b1 * s, g1 * s",
            "b1, g1 = b1 * s, g1",
            hostile("stablespam_amsgrad"),
        ),
        ("StableSPAM: end of the cosine", "min(clock, total_steps + 1)", "clock", hostile("stablespam_amsgrad")),
        ("StableSPAM: the authors' cosine", "clock if official_quirks else", "", hostile("stablespam_official_cosine")),
        ("StableSPAM: count of Adam at a reset", "1.0 if resets else step", "step", hostile("stablespam")),
        ("StableSPAM: counts of the averages", "step if official_quirks else stat_step", "step", hostile("stablespam")),
        (
            "StableSPAM: the authors' one count",
            "step if official_quirks else stat_step",
            "stat_step",
            hostile("stablespam_official"),
        ),
        (
            "StableSPAM: reset of the maximum",
            ", where(reset > 0.5, 0.0, max_exp_avg_sq)",
            ", where(reset > 1.5, 0.0, max_exp_avg_sq)",
            hostile("stablespam_amsgrad"),
        ),
        (
            "StableSPAM: the authors' old moments",
            "[*direction, *reset] if",
            "[*reset, *direction] if",
            hostile("stablespam_official"),
        ),
    ),
    *rows(
        "optim/spam.py",
        ("SPAM: reset of the mean", "where(reset > 0.5, 0.0, exp_avg),", "exp_avg,", hostile("spam")),
        ("SPAM: reset of the mean square", ", where(reset > 0.5, 0.0, exp_avg_sq)", ", exp_avg_sq", hostile("spam")),
        ("SPAM: cut", "where(spike, sign(u) * sqrt(limit), u)", "where(spike, u, u)", hostile("spam")),
        ("SPAM: sign of what is cut", "sign(u) * sqrt(limit)", "sqrt(limit)", hostile("spam")),
        ("SPAM: threshold", "limit = threshold * exp_avg_sq", "limit = exp_avg_sq", hostile("spam")),
        ("SPAM: steps without a cut", "since >= clip_free_steps", "True", hostile("spam_official")),
        ("SPAM: no cut without a mean square", "(exp_avg_sq > floor) & ", "", hostile("spam")),
        ("SPAM: cut without a mean square", '"floor": -1.0 if', '"floor": 0.0 if', hostile("spam_official")),
        ("SPAM: warm-up", "a *= 1 - 0.99 *", "a *= 1 - 0.0 *", hostile("spam")),
        ("SPAM: no warm-up at the start", "since < clock and since", "since", hostile("spam")),
        ("SPAM: bias correction", "(1 - b2**k) ** 0.5 / (1 - b1**k) if", "1.0 if", hostile("spam")),
        (
            "SPAM: without bias correction",
            "if correct_bias else 1.0",
            "if True else 1.0",
            hostile("spam_without_bias_correction"),
        ),
        (
            "SPAM: bias correction anew",
            "if resets and reset_bias_correction else",
            "if False else",
            hostile("spam_anew"),
        ),
        ("SPAM: decay after the update", "a *= 1 - lr * weight_decay", "pass", hostile("spam_official")),
        ("SPAM: eps", '"e": eps', '"e": 0.0', hostile("spam")),
    ),
    *rows(
        "optim/sophia.py",
        ("Sophia: memory of the momentum", '"w1": 1 - b1', '"w1": 1.0', hostile("sophia")),
        ("Sophia: bias correction", "1 / (1 - b1**step) if correct_bias else 1.0", "1.0", hostile("sophia_signed")),
        ("Sophia: no bias correction", "if correct_bias else", "if True else", hostile("sophia")),
        ("Sophia: gamma", "maximum(hessian * gamma, e)", "maximum(hessian * 1.0, e)", hostile("sophia")),
        ("Sophia: curvature", "a / maximum(hessian * gamma, e)", "a / e", golden("sophia", "sophia__g_paper_order")),
        ("Sophia: eps", '"e": eps', '"e": 1e-30', hostile("sophia")),
        (
            "Sophia: negative curvature",
            "maximum(hessian * gamma, e)",
            "(hessian * gamma + e)",
            hostile("sophia_signed"),
        ),
        ("Sophia: limit", "over_curvature, limit_move, derive", "over_curvature, derive", hostile("sophia")),
        ("Sophia: memory of the curvature", "lerp(hessian, u, w2)", "u + (hessian - hessian) * w2", hostile("sophia")),
        ("Sophia: share of an estimate", '"w2": 1 - betas[1]', '"w2": 1 - betas[0]', hostile("sophia")),
        ("Sophia: square", "return u * u", "return absolute(u)", golden("sophia", "sophia__g_readme")),
        ("Sophia: labels of an estimate", "float(batch_size) ** 0.5", "1.0", golden("sophia", "sophia__g_readme")),
        (
            "Sophia: what is not finite is left out",
            "where(usable > 0.5,",
            "where(usable > -0.5,",
            hostile("sophia", "nan"),
        ),
        (
            "Sophia: the scaler's factor",
            "1.0 / self._scale_of(scaler)",
            "1.0 + 0.0 * self._scale_of(scaler)",
            "test_sophia.py::test_a_scaler_is_divided_out[estimates]",
        ),
        (
            "Sophia: when an estimate is due",
            "self._clock() % float(every) == 0",
            "self._clock() % 1.0 == 0",
            "test_sophia.py::test_an_estimate_is_due_before_step_1_and_every_k_steps",
        ),
        (
            "Sophia: warning",
            '"hessian_stale_at"):  # so once',
            '"nothing"):',
            "test_sophia.py::test_it_says_once_that_estimates_are_missing",
        ),
        (
            "Sophia: bias correction in the win rate",
            'if group["correct_bias"] and step else 1.0',
            "if False else 1.0",
            "test_sophia.py::test_the_win_rate_is_the_share_of_what_is_not_limited",
        ),
    ),
    *rows(
        "optim/scale.py",
        ("SCALE: momentum of the head", "return exp_avg, exp_avg", "return u, exp_avg", hostile("scale")),
        ("SCALE: memory of the momentum", '"w1": 1 - momentum', '"w1": 1.0', hostile("scale")),
        (
            "SCALE: the momentum comes first",
            "chain(momentum_alone, *size,",
            "chain(*size, momentum_alone,",
            hostile("scale"),
        ),
        ("SCALE: momentum of the last layer alone", 'role == "last"', 'role != "vector"', hostile("scale")),
        (
            "SCALE: l2 before the normalisation",
            "stage=Stage.PRECONDITION)  # behind",
            "stage=None)  # behind",
            "test_scale.py::test_l2_decay_is_in_what_is_normalised",
        ),
        ("SCALE: norm", 'one_size(group["norm"], fan_in)', 'one_size("rms", fan_in)', hostile("scale_l2")),
        ("SCALE: weight decay", "weight_decay=weight_decay", "weight_decay=0.0", scales("scale__wd_adamlr")),
        ("SCALE: vector_lr", 'setdefault("lr", vector_lr)', 'setdefault("fan_in", None)', scales("scale__wd_adamlr")),
        (
            "SCALE: a vector group's own lr",
            'setdefault("lr", vector_lr)',
            'update({"lr": vector_lr})',
            "test_scale.py::test_vector_lr_is_the_lr_of_vectors_so_one_schedule_scales_all",
        ),
        ("SCALE: vectors by AdamW", 'if role == "vector":', "if not role:", hostile("scale")),
        ("SCALE: memory of the vectors' mean", '"w1": 1 - b1', '"w1": 1.0', hostile("scale")),
        (
            "SCALE: memory of the vectors' mean square",
            '"k2": b2, "w2": 1 - b2',
            '"k2": 0.0, "w2": 1.0',
            hostile("scale"),
        ),
        ("SCALE: bias correction of the vectors' mean", "0.5 / (1 - b1**step)", "0.5", hostile("scale")),
        ("SCALE: bias correction of the mean square", "(1 - b2**step) ** 0.5 /", "1 /", hostile("scale")),
        ("SCALE: eps of vectors", '"e": vector_eps', '"e": 0.0', hostile("scale")),
    ),
    *rows(
        "roles.py",
        ("SCALE: fan-in of an embedding", "rows_axis(role, 2) if", "1 if", scales("scale__default")),
    ),
    *rows(
        "estimators.py",
        ("Hutchinson: signs", ".mul_(2).sub_(1)", ".mul_(0).sub_(1)", estimator(MEANS + "[rademacher]")),
        ("Hutchinson: mean over samples", "value=1 / samples", "value=1", estimator("samples_are_averaged")),
        (
            "Hutchinson: directions",
            "total.addcmul_(directions[p].to(total.dtype)",
            "total.addcmul_(1.0 + 0.0 * total",
            estimator("one_rademacher_sample_is_exact_where_the_hessian_is_diagonal"),
        ),
        ("labels: noise", "noise.neg_().add_(part)", "noise.mul_(0).add_(part)", estimator(LABELS)),
        ("labels: logits", "noise.neg_().add_(part)", "noise.neg_()", estimator(LABELS)),
        (
            "labels: ignored targets",
            "masked_fill(targets == ignore_index, ignore_index)",
            "clone()",
            estimator(IGNORED),
        ),
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
        "optim/frugal.py",
        ("FRUGAL: sign of the rest", "return sign(u) * scale", "return u * scale", hostile("frugal_columns")),
        ("FRUGAL: lr_scale", 'return {"scale": lr_scale}', 'return {"scale": 1.0}', hostile("frugal_blocks")),
        (
            "FRUGAL: lr_scale of the rest",
            '"scale": lr_scale * state_free_lr_scale',
            '"scale": state_free_lr_scale',
            hostile("frugal_blocks"),
        ),
        (
            "FRUGAL: state_free_lr_scale",
            '"scale": lr_scale * state_free_lr_scale',
            '"scale": lr_scale',
            hostile("frugal_columns"),
        ),
        ("FRUGAL: momentum", "= momentum * momentum_buffer + u", "= u", hostile("frugal_rows")),
        (
            "FRUGAL: the authors' first gradient",
            "where(first > 0.5, u, momentum_buffer)",
            "momentum_buffer",
            ways("quirks"),
        ),
        (
            "FRUGAL: the authors' first weight",
            "where(first > 0.5, p, momentum_buffer)",
            "momentum_buffer",
            ways("quirks"),
        ),
        ("FRUGAL: only matrices are split", 'role == "matrix", group', "True, group", hostile("frugal_columns")),
        ("FRUGAL: state that stays", '"nothing" if group["reset_state"] else "all"', '"nothing"', ways("kept")),
    ),
    *rows(
        "selection.py",
        (
            "selection: another with each refresh",
            '"refresh": (clock - 1) // update_gap',
            '"refresh": 0',
            hostile("frugal_rows"),
        ),
        ("selection: seed", 'int(group["seed"]))', "0)", ways("seed")),
        ("selection: parameter", "words(four, turn.refresh, index,", "words(four, turn.refresh, 0,", PICKS),
        ("selection: how many", "k = int(count * turn.density)", "k = round(count * turn.density)", PICKS),
        ("selection: how many tensors", "k = round(count * turn.density)", "k = int(count * turn.density)", CUT),
        ("selection: a vector is whole", "if p.dim() < 2 or", "if", hostile("spam_density")),
        (
            "selection: descending",
            "count - 1 - i for i in ascending",
            "i for i in ascending",
            BLOCKS.format("descending"),
        ),
        ("selection: ascending", "(turn.refresh * k + j) % count", "j", BLOCKS.format("ascending")),
        (
            "selection: mirror",
            "for i in (pair, count - 1 - pair)",
            "for i in (pair, pair + 1)",
            BLOCKS.format("mirror"),
        ),
        ("selection: the rest may stand still", "where(absolute(u) < 0.0, u, 0.0)", "u", ways("none")),
        ("selection: the authors' chance", 'turn.order == "bernoulli" and turn.refresh', "False", CHANCE),
    ),
    *rows(
        "optim/spam.py",
        (
            "SPAM: another selection with each reset",
            "clock // reset_every if reset_every else 0}\n\n\nclass",
            "0}\n\n\nclass",
            hostile("spam_density"),
        ),
        ("SPAM: the authors' density has no decay", 'param_group["decay"] = "none"', "pass", NO_DECAY),
    ),
    *rows(
        "machine.py",
        (
            "split: state starts fresh",
            "elif anew and name in stale:",
            "elif False:",
            hostile("frugal_columns"),
        ),
        ("split: what is left is dropped", "if name not in program.low or (anew", "if (anew", ways("kept blocks")),
        (
            "split: a sleeping parameter takes its turn",
            "if member.turn:\n                self._take_turn",
            "if False:\n                self._take_turn",
            SLEEPS,
        ),
        ("split: what state is laid out for", 'group["turn"] = tuple(member.turn)', "pass", STATE_AT),
        ("split: a selection of this place", "turn, at, p.shape)", "turn, p.shape)", PLACE),
        ("split: state of this place", "member.at if isinstance(member.chosen, Choice) else None", "None", PLACE),
    ),
)
