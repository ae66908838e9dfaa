"""The docs tell today's truth: links lead somewhere; commands, options, files and names exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "speculens"
FOLDERS = ("src", "tests", "docs", "testbed", "recipes", "benchmarks", ".ci")
TEXT = {".md", ".py", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".html", ".sh", ".jinja", ".cff", ""}
PAGES = [*sorted(ROOT.glob("*.md")), *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:work|root|home|Users)/\w")
CODE = re.compile(r"`([\w/.-]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_files() -> Iterator[Path]:
    # In a worktree `.git` is a file, and names the repository's place on this machine.
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def fenced(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page: Path) -> set[str]:
    """A heading's anchor as code hosts make it: lower case, spaces to hyphens, punctuation gone."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://|mailto:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def pages_linked_from(page: Path) -> set[Path]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    places = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose))
    return {page} | {(page.parent / place).resolve() for place in places if place.endswith(".md")}


def test_every_page_is_one_link_away_from_the_readme():
    pages = set((ROOT / "docs").glob("*.md"))
    assert sorted(map(name, pages - pages_linked_from(ROOT / "README.md"))) == []


def test_the_file_table_names_every_file():
    table = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    named = {PACKAGE / file for row in re.findall(r"^\|(.+?)\|", table, re.MULTILINE) for file in CODE.findall(row)}
    files = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(map(name, files - named)) == []


def test_a_broken_link_is_caught(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The door\n[a](#the-door) [b](page.md#the-door) [c](#window) [d](gone.md) `[e](code.md)`\n")
    assert broken_links(page) == ["#window", "gone.md"]


def test_no_path_of_one_machine():
    found = [
        f"{name(path)}, line {number}: {line.strip()[:100]}"
        for path in text_files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_a_path_of_one_machine_is_caught():
    assert MACHINE_PATH.search('open("/home/me/cat.jpg")')
    assert not MACHINE_PATH.search("see https://host.example/home/things and docs/home/x")


# --- code: what a page imports, the package offers


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_parse_and_import_what_exists(page):
    for body in fenced(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speculens"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} does not offer {missing}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "speculens":
                assert hasattr(importlib.import_module("speculens"), node.attr), f"speculens.{node.attr} does not exist"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "library.md"], ids=name)
def test_snippets_run_as_they_stand(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for body in fenced(page, "python"):
        exec(compile(body, name(page), "exec"), {"__name__": "snippet"})  # noqa: S102 - what a reader would run
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in {"LOG.md", "CHANGELOG.md"}], ids=name)
def test_files_named_in_code_style_exist(page):
    """`targets/base.py` in prose is in the package, the repository or beside the page; histories name what is gone."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = set(re.findall(r"`([a-z][\w/.-]*\.(?:py|toml|yaml|md))`", prose))
    missing = [
        file for file in sorted(named) if not any((base / file).exists() for base in (ROOT, PACKAGE, page.parent))
    ]
    assert [file for file in missing if "NAME" not in file] == []


# --- commands: what a page tells the reader to type, the CLI and the Makefile have


@cache
def verbs() -> dict[str, Any]:
    return commands_of(importlib.import_module("speculens.cli").app)


def commands_of(app: typer.Typer) -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)


def shown_commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words of every `program ...` line in the page's shell blocks; continuation lines are joined."""
    for body in (*fenced(page, "bash"), *fenced(page, "console")):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0].rpartition("/")[2] == program:
                yield words[1:]


def command_faults(words: list[str], offered: dict[str, Any]) -> list[str]:
    """What of `speculens VERB --option ...` the command line does not have."""
    verb, *rest = words
    if verb not in offered:
        return [f"there is no `speculens {verb}`"]
    known = {option for parameter in offered[verb].params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)}
    return [f"`speculens {verb}` has no {option}" for option in sorted(used - known - {"--help"})]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shown_commands_and_options_exist(page):
    shown = list(shown_commands(page, "speculens"))
    assert [fault for words in shown for fault in command_faults(words, verbs())] == []
    for verb, *rest in shown:
        verbs()[verb].make_context(verb, list(rest))  # raises where something is missing or of a wrong kind


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shown_scripts_and_options_exist(page):
    for program, *rest in shown_commands(page, "python"):
        script = (rest[0].replace(".", "/") + ".py") if program == "-m" else program
        folder = (ROOT / script).parent.glob("*.py")  # scripts of one folder share parsers
        source = "".join(file.read_text(encoding="utf-8") for file in folder)
        assert (ROOT / script).exists()
        unknown = [word for word in rest if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
        assert not unknown, f"{script} has no {unknown}"


def test_the_readmes_command_answers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (asked,) = (words for words in shown_commands(ROOT / "README.md", "speculens") if words[0] == "generate")
    assert importlib.import_module("speculens.cli").main([*asked, "--max-new-tokens", "16"]) == 0
    assert "|" in capsys.readouterr().out


def test_a_command_that_does_not_exist_is_caught(tmp_path):
    app = typer.Typer()

    @app.command()
    def draw(picture: str, *, large: bool = False) -> None: ...

    @app.command()
    def erase() -> None: ...

    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nspeculens draw --large x.png  # ok\nbin/speculens draw \\\n  --small x\nspeculens dream\n```\n"
    )
    faults = [fault for words in shown_commands(page, "speculens") for fault in command_faults(words, commands_of(app))]
    assert faults == ["`speculens draw` has no --small", "there is no `speculens dream`"]


def test_readme_lists_every_command():
    """The table of commands in the README: `verb` and the first line of its --help, word for word."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `speculens ([\w-]+)` \| (.+?) \|$", readme, re.MULTILINE))
    assert shown == {verb: (command.help or "").split("\n")[0].rstrip(".") for verb, command in verbs().items()}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shown_make_verbs_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    shown = {words[0] for words in shown_commands(page, "make") if words} | set(re.findall(r"`make ([\w-]+)", text))
    assert shown <= targets
