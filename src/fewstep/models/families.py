"""Registers the model families of this package by the ``_class_name`` in ``model_index.json``."""

from fewstep.core.registry import editing_families, model_families

model_families.register("ZImagePipeline", "fewstep.models.zimage.family:ZIMAGE")
model_families.register("StableDiffusion3Pipeline", "fewstep.models.sd3.family:SD3")
model_families.register("Lumina2Pipeline", "fewstep.models.lumina2.family:LUMINA2")
model_families.register("Flux2KleinPipeline", "fewstep.models.flux2.family:FLUX2")
model_families.register("WanPipeline", "fewstep.models.wan.family:WAN")

editing_families.register("ZImageOmniPipeline", "fewstep.models.zimage.omni:OMNI")
