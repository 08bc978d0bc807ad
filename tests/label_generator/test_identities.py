"""Two of the identities that the fast path uses, each in isolation; docs/how_it_works.md explains all four."""

import torch
import torch.nn.functional as F

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.label_generator.ensemble import StackedBatchNorm, StackedLinear
from handsoff_stream.label_generator.rows import resized_rows
from handsoff_stream.label_generator.tiles import Grid, MapGroup


def test_halving_is_the_mean_of_two_by_two_pixels():
    # Small integers, so that no operation rounds and the three ways must agree to the bit.
    map_BCHW = torch.randint(-64, 64, (2, 3, 16, 24), generator=torch.Generator().manual_seed(0)).float()
    mean_BChw = F.avg_pool2d(map_BCHW, 2)
    bilinear_BChw = F.interpolate(map_BCHW, (8, 12), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(bilinear_BChw, mean_BChw)

    group = MapGroup((0,), slice(0, 3), (16, 24))
    rows_BPC = resized_rows(
        FeaturePyramid((map_BCHW,)), group, Grid(8, 0, 8, 8), Grid(12, 0, 12, 12), slice(0, 2), torch.float32
    )
    assert torch.equal(rows_BPC, mean_BChw.flatten(2).transpose(1, 2))


def test_batch_norm_folds_into_the_linear_after_it():
    generator = torch.Generator().manual_seed(0)
    norm, linear = StackedBatchNorm(3, 5).double().eval(), StackedLinear(3, 5, 4, generator).double()
    norm.running_mean.uniform_(-1, 1, generator=generator)
    norm.running_var.uniform_(0.1, 2, generator=generator)
    torch.nn.init.uniform_(norm.weight, -2, 2, generator=generator)
    torch.nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    x_MPI = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    weight_MIO, bias_M1O = norm.fold_into(linear)
    torch.testing.assert_close(torch.baddbmm(bias_M1O, x_MPI, weight_MIO), linear(norm(x_MPI)), rtol=0, atol=1e-14)
