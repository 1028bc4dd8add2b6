import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# latency.json is a file of a run.
OURS = re.compile(r"`(?!latency\.json`)((?:agent|envs|experiments|graph_encoder|latency|pruning)(?:\.\w+)+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_of_ours_that_a_page_mentions_is_there(page: Path) -> None:
    for name in set(OURS.findall(page.read_text())):
        pkgutil.resolve_name(name)
