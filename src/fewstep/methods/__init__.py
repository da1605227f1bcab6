"""Training methods, one file or folder each; importing this package registers them."""

from fewstep.methods import dmd as _dmd
from fewstep.methods import trajectory as _trajectory

__all__ = ["_dmd", "_trajectory"]
