"""Q4_K blocks are read by gguf's own code, and are as exact as the format allows."""

import gguf
import numpy as np
import pytest
import torch

from fewstep.export.q4_k import quantize_q4_k

Q4_K = gguf.GGMLQuantizationType.Q4_K


def read(packed):
    return torch.from_numpy(gguf.dequantize(packed.numpy(), Q4_K))


def relative_rms(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_normal_numbers_keep_seven_percent():
    """4 bits for each number, by rounding to 16 even levels over the range of 32: about 8%; the fit is better."""
    rows = torch.randn(24, 768)
    packed = quantize_q4_k(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (24, 3 * 144)
    assert relative_rms(read(packed), rows) < 0.08
    low, high = (part(rows.reshape(-1, 32), dim=1, keepdim=True) for part in (torch.amin, torch.amax))
    step = (high - low) / 15
    plain = (((rows.reshape(-1, 32) - low) / step).round() * step + low).reshape(rows.shape)
    assert relative_rms(read(packed), rows) < relative_rms(plain, rows)


def test_numbers_that_the_format_holds_are_exact():
    """d 2^-6, scales 1 to 63, m 2^-4, minima 0 to 63, every level used: all bits of a block are right."""
    scales, minima = torch.tensor([63, 1, 17, 33, 50, 16, 62, 48.0]), torch.tensor([63, 0, 15, 16, 47, 48, 31, 62.0])
    levels = torch.arange(32) % 16
    rows = (scales[:, None] * levels / 64 - minima[:, None] / 16).reshape(1, 256)
    assert relative_rms(read(quantize_q4_k(rows)), rows) < 1e-3


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_constant_rows(value):
    rows = torch.full((2, 256), value)
    assert (read(quantize_q4_k(rows)) - rows).abs().max() <= 2e-3 * abs(value)


def test_positive_numbers_far_from_zero():
    """A minimum cannot be negative: the levels begin at 0."""
    rows = 10 + torch.rand(1, 256)
    assert (read(quantize_q4_k(rows)) - rows).abs().max() < 0.7


def test_rows_are_independent():
    rows = torch.randn(5, 256)
    together = quantize_q4_k(rows).numpy()
    assert np.array_equal(together[3], quantize_q4_k(rows[3:4]).numpy()[0])
