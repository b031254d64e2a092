"""A pruned model with a card that is written from its plan: into a folder, or to the hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import yaml

from ..artifacts.documents import PLAN_FILE, PlanDocument
from ..errors import ArtifactError, ConfigError, RunError, one_line
from ..pruning.cost import plain_amount
from ..report.decision import decide, sentence
from ..report.results import read_results
from ..report.tables import markdown_table
from ..utils.files import replacing_folder
from ..workloads.adapter import adapter_of_base, read_pruned
from .export import find_folder

CARD = "README.md"
# What the hub takes as a name (https://huggingface.co/docs/hub/repositories): one owner, or none.
_REPO = re.compile(r"^(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}$")


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    endpoint: str | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
) -> str:
    """Upload a pruned model's folder with a model card; returns its address.

    The token is that of `hf auth login`, or HF_TOKEN. A repository that is there gets a new commit; files of other
    names in it stay.

    Args:
        directory: a folder written by `rlprune.save`, or that of a run, whose pruned model is meant.
        repo: OWNER/NAME on the hub.
        private: of a repository that is made now.
        endpoint: another hub than https://huggingface.co (or HF_ENDPOINT).
        base_model: the dense model's id on the hub, for the card.
        license_name: the licence for the card, as the hub spells it (``apache-2.0``).

    Raises:
        ArtifactError: the folder holds no pruned model.
        ConfigError: no name of a repository.
        RunError: the hub refuses, or cannot be reached; nothing is half-written there, for a push is one commit.
    """
    if not _REPO.match(repo):
        raise ConfigError(f"REPO: {repo!r} is no name of a repository; expected OWNER/NAME")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="rlprune-push-") as folder:
        _fill(Path(folder), Path(directory), repo, base_model, license_name)
        api = HfApi(endpoint=endpoint)
        try:
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
            done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a pruned model")
        except (
            Exception
        ) as error:  # requests, the hub's own family, a missing token: all of them one line here
            raise RunError(f"push to {repo}: {one_line(error)}") from error
    return str(done.commit_url or f"{api.endpoint}/{name}")


def write_folder(
    directory: str | Path,
    out: str | Path,
    *,
    repo: str = "",
    base_model: str | None = None,
    license_name: str | None = None,
) -> Path:
    """The same files and card in a folder of yours, which is replaced where it is a pruned model's."""
    with replacing_folder(out, PLAN_FILE) as folder:
        _fill(folder, Path(directory), repo or Path(out).name, base_model, license_name)
    return Path(out)


def _fill(folder: Path, source: Path, repo: str, base_model: str | None, license_name: str | None) -> None:
    """Copy the pruned model's own files, links left out, and write the card."""
    pruned = find_folder(source)
    document = read_pruned(pruned)
    if not (pruned / PLAN_FILE).is_file():
        raise ArtifactError(f"{pruned}: has no {PLAN_FILE}; save the model with rlprune first")
    for path in sorted(pruned.iterdir()):
        if path.is_file() and not path.is_symlink() and path.name != CARD:
            shutil.copyfile(path, folder / path.name)
    run = pruned.parent if (pruned.parent / "results.json").is_file() else None
    text = model_card(document, repo, run=run, base_model=base_model, license_name=license_name)
    (folder / CARD).write_text(text, encoding="utf-8")


def model_card(
    document: PlanDocument,
    repo: str,
    *,
    run: Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
) -> str:
    """The card as Markdown with the hub's metadata in front: what was pruned, what is left, how it loads.

    Args:
        document: the content of plan.json.
        repo: the name it goes by.
        run: a finished run's folder, for what it costs in quality.
    """
    adapter = adapter_of_base(document["base"])
    facts: dict[str, object] = {**adapter.card_facts, "tags": ["pruning", "structured-pruning", "rlprune"]}
    if license_name:
        facts["license"] = license_name
    if base_model:
        facts["base_model"] = base_model
    origin = document.get("origin", {})
    method = origin.get("method") or origin.get("rule") or "hand"
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n",
        f"# {repo.rpartition('/')[2]}\n",
        f"A structurally pruned model. How much goes from each layer was chosen by `{method}` of rlprune.\n",
    ]
    if run is not None and (decision := decide(read_results(run), run)) is not None:
        parts.append(f"{sentence(decision)}\n")
    parts += [
        "## What is left\n",
        _costs(document),
        "",
        "## Load it\n",
        adapter.loading_code(document, repo),
        "",
    ]
    parts += ["## Widths\n", _widths(document), ""]
    versions = ", ".join(f"{name} {version}" for name, version in document["libraries"].items())
    parts.append(f"Made with {versions}. `plan.json` holds the kept units and a checksum of every tensor.")
    return "\n".join(parts) + "\n"


def _costs(document: PlanDocument) -> str:
    rows = []
    for metric, dense in document["dense_cost"].items():
        left = document["cost"].get(metric)
        if left is not None and dense:
            rows.append(
                [metric, plain_amount(dense, metric), plain_amount(left, metric), f"{left / dense:.1%}"]
            )
    return markdown_table(["cost", "dense", "pruned", "left"], rows)


def _widths(document: PlanDocument) -> str:
    rows = [
        [f"`{group['name']}`", group["kind"], str(group["width"]), str(width)]
        for group, width in zip(document["groups"], document["widths"], strict=True)
    ]
    return markdown_table(["group", "kind", "dense", "kept"], rows)
