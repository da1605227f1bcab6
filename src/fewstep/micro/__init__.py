"""The micro family: how the small Z-Image of the emoji world is made, part by part."""
