"""The terms of what acts beside the step: on a tensor in backward, and as a loss."""

from tests.terms import rows

GOLDEN = "test_golden.py::test_the_vanishing_gradient_penalty_is_the_authors"
VANISHED = "test_losses.py::test_states_without_a_gradient_count_for_nothing"


def tap(name: str) -> str:
    return f"test_taps.py::test_{name}"


def pixels(ord: str) -> str:
    return tap(f"each_pixel_keeps_its_direction_and_at_most_the_norm[dtype0-shape0-1-{ord}]")


def penalty(nonlinearity: str = "tanh", squared: bool = False) -> str:
    return f"test_losses.py::test_penalty_and_gradient_are_the_references[{nonlinearity}-{squared}]"


MUTANTS = (
    *rows(
        "transforms/tap.py",
        ("pixelwise clip: clip", "return ctx.clip.clipped(grad), None", "return grad, None", pixels("inf")),
        ("pixelwise clip: norm of each pixel", "amax(self.channel_dim, keepdim=True)", "amax()", pixels("inf")),
        ("pixelwise clip: magnitude", "wide.abs().amax", "wide.amax", pixels("inf")),
        ("pixelwise clip: 2-norm", "if self.ord == 2:", "if False:", pixels("2")),
        ("pixelwise clip: at most 1", ".clamp(max=1.0)", "", pixels("inf")),
        (
            "pixelwise clip: float32",
            "torch.promote_types(grad.dtype, torch.float32)",
            "grad.dtype",
            tap("half_precision_is_float32_rounded_once"),
        ),
        (
            "pixelwise clip: squares within range",
            "torch.where(norm == 0.0, 1.0, norm)",
            "torch.ones_like(norm)",
            tap("squares_do_not_overflow"),
        ),
        (
            "pixelwise clip: zeros, 2-norm",
            "torch.where(norm == 0.0, 1.0, norm)",
            "norm",
            tap("zeros_stay_and_what_is_not_finite_stays_so_in_its_own_pixel"),
        ),
        (
            "pixelwise clip: the scaler's factor",
            "limit = self.scaler.scale(limit)",
            "pass",
            tap("with_a_scaler_the_unscaled_gradient_is_clipped"),
        ),
    ),
    *rows(
        "losses.py",
        ("penalty: slope of the nonlinearity", "(delta * SLOPES[nonlinearity](h)) @", "delta @", penalty()),
        ("penalty: slope of tanh", "lambda h: 1 - h * h", "lambda h: 1 - h", penalty()),
        ("penalty: slope of the sigmoid", "lambda h: h * (1 - h)", "lambda h: h", penalty("sigmoid")),
        (
            "penalty: slope of relu",
            "(h > 0).to",
            "(h > -1).to",
            "test_losses.py::test_the_ratio_is_what_backward_through_torchs_cell_did",
        ),
        ("penalty: direction of the weight", "@ weight.to(dtype)", "@ weight.to(dtype).T", GOLDEN),
        ("penalty: squared", "ratio * ratio if squared else ratio", "ratio", penalty(squared=True)),
        ("penalty: not squared", "ratio * ratio if squared else ratio", "ratio * ratio", penalty()),
        ("penalty: distance from one", "(ratio * ratio if squared else ratio) - 1.0", "ratio", penalty()),
        ("penalty: relative to the gradient", "/ torch.where(gone, 1.0, norm)", "", penalty()),
        (
            "penalty: what has vanished costs nothing",
            "change = torch.where(gone, 0.0,",
            "change = torch.where(gone, -1.0,",
            VANISHED,
        ),
        ("penalty: what has vanished isn't counted", "(~gone).sum()", "torch.tensor(gone.numel())", VANISHED),
        ("penalty: floor", "FLOOR = 1e-10", "FLOOR = 0.0", VANISHED),
        ("penalty: none counts", ".clamp(min=1)", "", VANISHED),
        (
            "penalty: no autocast",
            "enabled=False",
            "enabled=True",
            "test_losses.py::test_small_gradients_of_half_precision_are_seen_under_autocast[dtype1]",
        ),
    ),
)
