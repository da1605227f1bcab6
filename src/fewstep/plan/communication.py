"""What each process of a sharded distillation holds and sends: formulas, in bytes.

For full copies as ``roles.py`` makes them and FSDP2 shards them (``fully_shard``, block by block): fp32 weights, in
bf16 on their way where the computation is, each block gathered for its forward, let go, gathered again for its
backward; AdamW; a moving average of the student. Activations are not in it. `benchmarks/scaling.py` prints them for
Z-Image; a test holds them to real processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.models.denoiser import TransformerDenoiser

BYTES = 4  # of a weight, a gradient, a moment: fp32


@dataclass(frozen=True)
class ParamCounts:
    """A denoiser's parameters: all of them, those of its largest block, and those outside of blocks."""

    parameters: int
    block: int
    root: int

    @classmethod
    def of(cls, denoiser: TransformerDenoiser) -> ParamCounts:
        """Counts of a denoiser, which may be on the meta device."""
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        blocks = [count(block) for block in denoiser.get_blocks()]
        return cls(count(denoiser), max(blocks), count(denoiser) - sum(blocks))


@dataclass(frozen=True)
class ShardingLayout:
    """So many processes, in groups that hold one copy of the weights each (``train.fsdp_shard_size``)."""

    dist: int
    group: int

    @property
    def replicas(self) -> int:
        return self.dist // self.group


@dataclass(frozen=True)
class ForwardCounts:
    """How often the denoisers of a step speak and learn.

    Attributes:
        forwards: of all roles.
        backwards: of all roles; each gives gradients.
    """

    forwards: float
    backwards: float


def forward_counts(steps: int, fake_updates: int) -> ForwardCounts:
    """Of one step of Decoupled-DMD, mean over the anchors of a student of so many steps (``distill/dmd.py``).

    A rollout takes (steps - 1) / 2 forwards in the mean, the data prediction one more. The student's move also asks
    teacher and fake once each; each of the fake's moves asks the fake once.
    """
    images = (steps - 1) / 2 + 1
    return ForwardCounts(images + 2 + fake_updates * (images + 1), 1 + fake_updates)


def memory(size: ParamCounts, layout: ShardingLayout, bf16: bool = False) -> dict[str, float]:
    """Bytes that a process holds, by what they are.

    "gathered": whole, of the role that speaks: what lies outside of blocks, the block at work, and the next on its way.
    """
    share = BYTES * size.parameters / layout.group
    gathered = (2 if bf16 else BYTES) * (2 * size.block + size.root) if layout.group > 1 else 0
    return {
        "teacher": share,
        "student": share,
        "fake": share,
        "gradients": share,  # of one trainable at a time
        "AdamW": 4 * share,  # two moments, of student and fake
        "moving average": share,
        "gathered": gathered,
    }


def communication(
    size: ParamCounts, layout: ShardingLayout, forward_counts: ForwardCounts, bf16: bool = False
) -> dict[str, float]:
    """Bytes that a process receives in a step, by what they are for.

    Every forward gathers all weights, every backward does so again; gradients are scattered within a group (each
    process gets its part from all others), and summed up between groups by a ring.
    """
    others = (layout.group - 1) / layout.group
    shard = BYTES * size.parameters / layout.group
    return {
        "weights": (2 if bf16 else BYTES)
        * others
        * (forward_counts.forwards + forward_counts.backwards)
        * size.parameters,
        "gradients within a group": BYTES * others * forward_counts.backwards * size.parameters,
        "gradients between groups": 2 * (layout.replicas - 1) / layout.replicas * shard * forward_counts.backwards,
    }
