"""The documentation: links resolve, lines of prose are short, and the commands it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fewstep.config.load import load_recipe, parse_recipe
from fewstep.tuning.space import read_space

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAX_PROSE = 140
COMMANDS = {
    *("distill", "tune", "generate", "evaluate", "plan", "encode-prompts", "cache-trajectories", "convert", "export"),
    *("emoji", "lora", "prefs", "serve", "steps"),
}
GROUPS = {
    "steps": {"train"},
    "emoji": {"build", "gallery", "sheet", "train", "publish", "publish-student"},
    "lora": {
        "adapter",
        "check",
        "choose",
        "convert",
        "extract",
        "import",
        "info",
        "merge",
        "mix",
        "prepare",
        "resize",
        "train",
    },
    "prefs": {"collect", "rank", "train"},
}

#: Words that describe models as persons.
PERSONIFYING = re.compile(r"\b(speaks?|said|goes on|asked|looks|rests?)\b")
#: The words of one paper, allowed on the pages that introduce them.
PAPER_WORDS = re.compile(r"\b(spear|shield)s?\b", re.IGNORECASE)
PAPER_WORDS_PAGES = {"docs/glossary.md", "docs/reference/decoupled-dmd.md", "CHANGELOG.md"}


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> list[str]:
    """The page's lines; those of code blocks are empty."""
    fenced, lines = False, []
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, line = not fenced, ""
        lines.append("" if fenced or line.startswith("    ") else line)
    return lines


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = [line.lstrip("# ") for line in without_code(page.read_text(encoding="utf-8")) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = "\n".join(without_code(page.read_text(encoding="utf-8")))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def named_commands(text: str) -> set[tuple[str, str]]:
    """The commands in a text, (command, next word), from command lines and inline code."""
    found = re.findall(r"(?:^ {4}|`|-m |&& |\.py )fewstep ([a-z][\w-]*)(?:[ \t]+([\w-]+))?", text, re.MULTILINE)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_prose_lines_are_short(page: Path) -> None:
    lines = without_code(page.read_text(encoding="utf-8"))
    prose = {number: line for number, line in enumerate(lines, 1) if not line.startswith(("|", "!["))}
    assert [number for number, line in prose.items() if len(line) >= MAX_PROSE] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_use_the_standard_terms(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if PERSONIFYING.search(line)] == []
    if relative(page) not in PAPER_WORDS_PAGES:
        assert [line for line in lines if PAPER_WORDS.search(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
    named = re.findall(r"(?<![\w/])((?:src/fewstep|tests|benchmarks|examples/cluster)/[\w./-]*\w)", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_named_commands_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, *ROOT.glob("examples/**/*.*")])
    named = named_commands(text)
    assert {command for command, _ in named} <= COMMANDS
    for group, commands in GROUPS.items():
        assert {word for command, word in named if command == group} <= commands | {""}
    assert {command for command, _ in named} == COMMANDS, "a command is not documented"


def test_command_line_has_the_documented_commands() -> None:
    import typer

    from fewstep.cli.main import app

    program = typer.main.get_command(app)
    assert set(program.commands) == COMMANDS  # type: ignore[attr-defined]
    for group, commands in GROUPS.items():
        assert set(program.commands[group].commands) == commands  # type: ignore[attr-defined]


@pytest.mark.slow
def test_code_of_the_extension_guide_runs(tiny_folder: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "guides" / "extending.md").read_text(encoding="utf-8")
    plugins = [tmp_path / f"plugin_{number}.py" for number in range(len(blocks(text, "python")))]
    for plugin, code in zip(plugins, blocks(text, "python"), strict=True):
        plugin.write_text(code, encoding="utf-8")
    (recipe,) = blocks(text, "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    terms = "method={name: dmd, terms: {cfg_augmentation: {}, latent_norm: {weight: 0.5, target: 1.2}}}"
    settings = [f"teacher={tiny_folder}", "train.steps=1", "train.batch_size=2", "evaluate.enabled=false"]
    for number, changes in enumerate([settings, [*settings, terms]]):
        out = tmp_path / str(number)
        words = ["distill", tmp_path / "mine.yaml", "--out", out, *(word for each in changes for word in ("-s", each))]
        done = subprocess.run(
            [sys.executable, "-m", "fewstep", *map(str, words)],
            env=os.environ | {"FEWSTEP_PLUGINS": os.pathsep.join(map(str, plugins)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert (out / "student" / "model_index.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_recipes_in_pages_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        tree = yaml.safe_load(block)
        if page.name == "extending.md":
            continue  # its method is registered by the code beside it, see above
        if "metric" in tree:  # a search space
            (tmp_path / "space.yaml").write_text(block, encoding="utf-8")
            read_space(tmp_path / "space.yaml").check(load_recipe("micro-decoupled"))
            continue
        if "kind" not in tree:  # a section: put into a recipe that has the rest
            base = {"kind": "distill", "name": "example", "teacher": "micro", "train": {"steps": 100, "batch_size": 4}}
            base["method"] = {"name": "dmd", "terms": {"cfg_augmentation": {}, "distribution_matching": {}}}
            base["optim"] = {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}}
            tree = base | tree
        parse_recipe(tree, relative(page))


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    assert {page for page in PAGES if page.is_relative_to(index.parent)} - {index} <= listed


def test_the_recipe_reference_is_current() -> None:
    """``make docs`` writes it from the recipes' models."""
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.config.reference"], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
