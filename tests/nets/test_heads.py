"""Many heads in one product are many separate heads; the projection is the published one."""

import math

import pytest
import torch
from torch import nn

from phyla.errors import InputError
from phyla.nets.heads import (
    ClusterHeads,
    ClusterNet,
    MixtureHeads,
    NestedHeads,
    NormalizedHeads,
    Projection,
    SpaceProjection,
    build_heads,
    build_projection,
    normalized,
)
from phyla.nets.resnet import EncoderSpec, initialise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(n_features: int = 6, n_clusters: int = 4, n_heads: int = 3) -> ClusterHeads:
    heads = ClusterHeads(n_features, n_clusters, n_heads)
    heads.initialise(seeded())
    return heads


def rows(n: int = 5, n_features: int = 6) -> torch.Tensor:
    return torch.randn(n, n_features, generator=seeded(1))


def separate(heads: ClusterHeads) -> list[nn.Linear]:
    """The same heads as the authors have them: one linear layer each."""
    layers = []
    for weight, bias in zip(heads.weight.detach(), heads.bias.detach(), strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        layers.append(layer)
    return layers


def test_many_heads_are_separate_linear_layers_gradient_included() -> None:
    heads, x = made(), rows()
    layers = separate(heads)
    factors = torch.randn(3, 5, 4, generator=seeded(2))
    (heads(x) * factors).sum().backward()
    for h, layer in enumerate(layers):
        logits = layer(x)
        assert torch.allclose(heads(x)[h], logits, atol=1e-6)
        (logits * factors[h]).sum().backward()
        assert torch.allclose(heads.weight.grad[h], layer.weight.grad, atol=1e-6)
        assert torch.allclose(heads.bias.grad[h], layer.bias.grad, atol=1e-6)


def test_shapes_also_without_images() -> None:
    heads = made()
    assert (heads.n_heads, heads.n_clusters) == (3, 4)
    assert heads(rows()).shape == (3, 5, 4)
    assert heads.probabilities(rows()).shape == (5, 3, 4)
    assert heads(rows(0)).shape == (3, 0, 4)


def test_probabilities_are_the_softmax_of_each_head() -> None:
    heads, x = made(), rows()
    found = heads.probabilities(x)
    assert torch.allclose(found.sum(dim=2), torch.ones(5, 3), atol=1e-6)
    assert torch.allclose(found[:, 1], heads(x)[1].softmax(dim=1), atol=1e-6)


@pytest.mark.parametrize(("given", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                             (torch.float64, torch.float64)])
def test_probabilities_are_float32_or_better(given: torch.dtype, dtype: torch.dtype) -> None:
    assert made().to(given).probabilities(rows().to(given)).dtype == dtype


def test_only_keeps_one_head_as_a_copy() -> None:
    heads = made()
    kept = heads.only(2)
    assert torch.allclose(kept(rows())[0], heads(rows())[2], atol=1e-6)
    assert (kept.n_heads, kept.n_clusters) == (1, 4)
    kept.weight.data.zero_()
    kept.bias.data.zero_()
    assert heads.weight[2].abs().min() > 0 and heads.bias[2].abs().min() > 0


@pytest.mark.parametrize("head", [3, -1])
def test_only_refuses_a_head_that_is_not_there(head: int) -> None:
    with pytest.raises(InputError, match=rf"there is no head {head}\. hint: allowed: 0 to 2"):
        made().only(head)


@pytest.mark.parametrize("sizes", [(0, 4, 1), (6, 0, 1), (6, 4, 0)])
def test_heads_need_features_clusters_and_at_least_one_head(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        ClusterHeads(*sizes)


def test_heads_start_as_torch_starts_linear_layers_and_differ() -> None:
    heads = made(400, 50, 4)
    bound = 1 / math.sqrt(400)
    for values in (heads.weight, heads.bias):
        assert values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert not torch.equal(heads.weight[0], heads.weight[1])
    again = ClusterHeads(400, 50, 4)
    again.initialise(seeded())
    assert torch.equal(heads.weight, again.weight) and torch.equal(heads.bias, again.bias)


def test_the_projection_is_two_layers_and_rows_of_length_one() -> None:
    projection = Projection(8, 3)
    initialise(projection, seeded())
    x = rows(5, 8)
    hidden = torch.relu(x @ projection[0].weight.T + projection[0].bias)
    wanted = hidden @ projection[2].weight.T + projection[2].bias
    assert torch.allclose(projection(x), wanted / wanted.norm(dim=1, keepdim=True), atol=1e-6)
    assert [tuple(value.shape) for value in projection.parameters()] == [(8, 8), (8,), (3, 8), (3,)]


@pytest.mark.parametrize(("given", "dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_projections_are_float32_or_better(given: torch.dtype, dtype: torch.dtype) -> None:
    found = Projection(8, 3).to(given)(rows(5, 8).to(given))
    assert found.dtype == dtype
    assert torch.allclose(found.norm(dim=1), torch.ones(5, dtype=dtype), atol=1e-6)


@pytest.mark.parametrize(("n_features", "encoder_parameters", "n_parameters"), [
    (512, 11_168_832, 11_497_152), (2048, 23_508_032, 27_966_656)])
def test_encoder_and_projection_have_the_published_size(n_features: int, encoder_parameters: int,
                                                        n_parameters: int) -> None:
    with torch.device("meta"):
        projection = Projection(n_features)
    assert encoder_parameters + sum(parameter.numel() for parameter in projection.parameters()) == n_parameters


def test_a_cluster_net_is_the_heads_on_the_encoder() -> None:
    encoder = EncoderSpec(width=2).build(seeded())
    net = ClusterNet(encoder, made(16)).eval()
    views = torch.randn(3, 3, 16, 16, generator=seeded(3))
    assert torch.equal(net(views), net.heads(encoder(views)))
    assert torch.allclose(net.probabilities(views), net(views).softmax(dim=2).transpose(0, 1), atol=1e-6)
    assert set(name.split(".")[0] for name in net.state_dict()) == {"encoder", "heads"}


def test_one_head_of_a_cluster_net_shares_nothing_with_it() -> None:
    net = ClusterNet(EncoderSpec(width=2).build(seeded()), made(16)).eval()
    views = torch.randn(3, 3, 16, 16, generator=seeded(3))
    before, kept = net(views), net.only(1)
    assert torch.allclose(kept(views)[0], before[1], atol=1e-6)
    with torch.no_grad():
        for value in kept.parameters():
            value.zero_()
    assert torch.equal(net(views), before)


def test_the_gradient_reaches_encoder_and_heads() -> None:
    net = ClusterNet(EncoderSpec(width=2).build(seeded()), made(16))
    net(torch.randn(4, 3, 16, 16, generator=seeded(3)))[:, :, 0].sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in net.parameters())
    assert net.encoder.conv1.weight.grad.abs().max() > 0
    assert (net.heads.weight.grad.abs().amax(dim=(1, 2)) > 0).all()


# ── projections of other depths ───────────────────────────────────────────────────────────────────────────────────


def test_a_projection_of_one_layer_is_linear_and_of_none_only_a_length() -> None:
    linear, x = Projection(8, 3, n_layers=1), rows(5, 8)
    initialise(linear, seeded())
    wanted = x @ linear[0].weight.T + linear[0].bias
    assert torch.allclose(linear(x), wanted / wanted.norm(dim=1, keepdim=True), atol=1e-6)
    assert [tuple(value.shape) for value in linear.parameters()] == [(3, 8), (3,)]
    bare = Projection(8, 8, n_layers=0)
    assert not list(bare.parameters()) and not bare.state_dict()
    assert torch.allclose(bare(x), x / x.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 3, 2), (8, 3, 1), (8, 8, 0)])
def test_a_projection_is_made_again_from_its_form(sizes: tuple[int, int, int]) -> None:
    held = Projection(*sizes)
    assert held.spec() == dict(zip(("n_features", "n_out", "n_layers"), sizes, strict=True))
    again = Projection(**held.spec())
    again.load_state_dict(held.state_dict())
    assert torch.equal(again(rows(5, 8)), held(rows(5, 8)))


@pytest.mark.parametrize("sizes", [(8, 3, 3), (8, 3, -1), (8, 3, 0)])
def test_a_projection_of_another_depth_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=rf"of {sizes[2]} layers from 8 to 3 .* hint: 0 .*1 or 2 layers"):
        Projection(*sizes)


# ── normalised heads ──────────────────────────────────────────────────────────────────────────────────────────────


def drawn(n_heads: int = 3, n_features: int = 6, n_clusters: int = 4) -> torch.Tensor:
    return torch.randn(n_heads, n_features, n_clusters, generator=seeded(4))


def test_normalised_weights_have_rows_or_columns_of_length_one_and_zeros_stay() -> None:
    raw = drawn()
    raw[0, 2], raw[1, :, 3] = 0.0, 0.0
    by_row, by_column = normalized(raw, "feature_rows"), normalized(raw, "class_columns")
    lengths, wanted = by_row.norm(dim=2), torch.ones(3, 6)
    wanted[0, 2] = 0
    assert torch.allclose(lengths, wanted, atol=1e-6)
    lengths, wanted = by_column.norm(dim=1), torch.ones(3, 4)
    wanted[1, 3] = 0
    assert torch.allclose(lengths, wanted, atol=1e-6)
    for norm in ("feature_rows", "class_columns"):
        assert torch.equal(normalized(raw[2], norm), normalized(raw, norm)[2]), "of one head as of many"


def test_a_prototype_of_unit_feature_rows_is_longer_than_one() -> None:
    raw = torch.randn(5, 128, 10, generator=seeded())
    assert normalized(raw, "feature_rows").norm(dim=1).mean().item() == pytest.approx(math.sqrt(12.8), rel=0.01)


@pytest.mark.parametrize("norm", ["feature_rows", "class_columns"])
def test_normalised_heads_are_separate_products_divided_by_the_temperature(norm: str) -> None:
    heads, x = NormalizedHeads(drawn(), temperature=0.1, norm=norm), rows()
    assert heads(x).shape == (3, 5, 4) and heads(rows(0)).shape == (3, 0, 4)
    for h, raw in enumerate(drawn()):
        assert torch.allclose(heads(x)[h], x @ normalized(raw, norm) / 0.1, atol=1e-4)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("norm", ["feature_rows", "class_columns"])
def test_plain_linear_heads_give_the_same_logits_as_normalised_ones(norm: str, trainable: bool) -> None:
    heads, x = NormalizedHeads(drawn(), temperature=0.05, norm=norm, trainable=trainable).double(), rows().double()
    plain = heads.as_linear()
    assert isinstance(plain, ClusterHeads) and (plain.n_heads, plain.n_clusters) == (3, 4)
    assert torch.allclose(plain(x), heads(x), rtol=1e-12) and not plain.bias.any()
    assert torch.allclose(plain.only(2)(x)[0], heads(x)[2], rtol=1e-12)
    before = heads(x).detach().clone()
    with torch.no_grad():
        plain.weight.zero_()
    assert torch.equal(heads(x), before), "they share nothing"


def test_prototypes_are_buffers_unless_they_are_trained() -> None:
    fixed, x = NormalizedHeads(drawn(), temperature=0.1, norm="feature_rows"), rows().requires_grad_()
    assert not list(fixed.parameters()) and list(fixed.state_dict()) == ["weight"]
    fixed(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any() and fixed.weight.grad is None
    trained = NormalizedHeads(drawn(), temperature=0.1, norm="feature_rows", trainable=True)
    trained(rows()).square().sum().backward()
    assert list(trained.state_dict()) == ["weight"] and (trained.weight.grad.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_normalised_heads_refuse_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be above 0"):
        NormalizedHeads(drawn(), temperature=temperature, norm="feature_rows")


# ── a projection between ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_net_with_a_projection_is_heads_on_projection_on_encoder() -> None:
    encoder, projection = EncoderSpec(width=2).build(seeded()), Projection(16, 5)
    initialise(projection, seeded(2))
    net = ClusterNet(encoder, made(5), projection).eval()
    views = torch.randn(3, 3, 16, 16, generator=seeded(3))
    assert torch.equal(net.embed(views), projection(encoder(views)))
    assert torch.equal(net(views), net.heads(projection(encoder(views))))
    assert torch.allclose(net.probabilities(views), net(views).softmax(dim=2).transpose(0, 1), atol=1e-6)
    assert set(name.split(".")[0] for name in net.state_dict()) == {"encoder", "heads", "projection"}
    kept, before = net.only(1), net(views)
    assert torch.allclose(kept(views)[0], before[1], atol=1e-6)
    with torch.no_grad():
        for value in kept.parameters():
            value.zero_()
    assert torch.equal(net(views), before), "it shares no projection either"
    net(views).sum().backward()
    assert all(parameter.grad.any() for parameter in projection.parameters())


# ── projections of several spaces, mixtures of heads ──────────────────────────────────────────────────────────────────


def mixture(groups: list[int] | None = None, n_members: int = 2) -> MixtureHeads:
    heads = MixtureHeads(6, 4, n_members, groups)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, generator=seeded(3))
    return heads


def test_a_mixture_averages_members_and_sums_groups() -> None:
    heads, x = mixture([0, 1, 1, 2]), rows()
    each = torch.stack([(x @ heads.weight[m].T + heads.bias[m]).softmax(dim=1) for m in range(2)]).mean(dim=0)
    wanted = torch.stack([each[:, 0], each[:, 1] + each[:, 2], each[:, 3]], dim=1)
    assert heads.probabilities(x).shape == (5, 1, 3)
    assert torch.allclose(heads.probabilities(x)[:, 0], wanted, atol=1e-6)
    assert torch.allclose(heads(x)[0].exp(), wanted, atol=1e-6)
    assert (heads.n_heads, heads.n_clusters) == (1, 3)


def test_a_mixture_of_one_is_a_linear_head() -> None:
    heads, plain, x = mixture(n_members=1), ClusterHeads(6, 4), rows()
    plain.weight.data, plain.bias.data = heads.weight.data, heads.bias.data
    assert torch.allclose(heads.probabilities(x), plain.probabilities(x), atol=1e-6)


def test_a_mixture_takes_gradients_and_survives_certainty() -> None:
    heads = mixture()
    heads.weight.data *= 1e4
    found = heads(rows())
    found.sum().backward()
    assert found.isfinite().all()
    assert heads.weight.grad.isfinite().all()


@pytest.mark.parametrize("groups", [[0, 2, 2, 2], [0, 1], [1, 1, 1, 1], [-1, 0, 1, 1]])
def test_groups_give_every_output_a_cluster_and_every_cluster_one(groups: list[int]) -> None:
    with pytest.raises(InputError, match="groups"):
        MixtureHeads(6, 4, groups=groups)


def test_a_projection_of_spaces_gives_each_the_same_weight() -> None:
    x = rows(n_features=5) * torch.tensor([1, 1, 100, 100, 100])
    projected = SpaceProjection([2, 3])(x)
    first, second = (nn.functional.normalize(part, dim=1) for part in (x[:, :2], x[:, 2:]))
    assert torch.allclose(projected @ projected.T, (first @ first.T + second @ second.T) / 2, atol=1e-6)
    assert torch.allclose(projected.norm(dim=1), torch.ones(5), atol=1e-6)


def test_a_projection_moves_stretches_and_has_layers() -> None:
    x = rows()
    made = SpaceProjection([6], unit=False, hidden=[4, 3], activation="relu", out_unit=True)
    made.shift, made.scale = torch.full((6,), 0.5), torch.arange(1.0, 7)
    hidden = made.layers[1](made.layers[0]((x - 0.5) * torch.arange(1.0, 7)).relu())
    assert torch.allclose(made(x), nn.functional.normalize(hidden, dim=1), atol=1e-6)
    assert (made.n_features, made.n_out) == (6, 3)


@pytest.mark.parametrize("made", [Projection(6, 4), Projection(6, 6, 0), SpaceProjection([2, 4], hidden=[3]),
                                  SpaceProjection([6], unit=False, activation="relu", out_unit=True)])
def test_a_projection_is_made_again_from_what_a_file_holds(made: Projection | SpaceProjection) -> None:
    again = build_projection(made.spec())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(rows()), made(rows()))


@pytest.mark.parametrize("heads", [made(), mixture([0, 1, 1, 0]), mixture()])
def test_heads_are_made_again_from_what_a_file_holds(heads: ClusterHeads | MixtureHeads) -> None:
    again = build_heads(heads.spec())
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again(rows()), heads(rows()))


@pytest.mark.parametrize("wrong", [{"widths": []}, {"widths": [0]}, {"widths": [3], "hidden": [0]}])
def test_impossible_projections_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        SpaceProjection(**wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_nested_heads_are_traced_for_any_number_of_images():
    heads = NestedHeads(ClusterHeads(4, 2).spec(), [0, 0, 0, 1, 1], [0, 1, 1, 2, 2])
    traced = torch.export.export(heads, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(traced.module()(rows), heads(rows))
