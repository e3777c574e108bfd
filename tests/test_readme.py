"""What the README and docs/ show works: their settings are valid, their links lead somewhere, their commands exist."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from assets import __main__ as checkout
from assets.plan import CORE
from puzzle_dag import cli
from puzzle_dag.config import ForeignProfile, ForeignScenario, Profile, Scenario, Target

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL) for page in PAGES}


def yaml_blocks(kind: type) -> list[tuple[str, str]]:
    """Return (page, text) of the YAML blocks that are whole files of one kind, told by a field that only it has."""
    mark = {Profile: "parent:", Scenario: "target:", Target: "hardware:", ForeignProfile: "library_file:", ForeignScenario: r"library: \w"}[
        kind
    ]
    blocks = [(page, re.sub(r"^#.*\n", "", b)) for page, text in TEXT.items() for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    return [(page, block) for page, block in blocks if block.startswith("version:") and re.search(rf"^{mark}", block, re.MULTILINE)]


@pytest.mark.parametrize("kind", [Profile, Scenario, Target, ForeignProfile, ForeignScenario])
def test_settings_that_are_shown_are_valid(kind):
    blocks = yaml_blocks(kind)
    assert blocks
    for _, block in blocks:
        kind.model_validate({"name": "shown", **yaml.safe_load(block)})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT[page.name]):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {t for text in TEXT.values() for t in re.findall(r"(?:`|\n)make ([a-z]+)", text)}
    assert {"demo", "ui", "test", "quality", "refresh", "setup"} <= rules
    assert named <= rules


def commands_of(parser: argparse.ArgumentParser) -> set[str]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return set(commands.choices)


def test_commands_that_are_named_exist():
    shown = "\n".join([*TEXT.values(), (ROOT / "Makefile").read_text()])
    for pattern, parser in ((r"puzzle-dag ([a-z]+)", cli.build_parser()), (r"-m assets ([a-z]+)", checkout._parser())):
        named = set(re.findall(pattern, shown))
        assert named and named <= commands_of(parser)


def test_the_picture_of_the_asset_graph_shows_the_assets_that_there_are():
    drawn = (ROOT / "docs" / "asset-graph.svg").read_text()
    shown = set(re.findall(r">([a-z_]+)</text>", drawn))
    assert shown >= CORE, "draw it again: python -m assets.graph docs/asset-graph.svg"
