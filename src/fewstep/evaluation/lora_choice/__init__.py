"""Which checkpoint of a LoRA training to take, and at which strength: by measurement, and a fixed rule."""
