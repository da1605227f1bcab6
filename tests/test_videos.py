"""Videos: their files, their strips, and what takes images alone."""

import base64
import io
import json
import re

import pytest
import torch
from family_conformance import DISTILL
from PIL import Image
from test_generate_cli import assert_one_error, run
from wan_setup import save_wan

from fewstep import api
from fewstep.data.images import grid, grid_size, middle_frame, strip
from fewstep.data.videos import read_video, write_video
from fewstep.errors import UserError
from fewstep.inference.image_metadata import read_metadata
from fewstep.serve.prepare import prepare
from fewstep.serve.settings import ServedModel, ServeSettings

SMALL = ("--height", 32, "--width", 48, "--steps", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its own defaults are small videos."""
    made = save_wan(tmp_path_factory.mktemp("models") / "wan")
    settings = {"steps": 2, "guidance_scale": 1.0, "height": 32, "width": 48, "frames": 5}
    (made / "fewstep.json").write_text(json.dumps(settings))
    return made


def counted(frames):
    """Frame i of video n has the color (n, i, 7)."""
    video = torch.full((2, frames, 4, 6, 3), 7, dtype=torch.uint8)
    video[..., 0] = torch.arange(2).view(2, 1, 1, 1)
    video[..., 1] = torch.arange(frames).view(1, frames, 1, 1)
    return video


@pytest.mark.parametrize(
    ("frames", "shown"), [(2, [0, 1]), (5, [0, 1, 3, 4]), (9, [0, 3, 5, 8]), (81, [0, 27, 53, 80])]
)
def test_a_strip_has_frames_side_by_side_from_the_first_to_the_last(frames, shown):
    strips = strip(counted(frames))
    assert strips.shape == (2, 4, 6 * len(shown), 3)
    assert strips[1, 2, ::6, 1].tolist() == strips[1, 2, 5::6, 1].tolist() == shown
    assert (strips[1, ..., 0] == 1).all()
    assert middle_frame(counted(frames))[0, 0, 0, 1] == frames // 2
    assert grid(counted(frames), columns=1).size == grid_size(2, 1, 4, 6 * len(shown))


def test_images_are_their_own_strips():
    images = torch.randint(256, (2, 4, 6, 3), dtype=torch.uint8)
    assert strip(images) is images
    assert middle_frame(images) is images


@pytest.mark.parametrize("same", [False, True], ids=["moving", "still"])
def test_a_video_is_read_as_it_was_written(tmp_path, same):
    video = torch.randint(256, (9, 16, 24, 3), dtype=torch.uint8)
    if same:
        video[:] = video[0]
    else:
        video[3:6] = video[2]  # one frame of the file
    write_video(video, tmp_path / "a.webp", '{"a": 1}')
    assert torch.equal(read_video(tmp_path / "a.webp", 9, ""), video)
    with Image.open(tmp_path / "a.webp") as opened:
        assert opened.size == (24, 16)
        assert opened.n_frames == (1 if same else 6)


def test_videos_are_files_that_pillow_plays_with_their_settings(folder, tmp_path):
    many = tmp_path / "many"
    done = run("generate", folder, "a fox", "a hen", "-o", many, *SMALL, "--frames", 9)
    assert done.exit_code == 0, done.output
    assert "2 videos, NFE 2, " in done.stdout
    assert "s per video" in done.stdout
    assert sorted(file.name for file in many.iterdir()) == ["0000.webp", "0001.webp", "generation.json"]
    made = read_metadata(many / "0001.webp")
    assert (made.prompt, made.params.frames, made.params.seed) == ("a hen", 9, 1)
    images = api.generate(folder, ["a fox", "a hen"], height=32, width=48, frames=9, steps=1).images
    assert images.shape == (2, 9, 32, 48, 3)
    assert images.float().std(dim=1).mean() > 1  # it moves
    assert torch.equal(read_video(many / "0001.webp", 9, ""), images[1])


def test_a_video_is_made_again_from_its_file(folder, tmp_path):
    first, again = tmp_path / "first.webp", tmp_path / "again.webp"
    assert run("generate", folder, "a hen", "--seed", 3, "-o", first, *SMALL).exit_code == 0
    assert run("generate", "--from", first, "-o", again).exit_code == 0
    assert again.read_bytes() == first.read_bytes()
    assert run("generate", "--from", first, "-o", again, "--frames", 9).exit_code == 0
    assert read_metadata(again).params.frames == 9


def test_a_picture_shows_strips_and_a_webp_moves(folder, tmp_path):
    words = ("generate", folder, "a fox", "a hen", "--columns", 1, *SMALL)
    assert run(*words, "-o", tmp_path / "a.png").exit_code == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == grid_size(2, 1, 32, 4 * 48)
    assert run(*words, "-o", tmp_path / "a.webp").exit_code == 0
    with Image.open(tmp_path / "a.webp") as video:
        assert (video.size, video.n_frames) == (grid_size(2, 1, 32, 48), 5)
    assert run(*words, "-o", tmp_path / "one.webp", "--frames", 1).exit_code == 0
    with Image.open(tmp_path / "one.webp") as image:
        assert image.n_frames == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "a.webp", "one.webp"]


def test_frames_are_refused_where_there_are_none(folder, tiny_folder, tmp_path):
    photo = tmp_path / "a.png"
    Image.new("RGB", (48, 32)).save(photo)
    out = ("-o", tmp_path / "b.png")
    assert_one_error(
        run("generate", tiny_folder, "a fox", "--frames", 5, *out), "frames 5: ZImagePipeline makes images"
    )
    assert_one_error(run("generate", folder, "a fox", "--frames", 6, *out), "frames 6 is not one more than a multiple")
    words = ("generate", folder, "a fox", "--image", photo)
    assert_one_error(run(*words, "--frames", 5, *out), "frames 5: an edit takes images alone; set frames to 1")
    assert run(*words, "-o", tmp_path / "b.png").exit_code == 0
    with pytest.raises(UserError, match="makes videos of 5 frames, which are not served; set frames to 1"):
        prepare(ServedModel(model=str(folder)), ServeSettings())


def test_previews_of_a_distillation_are_strips_of_the_recipes_frames(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{n} foxes\n" for n in range(20)))
    made = api.distill(
        "micro-aligned", tmp_path / "run",
        overrides=[
            *DISTILL, f"teacher={folder}", f"prompts.source={tmp_path / 'prompts.txt'}", "models.train=lora",
            "frames=9", "resolution=32", "train.sample_every=1",
        ],
    )  # fmt: skip
    assert json.loads((made.student / "fewstep.json").read_text())["frames"] == 9
    with Image.open(tmp_path / "run" / "previews" / "step_000001.png") as shown:
        assert shown.width % (4 * 32 + 2) == 4 * 32


def test_the_middle_frame_is_measured_and_the_report_shows_strips(folder, tmp_path):
    found = api.evaluate(
        folder, ["a fox", "a hen"], out=tmp_path / "report", many_steps=2, diversity_prompts=1, diversity_seeds=2,
        scorers=[],
    )  # fmt: skip
    assert found.run["measured_frame"] == "the one in the middle"
    images = re.findall(r'data:image/webp;base64,([^"]+)"', (tmp_path / "report" / "index.html").read_text())
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image))) as shown:
            assert shown.size == (4 * 48, 32)
    assert len(images) == 2 + 2
