"""Mean-variance, MMD and GAN terms: closed forms, and gradients to the right trainable."""

import json

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of
from torch import nn

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.errors import UserError
from fewstep.evaluation.runner import emoji_prompts
from fewstep.methods.dmd.build_terms import real_batches
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.gan import GANTerm
from fewstep.methods.dmd.terms.shields import (
    FeatureMMDTerm,
    MeanVarianceTerm,
    TrajectoryMSETerm,
    feature_mmd,
    mean_variance,
)
from fewstep.models.zimage.denoiser import ZImageDenoiser

RENOISE = Renoise("hybrid", 3.0)


class Pixels:
    """A feature extractor whose tokens are the noisy pixels."""

    def features(self, x, sigma, prompts):
        return x.flatten(2).transpose(1, 2)


def batch_of(count, real=None):
    """No noise and empty prompts, with real latents or without: what these shields are tried on looks at no more."""
    prompts = EncodedPrompts(torch.zeros(count, 1, 1), torch.ones(count, dtype=torch.long))
    return DistillBatch(torch.zeros(count), prompts, None if real is None else real[:, None])


def test_mean_variance_is_the_divergence_of_gaussians():
    """Against torch's own divergence, sample by sample, with another mean and deviation each."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8) * torch.tensor([0.5, 1, 2, 1, 3]).view(-1, 1, 1, 1) + torch.arange(5).view(-1, 1, 1, 1)
    flat = x.flatten(1)
    own = torch.distributions.Normal(flat.mean(1), flat.std(1, correction=0))
    target = torch.distributions.Normal(0.3, 1.2)
    expected = torch.distributions.kl_divergence(own, target).mean()
    assert mean_variance(x, 0.3, 1.2).item() == pytest.approx(expected.item(), rel=1e-5)
    normal = torch.randn(2, 4, 64, 64)
    assert mean_variance(normal, 0.0, 1.0).item() == pytest.approx(0.0, abs=1e-3)


def test_mean_variance_pulls_to_its_targets():
    x = (3 + 4 * torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    shield, optimizer = MeanVarianceTerm(0.5, 1.0), torch.optim.Adam([x], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        shield.loss(x, batch_of(4)).backward()
        optimizer.step()
    assert x.mean().item() == pytest.approx(0.5, abs=0.05)
    assert x.std().item() == pytest.approx(1.0, abs=0.05)


def test_feature_mmd_tells_distributions_apart():
    torch.manual_seed(0)
    same = [feature_mmd(torch.randn(40, 6), torch.randn(40, 6)).item() for _ in range(30)]
    apart = [feature_mmd(torch.randn(40, 6), torch.randn(40, 6) + 1).item() for _ in range(30)]
    assert abs(sum(same) / 30) < 0.01  # unbiased
    assert min(apart) > max(same)


def test_mmd_brings_a_shifted_student_back():
    torch.manual_seed(0)
    offset = nn.Parameter(torch.tensor(1.5))
    shield, optimizer = FeatureMMDTerm(Pixels(), RENOISE), torch.optim.Adam([offset], lr=0.05)
    for _ in range(150):
        real, x = torch.randn(32, 2, 2, 2), torch.randn(32, 2, 2, 2) + offset
        optimizer.zero_grad()
        shield.loss(x, batch_of(32, real)).backward()
        optimizer.step()
    assert abs(offset.item()) < 0.4


def test_gan_gradients_reach_their_own_player_alone():
    gan = GANTerm(Pixels(), 2, RENOISE)
    x = torch.randn(8, 2, 2, 2, requires_grad=True)
    gan.loss(x, batch_of(8)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in gan.module.parameters())
    x.grad = None
    loss, _ = gan.learn(x, batch_of(8, torch.randn(8, 2, 2, 2)))
    loss.backward()
    assert x.grad is None
    assert all(p.grad is not None for p in gan.module.parameters())


def test_gan_learns_to_tell_and_shows_the_student_the_way():
    """Real latents lie 2 above the student's: the head finds that out, and its gradient points up."""
    torch.manual_seed(0)
    gan = GANTerm(Pixels(), 2, RENOISE, penalty=1.0)
    gan.module.norm = nn.Identity()  # with two features a layer norm would leave only their order
    optimizer = torch.optim.Adam(gan.module.parameters(), lr=0.01)
    accuracy = []
    for _ in range(150):
        loss, metrics = gan.learn(torch.randn(64, 2, 2, 2), batch_of(64, torch.randn(64, 2, 2, 2) + 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy.append(metrics["accuracy"].item())
    assert sum(accuracy[-20:]) / 20 > 0.7
    x = torch.randn(64, 2, 2, 2, requires_grad=True)
    gan.loss(x, batch_of(64)).backward()
    assert (x.grad < 0).float().mean() > 0.95  # down the loss is up


def test_gan_penalty_flattens_the_head():
    """The same training with a heavy penalty leaves logits that move less where real latents move a little."""
    moved = {}
    for penalty in (0.0, 1e5):
        torch.manual_seed(0)
        gan = GANTerm(Pixels(), 2, RENOISE, penalty=penalty)
        gan.module.norm = nn.Identity()
        optimizer = torch.optim.Adam(gan.module.parameters(), lr=0.01)
        for _ in range(60):
            loss, metrics = gan.learn(torch.randn(64, 2, 2, 2), batch_of(64, torch.randn(64, 2, 2, 2) + 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved[penalty] = metrics["r1"].item()
    assert moved[1e5] < 0.5 * moved[0.0]


def test_features_are_the_middle_of_the_forward(tiny):
    """One vector a patch; samples whose captions have other lengths come back in order."""
    denoiser = ZImageDenoiser(tiny.transformer)
    prompts = tiny.encode(["a dog", "word " * 60, "a cat"])
    x, sigma = torch.randn(3, 16, 8, 8), torch.rand(3)
    with torch.no_grad():
        together = denoiser.features(x, sigma, prompts)
        alone = torch.cat([denoiser.features(x[i : i + 1], sigma[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert together.shape == (3, 16, 48)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std().item() > 1e-2


RUN = [
    *("train.steps=1", "shield.regression=0", "align=0", "fake_warmup=0", "optim.student.lr_schedule=constant"),
    *("train.batch_size=4", "train.log_every=1", "train.save_every=1", "train.sample_every=0"),
    *("train.precision=fp32", "fake_updates=1", "evaluate.enabled=false", "shield.real_samples=6"),
    *("trajectory.samples=6", "trajectory.substeps=3", "trajectory.guidance_scale=null"),
    *("optim.discriminator={lr: 1.0e-3}", "student.steps=2"),
]


@pytest.mark.parametrize("real", ["teacher", "emoji"])
def test_a_run_with_every_shield_resumes_exactly(tiny_folder, tmp_path, real):
    more = [
        f"teacher={tiny_folder}",
        f"shield.real={real}",
        "shield.mean_variance=0.1",
        "shield.mmd=0.1",
        "shield.gan=0.1",
    ]
    api.distill("micro-turbo", tmp_path / "whole", overrides=[*RUN, *more, "train.steps=2"])
    api.distill("micro-turbo", tmp_path / "parts", overrides=[*RUN, *more, "train.steps=1"])
    api.distill("micro-turbo", tmp_path / "parts", overrides=[*RUN, *more, "train.steps=2"])
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "parts")]
    first, second = (json.loads(line) for line in lines)
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert {"student/mean_variance", "student/mmd", "student/discriminator", "discriminator/accuracy"} <= first.keys()


def test_real_images_of_strange_prompts_are_refused(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photograph of a harbour\n")
    more = [f"teacher={tiny_folder}", "shield.real=emoji", "shield.mmd=1", f"prompts.source={tmp_path / 'prompts.txt'}"]
    with pytest.raises(UserError, match="harbour"):
        api.distill("micro-turbo", tmp_path / "run", overrides=[*RUN, *more])


def test_regression_holds_the_student_to_the_teachers_way(tiny, tiny_folder, tmp_path):
    """A batch's states are where the guided teacher was on its way from the batch's noise, so a student that walks as
    it does loses nothing, and another one does."""
    overrides = [*RUN, f"teacher={tiny_folder}", "shield.regression=1", "shield.weight=0", "trajectory.substeps=1"]
    recipe = load_recipe("micro-turbo", overrides)
    batch = real_batches(recipe, tiny, emoji_prompts(6), tmp_path / "cache")(7)
    sigmas = flow.get_sigmas(2, tiny.shift)
    teacher = ClassifierFreeGuidance(tiny.denoiser, tiny.encode([""]), 1 + tiny.generation_config.guidance_scale)
    with torch.no_grad():
        along = TrajectoryMSETerm(teacher, sigmas).loss(batch.noise, batch)
        astray = TrajectoryMSETerm(tiny.denoiser, sigmas).loss(batch.noise, batch)
        made = sample_euler(teacher, batch.noise, sigmas, batch.prompts)
    torch.testing.assert_close(batch.real, made, atol=2e-2, rtol=2e-3)  # kept in fp16
    assert along.item() < 1e-3 * astray.item()
    api.distill(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "student/regression" in json.loads(lines[-1])


def test_regression_reaches_every_step_of_the_student():
    """On a Gaussian the regression alone moves a shifted student back to the teacher's way."""
    teacher, student = Gaussian(), Gaussian(offset=1.0)
    noise, prompts = torch.randn(64, *SHAPE), prompts_of([1.0] * 64)
    states = teacher_trajectory(teacher, noise, flow.uniform_timesteps(4), 1, 3.0, prompts)
    shield, optimizer = (
        TrajectoryMSETerm(student, flow.get_sigmas(4, 3.0)),
        torch.optim.Adam(student.parameters(), lr=0.1),
    )
    for _ in range(60):
        optimizer.zero_grad()
        shield.loss(noise, DistillBatch(noise, prompts, states)).backward()
        optimizer.step()
    assert student.offset.item() == pytest.approx(0.0, abs=0.05)


def test_regression_of_a_student_with_a_way_of_its_own_is_refused(tiny_folder, tmp_path):
    overrides = [*RUN, f"teacher={tiny_folder}", "shield.regression=1", "student.anchors=[1.0, 0.3]"]
    with pytest.raises(UserError, match=r"shield\.regression: it needs evenly spaced anchors"):
        api.distill("micro-turbo", tmp_path / "run", overrides=overrides)


def test_regression_on_data_is_refused():
    with pytest.raises(UserError, match=r"set shield\.real to teacher"):
        load_recipe("micro-turbo", ["shield.regression=1", "shield.real=emoji"])


def test_a_gan_without_its_optimizer_is_refused():
    with pytest.raises(UserError, match=r"optim\.discriminator is missing"):
        load_recipe("micro-turbo", ["shield.gan=1"])
