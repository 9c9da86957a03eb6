"""What each parameter of a model is: hidden matrix, embedding, last layer or vector; groups made from that."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .options import NOT_NEGATIVE, Number, check_choice, check_number, hint, listed

ROLES = ("matrix", "embedding", "last", "vector")
STRONGEST = ("embedding", "last", "matrix", "vector")  # of the uses of a tied tensor
HEADS = ("lm_head", "head", "heads", "classifier")
OUTPUTS = ("output", "out", "fc")  # layers in the middle have such names too: asked where the order says nothing
FUSED = ("in_proj_weight", "c_attn", "qkv", "qkv_proj", "to_qkv", "query_key_value", "Wqkv")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OTHERS = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase)  # with weights that are never an output layer's
NORM = re.compile(r"Norm(\dd)?$")


class Use(NamedTuple):
    """One place of a model that holds a parameter."""

    name: str
    kind: str
    role: str
    fan_in: int | None


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter and its role.

    fan_in: the axis along which one output's inputs lie, None for a vector. Where there are more than two axes, 1 is
        all axes but the first.
    values: what overrides give beside these, for the group.
    """

    parameter: Tensor
    uses: tuple[Use, ...]
    role: str
    fan_in: int | None
    kind: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.uses[0].name

    @property
    def tied(self) -> tuple[str, ...]:
        """The other names of the same tensor."""
        return tuple(use.name for use in self.uses[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def matches(self, key: str) -> bool:
        """Whether an override's key, a role or a pattern, means this one."""
        return self.role == key if key in ROLES else any(fnmatchcase(use.name, key) for use in self.uses)

    def changed(self, given: Mapping[str, Any]) -> "Entry":
        """As an override says."""
        values = {**self.values, **given}
        role, dims = values.pop("role", self.role), self.parameter.dim()
        check_choice("overrides", "role", role, ROLES)
        use = self if role == self.role else chosen_use(self.uses, role)
        usual = None if role == "vector" else rows_axis(role, dims) if use.fan_in is None else use.fan_in
        fan_in = values.pop("fan_in", usual)
        if not (fan_in is None if role == "vector" else dims > 1 and fan_in in range(dims)):
            raise ValueError(
                f"overrides: {self.name!r} of shape {self.shape} can't be {role!r} with fan_in={fan_in}; a vector has "
                f"no fan_in, the other roles need two axes and name one"
            )
        return replace(self, role=role, fan_in=fan_in, kind=use.kind, values=values)


class RoleMap:
    """The roles of a model's parameters; prints as a table, `roles(model)["name"]` is one entry."""

    def __init__(self, entries: Iterable[Entry], named: bool = True):
        self.entries, self.named = tuple(entries), named

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        names = {use.name: e for e in self.entries for use in e.uses}
        if name not in names:
            raise KeyError(f"there is no parameter {name!r}{hint(name, names)}")
        return names[name]

    def __repr__(self) -> str:
        return "\n".join(line for role in ROLES for line in section(role, [e for e in self if e.role == role]))

    def overridden(self, overrides: Mapping[str, Any]) -> "RoleMap":
        """With roles and values of the user's: one rule after the other."""
        if not isinstance(overrides, Mapping):
            raise TypeError(f"overrides={overrides!r}: give a dict such as {{'lm_head.weight': 'last'}}")
        entries = self.entries
        for key, value in overrides.items():
            if not isinstance(value, str | Mapping) or "params" in value:
                raise TypeError(f"overrides: {key!r}: {value!r} is no role and no dict of a group's values")
            if not any(e.matches(key) for e in entries):
                names = [use.name for e in entries for use in e.uses]
                what = f"no parameter has the role {key!r}" if key in ROLES else f"{key!r} matches no parameter"
                raise ValueError(f"overrides: {what}{hint(key, names) or '; print(gradkit.roles(model)) shows them'}")
            values = {"role": value} if isinstance(value, str) else value
            entries = tuple(e.changed(values) if e.matches(key) else e for e in entries)
        return RoleMap(entries, self.named)

    def groups(self, weight_decay: Number | None = None) -> list[dict[str, Any]]:
        """One group for each role and set of values, of the parameters that require a gradient."""
        found: list[dict[str, Any]] = []
        for role in ROLES:
            decay = 0.0 if role == "vector" else weight_decay
            for e in (e for e in self if e.role == role and e.parameter.requires_grad):
                values = {"role": role, "fan_in": e.fan_in, **({} if decay is None else {"weight_decay": decay})}
                values.update(e.values)
                group = next((g for g in found if {k: v for k, v in g.items() if k != "params"} == values), None)
                if group is None:
                    found.append(group := {"params": [], **values})
                group["params"].append((e.name, e.parameter) if self.named else e.parameter)
        return found


def roles(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> RoleMap:
    """Which role each parameter of a model has: `print(gradkit.roles(model))`.

    matrix: weights of hidden linear layers and convolutions. embedding: tables of rows. last: the output layer.
    vector: biases, norms, all of at most one axis. Frozen parameters are in it too.
    overrides: as of `param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"roles: model is a {type(model).__name__}; give the model itself, a torch.nn.Module")
    heads = output_layers(dict(model.named_modules()))
    uses: dict[Tensor, list[Use]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        layer, what = module, "original"
        if isinstance(module, ParametrizationList):  # of a tensor of the layer above, e.g. by a weight norm
            above, _, what = f".{path}".rpartition(".parametrizations.")
            layer = model.get_submodule(above[1:])
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{own}" if path else own
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"roles: {name!r} has no shape yet; run one forward of the model first")
            role, fan_in = found_role(layer, what if own == "original" else own, p)
            fused = ", fused qkv" if {*name.split(".")[-2:]} & {*FUSED} and role == "matrix" else ""
            role = "last" if role == "matrix" and layer in heads else role
            uses.setdefault(p, []).append(Use(name, type(layer).__name__ + fused, role, fan_in))
    entries = []
    for p, mine in uses.items():
        use = min(mine, key=lambda use: STRONGEST.index(use.role))
        entries.append(Entry(p, tuple(mine), use.role, use.fan_in, use.kind, {}))
    return RoleMap(entries).overridden({} if overrides is None else overrides)


def param_groups(
    model: nn.Module, weight_decay: Number | None = None, overrides: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A model's parameters in groups by role, with names, for any optimizer: `AdamW(param_groups(model), lr=...)`.

    weight_decay: of all groups but the vectors', which get 0; None: what the optimizer is given.
    overrides: {pattern of names, or role: role, or dict of a group's values}, e.g. {"lm_head.weight": "last",
        "embedding": {"lr": 1e-2}}; one after the other, a later one wins. One that matches nothing raises.
    """
    if weight_decay is not None:
        check_number("param_groups", "weight_decay", weight_decay, NOT_NEGATIVE)
    groups = roles(model, overrides).groups(weight_decay)
    if not groups:
        raise ValueError("param_groups: no parameter of the model requires a gradient; unfreeze what is to be trained")
    return groups


def by_shape(who: str, params: Iterable[Any]) -> RoleMap:
    """The roles of parameters that come without a model: up to one axis is a vector, all else a matrix. Warns."""
    given = list(params)
    named = all(isinstance(p, tuple) for p in given)
    entries = []
    for name, p in given if named else [(str(i), p) for i, p in enumerate(given)]:
        role, fan_in = ("vector", None) if p.dim() < 2 else ("matrix", 1)
        entries.append(Entry(p, (Use(name, "by shape", role, fan_in),), role, fan_in, "by shape", {}))
    made = RoleMap(entries, named)
    warnings.warn(
        f"{who}: the groups have no role, so shapes decide; embeddings and the last layer are taken for hidden "
        f"matrices. Give gradkit.param_groups(model).\n{made}",
        stacklevel=4,  # of who calls the constructor that asked `with_roles`
    )
    return made


def with_roles(who: str, params: Any) -> Any:
    """What an optimizer is given: parameters in groups by shape; all else, groups too, as it is."""
    if isinstance(params, Tensor):
        return params  # which torch refuses
    given = params if isinstance(params, list | tuple) else list(params)
    loose = (x[1] if isinstance(x, tuple) and len(x) == 2 else x for x in given)
    return by_shape(who, given).groups() if given and all(isinstance(x, Tensor) for x in loose) else given


def check_role(who: str, group: Mapping[str, Any]) -> tuple[str, int]:
    """A group's role and the fan-in of its matrices; where the group doesn't say it, that of a two-axis weight."""
    role, fan_in = group.get("role"), group.get("fan_in")
    if role is None:
        raise ValueError(f"{who}: a group has no role: use gradkit.param_groups(model), or one of {listed(ROLES)}")
    check_choice(who, "role", role, ROLES)
    return role, rows_axis(role, 2) if fan_in is None else fan_in


def check_axes(who: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise if a parameter lacks the axes that its group's role needs."""
    role, fan_in = check_role(who, group)
    if role != "vector" and p.dim() < 2:
        raise ValueError(
            f"{who}: a parameter of shape {tuple(p.shape)} can't be {role!r}, which needs two axes; give it the role "
            f"'vector', or make the groups from the model as it is now"
        )
    if role != "vector" and fan_in not in range(p.dim()):
        raise ValueError(
            f"{who}: fan_in={fan_in!r} is no axis of a parameter of shape {tuple(p.shape)}: use one of "
            f"{listed(range(p.dim()))}"
        )


def found_role(module: nn.Module, own: str, p: Tensor) -> tuple[str, int | None]:
    """The role of a parameter that a module calls `own`, and its fan-in; of the last layer as of a hidden one."""
    table, layer = isinstance(module, nn.Embedding | nn.EmbeddingBag), is_layer(module)
    thin = sum(n > 1 for n in p.shape) < 2  # a token, a scale of channels, a weight norm's magnitudes
    weight = own.startswith("weight") and not own.endswith("_g")  # may be thin: one input or output
    if p.dim() < 2 or "bias" in own or NORM.search(type(module).__name__):
        return "vector", None
    if thin and not (weight and (layer or table or isinstance(module, OTHERS))):
        return "vector", None
    if table or (not layer and ("embed" in own or "token" in own or type(module).__name__.endswith("Embedding"))):
        return "embedding", rows_axis("embedding", p.dim())
    return "matrix", 0 if isinstance(module, TRANSPOSED) or is_conv1d(module) else rows_axis("matrix", p.dim())


def rows_axis(role: str, dims: int) -> int:
    """The fan-in where no layer says it: an embedding's rows, else what a linear layer has."""
    return dims - 2 if role == "embedding" else 1


def chosen_use(uses: tuple[Use, ...], role: str) -> Use:
    """The one whose layout counts in a role: of a tied head the linear layer, unless it is to be an embedding."""
    return next((u for u in uses if (u.role == "embedding") == (role == "embedding")), uses[0])


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with the weight [in, out]."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__.endswith("Linear") or is_conv1d(module)


def is_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONVOLUTIONS + TRANSPOSED)


def output_layers(modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The last layers: linear ones by name, else the final layer unless a repeated block has it, else by name."""
    layers = [path for path, module in modules.items() if is_layer(module)]
    final = [modules[path] for path in layers[-1:] if not in_block(path, modules)]
    return named_heads(HEADS, modules) or final or named_heads(OUTPUTS, modules)


def named_heads(names: tuple[str, ...], modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The final linear layer of each module of such a name; where it is a list or dict, of each of its members."""
    found = []
    for path, module in modules.items():
        if path.rpartition(".")[2] in names and not in_block(path, modules):
            several = isinstance(module, nn.ModuleList | nn.ModuleDict)
            for head in module.children() if several else [module]:
                found += [m for m in head.modules() if is_linear(m)][-1:]
    return found


def in_block(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module lies in a block of a list of blocks, or in one of several of a class in a sequence."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        container, block = modules[".".join(parts[: n - 1])], modules[".".join(parts[:n])]
        if isinstance(container, nn.ModuleList):
            return True
        alike = [m for m in container.children() if type(m) is type(block)]
        if isinstance(container, nn.Sequential) and type(block) is not nn.Sequential and len(alike) > 1:
            return True
    return False


def section(role: str, entries: list[Entry]) -> list[str]:
    """A role's lines of the table: parameters that differ only in the numbers of their names share one."""
    if not entries:
        return [f"{role}: none"]
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for e in entries:
        tied = [f"tied to {name}" for name in dict.fromkeys(map(starred, e.tied))]
        frozen = [] if e.parameter.requires_grad else ["frozen"]
        extra = [f"{k}={v!r}" for k, v in e.values.items()]
        axis = "" if e.fan_in is None else f"fan-in {e.fan_in}"
        shape = " x ".join(map(str, e.shape)) or "scalar"
        rows.setdefault((starred(e.name), shape, axis, ", ".join([e.kind, *tied, *frozen, *extra])), []).append(e)
    cells = [
        (name if len(mine) > 1 else mine[0].name, str(len(mine)), shape, axis, kind)
        for (name, shape, axis, kind), mine in rows.items()
    ]
    names, counts, *rest = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(names), f"{row[1]:>{counts}} of", *map(str.ljust, row[2:], rest)]) for row in cells
    ]
    total = sum(e.parameter.numel() for e in entries)
    count = f"{len(entries)} tensor{'s' * (len(entries) > 1)}"
    return [f"{role}: {count}, {total:,} elements", *(f"  {line}".rstrip() for line in lines)]


def starred(name: str) -> str:
    """A name with * for the numbers between its dots: a pattern that matches it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
