"""One of each file that rlprune reads, small and whole, to be damaged by tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from helpers.lm_folder import write_folder
from helpers.pruned_lm import pruned as pruned_lm
from helpers.questions import instruction
from helpers.run_fixture import write_run
from helpers.synthetic import make_synthetic_task
from rlprune.config.config import load_config
from rlprune.evaluation.ledger import EvaluationLog
from rlprune.language.loading import help_tokenizer

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"


def _net() -> torch.nn.Module:
    from rlprune.vision.zoo import build_model

    torch.manual_seed(0)
    return build_model("cifar_resnet20", 10, 1, arguments={"width": 4}).eval()


_SPACES: list[Any] = []


def small_space() -> Any:
    """The space of the pruned model."""
    if not _SPACES:
        _SPACES.append(rlprune.trace(_net(), torch.zeros(1, 1, 8, 8)))
    return _SPACES[0]


def write_policy(folder: Path) -> None:
    from gymnasium import spaces

    from rlprune.agents.ppo.policy import GroupPolicy, provenance, save_policy
    from rlprune.envs.observation import BOUND, FEATURE_VERSIONS

    width = 6 * len(FEATURE_VERSIONS[1])
    box = spaces.Box(-BOUND, BOUND, (width,), np.float32)
    policy = GroupPolicy(box, spaces.Box(-1.0, 1.0, (6,), np.float32), lambda _: 1e-3, hidden=8)
    policy.provenance = provenance([make_synthetic_task(6)])
    save_policy(policy, folder)


def write_whole(folder: Path) -> Path:
    """One of each file that is read, small and whole: pruned models, a policy, a run, a table, questions."""
    from rlprune.latency.table import Calibration, LatencyTable, LayerTable, LayerUse

    space = small_space()
    scores = [np.arange(group.width, 0, -1.0) for group in space.groups]
    plan = rlprune.make_plan(space, importance=scores, distribution=np.ones(len(space.groups)), budget=0.5)
    rlprune.save(rlprune.prune(_net(), plan), plan, folder / "pruned")
    write_policy(folder / "policy")
    write_run(folder / "run", groups=4, seeds=1, evaluations=6)
    _write_ledger(folder / "run" / "ledger.jsonl")
    (folder / "run" / "config.yaml").write_text(json.dumps(load_config("digits").to_dict()))
    _write_benchmark(folder / "benchmark")
    shutil.copy(folder / "pruned" / "plan.json", folder / "run" / "pruned" / "plan.json")
    sizes = np.array([1, 2, 4])
    layer = LayerTable("conv", sizes, sizes, np.arange(9.0).reshape(3, 3), 16.0)
    calibration = Calibration(element={16.0: 0.5}, dense=3.0)
    table = LatencyTable("mark", 1, {"device": "cpu"}, (layer,), (LayerUse("conv1", 0, 1),), calibration)
    (folder / "table.json").write_text(json.dumps(table.to_dict()))
    slim, plan = pruned_lm()
    rlprune.save(slim, plan, folder / "lm", tokenizer=help_tokenizer(300))
    write_folder(folder / "dense", num_hidden_layers=1)
    entry = {"instruction": instruction("why?", ("a", "b")), "answer": "answer1"}
    (folder / "questions.json").write_text(json.dumps([entry] * 2))
    return folder


def _write_benchmark(folder: Path) -> None:
    """Four methods and two seeds of the results that the documents show."""
    results = json.loads((RESULTS / "digits.json").read_text(encoding="utf-8"))
    methods = ("dense", "uniform", "random", "ppo")
    results["rows"] = [r for r in results["rows"] if r["method"] in methods and r["seed"] < 2]
    results["summary"] = [e for e in results["summary"] if e["method"] in methods]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))


def _write_ledger(path: Path) -> None:
    log = EvaluationLog(None)
    path.unlink()
    task = make_synthetic_task(4)
    for width in (3, 4, 5):
        found = task.evaluator.evaluate([width] * 4)
        row = {"seconds": 0.1, "method": "ppo", "seed": 0, "task": "", "widths": list(found.widths)}
        row |= {
            name: getattr(found, name) for name in ("cost", "score", "loss", "metric", "error", "samples")
        }
        log.path = path
        log.append(row)  # type: ignore[arg-type]
