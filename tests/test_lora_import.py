"""``fewstep lora import``: an ai-toolkit configuration as a recipe, and what has no equivalent."""

import copy

import pytest
import yaml
from lora_cli import run, succeed

from fewstep.config.ai_toolkit import import_ai_toolkit
from fewstep.config.load import load_recipe

CONFIG = yaml.safe_load("""
job: extension
config:
  name: ann
  process:
    - type: diffusion_trainer
      training_folder: output
      sqlite_db_path: ./aitk_db.db
      device: cuda
      trigger_word: ann
      performance_log_every: 10
      network:
        {type: lora, linear: 32, linear_alpha: 16, conv: 16, lokr_factor: -1, network_kwargs: {ignore_if_contains: []}}
      save: {dtype: float16, save_every: 200, max_step_saves_to_keep: 5, save_format: diffusers, push_to_hub: false}
      datasets:
        - {folder_path: /photos/ann, mask_path: null, caption_ext: txt, caption_dropout_rate: 0.1, is_reg: false,
           network_weight: 1, resolution: [512, 768], controls: [], num_frames: 1, cache_latents_to_disk: true}
      train:
        batch_size: 2
        steps: 2500
        gradient_accumulation: 4
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        timestep_type: weighted
        content_or_style: balanced
        optimizer_params: {weight_decay: 1e-4}
        lr: 0.0002
        ema_config: {use_ema: true, ema_decay: 0.98}
        skip_first_sample: true
        dtype: bf16
        loss_type: mse
      model:
        {name_or_path: Tongyi-MAI/Z-Image, arch: zimage, quantize: true, qtype: qfloat8, quantize_te: true,
         low_vram: false}
      sample:
        {sampler: flowmatch, sample_every: 100, width: 1024, height: 1024, samples: [{prompt: "[trigger] reads"}],
         neg: "", seed: 42, walk_seed: true, guidance_scale: 4, sample_steps: 30}
""")


def job_of(config):
    return config["config"]["process"][0]


def changed(section, **values):
    config = copy.deepcopy(CONFIG)
    job_of(config)[section] |= values
    return config


def test_every_key_becomes_one_of_the_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    printed = succeed("lora", "import", tmp_path / "config.yaml", "--out", tmp_path / "ann.yaml").stdout.splitlines()
    assert printed == [
        "sample.width, height, sample_steps, seed: previews have the training's size, the model's own steps and own "
        "seeds",
        "First make the training set: fewstep lora prepare /photos/ann --out runs/ann-set --size 768 --trigger ann",
        str(tmp_path / "ann.yaml"),
    ]
    recipe = load_recipe(tmp_path / "ann.yaml")
    assert (recipe.name, recipe.model, recipe.method.name) == ("ann", "Tongyi-MAI/Z-Image", "flow_matching")
    assert (recipe.data.images, recipe.data.resolutions, recipe.data.caption_dropout) == (
        "runs/ann-set",
        [512, 768],
        0.1,
    )
    adapter, lora, train = recipe.adapter, recipe.optim["lora"], recipe.train
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.save_dtype) == ("lora", 32, 16, "fp16")
    assert (recipe.models.frozen_dtype, recipe.models.gradient_checkpointing) == ("fp8", True)
    assert (lora.lr, lora.optimizer, lora.weight_decay, lora.ema_decay) == (2e-4, "adamw8bit", 1e-4, 0.98)
    assert (train.steps, train.batch_size, train.gradient_accumulation_steps) == (2500, 2, 4)
    assert (train.precision, train.sample_every, train.save_every, recipe.keep_files) == ("bf16", 100, 200, 5)
    assert recipe.timesteps.distribution == "weighted"
    assert (recipe.preview.prompts, recipe.preview.guidance_scale) == (["ann reads"], 3)  # the scale is g + 1 there


@pytest.mark.parametrize(
    ("section", "values", "remark", "key", "expected"),
    [
        ("train", {"optimizer": "prodigy", "lr": 1.0}, "train.optimizer prodigy (lr 1.0): ", ("optim", "lora", "lr"),
         1e-4),
        ("train", {"timestep_type": "lognorm_blend"}, "train.timestep_type lognorm_blend: ",
         ("timesteps", "distribution"), "sigmoid"),
        ("train", {"dtype": "fp16"}, "train.dtype fp16: it overflows", ("train", "precision"), "bf16"),
        ("train", {"diff_output_preservation": True}, "train.diff_output_preservation True: left out; data.preserv",
         ("name",), "ann"),
        ("network", {"type": "loha"}, "network.type loha: ", ("adapter", "kind"), "lora"),
        ("network", {"network_kwargs": {"only_if_contains": ["layers.1"]}},
         "network.network_kwargs.only_if_contains ['layers.1']: ", ("adapter", "rank"), 32),
        ("model", {"qtype": "uint3|adapter"}, "model.qtype uint3|adapter: ", ("models", "frozen_dtype"), "fp8"),
        ("model", {"assistant_lora_path": "a/b/c.safetensors"}, "model.assistant_lora_path a/b/c.safetensors: ",
         ("method", "training_adapter"), "a/b/c.safetensors"),
        ("model", {"name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, "sample.guidance_scale 4: ", ("preview",),
         {"prompts": ["ann reads"]}),
        ("save", {"push_to_hub": True}, "save.push_to_hub True: ", ("keep_files",), 5),
        ("sample", {"neg": "blurry"}, "sample.neg blurry: ", ("train", "sample_every"), 100),
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_named(section, values, remark, key, expected):
    found = import_ai_toolkit(changed(section, **values))
    assert [one for one in found.remarks if one.startswith(remark)]
    value = found.recipe
    for part in key:
        value = value[part]
    assert value == expected


def test_several_data_sets_and_unknown_keys_are_named():
    config = copy.deepcopy(CONFIG)
    job_of(config)["datasets"] += [{"folder_path": "/photos/more"}]
    job_of(config)["datasets"][0] |= {"flip_x": True, "num_repeats": 3}
    job_of(config)["slider"] = {"guidance_strength": 3.0}
    remarks = import_ai_toolkit(config).remarks
    assert any("/photos/more" in remark for remark in remarks)
    for name in ("datasets.flip_x True", "datasets.num_repeats 3", "slider.guidance_strength 3.0"):
        assert f"{name}: no equivalent; left out" in remarks


def test_a_file_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "ann.yaml").write_text("mine")
    done = run("lora", "import", tmp_path / "config.yaml", "--out", tmp_path / "ann.yaml")
    assert done.exit_code == 1
    assert (tmp_path / "ann.yaml").read_text() == "mine"
