"""Values in recipes: of another type, out of range, unknown, or in contradiction to others."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS
from bad_inputs.table import Case, Message, Section

_FILES = {"mine.yaml": DISTILL, "cache.yaml": CACHE, "prompts.txt": PROMPTS}


def _set(override: str, expected: str) -> Case:
    return Case(f"distill mine.yaml -s '{override}'", expected, _FILES)


def _set_all(expected: str, *overrides: str) -> Case:
    return Case("distill mine.yaml " + " ".join(f"-s '{each}'" for each in overrides), expected, _FILES)


def _cache(override: str, expected: str) -> Case:
    return Case(f"cache-trajectories cache.yaml -s '{override}'", expected, _FILES)


_STEP_LORAS = ("models.train=lora", "models.lora_per_step=true")

SECTION = Section(
    "Values in recipes",
    "Every message names the recipe and the key. [Recipes](../recipes.md) has the type and range of every key.",
    (
        Message(
            "{recipe}: {key}: input should be greater than {number}",
            "Give a larger value.",
            _set("train.steps=0", "train.steps: input should be greater than or equal to 1 (got 0)"),
            _set("train.batch_size=-2", "train.batch_size"),
            _set("train.seed=-1", "train.seed"),
            _set("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps"),
            _set("train.max_minutes=0", "train.max_minutes"),
            _set("train.save_minutes=-1", "train.save_minutes"),
            _set("train.log_every=0", "train.log_every"),
            _set("train.sample_every=-1", "train.sample_every"),
            _set("train.save_every=0", "train.save_every"),
            _set("train.max_checkpoints=0", "train.max_checkpoints"),
            _set("train.num_threads=0", "train.num_threads"),
            _set("train.fsdp_shard_size=0", "train.fsdp_shard_size"),
            _set("optim.student.lr=0", "optim.student.lr"),
            Case("lora train micro-lora --set optim.lora.lr=0", "optim.lora.lr"),
            Case("lora adapter tiny --out a.safetensors --prompts p --set adapter.rank=0", "adapter.rank"),
            _set("optim.student.eps=0", "optim.student.eps"),
            _set("optim.fake_score.weight_decay=-1", "optim.fake_score.weight_decay"),
            _set("optim.student.warmup_steps=-1", "optim.student.warmup_steps"),
            _set("optim.student.max_grad_norm=0", "optim.student.max_grad_norm"),
            _set("student.steps=0", "student.steps"),
            _set("method.fake_score_updates=0", "method.fake_score_updates"),
            _set("method.terms.cfg_augmentation.guidance_scale=-1", "method.terms.cfg_augmentation.guidance_scale"),
            _set("method.terms.distribution_matching.weight=-1", "method.terms.distribution_matching.weight"),
            _set("resolution=0", "resolution"),
            _set("models.rank=0", "models.rank"),
            _set("models.lora_alpha=0", "models.lora_alpha"),
            _set("prompts.heldout_fraction=-0.1", "prompts.heldout_fraction"),
            _set("trajectory.num_trajectories=0", "trajectory.num_trajectories"),
            _set("trajectory.guidance_scale=-1", "trajectory.guidance_scale"),
            _set("evaluate.num_prompts=0", "evaluate.num_prompts"),
            _set("evaluate.validate_every=-1", "evaluate.validate_every"),
            _cache("num_trajectories=0", "num_trajectories"),
            _cache("steps=0", "steps"),
            _cache("first_seed=-1", "first_seed"),
            _cache("batch_size=0", "batch_size"),
            _cache("shard_size=0", "shard_size"),
            Case("plan mine.yaml -s train.steps=0", "train.steps", _FILES),
            Case("emoji train classifier -s data.num_objects=0", "data.num_objects"),
            Case("emoji train micro-text-encoder -s model.vocab_size=3", "model.vocab_size"),
            Case("emoji train micro-teacher -s shift=0", "shift"),
            Case("emoji train micro-teacher -s logit_std=0", "logit_std"),
        ),
        Message(
            "{recipe}: {key}: input should be less than {number}",
            "Give a smaller value.",
            _set("student.steps=65", "student.steps: input should be less than or equal to 64 (got 65)"),
            _set("student.eta=2", "student.eta"),
            _set("optim.student.ema_decay=1", "optim.student.ema_decay"),
            _set("optim.student.betas=[0.9, 1]", "optim.student.betas.1"),
            _set("optim.student.min_lr_ratio=1.5", "optim.student.min_lr_ratio"),
            _set("prompts.heldout_fraction=0.5", "prompts.heldout_fraction"),
            _set("train.seed=18446744073709551616", "train.seed"),
            _set("train.steps=999999999999999999999", "train.steps"),
            _set("train.batch_size=1000000000", "train.batch_size"),
            _set("resolution=2147483648", "resolution"),
            _set("models.rank=1000000000", "models.rank"),
            _set("models.lora_alpha=1e39", "models.lora_alpha"),
            _set("train.num_threads=1000000", "train.num_threads"),
            _cache("first_seed=18446744073709551616", "first_seed"),
            _cache("shard_size=99999999999999999999", "shard_size"),
            Case("emoji train micro-teacher -s prompt_dropout=2", "prompt_dropout"),
        ),
        Message(
            "{recipe}: {key}: input should be a multiple of {number} (got {value})",
            "Give the next multiple.",
            Case("emoji train classifier -s base_channels=13", "base_channels: input should be a multiple of 4"),
            Case("emoji train micro-teacher -s 'model.axes_dims=[15, 16, 17]'", "model.axes_dims.0"),
        ),
        Message(
            "{recipe}: {key}: input should be a valid {type}",
            "The value is of another type; text that begins with a sign may need quotes.",
            _set("train.steps=ten", "train.steps: input should be a valid integer, unable to parse string"),
            _set(
                "train.steps=1.5", "train.steps: input should be a valid integer, got a number with a fractional part"
            ),
            _set("train.batch_size=[2]", "train.batch_size: input should be a valid integer"),
            _set("train.steps={a: 1}", "train.steps: input should be a valid integer"),
            _set("train.seed=null", "train.seed: input should be a valid integer (got None)"),
            _set("optim.student.lr=fast", "optim.student.lr: input should be a valid number"),
            _set("optim.student.betas=0.9", "optim.student.betas: input should be a valid tuple"),
            _set("evaluate.scorers=emoji", "evaluate.scorers: input should be a valid list"),
            _set("evaluate.enabled=maybe", "evaluate.enabled: input should be a valid boolean"),
            _set("train.keep_best={metric: 3}", "train.keep_best.metric: input should be a valid string"),
            Case(
                "distill mine.yaml",
                "teacher: input should be a valid string",
                {"mine.yaml": DISTILL.replace("teacher: tiny", "teacher: [tiny]")},
            ),
            _set("resolution=1.5", "resolution: input should be a valid integer"),
        ),
        Message(
            "{recipe}: {key}: input should be a finite number (got {value})",
            "Infinity and NaN are refused.",
            _set("train.max_minutes=.inf", "train.max_minutes"),
            _set("optim.student.lr=.nan", "optim.student.lr"),
            _set("method.terms.cfg_augmentation.guidance_scale=.inf", "guidance_scale"),
            _cache("guidance_scale=.nan", "guidance_scale"),
        ),
        Message(
            "{recipe}: {key}: expected a number, not true or false{...}",
            "YAML reads yes, no, on and off as true and false: quote text, or give a number.",
            _set("train.steps=true", "train.steps"),
            _set("train.save_minutes=yes", "train.save_minutes"),
            _set("optim.student.betas=[true, 0.9]", "optim.student.betas"),
            _cache("num_trajectories=on", "num_trajectories"),
        ),
        Message(
            "{recipe}: {key}: empty text; give a value, or leave it out{...}",
            "An empty path would be the working directory.",
            _set('teacher=""', "teacher: empty"),
            _set('init=" "', "init: empty"),
            _set('prompts.source=""', "prompts.source: empty"),
            _set('evaluate.scorers=[""]', "evaluate.scorers: empty"),
            Case("emoji train micro-teacher -s 'vae=\"\"'", "vae: empty"),
        ),
        Message(
            "{recipe}: {key}: input should be {choices} (got {value})",
            "Take one of the listed values.",
            _set("train.precision=fp16", "'fp32', 'bf16' or 'auto' (got 'fp16')"),
            _set("train.precision=16", "(got '16')"),
            _set("train.on_alert=explode", "'off', 'warn', 'stop' or 'rollback'"),
            _set("train.on_alert=true", "train.on_alert"),
            _set("train.keep_best={metric: student/loss, mode: best}", "'max' or 'min'"),
            _set("optim.student.optimizer=adam", "'adamw', 'adamw8bit' or 'muon'"),
            _set("optim.student.lr_schedule=step", "'constant', 'cosine' or 'linear'"),
            _set("student.sampler=dpm", "'euler' or 'sde'"),
            _set("student.timestep_sampling=random", "'fixed' or 'continuous'"),
            _set("models.train=qlora", "'full' or 'lora'"),
            _set("models.frozen_dtype=fp16", "'fp32', 'bf16' or 'fp8'"),
            _set("method.name=guess", "method.name: input should be 'dmd', 'trajectory' (got 'guess')"),
            _set("method.terms.cfg_augmentation.weight={kind: sine}", "cfg_augmentation.weight.kind: input"),
        ),
        Message(
            "{recipe}: models.lora_per_step: the student's steps must be fixed; leave out student.step_counts and "
            "student.timestep_sampling",
            "Each step has a LoRA of its own, for its own noise level.",
            _set_all("models.lora_per_step: the student's steps", *_STEP_LORAS, "student.step_counts=[2, 4]"),
            _set_all("steps must be fixed", *_STEP_LORAS, "student.timestep_sampling=continuous"),
        ),
        Message(
            "{recipe}: method.fake_score_ema_to_student needs one adapter of the student: leave out "
            "models.lora_per_step",
            "The fake score has one adapter, and the student one for each step.",
            _set_all("needs one adapter", *_STEP_LORAS, "method.fake_score_ema_to_student=0.1"),
        ),
        Message(
            "{recipe}: {key}: list should have at least 1 item after validation, not 0",
            "Give at least one, or `null` for the default.",
            _set("models.target_modules=[]", "models.target_modules"),
            Case("emoji train micro-vae -s 'model.block_out_channels=[]'", "model.block_out_channels"),
        ),
        Message(
            "{recipe}: name: string should match pattern {pattern} (got {name})",
            "The name is that of a folder: letters, digits, `_`, `.` and `-`, and a letter or digit first.",
            _set("name=../x", "(got '../x')"),
            _set("name=a/b", "(got 'a/b')"),
            _set("name=.", "(got '.')"),
            _cache("name=-x", "(got '-x')"),
        ),
        Message(
            "{recipe}: {key}: expected a number, or a mapping with kind: linear, cosine or piecewise (got {value})",
            "A weight is a number or a schedule.",
            _set("method.terms.cfg_augmentation.weight=high", "(got 'high')"),
            _set("method.terms.cfg_augmentation.weight=true", "(got True)"),
        ),
        Message(
            "{recipe}: {key}: a piecewise schedule needs a value for step 0",
            "Add `0: VALUE` to its values.",
            _set("method.terms.cfg_augmentation.weight={kind: piecewise, values: {5: 1}}", "cfg_augmentation.weight"),
        ),
        Message(
            "{recipe}: {key}: a step is a number, or a share of the steps such as 85% (got {value})",
            "Give a number of steps from 0, or 0% to 100%.",
            _set("method.terms.cfg_augmentation.weight={kind: piecewise, values: {120%: 1}}", "weight.values.120%"),
            _set("method.terms.cfg_augmentation.weight={kind: linear, last_step: late}", "weight.last_step"),
        ),
    ),
)

CONTRADICTIONS = Section(
    "Values in recipes that contradict each other",
    "Each value is possible, but not beside the others.",
    (
        Message(
            "{recipe}: student: step_counts {counts}: expected different numbers, steps ({steps}) among them",
            "`student.steps` is the number that is sampled with by default.",
            _set("student.step_counts=[1, 2]", "steps (4) among them"),
            _set("student.step_counts=[4, 4]", "different numbers"),
        ),
        Message(
            "{recipe}: student: step_chooser: no effect on one number of steps; set step_counts, or leave it out",
            "The predictor says which of several numbers of steps a prompt needs.",
            _set("student.step_chooser=tiny", "step_chooser: no effect"),
        ),
        Message(
            "student.step_chooser: {model} has no steps.safetensors; make it with fewstep steps train",
            "Name the folder of a student that `fewstep steps train` was run for.",
            _set("student={step_counts: [2, 4], step_chooser: tiny}", "student.step_chooser: tiny has no steps"),
        ),
        Message(
            "{recipe}: student: step_counts: its levels are evenly spaced; leave timesteps and timestep_sampling out",
            "A list of levels is that of one number of steps.",
            _set("student={step_counts: [2, 4], timestep_sampling: continuous}", "step_counts: its levels"),
        ),
        Message(
            "{recipe}: student: timesteps {levels}: expected {steps} levels that descend from 1, without the 0",
            "Give one noise level for each of `student.steps`, the first one 1.",
            _set("student.timesteps=[1, 0.5]", "expected 4 levels"),
            _set("student.timesteps=[0.5, 1, 0.2, 0.1]", "[0.5, 1.0, 0.2, 0.1]"),
            _set("student.timesteps=[1, 0.5, 0.2, 0]", "without the 0"),
            _set("student.timesteps=[]", "timesteps []"),
        ),
        Message(
            "{recipe}: {section}{key}: no effect on {what}; set {...}, or leave it out",
            "The key is only read beside another value; set that value, or remove the key.",
            _set("models.rank=4", "rank: no effect on full copies; set models.train: lora"),
            _set("models.target_modules=[to_q]", "target_modules: no effect on full copies"),
            _set("student.eta=0.5", "eta: no effect on the euler sampler; set student.sampler: sde"),
        ),
        Message(
            "{recipe}: {key}.min_lr_ratio: no effect on a constant rate; set {key}.min_lr_ratio=0 too, or leave it out",
            "With `-s KEY.lr_schedule=constant`, also give `-s KEY.min_lr_ratio=0` if the recipe sets another.",
            _set("optim.fake_score.min_lr_ratio=0.5", "set optim.fake_score.min_lr_ratio=0 too"),
            Case("distill micro-turbo -s optim.student.lr_schedule=constant", "set optim.student.min_lr_ratio=0 too"),
            Case("emoji train micro-vae -s optim.lr_schedule=constant", "set optim.min_lr_ratio=0 too"),
        ),
        Message(
            "{recipe}: method.terms.{term}.weight: last_step {last} is not after first_step {first}, of {steps} steps",
            "A ramp needs at least one step; shares such as 85% are of `train.steps`.",
            _set("method.terms.cfg_augmentation.weight={kind: linear, first_step: 5}", "cfg_augmentation.weight: last"),
            _set(
                "method.terms.distribution_matching.weight={kind: cosine, first_step: 60%, last_step: 20%}",
                "distribution_matching.weight: last_step 0 is not after first_step 1",
            ),
        ),
        Message(
            "resolution {pixels}: not a multiple of {number}",
            "The autoencoder and the patches of the transformer divide a side by so much.",
            _set("resolution=65", "resolution 65: not a multiple of 16"),
            _cache("resolution=65", "resolution 65"),
            Case("plan mine.yaml -s resolution=65", "resolution 65", _FILES),
        ),
        Message(
            "{recipe}: {key}: no term {uses}; leave it out",
            "The method's loss terms do not need it.",
            _set("trajectory.cache=runs/cache", "trajectory.cache: no term uses"),
        ),
        Message(
            "{recipe}: method.real_source {source}: no term needs real latents; leave it out",
            "Only the GAN and the mean-variance and MMD terms compare with real latents.",
            _set("method.real_source=emoji", "method.real_source emoji"),
        ),
        Message(
            "{recipe}: train.keep_best.metric: there is no '{metric}'; there are {names}",
            "The best checkpoint is chosen by a metric of the method's losses or of validation.",
            _set("train.keep_best={metric: student/los}", "'student/los'"),
        ),
        Message(
            "{recipe}: train.keep_best.metric {metric}: never measured; set evaluate.validate_every",
            "Metrics that begin with `val/` are measured in validation only.",
            _set("train.keep_best={metric: val/object_acc}", "val/object_acc: never measured"),
        ),
        Message(
            "{recipe}: method.renoise: sigma_min {low} is not below sigma_max {high}",
            "Widen the range of noise levels.",
            _set("method.renoise.sigma_min=0.99", "sigma_min 0.99"),
        ),
        Message(
            "models.target_modules: no linear layer is named '{name}'; there are {names}",
            "Each name must end the name of a linear layer of the transformer.",
            Case("distill mine.yaml -s models.train=lora -s 'models.target_modules=[to_q, to_kk]'", "'to_kk'", _FILES),
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
            _set("optim.student=null", "optim.student is missing"),
            _set("optim.fake_score=null", "optim.fake_score is missing"),
        ),
        Message(
            "{recipe}: optim.{part}: method {method} has no such trainable part here (it trains {parts})",
            "Remove the optimizer, or add the term that trains this part.",
            _set("optim.teacher.lr=1", "optim.teacher"),
            _set("method.terms={cfg_augmentation: {}}", "optim.fake_score"),
        ),
    ),
)
