"""The pages of the documentation, and what stands in their fenced blocks."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [
    *(
        DOCS.parent / f"{name}.md"
        for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")
    ),
    *sorted(DOCS.glob("*.md")),
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of a list item."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [textwrap.dedent(body) for _, body in found]


def command_lines(page: Path) -> list[list[str]]:
    """The words of every shell line, continued lines joined, comments left out."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
