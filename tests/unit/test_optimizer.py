"""Muon: what it does to a matrix, against PyTorch's own, and to a network's parameters."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion.denoiser import build_network
from diffusion.model.placement import place
from diffusion.training.optimizer import AdamW, Muon, make_optimizers
from diffusion.training.orthogonal import orthogonalised, share_out
from tests.conftest import tiny_recipe
from tests.specs import RGB_SPEC


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (32, 32)])
def test_singular_values_come_near_one_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalised(matrix) @ v.T  # diagonal in the matrix' own singular vectors
    values = turned.diagonal()
    assert (turned - values.diag()).abs().max() < 1e-9
    # A square random matrix has singular values near zero, which five iterations do not lift all the way.
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert values.min() > (0.6 if shape[0] != shape[1] else 0.0)


@given(st.lists(st.integers(1, 10**9), max_size=60), st.integers(1, 9))
def test_work_is_shared_out_evenly(costs: list[int], processes: int) -> None:
    load = [0] * processes
    for cost, owner in zip(costs, share_out(costs, processes), strict=True):
        load[owner] += cost
    assert sum(load) == sum(costs)
    assert max(load) <= sum(costs) / processes + max(costs, default=0)


def test_a_step_is_pytorch_s_own() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(24, 64)) for _ in range(2))
    own = Muon([ours], weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(24, 64)
        theirs.grad = ours.grad.clone()
        own.step(0.02)
        other.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs computes in bfloat16


def test_a_convolution_is_taken_as_a_matrix_whatever_its_memory_layout() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone().contiguous(memory_format=layout))
        parameter.grad = grad.clone().contiguous(memory_format=layout)
        optimizer = Muon([parameter], weight_decay=0.0)
        optimizer.step(1.0)
        results.append(weight - parameter.detach())
    torch.testing.assert_close(results[0], results[1])
    values = torch.linalg.svdvals(results[0].flatten(1))
    assert (values / (0.2 * 36**0.5)).min() > 0.6


def test_adamw_is_pytorch_s_own_to_the_bit() -> None:
    torch.manual_seed(0)
    ours, theirs, without_gradient = (nn.Parameter(torch.ones(8, 4, 3, 3)) for _ in range(3))
    own = AdamW([ours, without_gradient], weight_decay=0.1, betas=(0.9, 0.99))
    other = torch.optim.AdamW([theirs], betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(5):
        other.param_groups[0]["lr"] = 0.02 / (step + 1)
        ours.grad = torch.randn(8, 4, 3, 3)
        theirs.grad = ours.grad.clone()
        own.step(0.02 / (step + 1))
        other.step()
    assert torch.equal(ours, theirs)
    assert own.state[ours].keys() == other.state[theirs].keys()
    for name, value in own.state[ours].items():
        assert torch.equal(value, other.state[theirs][name])
    assert torch.equal(without_gradient, torch.ones(8, 4, 3, 3))


def test_a_rank_that_compiles_nothing_imports_no_compiler() -> None:
    """It costs two seconds and 75 MB in each rank."""
    code = """
import sys, torch
from torch import nn
import diffusion.evaluation.job, diffusion.training.job
from diffusion.training.optimizer import AdamW, Muon
for kind in (lambda p: AdamW(p, 0.1, (0.9, 0.99)), lambda p: Muon(p, 0.1)):
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    kind([weight]).step(0.1)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_only_blocks_have_muon(kind: str) -> None:
    network = place(build_network(tiny_recipe(optimizer__kind=kind), RGB_SPEC), torch.device("cpu"))
    optimizers = make_optimizers(tiny_recipe(optimizer__kind=kind), dict(network.named_parameters()))
    owned = [id(p) for optimizer in optimizers for p in optimizer.state]
    assert sorted(owned) == sorted(map(id, network.parameters()))
    names = {id(p): name for name, p in network.named_parameters()}
    by_muon = [names[id(p)] for o in optimizers[1:] for p in o.state]
    assert bool(by_muon) == (kind == "muon")
    assert all(name.startswith(("down", "middle", "up")) and name.endswith("weight") for name in by_muon)
