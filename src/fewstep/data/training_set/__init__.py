"""Training sets for LoRA: a folder of images, checked, cropped to buckets and captioned (`fewstep lora prepare`)."""
