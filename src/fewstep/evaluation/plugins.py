"""What evaluation registers: scorers and feature networks."""
