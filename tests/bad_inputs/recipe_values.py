"""Values in recipes: of another type, out of range, unknown, or in contradiction to others."""

from bad_inputs.files import CACHE, DISTILL, PROMPTS
from bad_inputs.table import Case, Message, Section

_FILES = {"mine.yaml": DISTILL, "cache.yaml": CACHE, "prompts.txt": PROMPTS}


def _set(override: str, expected: str) -> Case:
    return Case(f"distill mine.yaml -s '{override}'", expected, _FILES)


def _cache(override: str, expected: str) -> Case:
    return Case(f"cache-trajectories cache.yaml -s '{override}'", expected, _FILES)


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
            Case("emoji train classifier -s base_channels=1", "base_channels"),
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
            Case("emoji train micro-teacher -s prompt_dropout=2", "prompt_dropout"),
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
            "{recipe}: student: timesteps {levels}: expected {steps} levels that descend from 1, without the 0",
            "Give one noise level for each of `student.steps`, the first one 1.",
            _set("student.timesteps=[1, 0.5]", "expected 4 levels"),
            _set("student.timesteps=[0.5, 1, 0.2, 0.1]", "[0.5, 1.0, 0.2, 0.1]"),
            _set("student.timesteps=[1, 0.5, 0.2, 0]", "without the 0"),
            _set("student.timesteps=[]", "timesteps []"),
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
