"""Memory and communication of a process, from 1 to 1,024 GPUs, for full-copy Decoupled-DMD of Z-Image: by formulas.

Nothing is run or loaded: the model is counted on torch's meta device, the rest is `fewstep.training.scaling`, which a
test holds to real processes at small size.

    python benchmarks/scaling.py [--steps 8] [--fake-updates 5]
"""

from __future__ import annotations

import argparse

import torch
from diffusers import ZImageTransformer2DModel

from fewstep.models.zimage.denoiser import ZImageDenoiser
from fewstep.plan.communication import ParamCounts, ShardingLayout, communication, forward_counts, memory

#: All in one group, and groups of one node (8).
LAYOUTS = [(1, 1), (8, 8), (16, 8), (16, 16), (64, 8), (64, 64), (256, 8), (256, 256), (1024, 8), (1024, 1024)]


def zimage() -> ParamCounts:
    """Z-Image's own numbers, which are the defaults of diffusers' class."""
    with torch.device("meta"):
        return ParamCounts.of(ZImageDenoiser(ZImageTransformer2DModel()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of the student")
    parser.add_argument("--fake-updates", type=int, default=5)
    arguments = parser.parse_args()
    size, wanted = zimage(), forward_counts(arguments.steps, arguments.fake_updates)
    print(f"Z-Image: {size.parameters / 1e9:.2f}e9 parameters, {size.block / 1e6:.0f}e6 in a block")
    print(
        f"a step of a student of {arguments.steps} steps, {arguments.fake_updates} updates of the fake: "
        f"{wanted.forwards:g} forwards and {wanted.backwards:g} backwards in the mean\n"
    )
    names = ["weights", "gradients", "AdamW", "moving average", "gathered", "in all"]
    columns = ["GPUs", "group", *(f"{name}, GB" for name in names), "received a step, GB", "of it between groups, GB"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " ---: |" * len(columns))
    for dist, group in LAYOUTS:
        layout = ShardingLayout(dist, group)
        held, sent = memory(size, layout, bf16=True), communication(size, layout, wanted, bf16=True)
        weights = held.pop("teacher") + held.pop("student") + held.pop("fake")
        figures = [weights, *held.values()]
        figures += [sum(figures), sum(sent.values()), sent["gradients between groups"]]
        print(f"| {dist:,} | {group:,} | " + " | ".join(f"{figure / 1e9:,.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
