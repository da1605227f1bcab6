"""The table and the targets of benchmarks/advdmd.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ablation_results import METRICS as COMMON

Figures = Mapping[str, float | None]

#: Metric -> its title, its factor, and its format.
METRICS = {
    **{key: COMMON[key] for key in ("object_acc", "nearest_real_acc", "style_acc")},
    "fd_real": ("FD to real images", 1, ".1f"),
    **{key: COMMON[key] for key in ("fd_teacher", "diversity", "hf_energy", "steps")},
    "auc": ("held-out AUC", 1, ".2f"),
    "open": ("gate open, %", 100, ".0f"),
}
TEACHER, REAL, DISTILLED = "teacher, 50 steps", "real images", "Decoupled-DMD"
START = "start"


def title(name: str, steps: int) -> str:
    """Of a row of the table."""
    return f"{name}, {steps} {'step' if steps == 1 else 'steps'}"


def targets(found: Mapping[str, Sequence[Figures]], reference: Mapping[str, Figures]) -> str:
    """In how many seeds each arm reaches the targets of its number of steps, as a Markdown list."""
    lines = []
    for name, seeds in found.items():
        arm, _, steps = name.rpartition(", ")
        if arm == START:
            continue
        distilled = [*found.get(f"{DISTILLED}, {steps}", []), *[None] * len(seeds)][: len(seeds)]
        held = [_held(steps, one, reference, other) for one, other in zip(seeds, distilled, strict=True)]
        counts = []
        for target in held[0]:
            known = [each[target] for each in held if each[target] is not None]
            counts.append(f"{target}: {sum(map(bool, known))} of {len(known)}")
        lines.append(f"- {name}: {'; '.join(counts)}")
    return "\n".join(lines) + "\n"


def _held(
    steps: str, one: Figures, reference: Mapping[str, Figures], distilled: Figures | None
) -> dict[str, bool | None]:
    def ratio(key: str, of: str = TEACHER) -> float:
        return (one[key] or 0.0) / (reference[of][key] or 1.0)

    if steps == "4 steps":
        return {
            "FD to real images below the teacher's": ratio("fd_real") < 1,
            "nearest real above it": ratio("nearest_real_acc") > 1,
            f"objects at least {DISTILLED}'s": None if distilled is None else _no_lower(one, distilled, "object_acc"),
            "diversity at least 90% of the teacher's": ratio("diversity") >= 0.9,
        }
    share = 0.95 if steps == "2 steps" else 0.9
    return {
        f"nearest real at least {share:.0%} of the teacher's": ratio("nearest_real_acc") >= share,
        "objects too": ratio("object_acc") >= share,
        "hf energy within 15% of real images'": 0.85 <= ratio("hf_energy", REAL) <= 1.15,
    }


def _no_lower(one: Figures, other: Figures, key: str) -> bool:
    return (one[key] or 0.0) >= (other[key] or 0.0)
