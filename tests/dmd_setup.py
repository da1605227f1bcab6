"""DMD on Gaussians, for which every direction is known."""

import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.core.schedules import Constant
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.method import DMD, WeightedTerm
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.dmd.terms.cfg_augmentation import CFGAugmentation
from fewstep.methods.dmd.terms.distribution_matching import DistributionMatching
from fewstep.methods.dmd.terms.trajectory_mse import TrajectoryMSE

SHIFT = 3.0
COUNT = 6
LEVELS = (1.0, 0.75, 0.5, 0.25)
EPS = 1e-6


def dmd(
    *,
    ca=1.0,
    dm=1.0,
    alpha=4.0,
    renoise=None,
    teacher=None,
    student=None,
    fake=None,
    null_mean=0.0,
    more=None,
    terms=(),
    levels=LEVELS,
    group_size=1,
    total_steps=10,
    eps=EPS,
    **dm_options,
):
    """DMD on Gaussians, with CA and DM by weight (a number or a schedule; 0 leaves the term out).

    terms: functions of the sampler, each giving a further term's name, the term and its weight.
    """
    renoise = renoise or Renoise("hybrid", SHIFT)
    teacher = teacher or Gaussian().requires_grad_(False)
    student, fake = student or Gaussian(), fake or Gaussian()
    sampler = StudentSampler(student, levels, SHIFT)
    found = {}
    if ca:
        found["cfg_augmentation"] = CFGAugmentation(alpha, eps), ca
    if dm:
        matching = DistributionMatching(
            teacher, student, fake, renoise, sampler.fresh, eps=eps, **{"updates": 3, **dm_options}
        )
        found["distribution_matching"] = matching, dm
    if more:
        found["trajectory_mse"] = TrajectoryMSE(student, sampler.trained_sigmas), more
    for make in terms:
        name, term, weight = make(sampler)
        found[name] = term, weight
    weighted = {
        name: WeightedTerm(term, Constant(weight) if isinstance(weight, float) else weight)
        for name, (term, weight) in found.items()
    }
    return DMD(teacher, sampler, prompts_of([null_mean]), renoise, weighted, total_steps, group_size=group_size)


def fake_score(method):
    return method.terms["distribution_matching"].term.fake_score


def directions(method, x, anchor, prompts):
    """The weighted sum of all directions, and their metrics."""
    terms = {name: each.term for name, each in method.terms.items()}
    found = method.compute_directions(terms, x, anchor, prompts)
    metrics = {key: value for each in found.values() for key, value in each.metrics.items()}
    return sum(method.terms[name].weight(0) * each.delta for name, each in found.items()), metrics


def batch_of(mean=1.0, count=COUNT):
    return DistillBatch(torch.randn(count, *SHAPE), prompts_of([mean] * count), texts=[f"{mean:g}"] * count)


def train_student(method, student):
    """The student alone, 80 steps on what the method collects; the metrics of the last one."""
    (part,) = [part for part in method.trainables if part.name == "student"]
    optimizer = torch.optim.Adam([student.offset], lr=0.05)
    for step in range(80):
        method.before_step(step)
        with torch.no_grad():
            collected = method.collect(batch_of(count=64))
        loss, metrics = part.loss(collected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
    return metrics
