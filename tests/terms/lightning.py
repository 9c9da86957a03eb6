"""The terms of the callbacks and the mixin for Lightning."""

from tests.terms import rows


def trained(name: str, *parameters: str) -> str:
    return f"integrations/test_lightning.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def ranks(name: str) -> str:
    return f"integrations/test_lightning_ranks.py::test_on_two_ranks[{name}]"


WRONG = trained("what_several_losses_cannot_be_is_said_before_any_gradient")
ACCUMULATED = "{'accumulate_grad_batches': 2}"
MUTANTS = (
    *rows(
        "integrations/lightning.py",
        (
            "GradientTransforms: before the Trainer's clip",
            "                handle.now()",
            "                pass",
            trained("transforms_run_once_before_the_trainers_clip", "closure"),
        ),
        (
            "GradientTransforms: overflow",
            "bool(found) and not sum(x.item() for x in found.values())",
            "bool(found)",
            trained("an_overflow_does_not_reach_the_transforms", "False"),
        ),
        (
            "GradientTransforms: what unscales by itself",
            "not unscaled(scaler, optimizer):",
            "False:",
            trained("transforms_run_once_before_the_trainers_clip", "fused, scaler"),
        ),
        (
            "GradientTransforms: all or nothing",
            "                handle.detach()",
            "                pass",
            trained("what_cannot_be_attached_stops_before_training_and_leaves_nothing"),
        ),
        (
            "OptimizerMonitor: the counted steps",
            "clock // self.every > before // self.every",
            "True",
            trained("figures_of_the_counted_steps_reach_the_logger"),
        ),
        (
            "SophiaHessian: once a step",
            "if trainer.global_step == self._step:",
            "if False:",
            trained("estimates_are_those_of_the_loop_by_hand", ACCUMULATED),
        ),
        (
            "MultiLoss: the factor of scaler and accumulation",
            "[one * factor for one in losses]",
            "list(losses)",
            trained("several_losses_are_combined_as_by_hand", "accumulation"),
        ),
        ("MultiLoss: nothing beside the losses", "if len(following) != 1:", "if not following:", WRONG),
        ("MultiLoss: no other backward", "if not ctx.allowed:", "if False:", WRONG),
        (
            "MultiLoss: what DDP passes on",
            "following = [node.next_functions[at]]",
            "pass",
            ranks("several_losses_are_combined_over_all_ranks"),
        ),
        (
            "MultiLoss: shared parameters",
            "shared=self.shared_parameters()",
            "shared=None",
            trained("shared_parameters_are_the_users"),
        ),
        (
            "MultiLoss: the method's state",
            'self.method.load_state_dict(checkpoint["gradkit.method"])',
            "pass",
            trained("orders_of_several_losses_resume_bitwise"),
        ),
    ),
    *rows(
        "attach.py",
        (
            "attach: now, and not again",
            "if done is None:  # a trainer's closure",
            "if True:  # a trainer's closure",
            trained("what_runs_now_does_not_run_again_in_the_coming_step"),
        ),
    ),
)
