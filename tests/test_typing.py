"""The package is typed for those who install it: pyright, and mypy in strict mode, on a file outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = ROOT / "tests" / "outside" / "public_names.py"


def test_the_marker_is_shipped() -> None:
    assert (ROOT / "rlprune" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_a_type_checker_follows_the_public_names(checker: str, tmp_path: Path) -> None:
    if shutil.which(checker, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip(f"{checker} is not installed")
    words = {
        "pyright": ["-m", "pyright", "--pythonpath", sys.executable, str(FILE)],
        "mypy": ["-m", "mypy", "--strict", "--config-file", os.devnull, "--follow-imports", "silent",
                 "--ignore-missing-imports", "--cache-dir", str(tmp_path), str(FILE)],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words[checker]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
