"""Training methods, one file or folder each; importing this package registers them and imports none of them."""

from fewstep.core.registry import methods

methods.register("dmd", "fewstep.methods.dmd.method:DMD")
methods.register("trajectory", "fewstep.methods.trajectory:TrajectoryDistillation")
