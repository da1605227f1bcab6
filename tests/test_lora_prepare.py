"""`fewstep lora prepare`: captions, crops, checks, and the set that is written."""

import io
import json

import numpy as np
import pytest
import yaml
from pictures import jpeg, picture, pixels
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.data.training_set.buckets import MULTIPLE, RATIOS, crop_to, target_size
from fewstep.data.training_set.captions import CaptionRule, shot
from fewstep.data.training_set.checks import ImageRecord, Thresholds, run_checks
from fewstep.data.training_set.measures import grain, near_duplicates, perceptual_hash, sharpness
from fewstep.data.training_set.prepare import PrepareSettings, prepare
from fewstep.errors import UserError

# --- crops and measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_buckets_have_one_area_and_nothing_is_enlarged(ratio):
    width, height = target_size(round(3000 * ratio), 3000, 1024, "buckets")
    assert width % MULTIPLE == height % MULTIPLE == 0
    assert width / height == pytest.approx(ratio, rel=0.05)
    assert width * height == pytest.approx(1024**2, rel=0.05)
    small = target_size(round(300 * ratio), 300, 1024, "buckets")
    assert small[0] <= round(300 * ratio)
    assert small[1] <= 300
    assert small[0] / small[1] == pytest.approx(ratio, rel=0.2)


def test_other_crops():
    assert target_size(3000, 2000, 512, "square") == (512, 512)
    assert target_size(3000, 2000, 1024, "longest-edge") == (1024, 672)
    assert target_size(500, 400, 1024, "longest-edge") == (480, 384)
    assert target_size(20, 10, 1024, "square") == (10, 10)


def test_a_crop_is_the_middle():
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    found = pixels(crop_to(image, (50, 50)))
    assert np.abs(found[3:-3, 3:-3] - [255, 0, 0]).max() <= 2
    assert crop_to(picture(), (64, 32)).size == (64, 32)


def test_blur_and_grain_are_measured():
    image = picture(size=(400, 300))
    blurred = [sharpness(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[3] < Thresholds().least_sharpness < blurred[0]
    flat, rng = np.full((300, 400), 128.0), np.random.default_rng(0)
    for level in (2.0, 8.0):
        noisy = Image.fromarray((flat + rng.normal(0, level, flat.shape)).round().astype(np.uint8))
        assert grain(noisy) == pytest.approx(level, rel=0.15)
    assert grain(image) < 1


def test_copies_are_near_duplicates_and_others_are_not():
    images = [picture(seed, (320, 240)) for seed in range(30)]
    copies = [images[3].resize((100, 75)), Image.open(io.BytesIO(jpeg(images[3])))]
    hashes = [perceptual_hash(image) for image in [*images, *copies]]
    assert near_duplicates(hashes, Thresholds().duplicate_bits) == [[3, 30, 31]]


def test_groups_of_hashes():
    """Linked by chains; equal to comparing all pairs."""
    rng = np.random.default_rng(0)
    base = [int(code) for code in rng.integers(0, 2**63, 1500, dtype=np.uint64)]
    chain = [base[7] ^ 0b111, base[7] ^ 0b111111]
    groups = near_duplicates([*base, *chain], 3)
    assert groups == [[7, 1500, 1501]]
    assert near_duplicates([], 3) == []


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("", "a photo of Ann"),
        ("in a red coat, street", "a photo of Ann, in a red coat, street"),
        ("ann smiles", "ann smiles"),
    ],
)
def test_the_users_words_are_kept(own, expected):
    assert CaptionRule("Ann").caption(own) == expected
    assert CaptionRule("Ann", trigger="sks").caption(own) == f"sks, {expected}"
    assert CaptionRule("Ann", trigger="ANN").caption(own) == expected
    assert CaptionRule().caption(own) == own


def test_shots_in_captions():
    assert shot("Close-up of Ann, smiling") == "close-up"
    assert shot("a full body photo") == "full-body"
    assert shot("waist-up, at the beach") == "medium"
    assert shot("a cat") is None


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Photos with text files, one in a folder with metadata, one damaged."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    picture(1, (200, 150)).save(folder / "one.png")
    (folder / "one.txt").write_text("\ufeffclose-up of Ann\n", encoding="utf-8")
    picture(2, (150, 200)).save(folder / "two.jpg")
    picture(3, (200, 200)).save(folder / "more" / "three.webp")
    rows = [{"file_name": "three.webp", "text": "Ann on a <b>bench</b>"}, {"file_name": "gone.png", "text": "x"}]
    (folder / "more" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "._one.png").write_bytes(b"litter")
    (folder / "notes.md").write_text("mine")
    return folder


def run(*words):
    return CliRunner().invoke(app, ["lora", "prepare", *(str(word) for word in words)])


def test_a_set(photos, tmp_path, tiny_folder):
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    out = tmp_path / "set"
    done = run(photos, "--out", out, "--name", "Ann", "--size", 128, "--trigger", "sks", "--model", tiny_folder)
    assert done.exit_code == 0, done.output
    assert before == {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert {row["source"]: row["text"] for row in rows} == {
        "more/three.webp": "sks, Ann on a <b>bench</b>",
        "one.png": "sks, close-up of Ann",
        "two.jpg": "sks, a photo of Ann",
    }
    for row in rows:
        with Image.open(out / row["file_name"]) as image:
            assert image.size == (row["width"], row["height"])
        assert (out / row["file_name"]).with_suffix(".txt").read_text() == row["text"] + "\n"
    found = yaml.safe_load((out / "dataset.yaml").read_text())
    assert found["count"] == 3
    assert found["buckets"] == {"160x96": 1, "96x160": 1, "128x128": 1}
    assert (out / "sheet-01.jpg").is_file()
    page = (out / "report.html").read_text()
    assert "bad.png: no image" in page
    assert "warning      files: 1 left out (can be opened)\n             bad.png: no image" in done.stdout
    assert "more/gone.png" in done.stdout
    assert "warning      count: 3 images (at least 20" in done.stdout
    assert "ok           caption length: " in done.stdout
    assert "not checked  text and watermarks: give --check-text" in done.stdout


def test_hugging_face_reads_the_set(photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    prepare(photos, tmp_path / "set", PrepareSettings(side=128))
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(found["text"]) == ["", "Ann on a <b>bench</b>", "close-up of Ann"]


def record(index, **values):
    usual = {"source": f"{index}.png", "name": f"{index}.png", "width": 2000, "height": 2000, "size": (1024, 1024)}
    usual |= {"own": "", "caption": "Ann", "sharpness": 500.0, "grain": 1.0, "code": 0, "texts": [], "tokens": 9}
    return ImageRecord(**(usual | values))


def test_every_check_names_its_files():
    rng = np.random.default_rng(0)
    codes = [int(code) for code in rng.integers(0, 2**63, 40, dtype=np.uint64)]
    records = [record(index, code=code) for index, code in enumerate(codes)]
    checks = {check.name: check for check in run_checks(records, {}, [], 1024, Thresholds())}
    assert {name for name, check in checks.items() if check.level != "ok"} == {"count", "people", "shots"}
    assert checks["count"].level == "note"
    bad = [
        record(50, width=700, height=600, size=(576, 576)),
        record(51, sharpness=3.0),
        record(52, grain=15.0),
        record(53, texts=["PREVIEW"]),
        record(54, caption=""),
        record(55, tokens=600),
        record(56, code=codes[4] ^ 1),
    ]
    for index, one in enumerate(bad[:-1]):
        one.code = ~codes[index + 10] & (2**63 - 1)
    checks = {check.name: check for check in run_checks([*records, *bad], {}, ["gone.png"], 1024, Thresholds())}
    named = {name: check.files for name, check in checks.items() if check.files}
    assert named == {
        "resolution for training": ["50.png (700 x 600)"],
        "longest edge": ["50.png"],
        "blur": ["51.png (3.0)"],
        "grain": ["52.png (15.0)"],
        "text and watermarks": ["53.png: PREVIEW"],
        "captions": ["54.png"],
        "caption length": ["55.png (600)"],
        "near-duplicates": ["4.png = 56.png"],
        "captions of missing images": ["gone.png"],
    }


def test_shares_of_shots():
    kinds = ["close-up"] * 9 + ["half body"] * 7 + ["full body"] * 4
    fits = [record(index, own=kind) for index, kind in enumerate(kinds)]
    levels = [
        {check.name: check for check in run_checks(records, {}, [], 64, Thresholds())}["shots"]
        for records in (fits, fits[:9])
    ]
    assert [(check.level, check.found) for check in levels] == [
        ("ok", "close-up 45%, medium 35%, full-body 20%"),
        ("note", "close-up 100%, medium 0%, full-body 0%"),
    ]


@pytest.mark.slow
def test_text_is_found(photos, tmp_path):
    pytest.importorskip("rapidocr")
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((40, 200), "PREVIEW ONLY", fill="black", font=ImageFont.load_default(48))
    image.save(photos / "marked.png")
    done = run(photos, "--out", tmp_path / "set", "--check-text")
    assert done.exit_code == 0, done.output
    assert "warning      text and watermarks: 1 with text" in done.stdout
    assert "marked.png: PREVIEW ONLY" in done.stdout


def test_nothing_is_left_after_an_error(photos, tmp_path):
    for path in photos.rglob("*"):
        if path.suffix in (".png", ".jpg", ".webp"):
            path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of its 4 images can be opened \(bad\.png: no image"):
        prepare(photos, tmp_path / "set", PrepareSettings())
    assert not (tmp_path / "set").exists()
