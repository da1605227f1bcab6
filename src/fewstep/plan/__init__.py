"""Memory, time and communication of a training, before any weight is loaded."""
