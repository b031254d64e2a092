"""The notebook examples/first_search.ipynb: written from the cells below, run, and kept with its outputs.

pip install nbclient nbformat ipykernel
python docs/scripts/notebook.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[2] / "examples" / "first_search.ipynb"

CELLS = (
    (
        "markdown",
        "# A first search\n\nA small ResNet learns handwritten digits; then rlprune learns how much of each layer it "
        "can do without. Nothing is downloaded; on one CPU core it takes about a minute.",
    ),
    (
        "code",
        "import rlprune\n\n"
        'config = rlprune.load_config("digits", ["model.arguments.width=8", "model.train.epochs=8"])\n'
        "workload = rlprune.build_workload(config)  # a dense model, trained, with its data\n"
        'workload.evaluate(workload.model, "validation")',
    ),
    (
        "markdown",
        "**What can be cut?** Each group is a set of channels that have to go together. `lowest` is how far the whole "
        "model can be cut.",
    ),
    (
        "code",
        "space = rlprune.trace(workload.model, workload.example_inputs)\n"
        "for group in space.groups:\n"
        '    print(f"{group.name:<24} {group.width:>3} channels")\n'
        'print(f"MACs: {space.dense_cost():,.0f}; lowest budget {space.lowest():.1%}")',
    ),
    (
        "markdown",
        "**The search.** Rules, random search and the agent try plans that leave half of the MACs. Each plan is built, "
        "repaired and scored; nothing is trained until the end.",
    ),
    (
        "code",
        'settings = {"finish": {"epochs": 1}, "search": {"baselines": ["random"]}}\n'
        'result = rlprune.search(workload, budget="50%", evaluations=32, settings=settings)\n'
        'columns = ("score", "test_loss", "test_loss_finetuned", "test_finetuned", "evaluations")\n'
        'print(f"{\'method\':<18}" + "".join(f"{name:>21}" for name in columns))\n'
        "for row in result.table:\n"
        '    print(f"{row[\'method\']:<18}" + "".join(f"{row[name]:>21.4f}" for name in columns))',
    ),
    (
        "markdown",
        "**How is the pruning spread?** Widths of each layer: dense, by the best rule, by the agent.",
    ),
    (
        "code",
        "import matplotlib.pyplot as plt\nimport numpy as np\n\n"
        'rules = [row for row in result.table if row["kind"] == "rule"]\n'
        'best = max(rules, key=lambda row: row["score"])\n'
        'shown = {"dense": space.widths, f"rule: {best[\'method\']}": best["widths"], "ppo": result.plan.widths}\n'
        "places = np.arange(len(space.groups))\n"
        "figure, axes = plt.subplots(figsize=(8, 3), dpi=70)\n"
        "for number, (name, widths) in enumerate(shown.items()):\n"
        "    axes.bar(places + (number - 1) * 0.28, widths, 0.28, label=name)\n"
        'axes.set(xlabel="group, from the input to the output", ylabel="channels")\n'
        "axes.legend(frameon=False)\n"
        "plt.show()",
    ),
    ("markdown", "**Did the search still learn at the end?** The best score so far after each evaluation."),
    (
        "code",
        "import json\n\n"
        'lines = [json.loads(line) for line in (result.folder / "ledger.jsonl").read_text().splitlines()]\n'
        "figure, axes = plt.subplots(figsize=(8, 3), dpi=70)\n"
        'for method in ("random", "ppo"):\n'
        '    scores = [line["score"] for line in lines if line["method"] == method]\n'
        "    axes.plot(np.maximum.accumulate(scores), label=method)\n"
        'axes.set(xlabel="evaluations", ylabel="best score so far (0 is the dense model)")\n'
        "axes.legend(frameon=False)\n"
        "plt.show()",
    ),
    (
        "markdown",
        "**The policy on another network**, without a search: the same architecture, trained from another seed. Cut "
        "and repaired, not fine-tuned.",
    ),
    (
        "code",
        'other = rlprune.build_workload(config.override(["model.seed=1"]))\n'
        'applied = rlprune.apply(result.policy, other, budget="50%")\n'
        "print(applied.table)",
    ),
    (
        "markdown",
        "`result.model` is a plain `torch.nn.Module`. `result.save(FOLDER)` keeps everything; `result.report(FILE)` "
        "writes the report with intervals. Next: your own model (docs/own-model.md).",
    ),
)


def notebook() -> Any:
    """The notebook without outputs."""
    import nbformat

    kinds = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [kinds[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(CELLS)]
    facts = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=facts)


def run(book: Any) -> Any:
    """Run all cells in an empty folder; their outputs stand in the notebook afterwards."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of the run
        # What libraries warn of names files of the machine.
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    book.metadata.pop("language_info", None)
    return book


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    out = parser.parse_args(argv).out
    import nbformat

    nbformat.write(run(notebook()), out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
