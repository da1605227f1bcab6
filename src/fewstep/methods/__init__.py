"""Training methods, one file or folder each; importing this package registers them and imports none of them."""

from fewstep.core.registry import lora_methods, methods

methods.register("dmd", "fewstep.methods.dmd.method:DMD")
methods.register("trajectory", "fewstep.methods.trajectory:TrajectoryDistillation")
lora_methods.register("flow_matching", "fewstep.methods.lora.flow_matching:FlowMatchingLora")
lora_methods.register("trajectory", "fewstep.methods.lora.trajectory:LoraTrajectory")
lora_methods.register("self_distillation", "fewstep.methods.lora.self_distillation:SelfDistillation")
lora_methods.register("decoupled_dmd", "fewstep.methods.lora.decoupled_dmd:DecoupledDMDLora")
