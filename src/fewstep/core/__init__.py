"""Core: the flow, samplers, guidance and the protocols; torch alone."""
