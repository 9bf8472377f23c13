import copy

import pytest
import torch
from torch import nn

from phyla.training.group import ALONE, Group, SharedBatchNorm, join, share_batchnorm
from processes import Processes


def test_one_process_passes_everything_through() -> None:
    rows = torch.randn(5, 3, requires_grad=True)
    assert ALONE.gather(rows, 5) is rows
    assert ALONE.total(rows) is rows
    assert ALONE.collect(rows, 5) is rows
    assert ALONE.share({"a": 1}) == {"a": 1}
    assert ALONE.part(5) == slice(0, 5)
    ALONE.wait()
    ALONE.add_gradients([nn.Parameter(rows)])


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("gloo") == ALONE


@pytest.mark.parametrize(("n", "size"), [(7, 3), (6, 3), (2, 4), (0, 2), (1, 1)])
def test_parts_cover_all_rows_once_in_order(n: int, size: int) -> None:
    parts = [list(range(n))[Group(rank, size).part(n)] for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(n))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def _gathered(group: Group, n: int, dtype: torch.dtype) -> torch.Tensor:
    return group.collect((torch.arange(2 * n).view(n, 2) % 5).to(dtype)[group.part(n)], n)


@pytest.mark.parametrize("n", [4, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_rows_of_unequal_parts_come_in_order(processes: Processes, n: int, dtype: torch.dtype) -> None:
    for found in processes.run(_gathered, n, dtype):
        assert torch.equal(found, (torch.arange(2 * n).view(n, 2) % 5).to(dtype))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)).double()


def _batch() -> torch.Tensor:
    return torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _loss_of_whole_batch(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1).mean(0).square().sum() + (logits @ logits.T).logsumexp(1).mean()


def _step(group: Group) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    net, batch = _network(), _batch()
    share_batchnorm(net, group, device=torch.device("cpu"))
    loss = _loss_of_whole_batch(group.gather(net(batch[group.part(7)]), 7))
    loss.backward()
    group.add_gradients(net.parameters())
    return (loss.item(), {name: value.grad.clone() for name, value in net.named_parameters()},
            {name: value.clone() for name, value in net.named_buffers()})


def test_loss_gradient_and_statistics_are_those_of_one_process(processes: Processes) -> None:
    loss, gradients, buffers = _step(ALONE)
    for found_loss, found_gradients, found_buffers in processes.run(_step):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-12)
        for name, buffer in buffers.items():
            torch.testing.assert_close(found_buffers[name], buffer)


def _running(group: Group) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), 1.0 + group.rank)
    mean = torch.tensor([float(group.rank)])
    group.add_gradients([parameter], means=[mean])
    return torch.cat([parameter.grad, mean])


def test_gradients_are_added_and_means_averaged(processes: Processes) -> None:
    for found in processes.run(_running):
        assert found.tolist() == [3.0, 3.0, 0.5]


def _shared(group: Group) -> object:
    group.wait()
    return group.share({"rank": group.rank, "rows": torch.full((2,), float(group.rank))})


def test_all_have_the_value_of_the_first(processes: Processes) -> None:
    for found in processes.run(_shared):
        assert found["rank"] == 0
        assert found["rows"].tolist() == [0.0, 0.0]


def _values(group: Group) -> list[str]:
    return group.values(f"from {group.rank}")


def test_values_come_in_order_of_rank(processes: Processes) -> None:
    assert processes.run(_values) == [["from 0", "from 1"]] * 2
    assert ALONE.values("x") == ["x"]


def test_shared_batchnorm_keeps_parameters_names_and_mode() -> None:
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)).eval()
    inner, before = net[0], copy.deepcopy(net.state_dict())
    weight = net[1].weight
    share_batchnorm(net, Group(0, 2), device=torch.device("cpu"))
    assert net[0] is inner
    assert isinstance(net[1], SharedBatchNorm)
    assert net[1].weight is weight
    assert net.state_dict().keys() == before.keys()
    assert not net[1].training
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(net[1](x), nn.BatchNorm2d(3).eval()(x))
