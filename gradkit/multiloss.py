"""One gradient from several losses: inner products of theirs, weights from these, one combination."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import random
from .gradients import Rows, combinations, gramian, summed
from .graph import check_loss, nodes, tensors
from .options import NOT_NEGATIVE, SEED, Range, brief, check_choice, check_number
from .sharding import is_sharded, refuse_sharded

__all__ = ["CAGrad", "PCGrad"]

Order = Sequence[Sequence[int]]

BUCKET = 1 << 22  # elements that ranks average in one message
STILL = 1e-12  # of all weight: no move is worth a round
NEAR_ZERO = 1e-8  # of a gradient's usual norm: rounding in float32


class Last(NamedTuple):
    """What the last call saw, on its device; reading a number waits for it."""

    gram: Tensor  # inner products [tasks, tasks], or [parameters, tasks, tasks], in float64

    @property
    def cosines(self) -> Tensor:
        """Of the angles between gradients; NaN beside one that is 0."""
        norm = self.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.gram / (norm[..., :, None] * norm[..., None, :])

    @property
    def conflict_rate(self) -> Tensor:
        """The share of pairs whose inner product is negative."""
        tasks = self.gram.shape[-1]
        return (self.gram < 0).double().sum() * (tasks / (tasks - 1) / max(1, self.gram.numel()))


class Method:
    """Makes one gradient of several tasks': a subclass gives the weights.

    last: `gram`, `cosines` and `conflict_rate` of the last call; None before the first.
    """

    each_tensor = False  # whether each parameter has weights of its own

    def __init__(self) -> None:
        self.calls = 0
        self.last: Last | None = None

    def weights(self, gram: Tensor, order: Order | None) -> Tensor:
        """The factors [..., tasks] of the gradients, from their inner products [..., tasks, tasks]."""
        raise NotImplementedError

    def partly(self, tasks: int) -> int:
        """One more factor, for a parameter that some task has no gradient of."""
        return 1

    def combine(self, grads: Sequence[Sequence[Tensor | None]], order: Order | None = None) -> list[Tensor | None]:
        """One gradient for each parameter, None where no task has any.

        grads: `grads[task][parameter]`, a tensor or None; left as they are.
        order: of each task, the tasks in the order in which it meets them; None: as the method has it.
        """
        check_grads(type(self).__name__, grads)
        return self.merge([list(row) for row in grads], order)

    @torch.no_grad()
    def merge(self, rows: Rows, order: Order | None = None) -> list[Tensor | None]:
        """As `combine`; it empties the lists, and writes over gradients that nobody else holds."""
        gram = gramian(rows, self.each_tensor)
        weights = self.weights(gram, order).expand(len(rows[0]), -1)
        partly = [any(g is None for g in column) for column in zip(*rows, strict=True)]
        factors = torch.tensor([self.partly(len(rows)) if x else 1 for x in partly], dtype=weights.dtype)
        merged = combinations(rows, weights * factors.to(weights.device)[:, None])
        self.calls += 1
        self.last = Last(gram)
        return merged

    def state_dict(self) -> dict[str, int]:
        """The number of calls, from which random orders follow."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after as many calls."""
        if "calls" not in state:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: {brief(state)} has no 'calls'; give a method's state_dict()"
            )
        self.calls = int(state["calls"])


class PCGrad(Method):
    """What pulls against another task is taken out of each task's gradient.

        v_i = g_i; for each other task j in random order: v_i -= <v_i, g_j> / |g_j|^2 g_j where <v_i, g_j> < 0
        g = mean or sum over i of v_i

    reduction: "mean", which keeps the size of a mean of losses, or "sum", the paper's. A parameter that some task has
        no gradient of gets the sum in both.
    granularity: "global": inner products over all parameters; "tensor": each parameter by itself.
    seed: of the orders, which are the same on every rank; from three tasks on they matter.
    Yu et al. 2020, https://arxiv.org/abs/2001.06782
    """

    def __init__(self, reduction: str = "mean", granularity: str = "global", seed: int = 0) -> None:
        super().__init__()
        check_choice("PCGrad", "reduction", reduction, ("mean", "sum"))
        check_choice("PCGrad", "granularity", granularity, ("global", "tensor"))
        check_number("PCGrad", "seed", seed, SEED)
        self.reduction, self.granularity, self.seed = reduction, granularity, int(seed)
        self.each_tensor = granularity == "tensor"

    def partly(self, tasks: int) -> int:
        return tasks if self.reduction == "mean" else 1

    def weights(self, gram: Tensor, order: Order | None) -> Tensor:
        tasks = gram.shape[-1]
        met = torch.tensor(self.drawn(tasks) if order is None else others(order, tasks))
        own = torch.eye(tasks, dtype=gram.dtype, device=gram.device)
        mix = own.expand_as(gram)  # v_i = sum over k of mix[i, k] g_k
        for j in met.T.to(gram.device, non_blocking=True):  # what each task meets next
            dot = (mix * gram[..., j, :]).sum(-1)
            square = gram[..., j, j]
            back = torch.where((dot < 0) & (square > 0), dot / square, 0.0)
            mix = mix - back[..., None] * own[j]
        total = mix.sum(-2)
        return total / tasks if self.reduction == "mean" else total

    def drawn(self, tasks: int) -> list[list[int]]:
        """The orders of this call: a function of seed and number of the call."""
        words = random.words(np.arange(tasks * tasks), self.calls, 0, self.seed, random.stream("pcgrad"))[0]
        return others(words.reshape(tasks, tasks).argsort(1, kind="stable").tolist(), tasks)


class CAGrad(Method):
    """The direction near the mean gradient whose worst task gains most.

        g_0 = mean of g_i; w on the simplex minimises <g_w, g_0> + c |g_0| |g_w|, where g_w = sum of w_i g_i
        g = (g_0 + c |g_0| / |g_w| g_w) / (1, 1 + c^2 or 1 + c)

    c: how far from the mean, as a share of its norm; 0 is the mean.
    rescale: 0: no division; 1: by 1 + c^2; 2: by 1 + c.
    Liu et al. 2021, https://arxiv.org/abs/2110.14048
    """

    def __init__(self, c: float = 0.5, rescale: int = 1) -> None:
        super().__init__()
        check_number("CAGrad", "c", c, NOT_NEGATIVE)
        check_number("CAGrad", "rescale", rescale, Range("0, 1 or 2", 0, 3, whole=True))
        self.c, self.rescale = float(c), int(rescale)

    def weights(self, gram: Tensor, order: Order | None) -> Tensor:
        if order is not None:
            raise ValueError("CAGrad: the tasks have no order; leave order=None")
        tasks = gram.shape[-1]
        usual = gram.diagonal().mean()
        gram = gram / torch.where(usual > 0, usual, 1.0)
        start = gram.new_full((tasks,), 1 / tasks)
        c = self.c * torch.sqrt((start @ gram @ start).clamp(min=0))
        w = nearest(gram, c, start)
        norm = torch.sqrt((w @ gram @ w).clamp(min=0))
        total = start + c / (norm + NEAR_ZERO) * w
        return total / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]


def nearest(gram: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """The w on the simplex that minimises <b, w> + c sqrt(w' gram w), b the mean of the columns, from a start.

    Each round moves weight between the two tasks for which that gains most, to the minimum on their line; two tasks
    need one. Elsewhere than on the CPU their number is fixed: looking whether they suffice would wait for the device.
    """
    tasks = len(w)
    b, square = gram.mean(-1), gram.diagonal()
    slope = b[:, None] - b
    length = square[:, None] + square - 2 * gram  # |g_i - g_j|^2
    bend = c * c * length - slope * slope  # not above 0: the slope wins all along the line
    bent = bend > 0
    aside = torch.where(bent, slope / torch.sqrt(length * torch.where(bent, bend, 1.0)), 0.0)
    to_end = torch.where(slope < 0, 1.0, -1.0)
    for _ in range(1 if tasks == 2 else 8 * tasks):
        along = gram @ w
        now = (w @ along).clamp(min=0)
        along = along[:, None] - along
        deep = (now - along * along / length).clamp(min=0)
        move = torch.where(bent, -along / length - aside * torch.sqrt(deep), to_end)  # from j to i
        move = torch.minimum(torch.maximum(move, -w[:, None]), w)
        then = (length * move * move + 2 * along * move + now).clamp(min=0)
        best = (slope * move + c * (torch.sqrt(then) - torch.sqrt(now))).argmin().view(1)
        by = move.view(-1)[best]
        if by.is_cpu and abs(by.numpy()[0]) < STILL:
            break
        w = w.index_add(0, best // tasks, by).index_add(0, best % tasks, -by)
    return w


def backward(
    losses: Sequence[Tensor],
    optimizer_or_params: torch.optim.Optimizer | Iterable[Any],
    method: Method,
    *,
    shared: Iterable[Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """In place of `sum(losses).backward()`: the method combines the gradients of parameters that losses share.

    Every other parameter gets its own loss's gradient. All is added to `p.grad`, as backward does. Graphs are freed.

    losses: two or more, each of one number; unscaled.
    optimizer_or_params: whose parameters get gradients.
    method: `PCGrad(...)` or `CAGrad(...)`.
    shared: the parameters to combine; None: those that two losses or more reach. The others get the sum.
    scaler: a GradScaler, by which losses are to be scaled.
    Where torch.distributed is initialised, gradients are first averaged over all ranks.
    """
    if not isinstance(method, Method):
        raise TypeError(f"backward: method={brief(method)}: give gradkit.multiloss.PCGrad() or CAGrad()")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"backward: scaler={brief(scaler)}: give a torch.amp.GradScaler")
    params = trained(optimizer_or_params)
    for p in params:
        checked("backward: in p.grad", p.grad)
    graphs = graphs_of(losses)
    reached = [{id(node.variable) for node in graph if hasattr(node, "variable")} for graph in graphs]
    trunk = common(params, reached, shared)
    held = {id(p) for p in trunk}
    rest = [p for p in params if id(p) not in held]
    inner = [{node for node in graph if not hasattr(node, "variable")} for graph in graphs]
    of_trunk: Rows = []
    of_rest: Rows = []
    for i, loss in enumerate(losses):
        wanted = [p for p in params if id(p) in reached[i]]
        keep = any(not inner[i].isdisjoint(later) for later in inner[i + 1 :])
        scaled = loss if scaler is None else scaler.scale(loss)
        grads = torch.autograd.grad(scaled, wanted, retain_graph=keep, allow_unused=True)
        found = {id(p): checked(f"backward: losses[{i}]", g) for p, g in zip(wanted, grads, strict=True)}
        of_trunk.append([found.pop(id(p), None) for p in trunk])
        of_rest.append([found.pop(id(p), None) for p in rest])
        del grads  # the lists alone hold them from here on
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        average([*of_trunk, *of_rest])
    with torch.no_grad():
        for p, g in zip(trunk, method.merge(of_trunk), strict=True):
            give(p, g)
        for i, p in enumerate(rest):
            give(p, summed([row[i] for row in of_rest]))
            for row in of_rest:
                row[i] = None


def trained(optimizer_or_params: torch.optim.Optimizer | Iterable[Any]) -> list[Tensor]:
    """The parameters that gradients are wanted of."""
    given: Any = optimizer_or_params
    if isinstance(given, torch.optim.Optimizer):
        given = [p for group in given.param_groups for p in group["params"]]
    params = [p for p in tensors("backward", given) if p.requires_grad]
    for p in params:
        refuse_sharded("backward", p)
    return params


def graphs_of(losses: Sequence[Tensor]) -> list[set[Any]]:
    """The nodes behind each loss."""
    if not isinstance(losses, list | tuple):
        raise TypeError(f"backward: losses={brief(losses)}: give a list with the loss of each task")
    if len(losses) < 2:
        raise ValueError(f"backward: losses has {len(losses)}; give two or more, or call loss.backward() for one")
    for i, loss in enumerate(losses):
        check_loss("backward", f"losses[{i}]", loss)
        if not loss.requires_grad:
            raise ValueError(
                f"backward: losses[{i}] has no graph; compute it outside torch.no_grad(), and don't detach it"
            )
    graphs = [nodes(loss) for loss in losses]
    if any(type(node).__name__ == "CheckpointFunctionBackward" for graph in graphs for node in graph):
        raise RuntimeError(
            "backward: a part of the losses is checkpointed with use_reentrant=True, which hides its parameters; "
            "give torch.utils.checkpoint.checkpoint use_reentrant=False"
        )
    return graphs


def common(params: list[Tensor], reached: list[set[int]], shared: Iterable[Any] | None) -> list[Tensor]:
    """The parameters whose gradients the method combines."""
    for i, ids in enumerate(reached):
        if not any(id(p) in ids for p in params):
            raise ValueError(f"backward: losses[{i}] reaches none of the parameters; give those that it depends on")
    if shared is None:
        found = [p for p in params if sum(id(p) in ids for ids in reached) > 1]
        if not found:
            raise ValueError("backward: no parameter is reached by two losses; sum(losses).backward() is all it takes")
        return found
    chosen = {id(p) for p in tensors("backward: shared", shared)}
    found = [p for p in params if id(p) in chosen]
    if not any(id(p) in ids for p in found for ids in reached):
        raise ValueError("backward: none of shared= is a parameter that a loss reaches; give some of the parameters")
    return found


def check_grads(who: str, grads: Sequence[Sequence[Tensor | None]]) -> None:
    """Raise if these are not the gradients of several tasks for the same parameters."""
    if not isinstance(grads, list | tuple) or not all(isinstance(row, list | tuple) for row in grads):
        raise TypeError(f"{who}: grads={brief(grads)}: give a list of each task, of each parameter's gradient or None")
    if len(grads) < 2:
        raise ValueError(f"{who}: grads has {len(grads)} tasks; give two or more")
    for i, row in enumerate(grads):
        if len(row) != len(grads[0]):
            raise ValueError(
                f"{who}: grads[{i}] has {len(row)} gradients, grads[0] {len(grads[0])}; "
                f"give one or None for each parameter"
            )
    for j, column in enumerate(zip(*grads, strict=True)):
        first = next((g for g in column if g is not None), None)
        for i, g in enumerate(column):
            checked(f"{who}: grads[{i}][{j}]", g)
            if g is not None and first is not None and g.shape != first.shape:
                raise ValueError(
                    f"{who}: grads[{i}][{j}] has the shape {tuple(g.shape)}, another task's {tuple(first.shape)}; "
                    f"give gradients of the same parameter"
                )


def checked(where: str, g: Tensor | None) -> Tensor | None:
    """A gradient that can be combined; else raise."""
    if g is None:
        return g
    if not isinstance(g, Tensor):
        raise TypeError(f"{where} is {brief(g)}; give a tensor or None")
    if g.layout != torch.strided or not g.is_floating_point() or is_sharded(g):
        kind = "a DTensor" if is_sharded(g) else f"{g.dtype}, {g.layout}"
        raise TypeError(f"{where}: a gradient is {kind}; give dense floating ones (nn.Embedding(sparse=False))")
    return g


def others(order: Order, tasks: int) -> list[list[int]]:
    """Of each task the others, in this order."""
    rows = [[int(j) for j in row if int(j) != i] for i, row in enumerate(order)]
    if len(rows) != tasks or any(sorted([*row, i]) != list(range(tasks)) for i, row in enumerate(rows)):
        raise ValueError(f"PCGrad: order={brief(order)}: give {tasks} permutations of the tasks, one for each")
    return rows


def give(p: Tensor, g: Tensor | None) -> None:
    """Add to p.grad, as backward does."""
    if g is not None and p.grad is not None:
        p.grad += g
    elif g is not None:
        p.grad = g


def average(rows: Rows) -> None:
    """Put the mean over all ranks in place of each gradient; waited for once."""
    buckets: list[list[tuple[list[Tensor | None], int]]] = []
    free, last = 0, None
    for row in rows:
        for i, g in enumerate(row):
            if g is None:
                continue
            if g.numel() > free or (g.device, g.dtype) != last:
                buckets.append([])
                free, last = BUCKET, (g.device, g.dtype)
            buckets[-1].append((row, i))
            free -= g.numel()
    waiting = []
    for bucket in buckets:
        found = [g for row, i in bucket if (g := row[i]) is not None]
        flat = torch.cat([g.reshape(-1) for g in found]).div_(dist.get_world_size())
        for (row, i), g, part in zip(bucket, found, flat.split([g.numel() for g in found]), strict=True):
            row[i] = part.view(g.shape)
        waiting.append(dist.all_reduce(flat, async_op=True))
    for work in waiting:
        work.wait()
