"""Edge-aligned convolution in plain PyTorch: the definition, for any dtype and device, differentiable to any order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rung.kernels.edges import Edges


class VectorMessage(NamedTuple):
    """What the neighbours' vectors contribute to a convolution."""

    w: Tensor  # [N, 3, C]
    axial_weights: Tensor  # [R, l_max+1, C], of the vector's projection on the edge
    identity_weights: Tensor  # [R, C], of the vector itself


def convolve(
    radial_ER: Tensor,
    harmonics_EL: Tensor,
    x_NC: Tensor,
    weights_RlC: Tensor,
    edges: Edges,
    vectors: VectorMessage | None = None,
) -> Tensor:
    """Return A [N, L, C], the neighbours' features resolved by harmonics (DESIGN.md section 5, without n^-1/2).

        A[i,lm,c]  = sum_j Y_lm(u_ij) ( P0_lc(d) x[j,c] + P1_lc(d) u_ij . w[j,c] )
        A[i,1m,c] += sum_j P2_c(d) w[j,m,c]
        P*_lc(d)   = sum_nu W*[nu,l,c] s_nu(d)

    One degree at a time, a receiver's sum is a matrix product over its edges, batched in rows padded to the largest
    number of neighbours: nothing of size [E, L, C] is ever stored. That number is read back from the device.
    """
    senders, slots = edges.senders, _Slots(edges)
    x_EC = x_NC.index_select(0, senders)
    if vectors is not None:
        w_E3C = vectors.w.index_select(0, senders)
        along_EC = (w_E3C * harmonics_EL[:, 1:4, None]).sum(1) / math.sqrt(3)  # Y_1 = sqrt(3) u
    sums = []
    for degree in range(weights_RlC.shape[1]):
        message_EC = (radial_ER @ weights_RlC[:, degree]) * x_EC
        if vectors is not None:
            message_EC = torch.addcmul(message_EC, radial_ER @ vectors.axial_weights[:, degree], along_EC)
        rows_Nnm = slots.pad(harmonics_EL[:, degree**2 : (degree + 1) ** 2])
        sums.append(rows_Nnm.transpose(1, 2).contiguous() @ slots.pad(message_EC))
    if vectors is not None:
        identity_E3C = (radial_ER @ vectors.identity_weights)[:, None] * w_E3C
        sums[1] = sums[1].index_add(0, edges.receivers, identity_E3C)
    return torch.cat(sums, dim=1)


class _Slots:
    """Each edge's place when every receiver has as many places as the one with the most neighbours."""

    def __init__(self, edges: Edges) -> None:
        receivers = edges.receivers.long()
        self.num_atoms = len(edges.row_ptr) - 1
        self.width = int(edges.row_ptr.diff().max()) if self.num_atoms else 0
        place_E = torch.arange(len(receivers), device=receivers.device) - edges.row_ptr[receivers]
        self.slot_E = receivers * self.width + place_E

    def pad(self, values: Tensor) -> Tensor:
        """Return values [E, X] as [N, width, X], zero in the places that no edge takes."""
        padded = values.new_zeros((self.num_atoms * self.width, values.shape[1]))
        return padded.index_copy(0, self.slot_E, values).reshape(self.num_atoms, self.width, values.shape[1])
