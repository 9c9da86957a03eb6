"""The terms of what other people's training loops call."""

from tests.terms import rows


def parts(name: str, *parameters: str) -> str:
    return f"integrations/test_parts.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def trainer(name: str) -> str:
    return f"integrations/test_transformers.py::test_{name}"


RANKS = "integrations/test_transformers_ranks.py::test_on_two_ranks[sophias_estimate_is_over_all_ranks]"
OWN_LOOP = parts("an_estimate_is_that_of_the_loop_of_ones_own", "1.0")
DRAWN = parts("what_is_drawn_follows_from_seed_and_step_and_torchs_numbers_go_on")
OVERALL = parts("figures_of_all_parameters_are_weighed_by_their_entries")
LOGGED = trainer("the_monitor_logs_on_the_steps_that_count_and_reads_on_no_other")
MUTANTS = (
    *rows(
        "integrations/curvature.py",
        ("estimate: the mean over all labels", "summed * (ranks / count)", "summed * ranks", OWN_LOOP),
        ("estimate: how many labels", "update_hessian(batch_size=count)", "update_hessian(batch_size=1)", OWN_LOOP),
        ("estimate: the step's gradients stay", "zip(params, held, strict=True)", "()", OWN_LOOP),
        (
            "estimate: the scaler's factor",
            "g.div_(factor)",
            "g",
            parts("an_estimate_is_that_of_the_loop_of_ones_own", "1024.0"),
        ),
        ("estimate: gradients of all ranks", "        average(found)", "        pass", RANKS),
        ("estimate: labels of all ranks", "dist.all_reduce(counted)", "pass", RANKS),
        (
            "estimate: each rank draws for itself",
            "optimizer, rank)",
            "optimizer, 0)",
            "integrations/test_lightning_ranks.py::test_on_two_ranks[ranks_draw_labels_of_their_own]",
        ),
        ("estimate: numbers of its own", "torch.default_generator.manual_seed", "int", DRAWN),
        ("estimate: the optimizer's seed", "rank, seed, name", "rank, 0, name", DRAWN),
        ("estimate: the step", "int(optimizer.clock)", "0", DRAWN),
        (
            "estimate: torch's numbers go on",
            "torch.random.fork_rng(",
            "torch.random.fork_rng(enabled=False, devices=",
            DRAWN,
        ),
    ),
    *rows(
        "integrations/figures.py",
        ("figures: shares weigh entries", "sum(share * n for share, n in found)", "sum(x for x, _ in found)", OVERALL),
        ("figures: norms add in squares", "norm * norm", "norm", OVERALL),
        (
            "figures: what clips",
            'getattr(x.link, "counts", "")',
            "x.link.slots",
            parts("what_clips_is_what_counts_what_it_cuts"),
        ),
        (
            "figures: names of the model",
            "if key.isdecimal() else key",
            "if False else key",
            parts("parameters_go_by_their_names_in_the_model"),
        ),
    ),
    *rows(
        "integrations/transformers.py",
        (
            "GradientTransforms: two clips are named",
            "both = clips(self.transforms)",
            "both = []",
            trainer("two_clips_are_named_in_one_warning"),
        ),
        ("monitor: reads where it counts", "self._read // self.every <= before // self.every", "False", LOGGED),
        ("monitor: Trainer's rows stay", "control.should_log = asked", "pass", LOGGED),
    ),
)
