"""A code location of the micro profile whose engine is arithmetic, for the browser test: vLLM's start takes longer than all its clicks."""

import pytest
from ticking_engine import TickingEngine

from assets.definitions import build_definitions
from assets.plan import make_plan
from resources.workspace import project_root

TickingEngine().install(pytest.MonkeyPatch())
defs = build_definitions(make_plan(project_root(), "micro"))
