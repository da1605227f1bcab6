"""Seeds of independent random streams."""

import torch

from fewstep.core.method import Shard
from fewstep.core.seeds import derive_seed, generator, noise_rows


def test_seeds_depend_on_every_key_and_on_nothing_else() -> None:
    keys = [
        ("noise", 1, 2),
        ("noise", 2, 1),
        ("noise", 12),
        ("noise", 1),
        ("batch", 1, 2),
        ("noise1", 2),
        ("noise", "1"),
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed("noise", 1, 2) == 8117160189740333497
    assert all(0 <= derive_seed("x", i) < 2**63 for i in range(1000))


def test_streams_of_different_purposes_are_independent() -> None:
    """An offset of 2**32 is not: torch's CPU generator ignores it."""
    plain = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(plain, torch.randn(1000, generator=torch.Generator().manual_seed(5 + 2**32)))
    for one, other in ((generator("a", 5), generator("b", 5)), (generator("a", 5), torch.Generator().manual_seed(5))):
        pair = torch.stack([torch.randn(1000, generator=one), torch.randn(1000, generator=other)])
        assert pair.corrcoef()[0, 1].abs() < 0.15


def test_rows_of_noise_do_not_depend_on_the_number_of_processes() -> None:
    whole = noise_rows(Shard().rows(6), (2, 3), "noise", 0, 7)
    parts = [noise_rows(Shard(rank, 3).rows(6), (2, 3), "noise", 0, 7) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert len({float(row.sum()) for row in whole}) == 6
