"""American spelling, and one idiom for errors: `expected X to be ..., but got ...`."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TEXTS = sorted(
    path
    for folder, suffixes in {
        "src": (".py", ".cpp", ".h", ".html", ".css"),
        "tests": (".py",),
        "docs": (".md", ".rst", ".py", ".css"),
        "examples": (".py", ".rst"),
        "benchmarks": (".py", ".md", ".cpp"),
    }.items()
    for path in (ROOT / folder).rglob("*")
    if path.suffix in suffixes
    and path != Path(__file__)
    and not {"_build", "_generated", "gallery"} & set(path.relative_to(ROOT).parts)
) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]

BRITISH = re.compile(
    r"colour|centred?\b|centres|analys(e[ds]?|ing)\b|(normal|optim|initial|general|character|"
    r"organ|recogn|summar|visual|real|minim|maxim|special|parallel|serial|quant|vector|local|"
    r"penal|standard|synchron|util|rasteri|author|emphas|categor|custom|material)is(e[drs]?|ing|ation)\b|"
    r"neighbour|behaviour|favour|\bgrey\b|labelled|labelling|modelled|modelling|cancelled|"
    r"travelled|licence\b|artefact|whilst|programme\b|catalogue|judgement",
    re.IGNORECASE,
)
# How errors were worded before there was one idiom.
OLD_IDIOMS = re.compile(r"\bwant(s|ed)?\b|\bmust (be|have|not|lie|name|fit)\b|\bare asked for\b")
PRIVATE_IDIOM = re.compile(
    r"\b(plain )?twins?\b|\bmade (images?|data|sets?|shapes|scenes)\b|\bmirror(s|ed|ing)?\b"
    r"|\bit has besides\b|\bin the place of\b|\bONE_LOOK\b|\bDetectionTesting\b"
)


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_spelling_is_american():
    assert not lines_with(BRITISH)


def test_terms_are_those_of_the_field():
    assert not lines_with(PRIVATE_IDIOM)


def error_texts(path: Path) -> list[str]:
    """All string constants in the `raise` statements of a file."""
    return [
        node.value
        for statement in ast.walk(ast.parse(path.read_text()))
        if isinstance(statement, ast.Raise)
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_errors_have_one_idiom():
    texts = [(path.name, text) for path in SOURCES for text in error_texts(path)]
    assert len(texts) > 500
    assert not [(name, text) for name, text in texts if OLD_IDIOMS.search(text)]


def test_all_tracked_python_is_covered():
    """A new folder of sources is not forgotten."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in tracked.stdout.split()}
    assert folders <= {"src", "tests", "docs", "examples", "benchmarks"}
