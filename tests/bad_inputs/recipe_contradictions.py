"""Values in recipes that are possible, but not beside the others."""

from sd3_setup import save_sd3
from wan_setup import save_wan

from bad_inputs.overrides import FILES, caching_with, with_override, with_overrides
from bad_inputs.table import Case, Message, Section

_STEP_LORAS = ("models.train=lora", "models.lora_per_step=true")

SECTION = Section(
    "Values in recipes that contradict each other",
    "Each value is possible, but not beside the others.",
    (
        Message(
            "{recipe}: student: step_counts {counts}: steps ({steps}) is not among them",
            "`student.steps` is the number that is sampled with by default.",
            with_override("student.step_counts=[1, 2]", "steps (4) is not among them"),
        ),
        Message(
            "{recipe}: student: step_chooser: no effect on one number of steps; set step_counts, or leave it out",
            "The predictor says which of several numbers of steps a prompt needs.",
            with_override("student.step_chooser=tiny", "step_chooser: no effect"),
        ),
        Message(
            "student.step_chooser: {model} has no steps.safetensors; make it with fewstep steps train",
            "Name the folder of a student that `fewstep steps train` was run for.",
            with_override(
                "student={step_counts: [2, 4], step_chooser: tiny}", "student.step_chooser: tiny has no steps"
            ),
        ),
        Message(
            "{recipe}: student: step_counts: its levels are evenly spaced; leave timesteps and timestep_sampling out",
            "A list of levels is that of one number of steps.",
            with_override("student={step_counts: [2, 4], timestep_sampling: continuous}", "step_counts: its levels"),
        ),
        Message(
            "{recipe}: student: timesteps {levels}: expected {steps} levels that descend from 1, without the 0",
            "Give one noise level for each of `student.steps`, the first one 1.",
            with_override("student.timesteps=[1, 0.5]", "expected 4 levels"),
            with_override("student.timesteps=[0.5, 1, 0.2, 0.1]", "[0.5, 1.0, 0.2, 0.1]"),
            with_override("student.timesteps=[1, 0.5, 0.2, 0]", "without the 0"),
            with_override("student.timesteps=[]", "timesteps []"),
        ),
        Message(
            "{recipe}: {section}{key}: no effect on {what}; set {...}, or leave it out",
            "The key is only read beside another value; set that value, or remove the key.",
            with_override("models.rank=4", "rank: no effect on full copies; set models.train: lora"),
            with_override("models.target_modules=[to_q]", "target_modules: no effect on full copies"),
            with_override("student.eta=0.5", "eta: no effect on the euler sampler; set student.sampler: sde"),
            with_override("method.real_stream.num_workers=2", "method.real_stream: no effect on teacher"),
            with_overrides(
                "method.num_real_images: no effect on shards",
                *("method.real_source=a.tar", "method.num_real_images=9", "method.terms.gan={}"),
                "optim.discriminator={lr: 0.001}",
            ),
        ),
        Message(
            "{recipe}: models.lora_per_step: the student's steps must be fixed; leave out student.step_counts and "
            "student.timestep_sampling",
            "Each step has a LoRA of its own, for its own noise level.",
            with_overrides("models.lora_per_step: the student's steps", *_STEP_LORAS, "student.step_counts=[2, 4]"),
            with_overrides("steps must be fixed", *_STEP_LORAS, "student.timestep_sampling=continuous"),
        ),
        Message(
            "{recipe}: {what} compares states of {most} steps: each of student.step_counts must divide {most}",
            "A trajectory has states at the levels of the most steps.",
            with_overrides(
                "must divide 8", "student={steps: 8, step_counts: [3, 8]}", "method.terms.trajectory_mse={}"
            ),
        ),
        Message(
            "{recipe}: method.first_step_weight: {...}",
            "The first step has a loss of its own beside those of the later ones.",
            with_overrides("no effect on a student of 1 step", "method.first_step_weight=2", "student.steps=1"),
            with_override("method.first_step_weight=0", "at 0 nothing trains the first step"),
        ),
        Message(
            "{recipe}: models: compile: not with models.context_parallel; leave one of the two out",
            "Compiled blocks that exchange tokens were never tried.",
            with_overrides("compile: not with", "models.compile=true", "models.context_parallel=2"),
        ),
        Message(
            "models.context_parallel {number} does not divide the number of processes, {count}",
            "Start the command with `torchrun`; groups of that many processes share each sample.",
            Case("distill mine.yaml -s models.context_parallel=2", "processes, 1", FILES),
            Case("plan mine.yaml -s models.context_parallel=2 --gpus 3", "processes, 3", FILES),
        ),
        Message(
            "models.context_parallel: {transformer} cannot divide its tokens; leave it out",
            "Z-Image, Wan 2.1 and FLUX.2 [klein] can.",
            Case(
                "plan mine.yaml -s teacher=sd3 -s models.context_parallel=2 --gpus 2",
                "SD3Transformer2DModel cannot",
                FILES | {"sd3": save_sd3},
            ),
        ),
        Message(
            "models.context_parallel {number} does not divide the transformer's {count} attention heads",
            "Each process computes the attention of its own heads.",
            Case(
                "plan mine.yaml -s teacher=wan -s models.context_parallel=3 --gpus 3",
                "context_parallel 3 does not divide the transformer's 2",
                FILES | {"wan": save_wan},
            ),
        ),
        Message(
            "{recipe}: method.fake_score_ema_to_student needs one adapter of the student: leave out "
            "models.lora_per_step",
            "The fake score has one adapter, and the student one for each step.",
            with_overrides("needs one adapter", *_STEP_LORAS, "method.fake_score_ema_to_student=0.1"),
        ),
        Message(
            "{recipe}: {key}.min_lr_ratio: no effect on a constant rate; set {key}.min_lr_ratio=0 too, or leave it out",
            "With `-s KEY.lr_schedule=constant`, also give `-s KEY.min_lr_ratio=0` if the recipe sets another.",
            with_override("optim.fake_score.min_lr_ratio=0.5", "set optim.fake_score.min_lr_ratio=0 too"),
            Case("distill micro-turbo -s optim.student.lr_schedule=constant", "set optim.student.min_lr_ratio=0 too"),
            Case("emoji train micro-vae -s optim.lr_schedule=constant", "set optim.min_lr_ratio=0 too"),
        ),
        Message(
            "{recipe}: method.terms.{term}.weight: last_step {last} is not after first_step {first}, of {steps} steps",
            "A ramp needs at least one step; shares such as 85% are of `train.steps`.",
            with_override(
                "method.terms.cfg_augmentation.weight={kind: linear, first_step: 5}", "cfg_augmentation.weight: last"
            ),
            with_override(
                "method.terms.distribution_matching.weight={kind: cosine, first_step: 60%, last_step: 20%}",
                "distribution_matching.weight: last_step 0 is not after first_step 1",
            ),
        ),
        Message(
            "resolution {pixels}: not a multiple of {number}",
            "The autoencoder and the patches of the transformer divide a side by so much.",
            with_override("resolution=65", "resolution 65: not a multiple of 16"),
            caching_with("resolution=65", "resolution 65"),
            Case("plan mine.yaml -s resolution=65", "resolution 65", FILES),
        ),
        Message(
            "{recipe}: {key}: no term {uses}; leave it out",
            "The method's loss terms do not need it.",
            with_override("trajectory.cache=runs/cache", "trajectory.cache: no term uses"),
        ),
        Message(
            "{recipe}: method.real_source {source}: no term needs real latents; leave it out",
            "Only the GAN and the mean-variance and MMD terms compare with real latents.",
            with_override("method.real_source=emoji", "method.real_source emoji"),
        ),
        Message(
            "{recipe}: train.keep_best.metric: there is no '{metric}'; there are {names}",
            "The best checkpoint is chosen by a metric of the method's losses or of validation.",
            with_override("train.keep_best={metric: student/los}", "'student/los'"),
        ),
        Message(
            "{recipe}: train.keep_best.metric {metric}: never measured; set evaluate.validate_every",
            "Metrics that begin with `val/` are measured in validation only.",
            with_override("train.keep_best={metric: val/object_acc}", "val/object_acc: never measured"),
        ),
        Message(
            "{recipe}: method.renoise: sigma_min {low} is not below sigma_max {high}",
            "Widen the range of noise levels.",
            with_override("method.renoise.sigma_min=0.99", "sigma_min 0.99"),
        ),
        Message(
            "models.target_modules: no linear layer is named '{name}'; there are {names}",
            "Each name must end the name of a linear layer of the transformer.",
            Case("distill mine.yaml -s models.train=lora -s 'models.target_modules=[to_q, to_kk]'", "'to_kk'", FILES),
        ),
        Message(
            "{recipe}: model: {problem}",
            "The sizes of the network's parts do not fit each other.",
            Case("emoji train micro-vae -s model.norm_num_groups=7", "32 is not a multiple of norm_num_groups"),
            Case("emoji train micro-teacher -s model.n_heads=5", "dim 192 is not n_heads 5 times"),
        ),
        Message(
            "num_objects {count}: the dataset has {total} objects",
            "Give a smaller number, or `null` for all.",
            Case("emoji train classifier -s data.num_objects=100000", "num_objects 100000"),
        ),
        Message(
            "{recipe}: optim.{part} is missing: method {method} trains {parts}",
            "Every trainable part has an optimizer.",
            with_override("optim.student=null", "optim.student is missing"),
            with_override("optim.fake_score=null", "optim.fake_score is missing"),
        ),
        Message(
            "{recipe}: optim.{part}: method {method} has no such trainable part here (it trains {parts})",
            "Remove the optimizer, or add the term that trains this part.",
            with_override("optim.teacher.lr=1", "optim.teacher"),
            with_override("method.terms={cfg_augmentation: {}}", "optim.fake_score"),
        ),
    ),
)
