"""Optimizer: groups, loading, closure, and the end of every chain: decay and the write."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import loading
from .chain import Chain, Placed, assemble
from .machine import Machine, as_chain, check_dtype, checked_chain
from .options import (
    COUNT,
    IN_GROUPS,
    Number,
    brief,
    builtin,
    check_number,
    hint,
    refuse_flags,
    split_options,
)
from .transforms.decay import last_links


class Optimizer(Machine, torch.optim.Optimizer):
    """Runs a chain: `gradkit.Optimizer(params, chain(...), lr=...)`, or a subclass that gives `links(group)`.

        u = chain(gradient)        p <- decay(p) - lr u

    params: what torch.optim takes: tensors, group dicts, or (name, tensor) pairs.
    lr: factor of the chain's result. weight_decay, decay: see `gradkit.transforms`.
    options: maximize, decay, transforms, backend, state_dtype, rounding, seed.
    """

    _built = False

    def __init__(
        self, params: Any, chain: Chain | None = None, *, lr: Number = 1e-3, weight_decay: Number = 0.0, **options: Any
    ):
        given, own = split_options(self, dict(options))
        who, transforms = type(self).__name__, given.pop("transforms", ())
        if not isinstance(transforms, list | tuple):
            raise TypeError(f"{who}: transforms={brief(transforms)}: give a list, e.g. transforms=[clip_by_norm(1.0)]")
        if chain is None and type(self).links is Optimizer.links:
            raise TypeError(f"{who}: give a chain: {who}(params, chain(...)), or use one of gradkit's classes")
        Machine.__init__(self, [checked_chain(who, x) for x in transforms], given.pop("backend", "auto"))
        self.chain = chain if chain is None else checked_chain(who, chain)
        defaults = {"lr": lr, "weight_decay": weight_decay, **own, **IN_GROUPS, **given}
        self._check_values({**defaults, "backend": self.backend})
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._check_names(self.param_groups)
        self._built = True

    def pieces(self, group: Mapping[str, Any]) -> list[Placed]:
        """The user's links, the class's own, decay and the write."""
        l2, last = last_links(group["decay"], group["weight_decay"])
        built_in = as_chain(self.links(group))
        if not isinstance(built_in, Chain):
            raise TypeError(f"{type(self).__name__}: links() returned {built_in!r}; return chain(...)")
        return assemble(self.transforms, built_in, l2, last)

    def links(self, group: Mapping[str, Any]) -> Chain:
        """The chain for one group: a pure function of its values."""
        assert self.chain is not None
        return self.chain

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; everything is checked first."""
        who = type(self).__name__
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"{who}: a group is a dict such as {{'params': [...], 'lr': 0.1}}")
        for name in ("backend", "transforms"):
            if name in param_group:
                raise ValueError(f"{who}: {name}= belongs to the optimizer, not to a group; give it to {who}(...)")
        refuse_flags(who, param_group)
        group = {**self.defaults, **param_group}
        group = {k: v if k in ("params", "param_names") else builtin(v) for k, v in group.items()}
        group.setdefault("lr_ref", group["lr"])
        program = self.check_group(group, getattr(self, "param_groups", ()))
        known = {*program.arguments, *program.shared}
        for name in param_group:
            if "." in name and name not in known:
                raise ValueError(f"{who}: the group's {name!r} belongs to no link{hint(name, known)}")
        group = {**program.arguments, **group, "lr_ref": float(group["lr_ref"]), "algorithm": who}
        if not getattr(self, "param_groups", None):
            group["clock"] = torch.zeros((), dtype=torch.float64)
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        if not isinstance(params, set):  # which torch refuses, for it has no order
            group["params"] = params = list(params or ())
        for p in params:
            tensor = p[1] if isinstance(p, tuple) else p
            if not isinstance(tensor, Tensor):
                continue  # torch refuses it
            check_dtype(who, tensor)
            self.check_parameter(tensor, group)
        if self._built:
            names = [p[0] for p in params if isinstance(p, tuple)]
            self._check_names([*self.param_groups, {**group, "param_names": names}])
        super().add_param_group(group)
        param_group.update(group)  # as in torch, the user's own dict becomes the group
        self.param_groups[-1] = param_group
        for name in program.shared:
            self.param_groups[0].setdefault(name, torch.zeros((), dtype=torch.float64))
        self._kept.update(program.shared)
        self._drop_plans()

    @torch._disable_dynamo  # traced, the table of scalars would be baked in
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, for the parameters that have a gradient; without any it does nothing.

        With sharded parameters and a measure (a clip) every rank must have some gradient: the others wait for it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        if any(g is not None for g in grads):
            self._run(grads)
        return loss

    @torch.no_grad()
    def init_state(self, step: int = 0) -> None:
        """Make all slots now, laid out as at that step; 0: the last one's."""
        check_number(f"{type(self).__name__}.init_state", "step", step, COUNT)
        params = {p for g in self.param_groups for p in g["params"] if p.requires_grad}
        self._drop_plans()
        self._make_state(params, max(1.0, float(step) or self.clock))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load and merge: the same class goes on bitwise; from another optimizer, slots of our names are taken."""
        before = [dict(g) for g in self.param_groups]
        seen: list[Mapping[str, Any]] = []  # after the user's own pre-hooks

        def pre(_: Any, final: dict[str, Any]) -> None:
            loading.check(self, final)
            seen.append(final)

        first = self.register_load_state_dict_pre_hook(pre)
        then = self.register_load_state_dict_post_hook(lambda _: loading.merge(self, before, seen[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            then.remove()
        self._drop_plans()
        self._counted, self._laid = None, {}

    def __getstate__(self) -> dict[str, Any]:
        ours = {n: vars(self)[n] for n in ("chain", "transforms", "backend", "choices", "_kept")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_plans" in vars(self):
            self._drop_plans()
        super().__setstate__(state)
        self._forget()
