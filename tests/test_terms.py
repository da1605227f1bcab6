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
from fewstep.core.method import Shard
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.errors import UserError
from fewstep.methods.adversarial.heads import DiscriminatorHeads
from fewstep.methods.base import DataSetup
from fewstep.methods.dmd.data import dmd_sources
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import StudentSample
from fewstep.methods.dmd.terms.gan import GAN, DiscriminatorHead, GANSettings
from fewstep.methods.dmd.terms.mean_variance import MeanVariance, mean_variance
from fewstep.methods.dmd.terms.mmd import FeatureMMD, feature_mmd
from fewstep.methods.dmd.terms.trajectory_mse import TrajectoryMSE
from fewstep.models.zimage.denoiser import ZImageDenoiser

RENOISE = Renoise("hybrid", 3.0)


class Pixels:
    """A feature extractor whose tokens are the noisy pixels, at each depth."""

    def features(self, x, sigma, prompts, depths=(0.5,)):
        return x.flatten(2).transpose(1, 2).repeat(1, 1, len(depths))


def sample_of(x0):
    """A student sample; regularizers use x0 alone."""
    zeros = torch.zeros(len(x0))
    return StudentSample(x0, torch.zeros_like(x0), zeros, zeros, batch_of(len(x0)).prompts)


def batch_of(count, real=None):
    """No noise and empty prompts, with real latents or without."""
    prompts = EncodedPrompts(torch.zeros(count, 1, 1), torch.ones(count, dtype=torch.long))
    return DistillBatch(torch.zeros(count), prompts, None if real is None else real[:, None])


def test_mean_variance_is_the_kl_divergence_of_gaussians():
    """Against torch's own, sample by sample."""
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
    term, optimizer = MeanVariance(0.5, 1.0), torch.optim.Adam([x], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        term.loss(sample_of(x), batch_of(4)).backward()
        optimizer.step()
    assert x.mean().item() == pytest.approx(0.5, abs=0.05)
    assert x.std().item() == pytest.approx(1.0, abs=0.05)


def test_feature_mmd_separates_distributions():
    torch.manual_seed(0)
    same = [feature_mmd(torch.randn(40, 6), torch.randn(40, 6)).item() for _ in range(30)]
    apart = [feature_mmd(torch.randn(40, 6), torch.randn(40, 6) + 1).item() for _ in range(30)]
    assert abs(sum(same) / 30) < 0.01  # unbiased
    assert min(apart) > max(same)


def test_feature_mmd_is_the_closed_form_with_the_median_of_all_pairs():
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    both = torch.cat([a, b])
    distance = torch.cdist(both, both).square()
    median = torch.stack([distance[i, j] for i in range(6) for j in range(6) if i != j]).median()
    kernel = sum(torch.exp(-distance / (scale * median)) for scale in (0.5, 1.0, 2.0)) / 3
    within = [
        sum(block[i, j] for i in range(3) for j in range(3) if i != j) / 6 for block in (kernel[:3, :3], kernel[3:, 3:])
    ]
    expected = sum(within) - 2 * kernel[:3, 3:].mean()
    assert feature_mmd(a, b).item() == pytest.approx(expected.item(), abs=1e-6)


def test_mmd_on_single_samples_is_refused():
    """Its estimator divides by the batch size less 1."""
    with pytest.raises(
        UserError, match=r"method\.terms\.mmd compares samples within a batch: set train\.batch_size to 2"
    ):
        load_recipe("micro-decoupled", ["method.terms.mmd.weight=1", "train.batch_size=1"])


def test_mmd_brings_a_shifted_student_back():
    torch.manual_seed(0)
    offset = nn.Parameter(torch.tensor(1.5))
    term, optimizer = FeatureMMD(Pixels(), RENOISE), torch.optim.Adam([offset], lr=0.05)
    for _ in range(150):
        real, x = torch.randn(32, 2, 2, 2), torch.randn(32, 2, 2, 2) + offset
        optimizer.zero_grad()
        term.loss(sample_of(x), batch_of(32, real)).backward()
        optimizer.step()
    assert abs(offset.item()) < 0.4


def gan_on_pixels(x0=None, depths=None, **options):
    """A GAN whose fresh student samples are standard normal, or the given ones."""
    head = DiscriminatorHead(2) if depths is None else DiscriminatorHeads(2, len(depths))
    settings = GANSettings(depths=depths, **options)
    return GAN(Pixels(), head, RENOISE, lambda batch: torch.randn(64, 2, 2, 2) if x0 is None else x0, settings)


DEPTHS = pytest.mark.parametrize("depths", [None, [0.25, 0.75]], ids=["middle", "heads"])


@DEPTHS
def test_gan_losses_reach_their_own_part_alone(depths):
    x = torch.randn(8, 2, 2, 2, requires_grad=True)
    gan = gan_on_pixels(x.detach(), depths)
    gan.loss(sample_of(x), batch_of(8)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in gan.head.parameters())
    x.grad = None
    (part,) = gan.trainables()
    assert (part.name, part.module) == ("discriminator", gan.head)
    loss, _ = part.loss(batch_of(8, torch.randn(8, 2, 2, 2)))
    loss.backward()
    assert x.grad is None
    assert all(p.grad is not None for p in gan.head.parameters())


def train_discriminator(gan, steps):
    """Against real latents 2 above the student's; returns the metrics of every step."""
    for head in getattr(gan.head, "heads", [gan.head]):
        head.norm = nn.Identity()  # with two features a layer norm would leave only their order
    optimizer = torch.optim.Adam(gan.head.parameters(), lr=0.01)
    history = []
    for _ in range(steps):
        loss, metrics = gan.compute_discriminator_loss(batch_of(64, torch.randn(64, 2, 2, 2) + 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(metrics)
    return history


@DEPTHS
def test_gan_moves_the_student_to_the_real_latents(depths):
    torch.manual_seed(0)
    gan = gan_on_pixels(depths=depths, r1_weight=1.0)
    accuracy = [metrics["accuracy"].item() for metrics in train_discriminator(gan, 150)]
    assert sum(accuracy[-20:]) / 20 > 0.7
    x = torch.randn(64, 2, 2, 2, requires_grad=True)
    gan.loss(sample_of(x), batch_of(64)).backward()
    assert (x.grad < 0).float().mean() > 0.95  # a descent step moves up


def test_gan_compares_up_to_its_highest_noise_level():
    x = torch.zeros(2000, 1)
    bounded = gan_on_pixels(sigma_max=0.3).sample_sigma(x)
    assert bounded.max().item() == pytest.approx(0.3, abs=0.01)
    assert bounded.min().item() == pytest.approx(RENOISE.low, abs=0.01)
    free = gan_on_pixels().sample_sigma(x)
    assert free.median().item() == pytest.approx(0.75, abs=0.04)  # u = 1/2 at shift 3


def test_r1_penalty_flattens_the_discriminator():
    final = {}
    for weight in (0.0, 1e5):
        torch.manual_seed(0)
        final[weight] = train_discriminator(gan_on_pixels(r1_weight=weight), 60)[-1]["r1"].item()
    assert final[1e5] < 0.5 * final[0.0]


def test_features_are_one_vector_per_patch(tiny):
    """Samples with captions of several lengths come back in order."""
    denoiser = ZImageDenoiser(tiny.transformer)
    prompts = tiny.encode(["a dog", "word " * 60, "a cat"])
    x, sigma = torch.randn(3, 16, 8, 8), torch.rand(3)
    with torch.no_grad():
        together = denoiser.features(x, sigma, prompts)
        alone = torch.cat([denoiser.features(x[i : i + 1], sigma[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert together.shape == (3, 16, 48)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std().item() > 1e-2


TERMS = "cfg_augmentation: {}, distribution_matching: {}"
RUN = [
    *(
        "train.steps=1",
        f"method.terms={{{TERMS}}}",
        "method.fake_score_start=0",
        "optim.student.lr_schedule=constant",
        "optim.student.min_lr_ratio=0",
    ),
    *("train.batch_size=4", "train.log_every=1", "train.save_every=1", "train.sample_every=0"),
    *("train.precision=fp32", "method.fake_score_updates=1", "evaluate.enabled=false", "method.num_real_images=6"),
    "evaluate.validate_every=0",
    "trajectory={num_trajectories: 6, teacher_steps_per_student_step: 3}",
    "student.steps=2",
]


@pytest.mark.parametrize("source", [pytest.param("teacher", marks=pytest.mark.slow), "emoji"])
def test_a_run_with_every_term_resumes_exactly(tiny_folder, tmp_path, source):
    terms = f"{TERMS}, mean_variance: {{weight: 0.1}}, mmd: {{weight: 0.1}}, gan: {{weight: 0.1, depths: [0.5, 1]}}"
    more = [f"teacher={tiny_folder}", f"method.real_source={source}", f"method.terms={{{terms}}}"]
    more += ["optim.discriminator={lr: 1.0e-3}"]
    api.distill("micro-aligned", tmp_path / "whole", overrides=[*RUN, *more, "train.steps=2"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*RUN, *more, "train.steps=1"])
    api.distill("micro-aligned", tmp_path / "parts", overrides=[*RUN, *more, "train.steps=2"])
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "parts")]
    first, second = (json.loads(line) for line in lines)
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert {"student/mean_variance", "student/mmd", "student/gan", "discriminator/accuracy"} <= first.keys()


def test_prompts_without_a_real_image_are_refused(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photograph of a harbor\n" * 40)
    more = [
        f"teacher={tiny_folder}",
        "method.real_source=emoji",
        "evaluate.validate_every=0",
        f"method.terms={{{TERMS}, mmd: {{}}}}",
    ]
    with pytest.raises(UserError, match="no image of 'a photograph of a harbor'"):
        api.distill(
            "micro-aligned", tmp_path / "run", overrides=[*RUN, *more, f"prompts.source={tmp_path}/prompts.txt"]
        )


def test_trajectory_mse_is_zero_for_the_guided_teacher(tiny, tiny_folder, tmp_path):
    """A batch's states are the guided teacher's from the batch's noise, so its own rollout has no error."""
    overrides = [*RUN, f"teacher={tiny_folder}", "method.terms={trajectory_mse: {}}", "optim.fake_score=null"]
    overrides += ["trajectory.teacher_steps_per_student_step=1"]
    recipe = load_recipe("micro-aligned", overrides)
    prompts = ["a fox", "a bear", "a red apple"]
    batch = dmd_sources(DataSetup(recipe, tiny, prompts, tmp_path / "cache"))["train"](7, Shard())
    sigmas = flow.get_sigmas(2, tiny.shift)
    teacher = ClassifierFreeGuidance(tiny.denoiser, tiny.encode([""]), 1 + tiny.generation_config.guidance_scale)
    with torch.no_grad():
        guided = TrajectoryMSE(teacher, [sigmas]).loss(None, batch)
        unguided = TrajectoryMSE(tiny.denoiser, [sigmas]).loss(None, batch)
        sampled = sample_euler(teacher, batch.noise, sigmas, batch.prompts)
    torch.testing.assert_close(batch.real, sampled, atol=2e-2, rtol=2e-3)  # cached in fp16
    assert guided.item() < 1e-3 * unguided.item()
    api.distill(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "student/trajectory_mse" in json.loads(lines[-1])


def test_trajectory_mse_trains_every_step_of_the_student():
    """On a Gaussian it alone moves a shifted student back to the teacher."""
    teacher, student = Gaussian(), Gaussian(offset=1.0)
    noise, prompts = torch.randn(64, *SHAPE), prompts_of([1.0] * 64)
    states = teacher_trajectory(teacher, noise, flow.uniform_timesteps(4), 1, 3.0, prompts)
    term, optimizer = TrajectoryMSE(student, [flow.get_sigmas(4, 3.0)]), torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        term.loss(None, DistillBatch(noise, prompts, states)).backward()
        optimizer.step()
    assert student.offset.item() == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.timesteps=[1.0, 0.3]", "student.steps=2"], "trajectory_mse needs evenly spaced timesteps"),
        (["student.sampler=sde"], "trajectory_mse needs evenly spaced timesteps"),
        (["method.real_source=emoji"], "trajectory_mse needs method.real_source: teacher"),
        (["method.terms.gan={}"], r"optim\.discriminator is missing"),
        (["method.terms.distribution_matching=null"], r"optim\.fake_score: method dmd has no such trainable part"),
        (["method.fake_score_start=90%"], "starts at step 202, after distribution_matching at step 191"),
        (["method.terms={cfg_augmentation: {weight: 0}}", "optim.fake_score=null"], "no term has a weight"),
        (
            [
                "method.terms={cfg_augmentation: {weight: {kind: piecewise, values: {0: 1, 9: 0}}}}",
                "optim.fake_score=null",
            ],
            "no term has a weight at step 9",
        ),
    ],
)
def test_recipes_whose_terms_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe("micro-aligned", overrides)
