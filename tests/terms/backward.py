"""The terms of what acts beside the step: on a tensor in backward, as a loss, and on several losses."""

from tests.terms import rows

GOLDEN = "test_golden.py::test_the_vanishing_gradient_penalty_is_the_authors"
VANISHED = "test_losses.py::test_states_without_a_gradient_count_for_nothing"


def tap(name: str) -> str:
    return f"test_taps.py::test_{name}"


def pixels(ord: str) -> str:
    return tap(f"each_pixel_keeps_its_direction_and_at_most_the_norm[dtype0-shape0-1-{ord}]")


def penalty(nonlinearity: str = "tanh", squared: bool = False) -> str:
    return f"test_losses.py::test_penalty_and_gradient_are_the_references[{nonlinearity}-{squared}]"


def losses(name: str, *parameters: str) -> str:
    return f"test_multiloss.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


PCGRAD, CAGRAD = (
    losses("pcgrad_is_the_references", "3", "mean", "dtype0"),
    losses("cagrad_is_the_references", "3", "0.5", "1"),
)
ORDERS = losses("orders_are_permutations_that_follow_from_seed_and_call")
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
    *rows(
        "multiloss.py",
        (
            "PCGrad: only what conflicts",
            "(dot < 0) & (square > 0)",
            "square > 0",
            losses("gradients_without_conflict_are_averaged", "PCGrad"),
        ),
        ("PCGrad: projection", "mix = mix - back[..., None] * own[j]", "mix = mix - 0 * own[j]", PCGRAD),
        ("PCGrad: the running vector", "dot = (mix * gram[..., j, :])", "dot = (own * gram[..., j, :])", PCGRAD),
        (
            "PCGrad: the other's own norm",
            "back = torch.where((dot < 0) & (square > 0), dot / square,",
            "back = torch.where((dot < 0) & (square > 0), dot / gram.diagonal().mean(),",
            PCGRAD,
        ),
        (
            "PCGrad: a task without gradient",
            "(dot < 0) & (square > 0)",
            "dot <= 0",
            losses("a_task_without_gradient_hinders_none", "PCGrad"),
        ),
        ("PCGrad: mean", 'return total / tasks if self.reduction == "mean" else total', "return total", PCGRAD),
        (
            "PCGrad: sum",
            'return total / tasks if self.reduction == "mean" else total',
            "return total / tasks",
            losses("pcgrad_is_the_references", "3", "sum", "dtype0"),
        ),
        (
            "PCGrad: the sum where a task lacks a gradient",
            'return tasks if self.reduction == "mean" else 1',
            "return 1",
            losses("a_parameter_that_some_task_lacks_gets_the_sum"),
        ),
        ("PCGrad: by tensor", 'granularity == "tensor"', "False", losses("pcgrad_by_tensor_is_the_references_of_each")),
        ("PCGrad: another order in each call", "self.calls, 0, self.seed", "0, 0, self.seed", ORDERS),
        ("PCGrad: seed", "self.calls, 0, self.seed", "self.calls, 0, 0", ORDERS),
        ("PCGrad: calls are counted", "self.calls += 1", "pass", losses("a_resumed_run_draws_on", "state_dict")),
        (
            "PCGrad: calls are resumed",
            'self.calls = int(state["calls"])',
            "pass",
            losses("a_resumed_run_draws_on", "state_dict"),
        ),
        ("CAGrad: radius", "total = start + c / (norm + NEAR_ZERO) * w", "total = start + c * w", CAGRAD),
        ("CAGrad: c", "c = self.c * torch.sqrt(", "c = torch.sqrt(", CAGRAD),
        ("CAGrad: rescale", "(1.0, 1 + self.c**2, 1 + self.c)", "(1.0, 1.0, 1.0)", CAGRAD),
        ("CAGrad: rounds", "1 if tasks == 2 else 8 * tasks", "1", CAGRAD),
        ("CAGrad: the bend of the norm", "- aside * torch.sqrt(deep)", "", CAGRAD),
        (
            "CAGrad: the simplex",
            "torch.minimum(torch.maximum(move, -w[:, None]), w)",
            "move",
            losses("no_other_direction_within_reach_gives_cagrads_worst_task_more", "8"),
        ),
        (
            "CAGrad: whatever the scale",
            "gram = gram / torch.where(usual > 0, usual, 1.0)",
            "pass",
            losses("scaled_gradients_give_the_scaled_result", "1e-15", "CAGrad"),
        ),
        ("backward: heads are found", "> 1]", "> 0]", losses("gradients_accumulate", "CAGrad")),
        (
            "backward: shared",
            "if shared is None:",
            "if True:",
            losses("shared_says_what_is_combined_and_the_rest_gets_the_sum"),
        ),
        ("backward: the scaler", "scaler.scale(loss)", "loss", losses("a_scaler_scales_the_losses", "PCGrad")),
        (
            "backward: a graph that is done with",
            "retain_graph=keep",
            "retain_graph=i + 1 < len(losses)",
            losses("a_graph_that_no_later_loss_needs_is_freed_at_once"),
        ),
        ("backward: added", "p.grad += g", "p.grad = g", losses("gradients_accumulate", "PCGrad")),
        (
            "ranks: mean",
            ".div_(dist.get_world_size())",
            "",
            "sharding/test_sharding.py::test_on_two_ranks[losses_are_combined_as_in_one_process]",
        ),
        (
            "ranks: before the method",
            "average([*of_trunk, *of_rest])",
            "average(of_rest)",
            "sharding/test_sharding.py::test_on_two_ranks[losses_are_combined_as_in_one_process]",
        ),
    ),
    *rows(
        "gradients.py",
        (
            "backward: tensors of their own",
            "total = having[0].clone()",
            "total = having[0]",
            losses("a_gradient_that_autograd_gives_twice_is_no_ones_twice"),
        ),
        (
            "backward: memory",
            "merged[i], columns[i] = x, []",
            "merged[i] = x",
            losses("memory_is_a_trunk_of_gradients_for_each_task", "plain", "11", "768", "False"),
        ),
        (
            "backward: a sum in the first gradient's place",
            "some(columns[i]).detach() if i in free",
            "some(columns[i]).detach() if False",
            losses("the_sum_takes_the_place_of_the_first_gradient", "dtype0", "True"),
        ),
        (
            "backward: no view",
            "some(columns[i]).detach() if i in free",
            "some(columns[i]) if i in free",
            losses("a_sum_is_a_plain_tensor_whatever_the_first_gradient_was"),
        ),
        (
            "backward: not in the place of one that is held",
            "    if holders(column) != holders(probe):\n",
            "    if False:\n",
            losses("gradients_that_a_hook_kept_stay_as_they_are", "True", "itself"),
        ),
        (
            "backward: nor of one whose memory is held",
            ", sys.getrefcount(memory), torch._C._storage_Use_Count(memory._cdata)",
            "",
            losses("gradients_that_a_hook_kept_stay_as_they_are", "True", "detached"),
        ),
        (
            "backward: nor of one of another's memory",
            "memory.resizable()",
            "True",
            losses("memory_of_others_stays_as_it_is", "True", "numpy"),
        ),
        (
            "backward: nor of one that overlaps itself",
            "        and lies_plain(first)\n",
            "",
            losses("a_sum_has_memory_of_its_own_size_that_does_not_overlap"),
        ),
        (
            "backward: nor of a slice",
            "        and memory.nbytes() == first.nbytes\n",
            "",
            losses("a_sum_has_memory_of_its_own_size_that_does_not_overlap"),
        ),
        (
            "backward: nor of an inference tensor",
            "first.is_inference() or ",
            "",
            losses("a_sum_is_a_plain_tensor_whatever_the_first_gradient_was"),
        ),
        (
            "inner products: memory of copies",
            "[tasks * copied(columns[i]) for i in group]",
            "[0 for i in group]",
            losses("memory_is_a_trunk_of_gradients_for_each_task", "transposed", "11", "768", "True"),
        ),
        (
            "combination: rounded once",
            "compute_dtype(first.dtype)",
            "first.dtype",
            losses("loops_in_c_do_what_torch_does", "2", "dtype2"),
        ),
        (
            "inner products: one layout",
            "g.permute(dims).reshape(-1)",
            "g.permute(sorted(range(g.dim()), key=g.stride)).reshape(-1)",
            losses("elements_meet_whatever_their_layout"),
        ),
        (
            "inner products: every piece",
            "start, free = stop, free - (stop - start)",
            "start, free = size, free - (stop - start)",
            losses("large_tensors_are_read_in_pieces"),
        ),
    ),
    *rows(
        "backends/mix.py",
        (
            "loops of several gradients: every element",
            "for (int k = 0; q < n; q++, k++)",
            "for (int k = 0; q < 0; q++, k++)",
            losses("loops_in_c_do_what_torch_does", "2", "dtype0"),
        ),
        (
            "loops of several gradients: every block",
            "? P{k} + start : none",
            "? P{k} : none",
            losses("loops_in_c_do_what_torch_does", "2", "dtype0"),
        ),
    ),
)
