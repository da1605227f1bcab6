"""Trajectory caches and trajectory distillation: exactness, refusals, resuming, and that distances fall."""

import json

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep.config.load import load_recipe
from fewstep.config.recipe import CacheRecipe
from fewstep.core import flow
from fewstep.core.method import Shard
from fewstep.core.samplers import iterate, sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import (
    cache_fingerprint,
    make_cache,
    open_trajectory_cache,
    subdivide,
    teacher_trajectory,
)
from fewstep.data.trajectories import INDEX, TrajectoryCache, read_index, shard_file
from fewstep.errors import UserError
from fewstep.methods.trajectory import TrajectoryDistillation, drawn_sigmas, trajectory_mse
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import load

SHIFT = 3.0
ANCHORS = flow.uniform_timesteps(4)


def cache_recipe(folder, **more):
    settings = {
        "num_trajectories": 6, "shard_size": 4, "teacher_steps_per_student_step": 2, "batch_size": 3, "steps": 2,
        "precision": "fp32", **more,
    }  # fmt: skip
    return CacheRecipe(kind="cache_trajectories", name="cache", teacher=str(folder), **settings)


def expected_of(folder, steps=2, substeps=2, guidance=2.0):
    return cache_fingerprint(load(folder), flow.uniform_timesteps(steps), substeps, guidance)


def test_subdivided_levels_contain_the_anchors():
    levels = subdivide(ANCHORS, 3)
    assert len(levels) == 12
    assert levels[::3] == pytest.approx(ANCHORS)
    assert levels == sorted(levels, reverse=True)


def test_trajectory_is_plain_sampling_with_the_fine_levels():
    """The last state equals plain sampling; with many steps an earlier one is the known flow of a Gaussian."""
    teacher, noise, prompts = Gaussian(), torch.randn(5, *SHAPE), prompts_of([1.0] * 5)
    states = teacher_trajectory(teacher, noise, ANCHORS, 4, SHIFT, prompts)
    sigmas = flow.sigmas_from_timesteps(subdivide(ANCHORS, 4), SHIFT)
    with torch.no_grad():
        whole = sample_euler(teacher, noise, sigmas, prompts)
    assert states.shape == (5, 4, *SHAPE)
    torch.testing.assert_close(states[:, -1], whole)
    # with fine steps the flow of a Gaussian is known: x at sigma is mean (1 - sigma) + root of the variance ratio
    exact = teacher_trajectory(teacher, noise, ANCHORS, 400, SHIFT, prompts)
    level = flow.shift_sigma(ANCHORS[2], SHIFT)
    variance = ((1 - level) * teacher.deviation) ** 2 + level**2
    torch.testing.assert_close(exact[:, 1], (1 - level) + variance**0.5 * noise, atol=0.02, rtol=0)


def test_loss_is_zero_for_the_same_trajectory_and_falls_for_another():
    teacher, noise, prompts = Gaussian(), torch.randn(64, *SHAPE), prompts_of([1.0] * 64)
    states = teacher_trajectory(teacher, noise, ANCHORS, 1, SHIFT, prompts)
    sigmas = flow.sigmas_from_timesteps(ANCHORS, SHIFT)
    same, metrics = TrajectoryDistillation(Gaussian(), [sigmas]).compute_student_loss(
        DistillBatch(noise, prompts, states)
    )
    assert same.item() == pytest.approx(0.0, abs=1e-10)
    assert set(metrics) == {f"trajectory_mse_{k}" for k in (1, 2, 3, 4)}

    student = Gaussian(offset=1.0)
    method = TrajectoryDistillation(student, [sigmas])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss, _ = method.compute_student_loss(DistillBatch(noise, prompts, states))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert student.offset.item() == pytest.approx(0.0, abs=0.05)


def test_a_student_of_several_step_counts_is_trained_at_each():
    """Fewer steps are held to those of the teacher's states that lie at their levels."""
    teacher, noise, prompts = Gaussian(), torch.randn(64, *SHAPE), prompts_of([1.0] * 64)
    states = teacher_trajectory(teacher, noise, ANCHORS, 1, SHIFT, prompts)
    batch, schedules = DistillBatch(noise, prompts, states), [flow.get_sigmas(count, SHIFT) for count in (1, 2, 4)]
    found = trajectory_mse(Gaussian(), batch, schedules[1])
    by_hand = [step.x_next for step in iterate(Gaussian(), noise, schedules[1], prompts)]
    expected = [(x - states[:, k]).square().mean() for x, k in zip(by_hand, (1, 3), strict=True)]
    torch.testing.assert_close(found, dict(zip((2, 4), expected, strict=True)))

    student = Gaussian(offset=1.0)
    method, drawn = TrajectoryDistillation(student, schedules), set()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(40):
        loss, metrics = method.compute_student_loss(batch)
        drawn.add(tuple(metrics))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = [tuple(f"trajectory_mse_{k}" for k in each) for each in ((4,), (2, 4), (1, 2, 3, 4))]
    assert drawn == set(names)
    assert drawn_sigmas(schedules, longest=True) == schedules[2]


def test_a_cache_has_states_for_every_step_count(tiny_folder, tmp_path):
    counts = ["student={steps: 1, step_counts: [1, 2]}", f"teacher={tiny_folder}", "method={name: trajectory}"]
    counts += ["optim.fake_score=null", "trajectory={num_trajectories: 4, teacher_steps_per_student_step: 1}"]
    recipe = load_recipe("micro-1", counts)
    cache = open_trajectory_cache(recipe, load(tiny_folder), tmp_path / "cache", ["a fox", "a bear"])
    assert cache.read([0])[0].shape[1] == 2


def test_cache_holds_the_teachers_states(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    cache, teacher = TrajectoryCache(folder, expected_of(tiny_folder)), load(tiny_folder)
    assert len(cache) == 6
    states, prompts = cache.read([5, 1])
    assert states.shape == (2, 2, 16, 8, 8)
    texts = [json.loads(cache._shards[n].metadata()["prompts"])[row] for n, row in ((1, 1), (0, 1))]
    torch.testing.assert_close(prompts.features, teacher.encode(texts).features)
    # two student steps of two teacher steps each: the last state is the teacher's image after four
    noise = initial_noise(teacher, cache.seeds([5, 1]), 64, 64)
    from fewstep.core.guidance import ClassifierFreeGuidance

    with torch.no_grad():
        final = sample_euler(
            ClassifierFreeGuidance(teacher.denoiser, teacher.encode([""]), 3.0),
            noise,
            flow.get_sigmas(4, teacher.shift),
            prompts,
        )
    torch.testing.assert_close(states[:, -1], final, atol=2e-2, rtol=2e-3)  # kept in fp16


def test_interrupted_cache_resumes(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    before = shard_file(folder, 1).read_bytes()
    kept = shard_file(folder, 0).stat().st_mtime_ns
    shard_file(folder, 1).unlink()
    with pytest.raises(UserError, match="1 of 2 shards are missing"):
        TrajectoryCache(folder, expected_of(tiny_folder))
    make_cache(cache_recipe(tiny_folder), folder)
    assert shard_file(folder, 1).read_bytes() == before
    assert shard_file(folder, 0).stat().st_mtime_ns == kept


def test_processes_share_the_work(tiny_folder, tmp_path):
    """Two processes sample every other shard, and together those of one."""
    recipe = cache_recipe(tiny_folder, shard_size=2)
    whole = make_cache(recipe, tmp_path / "whole")
    written = []
    for rank in (0, 1):
        make_cache(recipe, tmp_path / "shared", process=Shard(rank, 2))
        written.append({path.name for path in (tmp_path / "shared").glob("shard-*")})
    assert written == [
        {"shard-00000.safetensors", "shard-00002.safetensors"},
        {path.name for path in whole.glob("shard-*")},
    ]
    for path in whole.iterdir():
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()


def test_other_caches_are_refused(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    with pytest.raises(UserError, match="another guidance_scale"):
        TrajectoryCache(folder, expected_of(tiny_folder, guidance=3.0))
    with pytest.raises(UserError, match="another sigmas"):
        TrajectoryCache(folder, expected_of(tiny_folder, substeps=3))
    with pytest.raises(UserError, match="another sigmas, states"):
        make_cache(cache_recipe(tiny_folder, steps=4), folder)
    with pytest.raises(UserError, match="another size or seed"):
        make_cache(cache_recipe(tiny_folder, first_seed=7), folder)
    other = load(tiny_folder)
    with torch.no_grad():
        next(other.transformer.parameters()).view(-1)[-1] += 1e-3  # one number of one weight
    with pytest.raises(UserError, match="another transformer"):
        TrajectoryCache(folder, cache_fingerprint(other, flow.uniform_timesteps(2), 2, 2.0))
    make_cache(cache_recipe(tiny_folder, first_seed=7), folder, overwrite=True)
    assert read_index(folder).first_seed == 7


def test_damaged_caches_and_other_folders_are_refused_in_one_line(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    shard_file(folder, 0).write_bytes(b"torn")
    with pytest.raises(UserError, match="shard-00000"):
        TrajectoryCache(folder, expected_of(tiny_folder))
    (folder / INDEX).write_text("{")
    with pytest.raises(UserError, match=INDEX):
        TrajectoryCache(folder, expected_of(tiny_folder))
    with pytest.raises(UserError, match="nowhere is not a cache"):
        TrajectoryCache(tmp_path / "nowhere", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="has files but no"):
        make_cache(cache_recipe(tiny_folder), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_overwrite_keeps_other_files(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.txt was not written by fewstep cache-trajectories"):
        make_cache(cache_recipe(tiny_folder, first_seed=7), folder, overwrite=True)
    assert shard_file(folder, 0).exists()
