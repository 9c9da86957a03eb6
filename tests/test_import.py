"""What `import gradkit` and a step load, in fresh processes: nothing slow that the user did not ask for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("triton", "torch._dynamo", "torch._inductor", "sympy", "lightning", "transformers", "matplotlib")
TRAIN = """
p = torch.nn.Parameter(torch.ones(4))
p.grad = torch.ones(4)
optimizer = {}([p])
optimizer.step()
"""


def added(before, statements):
    """Those of SLOW that a fresh Python loads in the statements, and did not before."""
    seen = f"import sys\nseen = {{m for m in {SLOW} if m in sys.modules}}"
    script = f"{before}\n{seen}\n{statements}\nprint(*[m for m in {SLOW} if m in sys.modules and m not in seen])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_loads_nothing_slow():
    assert added("import torch", "import gradkit") == []
    assert added("import torch", "import matplotlib") == ["matplotlib"]  # what the line above would see


def test_a_step_loads_nothing_slow_that_torchs_own_has_not():
    before = "import torch" + TRAIN.format("torch.optim.AdamW")  # the constructor of all its optimizers loads dynamo
    assert added(before, "import gradkit" + TRAIN.format("gradkit.AdamW")) == []


def test_the_kernels_cannot_be_imported_under_their_folders_name():
    """The top-level name is another package's, also for who works in a checkout."""
    command = [sys.executable, "-c", "import triton_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "ImportError" in done.stderr, done.stderr
