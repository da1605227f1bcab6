"""The teacher's cache and what learns from it: exactness, refusals, resuming, and that distances fall."""

import json
import weakref

import pytest
import torch
from gaussian import SHAPE, Gaussian, prompts_of

from fewstep import api
from fewstep.config.recipe import CacheRecipe, StagesRecipe
from fewstep.core import flow
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import cache_fingerprint, make_cache, subdivide, teacher_trajectory
from fewstep.data.trajectories import INDEX, TrajectoryCache, read_index, shard_file
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.methods.models_setup import build_models
from fewstep.methods.trajectory import TrajectoryDistillation, TrajectorySettings
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import load

SHIFT = 3.0
ANCHORS = flow.uniform_timesteps(4)


def cache_recipe(folder, **more):
    settings = {"samples": 6, "shard_size": 4, "substeps": 2, "batch_size": 3, "steps": 2, "precision": "fp32", **more}
    return CacheRecipe(kind="cache_trajectories", name="cache", teacher=str(folder), **settings)


def expected_of(folder, steps=2, substeps=2, guidance=2.0):
    return cache_fingerprint(load(folder), flow.uniform_timesteps(steps), substeps, guidance)


def test_finer_levels_keep_the_anchors():
    levels = subdivide(ANCHORS, 3)
    assert len(levels) == 12
    assert levels[::3] == pytest.approx(ANCHORS)
    assert levels == sorted(levels, reverse=True)


def test_trajectory_is_the_teachers_own_way():
    """The last state is what plain sampling on the fine levels gives; an earlier one is a stop on that way."""
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


def test_loss_is_zero_for_a_student_that_walks_the_same_way_and_falls_for_another():
    teacher, noise, prompts = Gaussian(), torch.randn(64, *SHAPE), prompts_of([1.0] * 64)
    states = teacher_trajectory(teacher, noise, ANCHORS, 1, SHIFT, prompts)
    settings = TrajectorySettings(tuple(flow.sigmas_from_timesteps(ANCHORS, SHIFT)))
    same, metrics = TrajectoryDistillation(Gaussian(), settings).student_loss(DistillBatch(noise, prompts, states))
    assert same.item() == pytest.approx(0.0, abs=1e-10)
    assert set(metrics) == {"state_1", "state_2", "state_3", "state_4"}

    student = Gaussian(offset=1.0)
    method = TrajectoryDistillation(student, settings)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss, _ = method.student_loss(DistillBatch(noise, prompts, states))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert student.offset.item() == pytest.approx(0.0, abs=0.05)


def test_cache_holds_what_the_teacher_gives(tiny_folder, tmp_path):
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


def test_cache_goes_on_where_it_was_interrupted(tiny_folder, tmp_path):
    folder = make_cache(cache_recipe(tiny_folder), tmp_path / "cache")
    before = shard_file(folder, 1).read_bytes()
    kept = shard_file(folder, 0).stat().st_mtime_ns
    shard_file(folder, 1).unlink()
    with pytest.raises(UserError, match="1 of 2 shards are missing"):
        TrajectoryCache(folder, expected_of(tiny_folder))
    make_cache(cache_recipe(tiny_folder), folder)
    assert shard_file(folder, 1).read_bytes() == before
    assert shard_file(folder, 0).stat().st_mtime_ns == kept


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


def test_damage_and_strangers_end_in_one_line(tiny_folder, tmp_path):
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


def phases_recipe(folder, steps=4):
    optim = {"student": {"lr": 3e-3}, "fake": {"lr": 1e-3}}
    train = {"steps": steps, "batch_size": 4, "log_every": 1, "save_every": 2}
    align = {
        "name": "align",
        "method": "trajectory",
        "student": {"steps": 2},
        "trajectory": {"samples": 8, "substeps": 3},
        "optim": {"student": optim["student"]},
        "train": {**train, "steps": 30},
    }
    match = {"name": "match", "student": {"steps": 1}, "fake_updates": 1, "optim": optim, "train": train}
    return StagesRecipe(
        kind="stages", name="two", teacher=str(folder), stages=[align, match], evaluate={"enabled": False}
    )


def test_phases_start_from_each_other_and_go_on(tiny_folder, tmp_path):
    made = api.distill(phases_recipe(tiny_folder), tmp_path / "run")
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "phases/1-align/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["student/loss"] < 0.7 * lines[0]["student/loss"]
    assert load(made.student).generation_config.steps == 1
    joined = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert joined == list(range(1, 35))
    aligned, student = load(run / "phases/1-align/student"), load(made.student)
    teacher = load(tiny_folder)

    def apart(a, b):
        pairs = zip(a.transformer.parameters(), b.transformer.parameters(), strict=True)
        return sum((x - y).abs().sum().item() for x, y in pairs)

    assert 0 < apart(student, aligned) < apart(student, teacher)
    before = generate(student, ["a dog"], SamplingParams(seed=3)).images
    api.distill(phases_recipe(tiny_folder), tmp_path / "run")  # all is done: nothing changes
    assert torch.equal(generate(load(made.student), ["a dog"], SamplingParams(seed=3)).images, before)


def test_a_phase_leaves_the_room_to_the_next(tiny_folder, tmp_path, monkeypatch):
    """Its models are gone before those of the next are made; and the last student takes its space once."""
    made, left = [], []

    def watched(*words, **more):
        left.append([model() is not None for models in made for model in models])
        roles = build_models(*words, **more)
        made.append([weakref.ref(model) for model in (roles.teacher.transformer, roles.student.denoiser, roles.fake)])
        return roles

    monkeypatch.setattr("fewstep.jobs.build_models", watched)
    student = api.distill(phases_recipe(tiny_folder), tmp_path / "run").student
    assert left == [[], [False] * 3]
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (student / file).samefile(tmp_path / "run/phases/2-match/student" / file)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError))
    other = api.distill(phases_recipe(tiny_folder), tmp_path / "run").student
    assert not (other / file).samefile(tmp_path / "run/phases/2-match/student" / file)


def test_phases_that_ask_the_teacher_the_same_share_its_answers(tiny_folder, tmp_path):
    recipe = phases_recipe(tiny_folder).model_dump()
    align, match = recipe["phases"]
    match |= {"student": align["student"], "trajectory": align["trajectory"]}
    match["shield"] |= {"regression": 1.0, "weight": 0.0}
    align["train"] |= {"steps": 2}
    api.distill(StagesRecipe(**recipe), tmp_path / "run")
    assert [folder.name for folder in (tmp_path / "run" / "cache").iterdir()] == ["align"]
    assert not (tmp_path / "run/phases/2-match/cache").exists()


def test_phases_with_other_prompts_ask_the_teacher_again(tiny_folder, tmp_path):
    recipe = phases_recipe(tiny_folder).model_dump()
    align, match = recipe["phases"]
    (tmp_path / "prompts.txt").write_text("a fox\n")
    match |= {"student": align["student"], "trajectory": align["trajectory"], "align": 1.0}
    match["prompts"] |= {"source": str(tmp_path / "prompts.txt")}
    align["train"] |= {"steps": 2}
    api.distill(StagesRecipe(**recipe), tmp_path / "run")
    assert sorted(folder.name for folder in (tmp_path / "run" / "cache").iterdir()) == ["align", "match"]


def test_a_phase_that_wants_a_fake_says_so(tiny_folder):
    with pytest.raises(ValueError, match=r"optim\.fake is missing"):
        StagesRecipe(
            kind="stages",
            name="bad",
            teacher=str(tiny_folder),
            stages=[{"name": "a", "optim": {"student": {"lr": 1e-3}}, "train": {"steps": 1, "batch_size": 1}}],
        )
