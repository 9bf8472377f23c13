"""A tape does again what was done, on the same memory, and refuses what a CUDA graph cannot hold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tape import HostError, Tape


def network():
    torch_source = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.rand(weight.shape, generator=torch_source) - 0.5)
    return net


def training(net, optimizer, pixels, targets):
    """Return one step's loss; gradients are dropped first, as in a loop."""
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(net(pixels), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_step_of_training_is_done_again_on_other_images(options):
    """Forward, backward, running statistics, momentum and weights, three steps on."""
    source = torch.Generator().manual_seed(0)
    batches = [(torch.rand(6, 3, 8, 8, generator=source), torch.randint(5, (6,), generator=source)) for _ in range(5)]
    eager = network()
    recorded = copy.deepcopy(eager)
    kinds = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3} | options
    optimizers = [torch.optim.SGD(net.parameters(), **kinds) for net in (eager, recorded)]
    losses = [training(eager, optimizers[0], *batch) for batch in batches]
    ours = [training(recorded, optimizers[1], *batches[0])]  # warm: the momentum is there
    pixels, targets = (part.clone() for part in batches[1])
    with Tape() as tape:
        loss = training(recorded, optimizers[1], pixels, targets)
    ours.append(loss.clone())
    for batch in batches[2:]:
        pixels.copy_(batch[0])
        targets.copy_(batch[1])
        tape.replay()
        ours.append(loss.clone())
    assert torch.equal(torch.stack(ours), torch.stack(losses))
    for name, value in eager.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], value), name
    for one, other in zip(eager.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_random_numbers_views_and_outputs_given_before():
    """A generator is used as it stands; a view, an ``out`` and a changed shape land in the same memory."""
    source, given, out = torch.Generator().manual_seed(0), torch.arange(4.0), torch.empty(2, 2)

    def block():
        table = given.view(2, 2).t()
        rolled = table + torch.rand(2, 2, generator=source)
        torch.matmul(rolled, table, out=out)
        table[0].mul_(2)
        return rolled.unsqueeze_(0), torch.split(out, 1)[1]

    with Tape() as tape:
        first, second = block()
    given.copy_(torch.arange(4.0) + 5)
    source.manual_seed(3)
    tape.replay()
    ours = [t.clone() for t in (first, second, given, out)]
    given.copy_(torch.arange(4.0) + 5)
    source.manual_seed(3)
    first, second = block()
    for mine, eager in zip(ours, (first, second, given, out), strict=True):
        assert torch.equal(mine, eager)


def test_a_name_given_to_another_tensor_does_not_change_what_was_recorded():
    """A graph holds addresses: a parameter whose data is exchanged afterwards is not the one it uses."""
    weight = nn.Parameter(torch.ones(2))
    held = weight.data
    with Tape() as tape:
        made = weight * 2
    weight.data = torch.full((2,), 5.0)
    held.fill_(3.0)
    tape.replay()
    assert made.tolist() == [6.0, 6.0]


@pytest.mark.parametrize("block", [
    lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: x.tolist(),
    lambda x: x.numpy(), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.unique(),
    lambda x: x.masked_select(x > 0), lambda x: x.long().bincount(), lambda x: x + torch.tensor([1.0, 2.0]),
    lambda x: x[[1, 0]], lambda x: x.repeat_interleave(x.long()), lambda x: torch.equal(x, x),
    lambda x: x.masked_fill(x > 1, 0)[x > 1], lambda x: x.index_put_((x > 1,), x[0]), lambda x: torch.where(x > 0),
])
def test_what_a_graph_cannot_hold_is_refused(block):
    x = torch.tensor([1.0, 2.0])
    block(x.clone())
    with pytest.raises(HostError), Tape():
        block(x)


def test_what_is_allowed_by_name_passes():
    with Tape(allow=["lift_fresh", "tolist"]):
        assert torch.tensor([1]).tolist() == [1]


def test_what_a_graph_can_hold_is_not_refused():
    x = torch.tensor([1.0, 2.0, -1.0])
    order = torch.tensor([2, 0, 1])
    with Tape() as tape:
        made = torch.where(x[order] > 0, x, 0).cumsum(0).clamp(max=2) + torch.arange(3) + torch.full((3,), 2.0)
        repeated = x.repeat_interleave(2)
        x.masked_fill_(x < 0, 0.0)
    x.copy_(torch.tensor([5.0, -6.0, 7.0]))
    tape.replay()
    assert made.tolist() == [4.0, 2.0, 3.0] and repeated.tolist() == [5.0, 5.0, -6.0, -6.0, 7.0, 7.0]
    assert x.tolist() == [5.0, 0.0, 7.0]


def test_a_result_whose_shape_changes_is_refused():
    """What escapes the list of waiting operations shows in a replay."""
    x = torch.tensor([1.0, 2.0])
    with Tape(allow=["nonzero"]) as tape:
        x.nonzero()
    x[0] = 0
    with pytest.raises(HostError, match=r"gave \(2, 1\), now \(1, 1\)"):
        tape.replay()
