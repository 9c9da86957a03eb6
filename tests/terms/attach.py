"""The terms of transforms in front of other optimizers: what they read, what a file holds, what goes away again."""

from tests.terms import rows


def attach(name: str, *parameters: str) -> str:
    return f"test_attach.py::test_{name}" + (f"[{'-'.join(parameters)}]" if parameters else "")


def filed(name: str, *parameters: str) -> str:
    return attach(name, *parameters).replace("test_attach.py", "test_attach_files.py")


def layout(kind: str) -> str:
    return attach("a_gradient_of_another_layout_gets_its_values", kind, "eager")


def scaled(fused: str = "fused") -> str:
    return attach("a_scaled_loss_takes_the_steps_of_the_unscaled_one", "AdamW", fused, "implicit")


STRANGERS = filed("keys_of_what_is_not_attached_are_dropped_with_one_warning")
FILE = filed("names_in_a_file_and_that_numbers_in_it_are_pythons")
GROUPS = attach("groups_follow_the_first_one_and_may_have_their_own_values")
DETACHED = attach("detaching_leaves_a_plain_optimizer")
ADOPTED = filed("attaching_behind_a_load_goes_on_from_it", "torch.float32")
ONLY_OURS = filed("an_entry_that_was_ours_alone_is_no_state_of_the_optimizers")
LATER = filed("a_class_that_looks_for_every_key_of_a_file_finds_it")
MUTANTS = (
    *rows(
        "attach.py",
        ("attach: unscale", "return u * inverse_scale", "return u + inverse_scale - inverse_scale", scaled()),
        ("attach: an overflow", "            if found:\n", "            if False:\n", scaled()),
        (
            "attach: once a step",
            "        if nested(self.optimizer):",
            "        if False:",
            attach("a_step_that_calls_its_bases_step_is_one", "False"),
        ),
        (
            "attach: now, for these gradients",
            "if not any(g is before for g, before in zip(self._gradients(), done, strict=False) if g is not None):",
            "if not done:",
            attach("what_now_has_not_seen_is_transformed_in_the_step", "another gradient"),
        ),
        (
            "attach: now, though some were changed behind it",
            "if not any(g is before",
            "if not all(g is before",
            attach("behind_now_gradients_may_be_changed_before_the_step", "one replaced"),
        ),
        (
            "attach: now, in a closure",
            "if done is None:  # a trainer's closure",
            "if done is not self._gradients():  # a trainer's closure",
            attach("behind_now_gradients_may_be_changed_before_the_step", "all replaced, in a closure"),
        ),
        (
            "attach: wrappers with some hooks",
            "vars(optimizer).keys() >= HOOKS",
            "vars(optimizer).keys() & HOOKS",
            attach("wrappers_without_hooks_are_opened"),
        ),
        (
            "attach: others' edits are checked first",
            "for handle in everyone[1:] if everyone[0] is self else ():",
            "for handle in ():",
            attach("a_wrong_edit_is_found_before_another_handle_has_rewritten_anything"),
        ),
        ("attach: unscaled once", "optimizer.grad_scale = None", "pass", scaled()),
        (
            "attach: behind a closure",
            "behind it\n                self._transform()\n",
            "behind it\n                pass\n",
            attach("a_closures_gradients_are_transformed_behind_it", "keyword"),
        ),
        (
            "attach: a positional closure",
            "if callable(next(iter(args[1:]), None)):",
            "if False:",
            attach("a_closures_gradients_are_transformed_behind_it", "positional"),
        ),
        ("attach: a group's own value", "group.get(IN_GROUP + name, foreign[0]", "(foreign[0]", GROUPS),
        ("attach: the first group's value", "foreign[0].get(IN_GROUP + name, default)", "default", GROUPS),
        ("attach: the clock is kept", "first[self.clock_key] = self.clock", "pass", FILE),
        (
            "attach: numbers over all are kept",
            "first.update({IN_GROUP + n: self.param_groups[0][n] for n in self._kept})",
            "pass",
            attach("zclip_cuts_and_remembers_as_the_authors_do", "tx_zclip__default_w5", "eager"),
        ),
        (
            "attach: state comes with a gradient",
            "return g is not None",
            "return True",
            attach("late_and_frozen_parameters_and_steps_without_gradients"),
        ),
        ("attach: marks go, step", "        self._sweep()\n        if kwargs", "        if kwargs", LATER),
        ("attach: marks go, saving", "        self._sweep()\n        carrying.save", "        carrying.save", LATER),
        (
            "attach: a second handle's keys are no strangers'",
            "take(self, handles(optimizer),",
            "take(self, [self],",
            STRANGERS,
        ),
        (
            "attach: arguments survive a load",
            "                group.setdefault(key, value)\n",
            "                pass\n",
            filed("a_file_from_before_attaching_loads_and_state_starts_fresh"),
        ),
        (
            "attach: detaching empties the groups",
            "                del group[key]\n",
            "                pass\n",
            DETACHED,
        ),
        ("attach: detaching removes the hooks", "            hook.remove()\n", "            pass\n", DETACHED),
    ),
    *rows(
        "carrying.py",
        (
            "attach: half of a link's state",
            "mine = {n: x for n, x in mine.items() if n not in names}",
            "pass",
            filed(
                "a_link_of_which_a_file_lacks_something_starts_fresh",
                "attached, then loaded",
                "gradkit_grokfast_ema_grad_ema",
            ),
        ),
        ("attach: counters are Python's", "float(v) if n in handle.numbers else v", "v", FILE),
        ("attach: numbers over all are Python's", "groups[0][key] = float(groups[0][key])", "pass", FILE),
        (
            "attach: slots keep their dtype",
            "dtype = program.slot_dtype(name, p, group)",
            "dtype = p.dtype",
            filed("a_bfloat16_parameters_slots_are_float32_behind_a_load"),
        ),
        (
            "attach: a load takes ours out",
            "v for k, v in e.items() if k not in ours}",
            "v for k, v in e.items()}",
            STRANGERS,
        ),
        ("attach: marks are taken out", "            del entry[key]\n", "            pass\n", LATER),
        (
            "attach: an empty entry goes, load",
            "if key not in gone}",
            "}",
            ONLY_OURS,
        ),
        (
            "attach: an empty entry goes, adoption",
            "        if not entry:\n",
            "        if False:\n",
            ONLY_OURS,
        ),
        (
            "attach: ours stay while a class looks",
            "set() if loads_itself(handle.optimizer) else",
            "",
            LATER,
        ),
        (
            "attach: strangers' values are dropped",
            "if k not in strange} for g in groups",
            "} for g in groups",
            STRANGERS,
        ),
        (
            "attach: a file from before starts fresh",
            "keep - counted & {*g}",
            "keep & {*g}",
            filed("a_file_from_before_attaching_loads_and_state_starts_fresh"),
        ),
        (
            "attach: what a load has rounded",
            "given[n].dtype != mine[n].dtype",
            "False",
            filed("attaching_behind_a_load_goes_on_from_it", "torch.bfloat16"),
        ),
        ("attach: adoption takes out", "name: entry.pop(", "name: entry.get(", ADOPTED),
    ),
    *rows(
        "stats.py",
        (
            "attach: the norm of unscaled gradients",
            "return inverse_scale * sqrt(gradient)",
            "return sqrt(gradient) + 0.0 * inverse_scale",
            attach("statistics_are_of_unscaled_gradients"),
        ),
    ),
    *rows(
        "plan.py",
        (
            "a copied gradient is given back",
            "sharding.store(self.grads[t], self.owners[t], g)",
            "pass",
            layout("sliced"),
        ),
    ),
    *rows(
        "sharding.py",
        ("an expanded gradient is replaced", "        p.grad = flat\n", "        pass\n", layout("expanded")),
    ),
    *rows(
        "backends/eager.py",
        (
            "the store into the gradient, eager",
            "part.g.copy_(written)",
            "pass",
            attach("behind_it_sgd_moves_each_parameter_by_minus_the_transformed_gradient", "clip_by_value", "eager"),
        ),
    ),
    *rows(
        "backends/csource.py",
        (
            "the store into the gradient, native",
            '(u);"] * (target == "g")',
            '(g);"] * (target == "g")',
            attach("behind_it_sgd_moves_each_parameter_by_minus_the_transformed_gradient", "clip_by_value", "native"),
        ),
    ),
)
