"""The HTTP server: one process, one model, one queue. See docs/serving.md."""
