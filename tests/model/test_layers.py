"""The species-wise linear map against its definition, atom by atom."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.model.layers import ElementGroups


def test_each_atom_is_multiplied_by_the_weight_of_its_element() -> None:
    element_N = torch.tensor([2, 0, 2, 3, 0])  # no atom of element 1
    x_NC, weight_SCC = torch.randn(5, 3).double(), torch.randn(4, 3, 3).double()
    found = ElementGroups.of(element_N, [2, 0, 2, 1]).linear(x_NC, weight_SCC)
    expected = torch.stack([x_NC[i] @ weight_SCC[element] for i, element in enumerate(element_N.tolist())])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_derivatives_agree_with_finite_differences() -> None:
    groups = ElementGroups.of(torch.tensor([2, 0, 2]), [1, 0, 2, 0])
    x_NC = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight_SCC = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x_NC: Tensor, weight_SCC: Tensor) -> Tensor:
        return groups.linear(x_NC, weight_SCC).square()

    assert torch.autograd.gradcheck(run, (x_NC, weight_SCC))
    assert torch.autograd.gradgradcheck(run, (x_NC, weight_SCC))
    (gradient,) = torch.autograd.grad(run(x_NC, weight_SCC).sum(), weight_SCC)
    assert gradient[1].abs().max() == 0 and gradient[3].abs().max() == 0 and gradient[0].abs().max() > 0
