"""The streamed softmax over a memory is the plain one, gradient and all, in memory that does not grow with the bank."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phyla.errors import InputError
from phyla.nets.memory import HIDDEN_LOGIT, Memory, MemorySoftmax, memory_softmax

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "superand.npz"
ENTROPIES = ("none", "masked", "all")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return nn.functional.normalize(torch.randn(n, width, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def images(n: int, n_images: int, seed: int = 5) -> Tensor:
    return torch.randint(n_images, (n,), generator=seeded(seed))


def plain(embeddings: Tensor, bank: Tensor, own: Tensor, *, temperature: float, entropy: str = "none") -> MemorySoftmax:
    """The formulas as they are written, with all logits at once."""
    logits = embeddings @ bank.T / temperature
    log_sum = logits.logsumexp(dim=1)
    if entropy == "none":
        return MemorySoftmax(log_sum, None)
    if entropy == "masked":
        logits = logits.scatter(1, own[:, None], HIDDEN_LOGIT)
    log_p = logits.log_softmax(dim=1)
    return MemorySoftmax(log_sum, -(log_p.exp() * log_p).sum(dim=1))


def with_gradient(function: Callable[..., MemorySoftmax], embeddings: Tensor, *inputs: Tensor, **options: object
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exp, entropy (zeros without one) and the gradient of a mix of both with uneven weights."""
    leaf = embeddings.clone().requires_grad_()
    log_sum, entropy = function(leaf, *inputs, **options)
    entropy = torch.zeros_like(log_sum) if entropy is None else entropy
    weights = torch.randn(2, len(leaf), generator=seeded(9), dtype=torch.float64).to(log_sum)
    (weights[0] * log_sum + weights[1] * entropy).sum().backward()
    return log_sum.detach(), entropy.detach(), leaf.grad


def assert_same(embeddings: Tensor, bank: Tensor, own: Tensor, *, temperature: float, entropy: str, chunk: int | None,
                tolerance: float = 1e-9) -> None:
    found = with_gradient(memory_softmax, embeddings, bank, own, temperature=temperature, entropy=entropy, chunk=chunk)
    wanted = with_gradient(plain, embeddings.double(), bank.double(), own, temperature=temperature, entropy=entropy)
    for value, expected in zip(found, wanted, strict=True):
        assert value.dtype == embeddings.dtype
        scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
        assert torch.allclose(value.double(), expected, rtol=0, atol=tolerance * scale)


# ── the softmax against the formulas ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("n_images", "chunk"), [(1, 1), (1, 8), (2, 1), (2, 2), (7, 1), (24, 8), (25, 8), (23, 8),
                                                 (5, 8), (40, None)])
def test_values_and_gradients_are_the_plain_ones(n_images, chunk, temperature, entropy):
    assert_same(unit_rows(6, 4, 1), unit_rows(n_images, 4, 2), images(6, n_images), temperature=temperature,
                entropy=entropy, chunk=chunk)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(0, 6), n_images=st.integers(1, 30), width=st.integers(1, 5), chunk=st.integers(1, 32),
       log_scale=st.floats(-3, 3), entropy=st.sampled_from(ENTROPIES), seed=st.integers(0, 10**6))
def test_values_and_gradients_are_the_plain_ones_whatever_the_shapes(n, n_images, width, chunk, log_scale, entropy,
                                                                     seed):
    draw = seeded(seed)
    embeddings = torch.randn(n, width, generator=draw, dtype=torch.float64)
    bank = torch.randn(n_images, width, generator=draw, dtype=torch.float64)
    assert_same(embeddings, bank, images(n, n_images, seed), temperature=10.0**log_scale, entropy=entropy, chunk=chunk)


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_gradcheck(chunk, entropy):
    embeddings, bank, own = unit_rows(4, 3, 1).requires_grad_(), unit_rows(11, 3, 2), images(4, 11)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        found = memory_softmax(x, bank, own, temperature=0.3, entropy=entropy, chunk=chunk)
        return tuple(part for part in found if part is not None)

    assert torch.autograd.gradcheck(outputs, (embeddings,))


@pytest.mark.parametrize("place", range(10))
def test_the_own_image_may_be_anywhere_also_at_the_edge_of_a_chunk(place):
    assert_same(unit_rows(3, 4, 1), unit_rows(10, 4, 2), torch.full((3,), place), temperature=0.1, entropy="masked",
                chunk=4)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_moves_with_every_image_changes_nothing(order):
    bank = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    bank = bank if order == "rising" else bank.flip(0)
    for entropy in ENTROPIES:
        assert_same(unit_rows(4, 2, 3), bank, images(4, 60), temperature=0.01, entropy=entropy, chunk=1)


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_float32_is_safe_with_large_logits(shift, entropy):
    """Logits near -200 or 200, where e^z alone is 0 or infinite in float32; the last column makes the shift."""
    embeddings = torch.cat((unit_rows(5, 6, 1, torch.float32), torch.ones(5, 1)), dim=1)
    bank = torch.cat((unit_rows(50, 6, 2, torch.float32), torch.full((50, 1), shift * 0.1)), dim=1)
    assert_same(embeddings, bank, images(5, 50), temperature=0.1, entropy=entropy, chunk=7, tolerance=2e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_an_own_logit_far_above_all_others_leaves_no_rounding_behind(temperature):
    """Taken away from the sum of all, an own logit 20 or 200 above the others would leave noise, or nothing."""
    embeddings = unit_rows(4, 8, 1, torch.float32)
    bank = torch.cat((embeddings, -embeddings + 0.05 * unit_rows(4, 8, 2, torch.float32)))
    own = torch.arange(4)
    found = with_gradient(memory_softmax, embeddings, bank, own, temperature=temperature, entropy="masked", chunk=3)
    wanted = with_gradient(plain, embeddings.double(), bank.double(), own, temperature=temperature, entropy="masked")
    assert torch.allclose(found[1].double(), wanted[1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(found[2].double(), wanted[2], rtol=1e-3, atol=1e-4)


def test_equal_logits_have_the_entropy_log_n():
    found = memory_softmax(torch.zeros(3, 2), unit_rows(70, 2, 1, torch.float32), images(3, 70), temperature=0.1,
                           entropy="all", chunk=16)
    assert found.entropy.tolist() == pytest.approx([math.log(70)] * 3)
    assert found.log_sum.tolist() == pytest.approx([math.log(70)] * 3)


@pytest.mark.parametrize("entropy", ["masked", "all"])
def test_an_entropy_is_never_below_zero(entropy):
    embeddings = unit_rows(64, 4, 1, torch.float32)
    found = memory_softmax(embeddings, embeddings, torch.arange(64), temperature=0.001, entropy=entropy, chunk=10)
    assert float(found.entropy.min()) >= 0


def test_one_image_masked_has_only_the_constant_and_no_gradient_of_the_entropy():
    embeddings = unit_rows(2, 3, 1).requires_grad_()
    found = memory_softmax(embeddings, unit_rows(1, 3, 2), torch.zeros(2, dtype=torch.long), temperature=0.1,
                           entropy="masked")
    found.entropy.sum().backward()
    assert found.entropy.tolist() == [0, 0] and not embeddings.grad.any()


def test_the_hidden_logit_counts_as_the_constant():
    """Two images, one of them hidden: the entropy is that of the logits -10 and z."""
    embeddings, bank = torch.tensor([[1.0]]), torch.tensor([[3.0], [-8.5]])
    found = memory_softmax(embeddings, bank, torch.tensor([0]), temperature=1.0, entropy="masked").entropy
    p = 1 / (1 + math.exp(-10 + 8.5))
    assert float(found) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    embeddings, bank = unit_rows(5, 8, 1).to(dtype), unit_rows(40, 8, 2, torch.float32)
    leaf = embeddings.clone().requires_grad_()
    found = memory_softmax(leaf, bank, images(5, 40), temperature=0.1, entropy="all", chunk=16)
    assert found.log_sum.dtype == found.entropy.dtype == torch.float32
    wanted = plain(embeddings.double(), bank.double(), images(5, 40), temperature=0.1, entropy="all")
    assert torch.allclose(found.log_sum.double(), wanted.log_sum, atol=1e-5)
    found.log_sum.sum().backward()
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("own_dtype", [torch.int32, torch.int64])
def test_a_float32_bank_serves_float64_rows_and_any_integer_names_the_own_image(own_dtype):
    bank, own = unit_rows(20, 4, 2, torch.float32), images(5, 20)
    found = memory_softmax(unit_rows(5, 4, 1), bank, own.to(own_dtype), temperature=0.1, entropy="masked", chunk=6)
    wanted = plain(unit_rows(5, 4, 1), bank.double(), own, temperature=0.1, entropy="masked")
    assert torch.allclose(found.entropy, wanted.entropy, atol=1e-12)


def test_autocast_does_not_reach_the_logits():
    inputs = unit_rows(6, 16, 1, torch.float32), unit_rows(50, 16, 2, torch.float32), images(6, 50)
    outside = with_gradient(memory_softmax, *inputs, temperature=0.1, entropy="masked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradient(memory_softmax, *inputs, temperature=0.1, entropy="masked")
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


# ── the gradient ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bank_gets_no_gradient_and_may_change_before_backward():
    bank, own = unit_rows(20, 4, 2).requires_grad_(), images(6, 20)
    first, second = (unit_rows(6, 4, 1).requires_grad_() for _ in range(2))
    memory_softmax(first, bank, own, temperature=0.1).log_sum.sum().backward()
    assert bank.grad is None
    found = memory_softmax(second, bank, own, temperature=0.1)
    bank.data.zero_()
    found.log_sum.sum().backward()
    assert torch.equal(first.grad, second.grad)


def test_one_output_alone_may_be_used_and_none_recorded():
    embeddings, bank, own = unit_rows(6, 4, 1).requires_grad_(), unit_rows(20, 4, 2), images(6, 20)
    for part in (0, 1):
        found, wanted = (function(embeddings, bank, own, temperature=0.1, entropy="masked")[part]
                         for function in (memory_softmax, plain))
        grads = [torch.autograd.grad(value.sum(), embeddings)[0] for value in (found, wanted)]
        assert torch.allclose(*grads, atol=1e-12)
    with torch.no_grad():
        assert not memory_softmax(embeddings, bank, own, temperature=0.1, entropy="all").entropy.requires_grad
    assert not memory_softmax(embeddings.detach(), bank, own, temperature=0.1).log_sum.requires_grad


@pytest.mark.parametrize("part", ["log_sum", "entropy"])
def test_a_second_derivative_is_refused_aloud(part):
    embeddings = unit_rows(6, 4, 1).requires_grad_()
    found = memory_softmax(embeddings, unit_rows(20, 4, 2), images(6, 20), temperature=0.1, entropy="all")
    with pytest.raises(InputError, match=r"first derivative only.*create_graph"):
        torch.autograd.grad(getattr(found, part).sum(), embeddings, create_graph=True)


# ── what is made on the way ───────────────────────────────────────────────────────────────────────────────────────


class Watch(TorchDispatchMode):
    """Record the largest storage that an operation returns, in numbers, but for that of ``known``; and all names."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.largest, self.names = {x.untyped_storage().data_ptr() for x in known}, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                numbers = value.untyped_storage().nbytes() // value.element_size()
                self.largest = max(self.largest, value.numel(), numbers)
        return result


def watched(function: Callable[..., MemorySoftmax], n_images: int, **options: object) -> Watch:
    """Return what was seen while 16 rows of 8 features went forward and backward."""
    embeddings, bank, own = unit_rows(16, 8, 1).requires_grad_(), unit_rows(n_images, 8, 2), images(16, n_images)
    with Watch(bank) as watch:
        found = function(embeddings, bank, own, temperature=0.1, **options)
        (found.log_sum.sum() + (0 if found.entropy is None else found.entropy.sum())).backward()
    return watch


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_nothing_larger_than_rows_times_chunk_is_made_whatever_the_size_of_the_bank(entropy):
    for n_images in (32, 33, 1000, 20_000):
        assert watched(memory_softmax, n_images, entropy=entropy, chunk=32).largest == 16 * 32
    assert watched(plain, 1000, entropy=entropy).largest == 16 * 1000, "the watch sees a large table"


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_nothing_waits_for_the_device(entropy):
    waiting = {"_local_scalar_dense", "item", "nonzero", "index", "masked_select", "is_nonzero", "equal", "unique"}
    assert not watched(memory_softmax, 100, entropy=entropy, chunk=32).names & waiting


def test_a_chunk_is_chosen_where_none_is_given():
    largest = watched(memory_softmax, 3000, entropy="none").largest
    assert 16 * 256 <= largest < 16 * 3000


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"temperature": math.nan}, "temperature must be above 0"),
    ({"entropy": "mask"}, "entropy='mask' is not known.*did you mean masked"),
    ({"chunk": 0}, "chunk must be at least 1"),
    ({"bank": torch.zeros(5, 3)}, r"same width.*got \(6, 4\) and \(5, 3\)"),
    ({"bank": torch.zeros(0, 4)}, "at least one image"),
    ({"own": torch.zeros(5, dtype=torch.long)}, r"6 rows need as many own images, got \(5,\)"),
])
def test_misuse_is_named(change, message):
    told = {"embeddings": torch.zeros(6, 4), "bank": torch.zeros(5, 4), "own": torch.zeros(6, dtype=torch.long),
            "temperature": 0.1} | change
    with pytest.raises(InputError, match=message):
        memory_softmax(**told)


@pytest.mark.parametrize("options", [{"n_images": 0}, {"n_features": 0}, {"momentum": -0.1}, {"momentum": 1.5},
                                     {"momentum": math.nan}])
def test_a_memory_that_cannot_be_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Memory(**({"n_images": 3, "n_features": 2} | options))


# ── the memory ────────────────────────────────────────────────────────────────────────────────────────────────────


def made(n_images: int = 30, n_features: int = 6, **options: float) -> Memory:
    memory = Memory(n_images, n_features, **options)
    memory.initialise(seeded(3))
    return memory


def gram_error(memory: Memory) -> float:
    """Return the largest error of the Gram matrix, relative to its largest entry."""
    gram = memory.rows.double().T @ memory.rows.double()
    return float((memory.gram - gram).abs().max() / gram.abs().max())


def test_rows_are_drawn_evenly_between_the_bounds_and_from_the_generator_alone():
    state = torch.get_rng_state()
    memory = made(20_000, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(memory.rows, made(20_000, 12).rows)
    assert torch.equal(memory.rows[:16_384], made(16_384, 12).rows) and len(memory.rows.unique(dim=0)) == 20_000
    bound = math.sqrt(3 / 12)
    assert -bound <= float(memory.rows.min()) < -0.999 * bound and 0.999 * bound < float(memory.rows.max()) <= bound
    assert float(memory.rows.square().mean()) == pytest.approx(1 / 12, rel=0.01)
    assert float(memory.rows.norm(dim=1).std()) > 0.05, "not normalised"
    assert gram_error(memory) < 1e-5


def test_an_update_moves_the_named_rows_and_no_others():
    memory, index, rows = made(momentum=0.25), torch.tensor([7, 0, 29]), unit_rows(3, 6, 4, torch.float32)
    before = memory.rows.clone()
    rows.requires_grad_()
    memory.update(index, rows)
    for place, image in enumerate(index.tolist()):
        mix = 0.25 * before[image] + 0.75 * rows.detach()[place]
        assert torch.allclose(memory.rows[image], mix / mix.norm(), atol=1e-6)
    others = [image for image in range(30) if image not in index.tolist()]
    assert torch.equal(memory.rows[others], before[others])
    assert not memory.rows.requires_grad and not memory.gram.requires_grad and rows.grad is None


def test_gram_stays_right_over_many_updates_and_refresh_removes_what_is_left():
    memory, draw = made(200, 16), seeded(8)
    for step in range(500):
        memory.update(torch.randperm(200, generator=draw)[:32], unit_rows(32, 16, step, torch.float32))
    drifted = gram_error(memory)
    assert drifted < 1e-4
    assert torch.allclose(memory.rows.norm(dim=1), torch.ones(200), atol=1e-6)
    memory.refresh()
    assert gram_error(memory) < min(1e-5, drifted)


def test_autocast_does_not_reach_the_memory():
    memories = made(), made()
    memories[0].update(torch.arange(8), unit_rows(8, 6, 1, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memories[1].update(torch.arange(8, dtype=torch.int32), unit_rows(8, 6, 1, torch.float32))
    assert torch.equal(memories[0].rows, memories[1].rows) and torch.equal(memories[0].gram, memories[1].gram)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memories[1].refresh()
    assert gram_error(memories[1]) < 1e-5


def test_half_precision_rows_are_taken_in_and_the_memory_stays_float32():
    memory = made()
    memory.update(torch.arange(8), unit_rows(8, 6, 1).bfloat16())
    assert memory.rows.dtype == memory.gram.dtype == torch.float32 and gram_error(memory) < 1e-5


def test_the_state_dict_carries_rows_and_gram_and_a_copy_goes_on_alike(tmp_path):
    memory, other = made(), Memory(30, 6)
    memory.update(torch.arange(8), unit_rows(8, 6, 1, torch.float32))
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {"rows": (30, 6), "gram": (6, 6)}
    other.load_state_dict(state)
    for each in (memory, other):
        each.update(torch.arange(5, 20), unit_rows(15, 6, 2, torch.float32))
    assert torch.equal(memory.rows, other.rows) and torch.equal(memory.gram, other.gram)
    assert not list(memory.parameters())


# ── known values ──────────────────────────────────────────────────────────────────────────────────────────────────


def worked() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (8, 8) of two views of four images, a memory (40, 8) and the images; closed formulas, float64."""
    n, d, r = (torch.arange(1, end + 1, dtype=torch.float64) for end in (40, 8, 8))
    bank = torch.sin(0.7 * n[:, None] + 1.3 * d + 0.05 * n[:, None] * d)
    embeddings = torch.cos(0.4 * r[:, None] + 0.9 * d + 0.03 * r[:, None] * d)
    index = torch.tensor([3, 17, 25, 38])
    return nn.functional.normalize(embeddings, dim=1), nn.functional.normalize(bank, dim=1), index


@pytest.mark.parametrize("chunk", [None, 7])
def test_values_of_the_authors_functions_on_the_worked_example(chunk):
    embeddings, bank, index = worked()
    own = index.repeat(2)
    masked, whole = (memory_softmax(embeddings, bank, own, temperature=0.1, entropy=entropy, chunk=chunk)
                     for entropy in ("masked", "all"))
    own_logit = (embeddings * bank[own]).sum(dim=1) / 0.1
    assert float((masked.log_sum - own_logit).mean()) == pytest.approx(6.699244405, abs=1e-9)
    assert float(masked.entropy.mean()) == pytest.approx(1.075262244, abs=1e-9)
    assert float(whole.entropy.mean()) == pytest.approx(1.094679507, abs=1e-9)
    rows = memory_softmax(bank[:4], bank, torch.arange(4), temperature=0.1, entropy="all", chunk=chunk)
    assert rows.entropy.tolist() == pytest.approx([0.394628653, 0.436101053, 0.448316711, 0.366561105], abs=5e-9)


def test_rows_after_the_authors_update_with_the_second_view():
    embeddings, bank, index = worked()
    memory = Memory(40, 8).double()
    memory.rows.copy_(bank)
    memory.refresh()
    memory.update(index, embeddings[4:])
    assert memory.rows[3, :4].tolist() == pytest.approx([-0.594959947, -0.323381097, 0.396956340, 0.491785906],
                                                        abs=1e-9)
    assert memory.rows[38, :4].tolist() == pytest.approx([-0.476699389, 0.552644729, 0.034399193, 0.271237908],
                                                         abs=1e-9)
    assert gram_error(memory) < 1e-12


@pytest.mark.parametrize("chunk", [None, 13])
def test_entropies_of_the_authors_functions_gradient_included(chunk):
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN, allow_pickle=False).items()
              if name.startswith("superand_")}
    bank, own = golden["superand_memory"], golden["superand_index"].repeat(2)
    options = {"temperature": float(golden["superand_temperature"]), "chunk": chunk}
    embeddings = golden["superand_embeddings"].requires_grad_()
    masked = memory_softmax(embeddings, bank, own, entropy="masked", **options).entropy.mean()
    masked.backward()
    assert masked.item() == pytest.approx(float(golden["superand_ue_masked"]), rel=1e-9)
    assert torch.allclose(embeddings.grad, golden["superand_ue_masked_grad"], rtol=1e-9, atol=1e-12)
    whole = memory_softmax(embeddings, bank, own, entropy="all", **options).entropy.mean()
    assert whole.item() == pytest.approx(float(golden["superand_ue_unmasked"]), rel=1e-9)
    rows = memory_softmax(bank, bank, torch.arange(len(bank)), entropy="all", **options)
    assert torch.allclose(rows.entropy, golden["superand_entropy"], rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_a_gpu_finds_what_a_cpu_finds(entropy):
    embeddings, bank = unit_rows(64, 32, 1, torch.float32), unit_rows(40_000, 32, 2, torch.float32)
    own = images(64, 40_000)
    host = with_gradient(memory_softmax, embeddings, bank, own, temperature=0.1, entropy=entropy)
    device = with_gradient(memory_softmax, *(x.cuda() for x in (embeddings, bank, own)), temperature=0.1,
                           entropy=entropy)
    assert all(torch.allclose(a, b.cpu(), atol=1e-3) for a, b in zip(host, device, strict=True))
