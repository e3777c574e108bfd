"""Pictures that several assets show of the same thing, drawn from what is on the shelf."""

from collections.abc import Sequence

import dagster as dg

from assets.costs import parent_block
from assets.materialise import picture
from assets.plan import Plan
from resources.pages import page_url
from resources.workspace import Workspace


def architecture_picture(
    plan: Plan, workspace: Workspace, blocks: Sequence[str], *, runs: Sequence[str] = (), title: str
) -> dg.MetadataValue:
    """Return which attention and which FFN every layer took, among all that were on offer, and which runs were replaced at once."""
    from puzzle_dag.report.pictures import architecture_map

    variants = workspace.shelf.value("cost_variants")
    drawn = architecture_map(
        blocks, attentions=variants["attention"], ffns=variants["ffn"], parent_block=parent_block(plan).name, runs=runs, title=title
    )
    return picture(drawn, "the architecture, layer by variant")


def page_link(plan: Plan, page: str) -> dg.MetadataValue:
    """Return the link to a page of var/PROFILE/reports, which `python -m assets ui` serves beside the UI."""
    return dg.MetadataValue.url(page_url(plan.profile.name, page))
