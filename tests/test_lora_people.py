"""`fewstep lora prepare --check-people`: faces in photographs, and the kinds of shots that follow from them."""

import sys

import numpy as np
import pytest
from matplotlib import cbook
from pictures import picture
from PIL import Image
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.data.training_set.checks import ImageRecord, Thresholds, run_checks
from fewstep.data.training_set.faces import open_face_finder, shot_of


@pytest.fixture(scope="module")
def portrait():
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return image.convert("RGB")


def pair(image):
    return Image.fromarray(np.concatenate([np.asarray(image)] * 2, axis=1))


def surrounded(image, factor):
    """The image in the middle of a gray one, ``factor`` times as wide and high."""
    whole = Image.new("RGB", (image.width * factor, image.height * factor), (128, 128, 128))
    whole.paste(image, ((whole.width - image.width) // 2, (whole.height - image.height) // 2))
    return whole


def test_faces_are_counted_and_measured(portrait):
    find = open_face_finder()
    (width,) = find(portrait)
    assert width == pytest.approx(0.3, abs=0.05)  # of the image's height, by eye
    assert len(find(pair(portrait))) == 2
    assert find(picture(size=(400, 300))) == []
    shots = [shot_of(find(image)[0]) for image in (portrait, surrounded(portrait, 2), surrounded(portrait, 4))]
    assert shots == ["close-up", "medium", "full-body"]


def test_a_small_face_in_the_background_does_not_count(portrait):
    scene = surrounded(portrait, 2)
    scene.paste(portrait.resize((portrait.width // 3, portrait.height // 3)), (0, 0))
    assert len(open_face_finder()(scene)) == 1


def record(index, faces, own=""):
    return ImageRecord(
        f"{index}.png", f"{index}.png", 2000, 2000, (64, 64), own, own, 100.0, 1.0, 3**index, faces=faces
    )


def test_captions_decide_on_shots_before_faces():
    faces = [[0.3]] * 9 + [[0.2]] * 7 + [[0.05]] * 4
    found = [
        {check.name: check for check in run_checks(records, {}, [], 64, Thresholds())}
        for records in (
            [record(index, face) for index, face in enumerate(faces)],
            [record(index, face, "full body photo") for index, face in enumerate(faces)],
            [record(index, [] if index < 11 else face) for index, face in enumerate(faces)],
        )
    ]
    assert [(checks["shots"].level, checks["shots"].found) for checks in found] == [
        ("ok", "close-up 45%, medium 35%, full-body 20%"),
        ("note", "close-up 0%, medium 0%, full-body 100%"),
        ("not checked", "0 of 20 captions name the kind of shot"),
    ]
    assert "by the size of the largest face" in found[0]["shots"].threshold
    assert found[2]["faces"].files == [f"{index}.png" for index in range(11)]


def test_several_people_are_named(portrait, tmp_path):
    (tmp_path / "photos").mkdir()
    portrait.save(tmp_path / "photos/one.png")
    pair(portrait).save(tmp_path / "photos/two.png")
    words = ["lora", "prepare", str(tmp_path / "photos"), "--out", str(tmp_path / "set"), "--size", "256"]
    done = CliRunner().invoke(app, [*words, "--check-people"])
    assert done.exit_code == 0, done.output
    assert "warning      people: 1 with several people" in done.stdout
    assert "two.png (2 faces)" in done.stdout
    assert "ok           faces: fine" in done.stdout
    assert "note         shots: close-up 100%" in done.stdout


def test_without_scikit_image(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    picture().save(tmp_path / "a.png")
    done = CliRunner().invoke(app, ["lora", "prepare", str(tmp_path), "--out", f"{tmp_path}-set", "--check-people"])
    assert done.exit_code != 0
    assert "--check-people: needs scikit-image; pip install 'fewstep[people]'" in done.output
