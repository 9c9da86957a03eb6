"""Optimizers and gradient transforms for PyTorch, each written once as plain Python and run at the memory's speed.

| class | what it is | paper |
|---|---|---|
| `AdamW` | Adam with decoupled weight decay | https://arxiv.org/abs/1711.05101 |
| `Lion` | the sign of an interpolated momentum | https://arxiv.org/abs/2302.06675 |
| `DiffGrad` | Adam that slows down where the gradient stops changing | https://arxiv.org/abs/1909.11015 |
| `AdEMAMix` | AdamW with a second, slow momentum | https://arxiv.org/abs/2409.03137 |
| `Grokfast` | Adam behind a filter that amplifies slow gradients | https://arxiv.org/abs/2405.20233 |
| `SPAM` | Adam that cuts spikes and forgets its momentum | https://arxiv.org/abs/2501.06842 |
| `StableSPAM` | SPAM with limits and norms that adapt | https://arxiv.org/abs/2502.17055v2 |
| `Sophia` | a momentum over the Hessian's diagonal, limited | https://arxiv.org/abs/2305.14342 |
| `SCALE` | gradients of one size for each output, almost without state | https://arxiv.org/abs/2506.16659 |
| `FRUGAL` | state for a part of the matrices, signs for the rest | https://arxiv.org/abs/2411.07837 |
| `Optimizer` | your own chain of rules, measures and transforms | |

`attach(optimizer, ...)` puts transforms of the gradient in front of any other `torch.optim.Optimizer`.
"""

from . import estimators, losses, multiloss, ops, transforms
from .attach import attach
from .chain import Chain, chain
from .language import RuleError, fn
from .multiloss import backward
from .optim.adamw import AdamW
from .optim.ademamix import AdEMAMix
from .optim.diffgrad import DiffGrad
from .optim.frugal import FRUGAL
from .optim.grokfast import Grokfast
from .optim.lion import Lion
from .optim.scale import SCALE
from .optim.sophia import Sophia
from .optim.spam import SPAM
from .optim.stablespam import StableSPAM
from .optimizer import Optimizer
from .roles import param_groups, roles
from .selection import Choices, split
from .transform import Slot, Stage, derive, measure, rule

__version__ = "0.1.0"

__all__ = [
    "AdEMAMix",
    "AdamW",
    "Chain",
    "Choices",
    "DiffGrad",
    "FRUGAL",
    "Grokfast",
    "Lion",
    "Optimizer",
    "RuleError",
    "SCALE",
    "SPAM",
    "Slot",
    "Sophia",
    "StableSPAM",
    "Stage",
    "attach",
    "backward",
    "chain",
    "derive",
    "estimators",
    "fn",
    "losses",
    "measure",
    "multiloss",
    "ops",
    "param_groups",
    "roles",
    "rule",
    "split",
    "transforms",
]
