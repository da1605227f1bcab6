"""Linear layers sample by sample: the same numbers as plain ones, and the same bits in every batch."""

import pytest
import torch
from torch import nn

from fewstep.core.batch_invariance import batch_invariant

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96,), (64, 96), (5, 7, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_each_sample_is_computed_as_if_alone(dtype, shape, bias):
    layer, x = nn.Linear(96, 40, bias=bias, dtype=dtype), torch.randn(9, *shape).to(dtype)
    with torch.no_grad(), batch_invariant(CPU):
        together, alone = layer(x), torch.cat([layer(sample) for sample in x.split(1)])
    assert torch.equal(together, alone)
    with torch.no_grad():
        torch.testing.assert_close(together, layer(x))


def test_without_it_the_batch_changes_bits():
    """The reason for it. Where this fails, plain products have become batch invariant."""
    layer, x = nn.Linear(256, 1024), torch.randn(8, 256)
    with torch.no_grad():
        assert not torch.equal(layer(x), torch.cat([layer(sample) for sample in x.split(1)]))


def test_gpus_and_code_outside_are_left_alone():
    layer, x = nn.Linear(256, 1024), torch.randn(8, 256)
    with torch.no_grad():
        plain = layer(x)
        with batch_invariant(torch.device("cuda")):
            assert torch.equal(layer(x), plain)
        with batch_invariant(CPU):
            layer(x)
        assert torch.equal(layer(x), plain)
