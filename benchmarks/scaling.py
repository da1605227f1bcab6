"""Memory and communication of each process, from 1 to 1,024 GPUs, for Decoupled-DMD of Z-Image with full copies.

Nothing is run or loaded: parameters are counted on torch's meta device, the rest are the formulas of
`fewstep.plan.communication`, which a test compares with real processes at small size.

    python benchmarks/scaling.py [--steps 8] [--fake-score-updates 5]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import ZImageTransformer2DModel

from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.plan.communication import ParamCounts, ShardingLayout, communication, forward_counts, memory

#: (processes, processes in a group): one group of all, and groups of one node (8).
LAYOUTS = [(1, 1), (8, 8), (16, 8), (16, 16), (64, 8), (64, 64), (256, 8), (256, 256), (1024, 8), (1024, 1024)]


def zimage() -> ParamCounts:
    """Z-Image's sizes, which are the defaults of diffusers' class."""
    with torch.device("meta"):
        return ParamCounts.of(ZImageDenoiser(ZImageTransformer2DModel()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of the student")
    parser.add_argument("--fake-score-updates", type=int, default=5)
    arguments = parser.parse_args()
    size, counts = zimage(), forward_counts(arguments.steps, arguments.fake_score_updates)
    print(f"Z-Image: {size.parameters / 1e9:.2f}e9 parameters, {size.block / 1e6:.0f}e6 in each block")
    print(
        f"a step for {arguments.steps} student steps and {arguments.fake_score_updates} fake-score updates: on average "
        f"{counts.forwards:g} forward and {counts.backwards:g} backward passes\n"
    )
    names = ["weights", "gradients", "AdamW", "EMA", "all-gather buffers", "total"]
    columns = ["GPUs", "group", *(f"{name}, GB" for name in names), "received a step, GB", "between groups, GB"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " ---: |" * len(columns))
    for world_size, group in LAYOUTS:
        layout = ShardingLayout(world_size, group)
        held, sent = memory(size, layout, bf16=True), communication(size, layout, counts, bf16=True)
        weights = held.pop("teacher") + held.pop("student") + held.pop("fake score")
        figures = [weights, *held.values()]
        figures += [sum(figures), sum(sent.values()), sent["gradients between groups"]]
        print(f"| {world_size:,} | {group:,} | " + " | ".join(f"{figure / 1e9:,.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
