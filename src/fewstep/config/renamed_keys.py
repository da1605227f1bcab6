"""Keys of recipes written before they were renamed, each with what to write now."""

from __future__ import annotations

_TERMS = "method.terms"
RENAMED_KEYS = {
    "spear": f"{_TERMS}.cfg_augmentation",
    "spear.alpha": f"{_TERMS}.cfg_augmentation.guidance_scale, which is alpha - 1",
    "spear.weight": f"{_TERMS}.cfg_augmentation.weight",
    "shield": f"{_TERMS}.distribution_matching and further terms",
    "shield.weight": f"{_TERMS}.distribution_matching.weight",
    "shield.scales": f"{_TERMS}.distribution_matching.scales",
    "shield.regression": f"{_TERMS}.trajectory_mse.weight",
    "shield.mean_variance": f"{_TERMS}.mean_variance.weight",
    "shield.mmd": f"{_TERMS}.mmd.weight",
    "shield.gan": f"{_TERMS}.gan.weight",
    "shield.gan_penalty": f"{_TERMS}.gan.r1_weight",
    "shield.real": "method.real_source",
    "shield.real_samples": "method.num_real_images",
    "renoise": "method.renoise",
    "normaliser_floor": "method.dmd_norm_eps",
    "fake_updates": "method.fake_score_updates",
    "fake_follow": "method.fake_score_ema_to_student",
    "fake_warmup": "method.fake_score_start and a weight schedule",
    "align": f"a weight schedule of {_TERMS}.trajectory_mse",
    "optim.fake": "optim.fake_score",
    "roles": "models",
    "roles.kind": "models.train (full or lora)",
    "roles.base": "models.frozen_dtype",
    "roles.rank": "models.rank",
    "roles.fake_rank": "models.fake_score_rank",
    "roles.scale": "models.lora_alpha, which is the scale times the rank",
    "roles.targets": "models.target_modules",
    "compile": "models.compile",
    "gradient_checkpointing": "models.gradient_checkpointing",
    "size": "resolution",
    "phases": "stages",
    "student.anchors": "student.timesteps",
    "student.anchor_schedule": "student.timestep_sampling",
    "trajectory.samples": "trajectory.num_trajectories",
    "trajectory.substeps": "trajectory.teacher_steps_per_student_step",
    "samples": "num_trajectories",
    "substeps": "teacher_steps_per_student_step",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.minutes": "train.max_minutes",
    "train.preview_every": "train.sample_every",
    "train.checkpoint_every": "train.save_every",
    "train.checkpoint_minutes": "train.save_minutes",
    "train.keep_checkpoints": "train.max_checkpoints",
    "train.shard_group": "train.fsdp_shard_size",
    "train.alarms": "train.on_alert",
    "train.threads": "train.num_threads",
    "train.keep_best.better": "train.keep_best.mode (max or min)",
    "evaluate.prompts": "evaluate.num_prompts",
    "evaluate.every": "evaluate.validate_every",
    "evaluate.watched": "evaluate.validation_prompts",
}
_OPTIM = {
    "grad_clip": "max_grad_norm",
    "ema": "ema_decay",
    "bits": "optimizer (adamw or adamw8bit)",
    "decay": "lr_schedule",
    "final_lr_ratio": "min_lr_ratio",
}
RENAMED_KEYS |= {
    f"optim.{part}{old}": f"optim.{part}{new}"
    for part in ("", "student.", "fake.", "fake_score.", "discriminator.")
    for old, new in _OPTIM.items()
}
#: Values of `kind` that were renamed.
RENAMED_KINDS = {
    "phases": "stages",
    "cache": "cache_trajectories",
    "flow": "flow_matching",
    "text": "text_encoder",
    "judge": "classifier",
}
