"""What the engine adds to the formulas: order, rows, rings, signs, write-back."""

from tests.terms import hostile, law, rows

WINDOW = "grokfast_ma_running"
STORED = "test_backends.py::test_every_storage_and_decay_is_eager_in_every_bit"
LAST_BLOCK = "test_backends.py::test_tensors_that_do_not_fill_their_last_block_are_eager_in_every_bit"
KAHAN_TIE = "kahan_keeps_the_bits_of_a_parameter_on_a_tie"
STALLS = "stochastic_and_kahan_follow_float32_where_nearest_stalls"
MUTANTS = (
    *rows(
        "chain.py",
        (
            "a chain's own stage",
            "stage = stage if self.stage is None else self.stage",
            "pass",
            "test_chain.py::test_l2_comes_before_a_chain_of_the_stage_precondition[eager]",
        ),
        (
            "l2 after the filters",
            "of(user, Stage.GRAD) + of(own, Stage.GRAD) + (l2.place() if l2 else [])",
            "(l2.place() if l2 else []) + of(user, Stage.GRAD) + of(own, Stage.GRAD)",
            hostile("grokfast_ema"),
        ),
    ),
    *rows(
        "explain.py",
        (
            "explain: state by role",
            '"without a role")] += size',
            '"without a role")] += 0 * size',
            "test_state_bytes.py::test_explain_says_the_bytes_that_a_step_then_takes[SCALE]",
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
        ("ring position, eager", "int(self.positions[name][t]) % len(slot)", "0", hostile(WINDOW)),
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
        ("stochastic bits of each tensor, eager", "b.index[t], seed", "0, seed", STORED + "[lion-bfloat16-stochastic]"),
        ("Kahan: one that did not move, eager", "moved = p != before", "moved = p == p", law(KAHAN_TIE, "eager")),
    ),
    *rows(
        "backends/native.py",
        (
            "ring position, native",
            "b.positions[name] % [len(t) for t in ring]",
            "b.positions[name] % 1",
            hostile(WINDOW, backend="native"),
        ),
    ),
    *rows(
        "backends/csource.py",
        (
            "maximize, native",
            '["g = -g;"] * kind.program.maximize',
            "[]",
            "test_reference.py::test_maximize_climbs_what_the_reference_descends[lion-native]",
        ),
        ("Kahan's compensation, native", '}(P_rest[i]);"', '}(P_rest[i]) * 0;"', law(STALLS, "dtype0", "native")),
        ("stochastic bits, native", 'bits = f"philox(', 'bits = f"0u * philox(', law(STALLS, "dtype0", "native")),
        ("stochastic bits of each step, native", "(uint32_t)clock", "0u", law(STALLS, "dtype0", "native")),
        ("stochastic bits of each tensor, native", "(uint32_t)index", "0u", STORED + "[lion-bfloat16-stochastic]"),
        (
            "stochastic bits of each block, native",
            "philox(element + i,",
            "philox(i,",
            LAST_BLOCK + "[lion-bfloat16-stochastic]",
        ),
        (
            "Kahan: one that did not move, native",
            "int moved = p != p_before",
            "int moved = p == p",
            law(KAHAN_TIE, "native"),
        ),
        ("stochastic bits by seed, native", "(uint32_t)seed", "0u", law("the_seed_chooses_the_random_bits")),
        ("mean of a unit that a box holds", '" / (of[1] * inner)"', '""', hostile("scale", backend="native")),
        ("sums of a unit that a box holds", "sums[k] = 0;", ";", hostile("scale", backend="native")),
    ),
)
