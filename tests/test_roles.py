"""Roles of parameters: which one is found in a model, how overrides change it, and the groups that are made from it."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gradkit
from gradkit.roles import RoleMap, with_roles


class Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class ResNet(nn.Module):
    """As torchvision names things."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
        self.layer2 = nn.Sequential(Residual(4, 6, 2), Residual(6, 6, 1))
        self.fc = nn.Linear(6, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


class Translator(nn.Module):
    """A table of tokens and positions, torch's Transformer, an output layer that may be the table."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 6, 8))
        self.transformer = nn.Transformer(8, 2, 2, 1, 12, 0.0, batch_first=True)
        self.generator = nn.Linear(8, 11)
        if tied:
            self.generator.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.pos_embed
        return self.generator(self.transformer(x, x))


class Conv1D(nn.Module):
    """Hugging Face's linear layer."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Named(nn.Module):
    """A module of the members that it is given."""

    def __init__(self, **members: nn.Module | nn.Parameter):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


class Block(Named):
    pass


class ShardedLinear(Named):
    """As parallel frameworks write theirs: no subclass of torch's."""


class ShardedEmbedding(Named):
    pass


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def block() -> Block:
    return Block(attention=nn.Linear(4, 4), output=nn.Linear(4, 4))


def of_role(model: nn.Module, role: str) -> list[str]:
    return [e.name for e in gradkit.roles(model) if e.role == role]


def groups_by_role(groups: list[dict]) -> dict[str, list[str]]:
    return {g["role"]: [name for name, _ in g["params"]] for g in groups}


def test_a_resnet_has_matrices_vectors_and_a_last_layer():
    found = {e.name: (e.role, e.fan_in) for e in gradkit.roles(ResNet())}
    for name, p in ResNet().named_parameters():
        hidden = ("matrix", 1) if p.dim() == 4 else ("vector", None)
        assert found.pop(name) == (("last", 1) if name == "fc.weight" else hidden)
    assert not found
    assert of_role(ResNet(classes=0), "last") == []  # the last convolution is one of a repeated block


def test_a_transformer_prints_as_a_table():
    table = str(gradkit.roles(Translator(tied=True), {"pos_embed": {"lr": 0.1}}))
    lines = """\
matrix: 14 tensors, 1,600 elements
  transformer.encoder.layers.*.self_attn.in_proj_weight        2 of  24 x 8  fan-in 1  MultiheadAttention, fused qkv
  transformer.encoder.layers.*.self_attn.out_proj.weight       2 of  8 x 8   fan-in 1  NonDynamicallyQuantizableLinear
  transformer.encoder.layers.*.linear1.weight                  2 of  12 x 8  fan-in 1  Linear
  transformer.decoder.layers.0.linear2.weight                  1 of  8 x 12  fan-in 1  Linear
embedding: 2 tensors, 136 elements
  pos_embed      1 of  1 x 6 x 8  fan-in 1  Translator, lr=0.1
  tokens.weight  1 of  11 x 8     fan-in 0  Embedding, tied to generator.weight
last: none
vector: 33 tensors, 343 elements
  transformer.encoder.layers.*.self_attn.in_proj_bias        2 of  24    MultiheadAttention
  generator.bias                                             1 of  11    Linear"""
    found = table.splitlines()
    assert [line for line in found if line in lines.splitlines()] == lines.splitlines()
    assert len(found) == 4 + 10 + 2 + 25


def test_roles_of_every_parameter_stand_in_the_map_and_models_stay_as_they_are():
    for model in (ResNet(), Translator(), Translator(tied=True)):
        before = copy.deepcopy(model.state_dict())
        found = gradkit.roles(model)
        assert isinstance(found, RoleMap) and len(found) == len(list(found)) == len(list(model.parameters()))
        assert {id(e.parameter) for e in found} == {id(p) for p in model.parameters()}
        assert all(found[name].parameter is p for name, p in model.named_parameters(remove_duplicate=False))
        assert all(e.shape == tuple(e.parameter.shape) for e in found)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(KeyError, match="there is no parameter 'token.weight'; did you mean 'tokens.weight'"):
        found["token.weight"]


LAYERS = {
    "Linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "Conv1D": (lambda: Conv1D(4, 3), (2, 3)),
    "Embedding": (lambda: nn.Embedding(3, 4), None),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(3, 4), None),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 2), (2, 3, 5)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 5, 5, 5)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_outputs_inputs_lie_along_the_fan_in_axis(name):
    """One output's gradient reaches every index of that axis, and one index of the axis across."""
    make, shape = LAYERS[name]
    layer = make()
    entry = gradkit.roles(layer)["weight_ih" if name == "RNNCell" else "weight"]
    y = layer(torch.ones(shape) if shape else torch.arange(3).unsqueeze(1)).squeeze()  # [batch, outputs, ...]
    (g,) = torch.autograd.grad(y[:, 1].sum(), [entry.parameter])
    along, across = ((g != 0).movedim(axis, 0).flatten(1).any(1).tolist() for axis in (entry.fan_in, 1 - entry.fan_in))
    assert along == [True] * 3 and across == [False, True, False, False]


LAST = {
    "a sequence": (mlp, ["2.weight"]),
    "one layer": (lambda: nn.Linear(4, 1), ["weight"]),
    "plain sequences are no blocks": (lambda: nn.Sequential(mlp(), mlp()), ["1.2.weight"]),
    "nor are layers": (lambda: Named(layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])), ["layers.1.weight"]),
    "the order counts": (lambda: Named(fc=nn.Linear(4, 4), value=nn.Linear(4, 1)), ["value.weight"]),
    "before the order the name": (lambda: Named(head=nn.Linear(4, 9), body=nn.Linear(4, 4)), ["head.weight"]),
    "blocks behind it": (lambda: Named(lm_head=nn.Linear(4, 9), h=nn.ModuleList([block()])), ["lm_head.weight"]),
    "output where blocks are": (lambda: Named(output=nn.Linear(4, 9), h=nn.ModuleList([block()])), ["output.weight"]),
    "a list of blocks": (lambda: Named(layers=nn.ModuleList([block()])), []),
    "a sequence of blocks": (lambda: nn.Sequential(nn.Embedding(9, 4), block(), block()), []),
    "one block is none": (lambda: nn.Sequential(nn.Embedding(9, 4), block()), ["1.output.weight"]),
    "heads in blocks": (lambda: Named(h=nn.ModuleList([Named(head=nn.Linear(4, 4), out=nn.Linear(4, 4))])), []),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 4, batch_first=True), []),
    "the end of a classifier": (lambda: Named(classifier=mlp(), body=nn.Linear(4, 4)), ["classifier.2.weight"]),
    "several heads": (
        lambda: Named(heads=nn.ModuleDict({"a": mlp(), "b": nn.Linear(4, 2)}), body=nn.Linear(4, 4)),
        ["heads.a.2.weight", "heads.b.weight"],
    ),
    "a convolution": (lambda: Named(head=nn.Conv2d(3, 4, 3), tail=nn.ConvTranspose2d(4, 3, 3)), ["tail.weight"]),
    "Conv1D": (lambda: Named(body=nn.Linear(4, 4), score=Conv1D(2, 4)), ["score.weight"]),
    "under a norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        ["1.parametrizations.weight.original1"],
    ),
    "with one output under a norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1))),
        ["0.parametrizations.weight.original"],
    ),
    "by its class's name": (
        lambda: Named(body=nn.Linear(4, 4), end=ShardedLinear(weight=nn.Parameter(torch.zeros(9, 4)))),
        ["end.weight"],
    ),
    "no layer": (lambda: nn.Embedding(4, 2), []),
}


@pytest.mark.parametrize("case", LAST)
def test_the_last_layer(case):
    make, last = LAST[case]
    assert of_role(make(), "last") == last


def test_what_is_a_vector_though_it_has_axes():
    odd = Named(
        norm=nn.LayerNorm((4, 5)),
        attention=nn.MultiheadAttention(4, 2, add_bias_kv=True),
        cls_token=nn.Parameter(torch.zeros(1, 1, 4)),
        layer_scale=nn.Parameter(torch.zeros(4, 1, 1)),
        position_bias_table=nn.Parameter(torch.zeros(9, 2)),
        logit_scale=nn.Parameter(torch.zeros(())),
        linear=nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
        narrow=nn.Linear(4, 1),
        wide=nn.Linear(1, 4),
        series=nn.GRU(1, 4),
        one=nn.Embedding(4, 1),
        table=ShardedEmbedding(weight=nn.Parameter(torch.zeros(9, 4))),
        register_tokens=nn.Parameter(torch.zeros(1, 3, 4)),
        mixing=nn.Parameter(torch.zeros(4, 4)),
        up=nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 5, 3)),
    )
    odd.narrow.weight_g = nn.Parameter(torch.ones(3, 1))  # as torch.nn.utils.weight_norm calls it
    other = {e.name: e.role for e in gradkit.roles(odd) if e.role != "vector"}
    assert other == {
        "attention.in_proj_weight": "matrix",
        "attention.out_proj.weight": "matrix",
        "linear.parametrizations.weight.original1": "matrix",
        "narrow.weight": "matrix",
        "wide.weight": "matrix",
        "series.weight_ih_l0": "matrix",
        "series.weight_hh_l0": "matrix",
        "one.weight": "embedding",
        "table.weight": "embedding",
        "register_tokens": "embedding",
        "mixing": "matrix",
        "up.parametrizations.weight.original1": "last",
    }
    assert gradkit.roles(odd)["up.parametrizations.weight.original1"].fan_in == 0


@pytest.mark.parametrize("name", ["tokens.weight", "generator.weight", "gen*.weight"])
def test_a_tied_head_is_an_embedding_unless_one_of_its_names_is_overridden(name):
    model = Translator(tied=True)
    entry = gradkit.roles(model)["generator.weight"]
    assert (entry.name, entry.tied) == ("tokens.weight", ("generator.weight",))
    assert (entry.role, entry.fan_in, entry.kind) == ("embedding", 0, "Embedding")
    for role, fan_in in (("last", 1), ("matrix", 1), ("embedding", 0), ("vector", None)):
        entry = gradkit.roles(model, {name: role})["tokens.weight"]
        assert (entry.role, entry.fan_in) == (role, fan_in)
    groups = gradkit.param_groups(model, overrides={name: "last"})
    assert groups_by_role(groups)["last"] == ["tokens.weight"]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_a_layer_that_stands_in_two_places_is_one_entry_with_both_names():
    layer = nn.Linear(4, 4)
    found = gradkit.roles(Named(first=layer, second=layer, end=nn.Linear(4, 2)))
    assert found["second.weight"] is found["first.weight"] and found["first.weight"].tied == ("second.weight",)
    assert [e.name for e in found] == ["first.weight", "first.bias", "end.weight", "end.bias"]


def test_groups_of_a_model():
    model = Translator()
    groups = gradkit.param_groups(model, weight_decay=0.1)
    assert [(g["role"], g["fan_in"], g["weight_decay"]) for g in groups] == [
        ("matrix", 1, 0.1),
        ("embedding", 1, 0.1),  # the positions, [1, rows, size]
        ("embedding", 0, 0.1),
        ("last", 1, 0.1),
        ("vector", None, 0.0),
    ]
    pairs = [pair for g in groups for pair in g["params"]]
    assert len(pairs) == len(dict(pairs)) and dict(pairs).keys() == dict(model.named_parameters()).keys()
    assert all(p is dict(model.named_parameters())[name] for name, p in pairs)
    without = gradkit.param_groups(model)
    assert [g.get("weight_decay") for g in without] == [None, None, None, None, 0.0]


def test_overrides_act_one_after_the_other():
    model = Named(tokens=nn.Embedding(5, 4), body=mlp(), lm_head=nn.Linear(4, 5), w=nn.Parameter(torch.zeros(3, 4)))
    groups = gradkit.param_groups(
        model,
        weight_decay=0.1,
        overrides={
            "last": {"lr": 0.5},
            "lm_head.weight": "matrix",
            "w": {"fan_in": 0, "betas": (0.8, 0.9)},
            "body.*.bias": {"weight_decay": 0.2},
            "vector": {"eps": 1e-6},
            "body.2.bias": {"eps": 1e-5},
        },
    )
    kept = [({k: v for k, v in g.items() if k != "params"}, [n for n, _ in g["params"]]) for g in groups]
    vector = {"role": "vector", "fan_in": None}
    assert kept == [
        ({"role": "matrix", "fan_in": 0, "weight_decay": 0.1, "betas": (0.8, 0.9)}, ["w"]),
        ({"role": "matrix", "fan_in": 1, "weight_decay": 0.1}, ["body.0.weight", "body.2.weight"]),
        ({"role": "matrix", "fan_in": 1, "weight_decay": 0.1, "lr": 0.5}, ["lm_head.weight"]),
        ({"role": "embedding", "fan_in": 0, "weight_decay": 0.1}, ["tokens.weight"]),
        ({**vector, "weight_decay": 0.2, "eps": 1e-6}, ["body.0.bias"]),
        ({**vector, "weight_decay": 0.2, "eps": 1e-5}, ["body.2.bias"]),
        ({**vector, "weight_decay": 0.0, "eps": 1e-6}, ["lm_head.bias"]),
    ]


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ({"tokns.weight": "last"}, ValueError, "'tokns.weight' matches no parameter; did you mean 'tokens.weight'"),
        ({"*.conv": "last"}, ValueError, r"'\*.conv' matches no parameter; print\(gradkit.roles\(model\)\) shows them"),
        ({"last": "matrix", "last*": "matrix"}, ValueError, r"'last\*' matches no parameter"),
        ({"generator.weight": "matrix", "last": {"lr": 1.0}}, ValueError, "no parameter has the role 'last'"),
        ({"tokens.*": "embeding"}, ValueError, "role='embeding': use one of 'matrix', 'embedding', 'last', 'vector'"),
        ({"tokens.*": {"role": "head"}}, ValueError, "role='head': use one of"),
        ({"tokens.*": 0.1}, TypeError, "'tokens.\\*': 0.1 is no role and no dict of a group's values"),
        ({"tokens.*": {"params": []}}, TypeError, "is no role and no dict"),
        ({"generator.bias": "matrix"}, ValueError, r"'generator.bias' of shape \(11,\) can't be 'matrix'"),
        ({"tokens.*": {"fan_in": 2}}, ValueError, r"shape \(11, 8\) can't be 'embedding' with fan_in=2"),
        ({"generator.bias": {"fan_in": 0}}, ValueError, "can't be 'vector' with fan_in=0"),
        ([("tokens.*", "last")], TypeError, "give a dict such as {'lm_head.weight': 'last'}"),
    ],
)  # fmt: skip
def test_an_override_that_means_nothing_is_refused(overrides, error, message):
    for function in (gradkit.roles, gradkit.param_groups):
        with pytest.raises(error, match=message):
            function(Translator(), overrides=overrides)


def test_models_that_have_no_roles_are_refused():
    with pytest.raises(TypeError, match="model is a generator; give the model itself"):
        gradkit.roles(ResNet().parameters())
    with pytest.raises(ValueError, match="'1.weight' has no shape yet; run one forward"):
        gradkit.roles(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        gradkit.param_groups(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="param_groups: weight_decay=-1: give a number >= 0"):
        gradkit.param_groups(mlp(), weight_decay=-1)


def test_frozen_parameters_stand_in_the_map_and_in_no_group():
    model = mlp()
    model[0].requires_grad_(False)
    assert groups_by_role(gradkit.param_groups(model)) == {"last": ["2.weight"], "vector": ["2.bias"]}
    table = str(gradkit.roles(model))
    assert "  0.weight  1 of  6 x 4  fan-in 1  Linear, frozen\n" in table
    assert "  2.weight  1 of  4 x 6  fan-in 1  Linear\n" in table


OPTIMIZERS = [
    getattr(gradkit, n)
    for n in gradkit.__all__
    if isinstance(getattr(gradkit, n), type) and issubclass(getattr(gradkit, n), torch.optim.Optimizer)
]


@pytest.mark.parametrize(
    "make", [*(c for c in OPTIMIZERS if c is not gradkit.Optimizer), torch.optim.AdamW, torch.optim.SGD]
)
def test_every_optimizer_takes_the_groups_and_its_file_keeps_them(make, tmp_path):
    torch.manual_seed(0)
    model = Translator()
    options = {"backend": "chunked"} if issubclass(make, gradkit.Optimizer) else {}
    optimizer = make(gradkit.param_groups(model, weight_decay=0.5), lr=1e-2, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        model(torch.randint(11, (3, 6))).logsumexp(-1).mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.endswith("weight"))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make(gradkit.param_groups(model, weight_decay=0.1), lr=1e-3)
    again.load_state_dict(saved)
    for group, loaded in zip(optimizer.param_groups, again.param_groups, strict=True):
        for key in ("role", "fan_in", "weight_decay", "param_names", "lr"):
            assert group[key] == loaded[key]
    assert again.param_groups[-1]["weight_decay"] == 0.0 and "generator.bias" in again.param_groups[-1]["param_names"]


@pytest.mark.parametrize("make", [gradkit.AdamW, torch.optim.AdamW])
def test_without_a_gradient_all_but_vectors_decay(make):
    model = ResNet()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    make(gradkit.param_groups(model, overrides={"bn1.bias": {"weight_decay": 0.5}}), lr=0.1, weight_decay=0.25).step()
    for name, p in model.named_parameters():
        expected = 0.95 if name == "bn1.bias" else 1.0 if p.dim() == 1 else 0.975
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


def test_parameters_without_a_model_have_the_roles_of_their_shapes():
    def optimizer(params):  # as one that needs roles: the warning points to its caller
        return gradkit.AdamW(with_roles("SCALE", params), weight_decay=0.1)

    model, names = Translator(), []
    for given in (model.parameters(), model.named_parameters()):
        with pytest.warns(UserWarning, match=r"SCALE: the groups have no role(.|\n)* 1 of +11 +by shape") as caught:
            made = optimizer(given).param_groups
        assert len(caught) == 1 and caught[0].filename == __file__
        assert [(g["role"], g["fan_in"], g["weight_decay"]) for g in made] == [
            ("matrix", 1, 0.1),
            ("vector", None, 0.0),
        ]
        assert [{p.dim() for p in g["params"]} for g in made] == [{2, 3}, {1}]
        names.append(made[0].get("param_names", []))
    assert not names[0] and "generator.weight" in names[1]


# On models of Hugging Face, built from their configs.

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
WORDS = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers", reason="Hugging Face's models come with the extra [transformers]")


def summary(model: nn.Module) -> dict[str, dict]:
    """For each role the shapes and fan-in axes by name, with * for numbers."""
    found: dict[str, dict] = {}
    for e in gradkit.roles(model):
        found.setdefault(e.role, {})[".".join("*" if x.isdigit() else x for x in e.name.split("."))] = e.shape, e.fan_in
    vectors = found.pop("vector")
    assert all(fan_in is None for _, fan_in in vectors.values())
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(hf, tied):
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=tied, **WORDS)
    model = hf.GPT2LMHeadModel(config)
    hidden = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
    assert summary(model) == {
        "matrix": {f"transformer.h.*.{name}.weight": (shape, 0) for name, shape in hidden.items()},
        "embedding": {"transformer.wte.weight": ((30, 16), 0), "transformer.wpe.weight": ((8, 16), 0)},
        **({} if tied else {"last": {"lm_head.weight": ((30, 16), 1)}}),
    }
    assert "Conv1D, fused qkv" in str(gradkit.roles(model))
    entry = gradkit.roles(model, {"lm_head.weight": "last"})["lm_head.weight"]
    assert (entry.role, entry.fan_in, entry.kind) == ("last", 1, "Linear")
    gradkit.AdamW(gradkit.param_groups(model, weight_decay=0.1))


@pytest.mark.parametrize("tied", [True, False])
def test_llama(hf, tied):
    config = hf.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=1, tie_word_embeddings=tied)
    attention = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    hidden = {f"self_attn.{name}": shape for name, shape in attention.items()}
    hidden |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    expected = {
        "matrix": {f"model.layers.*.{name}.weight": (shape, 1) for name, shape in hidden.items()},
        "embedding": {"model.embed_tokens.weight": ((30, 16), 0)},
        "last": {"lm_head.weight": ((30, 16), 1)},
    }
    if tied:
        del expected["last"]
    assert summary(hf.LlamaForCausalLM(config)) == expected
    assert "last" not in summary(hf.LlamaModel(config))


def test_vit(hf):
    found = summary(hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=5)))
    assert found["last"] == {"classifier.weight": ((5, 16), 1)}
    assert list(found["embedding"].values()) == [((1, 5, 16), 1)]
    shapes = sorted(found["matrix"].values())
    assert shapes == [((16, 3, 4, 4), 1), *[((16, 16), 1)] * 4, ((16, 24), 1), ((24, 16), 1)]
