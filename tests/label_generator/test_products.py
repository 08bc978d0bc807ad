"""The library that computes matrix products does not matter: results agree, and all operands are supported."""

from __future__ import annotations

import pytest
import torch

from handsoff_stream.label_generator import products as module
from handsoff_stream.label_generator.products import add_product_, linears, product, products


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_those_of_matmul(dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(module, "_by_onednn", lambda x: False)
    x_MPI, weight_MIO, bias_M1O = (operands(*s, dtype=dtype) for s in ((3, 7, 5), (3, 5, 4), (3, 1, 4)))
    torch.testing.assert_close(product(x_MPI[0], weight_MIO[0]), x_MPI[0] @ weight_MIO[0])
    torch.testing.assert_close(products(x_MPI, weight_MIO), x_MPI @ weight_MIO)
    wanted_MPO = torch.baddbmm(bias_M1O, x_MPI, weight_MIO)
    torch.testing.assert_close(linears(x_MPI, weight_MIO, bias_M1O), wanted_MPO)
    out = x_MPI[0] @ weight_MIO[0]
    add_product_(out, x_MPI[1], weight_MIO[1])
    torch.testing.assert_close(out, x_MPI[0] @ weight_MIO[0] + x_MPI[1] @ weight_MIO[1])


def test_operands_may_be_parts_of_larger_tensors_or_empty() -> None:
    x_PI, weight_IO = operands(9, 20)[:, 3:11], operands(8, 30)[:, 5:15]
    torch.testing.assert_close(product(x_PI, weight_IO), x_PI @ weight_IO)
    assert product(x_PI[:0], weight_IO).shape == (0, 10)
    assert torch.equal(product(x_PI[:, :0], weight_IO[:0]), torch.zeros(9, 10))
