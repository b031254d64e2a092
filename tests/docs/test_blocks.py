"""Every Python block of every page is run: here, or by the test of its page, as the text stands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import rlprune
from helpers.lm import tiny_lm
from helpers.pages import DOCS, PAGES, blocks
from helpers.registries import forgotten
from helpers.small import SMALL_DIGITS, SMALL_LLAMA, without
from rlprune.cli.main import main
from rlprune.vision import build_model

# Who runs the blocks of a page; the number is counted, so that a new one is not forgotten.
ELSEWHERE = {
    "README.md": (1, "test_examples.py"),
    "own-model.md": (2, "test_examples.py"),
    "python.md": (13, "test_examples.py"),
    "deploy.md": (2, "test_deploy.py"),
    "workloads.md": (4, "test_workloads_page.py"),
    "write-your-own.md": (11, "test_write_your_own.py"),
}
# A search that takes a second or two.
RANDOM = (
    "search.agent=random",
    "search.evaluations=3",
    "search.baselines=[]",
    "finish.epochs=0",
    "finish.rules=false",
)
HERE = {
    "checkpoints-and-images.md": 2,
    "command-line.md": 1,
    "language-models.md": 3,
    "models.md": 1,
    "runtimes.md": 1,
    "tracking.md": 2,
}


def test_every_block_is_run_by_somebody() -> None:
    found: Counter[str] = Counter()
    for page in PAGES:  # two of them have one name
        found[page.name] += len(blocks(page, "python"))
    known = {name: count for name, (count, _) in ELSEWHERE.items()} | HERE
    assert +found == known
    assert all((Path(__file__).parent / test).is_file() for _, test in ELSEWHERE.values())


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(
    page: str, names: dict[str, object] | None = None, change: dict[str, str] | None = None
) -> dict[str, object]:
    """All blocks of a page one after the other, among one set of names; returns these."""
    found = {"__name__": page} if names is None else names  # what it registers is foreign, and forgotten
    for number, block in enumerate(blocks(DOCS / page, "python")):
        for old, new in (change or {}).items():
            block = block.replace(old, new)
        exec(compile(block, f"{page}, block {number}", "exec"), found)
    return found


def test_checkpoints_and_images() -> None:
    model = torch.nn.Linear(2, 2)
    with forgotten("mine"):
        found = run("checkpoints-and-images.md", {"torch": torch, "model": model})
    assert torch.load("weights.pt")["weight"].shape == (2, 2)
    image = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    for name in ("evaluation", "training"):
        assert found[name](image).shape == (3, 224, 224)  # type: ignore[operator]


@pytest.mark.slow
def test_the_command_line_from_python() -> None:
    """The page's settings name a model and images of the reader's; here they are the digits, and as short as can be."""
    short = rlprune.load_config("digits", [*SMALL_DIGITS, *RANDOM])
    Path("my.yaml").write_text(short.to_yaml(), encoding="utf-8")
    change = {
        "search.evaluations=200": "search.evaluations=3",
        '["ppo", "random", "evopress", "lamp"], seeds=3': '["random", "lamp"], seeds=1',
    }
    found = run("command-line.md", {"rlprune": rlprune}, change)
    assert len(found["compared"]["rows"]) == 3  # type: ignore[index]


@pytest.mark.slow
def test_language_models() -> None:
    pytest.importorskip("peft")
    words = ["prune", "tiny_llama", "--rule", "ffn_uniform", "--budget", "80%", "--out", "runs/mine/pruned"]
    assert main([*words, *without(SMALL_LLAMA)]) == 0
    tiny_lm("llama").config.save_pretrained("path/to/model")  # the third block needs no weights
    found = run("language-models.md")
    assert Path("merged/config.json").is_file() and isinstance(found["space"], rlprune.PruningSpace)


def test_models() -> None:
    space = run("models.md")["space"]
    assert isinstance(space, rlprune.PruningSpace) and len(space.groups) > 20


def test_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    with forgotten("runtimes.md"):
        run("runtimes.md")
        assert main(["list", "runtimes"]) == 0
    assert "a board whose kernels" in capsys.readouterr().out


def test_tracking(capsys: pytest.CaptureFixture[str]) -> None:
    short = ", ".join(f'"{setting}"' for setting in (*SMALL_DIGITS, *RANDOM))
    run("tracking.md", change={'"finish.epochs=0"]': f'"finish.epochs=0", {short}]'})
    out = capsys.readouterr().out
    assert "digits random" in out and "random/best_score" in out and "report.html" in out


def test_an_image_folder_is_looked_at_by_the_yaml_of_the_command_line() -> None:
    """The first block of the page as it stands, on four made-up images a class."""
    for split, count in (("train", 12), ("test", 4)):
        for label in range(2):
            folder = Path("path/to/images", split, str(label))
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (64, 64), (120 * label, 10 * number, 60)).save(folder / f"{number}.png")
    (text,) = blocks(DOCS / "command-line.md", "yaml")
    Path("my.yaml").write_text(text, encoding="utf-8")
    save_file(build_model("resnet18", classes=2).state_dict(), "weights.safetensors")
    settings = ["data.image_size=32", "data.calibration=4", "data.validation=4"]
    assert main(["inspect", "my.yaml", *without(settings)]) == 0
