"""Optimizers against their equations, and the contracts that torch's own keep."""

import pytest
import torch

from kernels import newton_schulz


def with_singular_values(s: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, V with orthonormal columns; U diag(s) V^T has the singular values s."""
    rand = lambda rows: torch.linalg.qr(torch.randn(rows, len(s), dtype=torch.float64))[0]
    return rand(m), rand(n)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1, 1e25])
@pytest.mark.parametrize("decades", [0, 2, 8])
def test_newton_schulz_brings_singular_values_to_where_it_says(shape, dtype, scale, decades):
    """Condition numbers up to 1e8: those of at least |G| / 570 land in [0.7, 1.2], the smaller ones below."""
    s = torch.logspace(0, -decades, 32, dtype=torch.float64)
    U, V = with_singular_values(s, *shape)
    G = (scale * (U * s) @ V.mT).to(torch.float64 if dtype == torch.float64 else torch.float32)
    O = newton_schulz(G, dtype=dtype)
    assert O.dtype == G.dtype and O.shape == G.shape
    along, reached = (U.mT @ O.double() @ V).diagonal(), s >= s.norm() / 570
    assert 0.7 < along[reached].min() and torch.linalg.matrix_norm(O.double(), 2) < 1.2
    assert reached.sum() == {0: 32, 2: 32, 8: 11}[decades]
    if dtype != torch.bfloat16 and decades == 8:
        assert 0 < along[~reached].min() < 0.01  # the direction is right, the size is not
    if dtype == torch.float64:  # more steps reach further
        assert (U.mT @ newton_schulz(G, 20) @ V).diagonal().min() > 0.7


def test_newton_schulz_of_a_stack_is_that_of_each_and_zero_gives_zero():
    G = torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(newton_schulz(G), torch.stack([torch.stack([newton_schulz(g) for g in h]) for h in G]))
    assert newton_schulz(torch.zeros(3, 4)).abs().max() == 0 and newton_schulz(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    assert newton_schulz(torch.tensor([[1.0, float("nan")]])).isnan().any()
    for bad in ({"G": torch.randn(3)}, {"G": torch.randn(3, 3), "steps": 0}):
        with pytest.raises(ValueError, match="needs .*1 or more"):
            newton_schulz(**bad)
