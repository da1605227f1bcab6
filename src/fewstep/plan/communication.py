"""Memory and communication of each process of a sharded distillation, by formulas, in bytes.

For full copies of the models as ``models_setup.py`` makes them and FSDP2 shards them (``fully_shard`` on every block):
fp32 weights, all-gathered in bf16 where the computation is in bf16, each block all-gathered before its forward,
resharded after it and all-gathered again before its backward; AdamW; an EMA of the student. Activations are left out.
``benchmarks/scaling.py`` prints the formulas for Z-Image; a test compares them with real processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.models.denoiser import TransformerDenoiser

BYTES = 4  # of a weight, a gradient or a moment in fp32


@dataclass(frozen=True)
class ParamCounts:
    """Parameters of a denoiser: all, those of its largest block, and those outside of blocks."""

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
    """Processes in groups that each shard one copy of the weights (``train.fsdp_shard_size`` processes)."""

    world_size: int
    group: int

    @property
    def replicas(self) -> int:
        return self.world_size // self.group


@dataclass(frozen=True)
class ForwardCounts:
    """Forward and backward passes of all denoisers in a step. Every backward pass yields gradients."""

    forwards: float
    backwards: float


def forward_counts(steps: int, fake_score_updates: int) -> ForwardCounts:
    """Passes in one step of Decoupled-DMD for a student of ``steps`` steps, mean over its anchors.

    A rollout takes (steps - 1) / 2 forwards in the mean, the data prediction one more. The student's update also
    evaluates teacher and fake score once each; each update of the fake score evaluates the fake score once.
    """
    sample = (steps - 1) / 2 + 1
    return ForwardCounts(sample + 2 + fake_score_updates * (sample + 1), 1 + fake_score_updates)


def memory(size: ParamCounts, layout: ShardingLayout, bf16: bool = False) -> dict[str, float]:
    """Bytes that a process holds, by component.

    "all-gather buffers" are whole weights of one model: those outside of blocks, the current block and the next one.
    """
    shard = BYTES * size.parameters / layout.group
    gathered = (2 if bf16 else BYTES) * (2 * size.block + size.root) if layout.group > 1 else 0
    return {
        "teacher": shard,
        "student": shard,
        "fake score": shard,
        "gradients": shard,  # of one trainable at a time
        "AdamW": 4 * shard,  # two moments each for student and fake score
        "EMA": shard,
        "all-gather buffers": gathered,
    }


def communication(
    size: ParamCounts, layout: ShardingLayout, counts: ForwardCounts, bf16: bool = False
) -> dict[str, float]:
    """Bytes that a process receives in a step, by purpose.

    Every forward and every backward pass all-gathers all weights. Gradients are reduce-scattered within a group (each
    process receives its shard from all others) and all-reduced between groups by a ring.
    """
    others = (layout.group - 1) / layout.group
    shard = BYTES * size.parameters / layout.group
    passes = counts.forwards + counts.backwards
    return {
        "weights": (2 if bf16 else BYTES) * others * passes * size.parameters,
        "gradients within a group": BYTES * others * counts.backwards * size.parameters,
        "gradients between groups": 2 * (layout.replicas - 1) / layout.replicas * shard * counts.backwards,
    }
