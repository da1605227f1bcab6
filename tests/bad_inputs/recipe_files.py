"""Recipes that are missing, or are not recipes, and overrides that name nothing."""

from bad_inputs.files import CACHE, DISTILL, folder, link_loop
from bad_inputs.table import Case, Message, Section


def _recipe(text: str) -> dict[str, str]:
    return {"mine.yaml": text}


SECTION = Section(
    "Recipes and overrides",
    "`RECIPE` is a YAML file, or the name of a bundled recipe. [Recipes](../recipes.md) lists all keys.",
    (
        Message(
            "{recipe}: no such recipe file (shipped recipes: {names})",
            "Check the path, or take one of the listed names.",
            Case("distill nothing.yaml", "nothing.yaml: no such"),
            Case("distill loop.yaml", "loop.yaml: no such", {"loop.yaml": link_loop}),
            Case("plan nothing", "nothing: no such"),
            Case("cache-trajectories nothing", "nothing: no such"),
            Case("emoji train nothing", "nothing: no such"),
        ),
        Message(
            "{recipe}: no such recipe file; did you mean {name}?",
            "Check the spelling of the bundled recipe.",
            Case("distill micro-turbu", "did you mean micro-turbo?"),
            Case("emoji train clasifier", "did you mean classifier?"),
        ),
        Message(
            "{folder}: a folder, not a recipe",
            "Give the YAML file in it.",
            Case("distill tiny", "tiny: a folder"),
            Case("plan old", "old: a folder", {"old": folder}),
        ),
        Message(
            "{folder}: a folder, not a recipe; the recipe of this run is {file}",
            "Give that file, to make the same again in another folder.",
            Case("distill old", "old/recipe.yaml", {"old/recipe.yaml": DISTILL}),
        ),
        Message(
            "the name of the recipe is empty; give a YAML file, or the name of a bundled recipe",
            "Often a shell variable that is not set.",
            Case("distill ''", "is empty"),
            Case("emoji train ' '", "is empty"),
        ),
        Message(
            "{recipe}: its kind is {kind}; use: fewstep {command} {recipe}",
            "Each kind of recipe has its command.",
            Case("distill cache.yaml", "fewstep cache-trajectories cache.yaml", {"cache.yaml": CACHE}),
            Case("distill classifier", "fewstep emoji train classifier"),
            Case("distill micro-lora", "fewstep lora train micro-lora"),
            Case("lora train mine.yaml", "fewstep distill mine.yaml", {"mine.yaml": DISTILL}),
            Case("emoji train mine.yaml", "fewstep distill mine.yaml", {"mine.yaml": DISTILL}),
            Case("emoji train micro-cache", "fewstep cache-trajectories micro-cache"),
            Case("cache-trajectories mine.yaml", "fewstep distill mine.yaml", {"mine.yaml": DISTILL}),
            Case("cache-trajectories classifier", "fewstep emoji train classifier"),
        ),
        Message(
            "{recipe}: its kind is {kind}; fewstep plan takes recipes of kind distill, stages or lora",
            "Other trainings have no plan.",
            Case("plan cache.yaml", "cache_trajectories", {"cache.yaml": CACHE}),
            Case("plan classifier", "kind is classifier"),
        ),
        Message(
            "{file}: not a UTF-8 text file",
            "Save it as UTF-8.",
            Case("distill mine.yaml", "mine.yaml", {"mine.yaml": "name: café".encode("latin-1")}),
            Case("distill mine.yaml", "mine.yaml", {"mine.yaml": bytes(range(128, 256))}),
        ),
        Message(
            "{file}: a recipe is a mapping of keys to values",
            "The file is empty, or holds a list or a text.",
            Case("distill mine.yaml", "mine.yaml", _recipe("")),
            Case("distill mine.yaml", "mine.yaml", _recipe("# nothing\n")),
            Case("distill mine.yaml", "mine.yaml", _recipe("- kind\n- distill\n")),
            Case("plan prompts.txt", "prompts.txt", {"prompts.txt": "a fox\n"}),
        ),
        Message(
            "{file}: not valid YAML: {problem}",
            "The line and column are named.",
            Case("distill mine.yaml", "the key steps is given twice", _recipe("train:\n  steps: 4\n  steps: 8\n")),
            Case("distill mine.yaml", "the key kind is given twice", _recipe("kind: distill\nkind: stages\n")),
            Case("distill mine.yaml", "line 2", _recipe("a: [\n")),
            Case("distill mine.yaml", "character '\\t'", _recipe("a:\tb: c\n")),
            Case("distill mine.yaml", "constructor for the tag", _recipe("a: !!python/object:os.system x\n")),
            Case("distill mine.yaml", "unhashable key", _recipe("? [a, b]\n: 2\n")),
            Case("distill mine.yaml", "another document", _recipe("a: 1\n---\nb: 2\n")),
            Case("distill mine.yaml", "undefined alias", _recipe("a: *b\n")),
            Case("distill mine.yaml", "month must be in 1..12", _recipe("day: 2024-13-45\n")),
            Case("distill mine.yaml", "recursion", _recipe("[" * 1000)),
        ),
        Message(
            "{recipe}: it has no kind; a recipe's kind is one of {kinds}",
            "Add `kind:`.",
            Case("distill mine.yaml", "it has no kind", _recipe("name: mine\n")),
            Case("emoji train mine.yaml", "it has no kind", _recipe("name: mine\n")),
        ),
        Message(
            "{recipe}: kind is {kind}; a recipe's kind is one of {kinds}",
            "Check the spelling.",
            Case("distill mine.yaml", "kind is 'distil'", _recipe("kind: distil\n")),
            Case("distill mine.yaml", "kind is ['distill']", _recipe("kind: [distill]\n")),
            Case("plan mine.yaml", "kind is None", _recipe("kind:\n")),
        ),
        Message(
            "{recipe}: {key} is missing",
            "The key has no default: add it.",
            Case("distill mine.yaml", "teacher is missing", _recipe(DISTILL.replace("teacher: tiny\n", ""))),
            Case("distill mine.yaml", "train.batch_size is missing", _recipe(DISTILL.replace(", batch_size: 2", ""))),
            Case("distill mine.yaml", "method.name is missing", _recipe(DISTILL.replace("name: dmd, ", ""))),
            Case("distill mine.yaml -s 'optim.student.betas=[0.9]'", "optim.student.betas.1", _recipe(DISTILL)),
            Case("cache-trajectories mine.yaml", "name is missing", _recipe(CACHE.replace("name: mine\n", ""))),
        ),
        Message(
            "{recipe}: {key} is missing (and {count} more mistakes)",
            "Several keys are wrong; the first one is named.",
            Case("distill mine.yaml", "name is missing", _recipe("kind: distill\n")),
        ),
        Message(
            "{recipe}: unknown key {key}; did you mean {other}?",
            "Check the spelling and the section.",
            Case("distill mine.yaml -s train.step=4", "did you mean train.steps?", _recipe(DISTILL)),
            Case("distill mine.yaml -s steps=4", "unknown key steps", _recipe(DISTILL)),
            Case("distill mine.yaml -s method.terms.gen.weight=1", "method.terms.gan?", _recipe(DISTILL)),
            Case("plan mine.yaml -s optim.student.warmup=1", "optim.student.warmup_steps?", _recipe(DISTILL)),
            Case("distill mine.yaml -s optim.student.batch_size=1", "train.batch_size?", _recipe(DISTILL)),
            Case("cache-trajectories mine.yaml -s num_trajectory=8", "num_trajectories?", _recipe(CACHE)),
            Case("emoji train classifier -s base_chanels=8", "base_channels?"),
        ),
        Message(
            "{recipe}: unknown key {key}; known keys: {keys}",
            "There is no such key in this section, and no similar one.",
            Case("distill mine.yaml -s optim.student.rho=1", "optim.student.lr, optim.student.betas", _recipe(DISTILL)),
            Case(
                "distill mine.yaml -s student.xyz=1",
                "student.steps, student.step_counts, student.step_chooser",
                _recipe(DISTILL),
            ),
        ),
        Message(
            "{recipe}: {section}: input should be a valid dictionary{...}",
            "A section of keys is expected, and a value or a list is given.",
            Case("distill mine.yaml -s train=4", "train: input", _recipe(DISTILL)),
            Case("distill mine.yaml -s 'train=[4]'", "train: input", _recipe(DISTILL)),
            Case("distill mine.yaml -s method=dmd", "method: input", _recipe(DISTILL)),
            Case("distill mine.yaml -s optim=null", "optim: input", _recipe(DISTILL)),
            Case("distill mine.yaml -s method.terms=null", "method.terms: input", _recipe(DISTILL)),
        ),
        Message(
            "-s {override}: expected key=value, as in -s train.steps=100",
            "Name the key with its sections, then `=` and the value.",
            Case("distill mine.yaml -s train.steps", "-s train.steps:", _recipe(DISTILL)),
            Case("distill mine.yaml -s =4", "-s =4:", _recipe(DISTILL)),
            Case("distill mine.yaml -s train..steps=4", "-s train..steps=4", _recipe(DISTILL)),
            Case("cache-trajectories mine.yaml -s steps:4", "-s steps:4", _recipe(CACHE)),
        ),
        Message(
            "-s {override}: the value is not valid YAML; quote text with special characters",
            "A list or mapping is not closed, or a text begins with a sign that YAML uses.",
            Case("distill mine.yaml -s 'train.steps=[1'", "train.steps=[1", _recipe(DISTILL)),
            Case("distill mine.yaml -s 'train.steps={'", "train.steps={", _recipe(DISTILL)),
        ),
        Message(
            "-s {override}: YAML takes '{comment}' for a comment; quote the value",
            "In YAML, a number sign after a space begins a comment: leave it out.",
            Case("distill mine.yaml -s 'train.steps=1 #2'", "'#2'", _recipe(DISTILL)),
        ),
        Message(
            "-s {override}: {key} holds a value, not further keys",
            "The key before the last dot is no section.",
            Case("distill mine.yaml -s train.steps.x=4", "steps holds a value", _recipe(DISTILL)),
            Case("emoji train classifier -s name.x=4", "name holds a value"),
        ),
    ),
)
