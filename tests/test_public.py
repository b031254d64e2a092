"""The public surface: what people type and import keeps its names and shapes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import rlprune
from rlprune.config.config import Config
from rlprune.vision.zoo import build_model

ROOT = Path(rlprune.__file__).parent.parent


def test_every_public_name_is_there() -> None:
    for name in rlprune.__all__:
        assert getattr(rlprune, name) is not None, name
        assert name in dir(rlprune)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        rlprune.prun  # noqa: B018


def test_errors_are_one_family() -> None:
    for name in ("ConfigError", "GraphError", "BudgetError", "DataError", "ArtifactError"):
        assert issubclass(getattr(rlprune, name), rlprune.RlpruneError)


def test_importing_is_quick_and_registers_the_environments() -> None:
    script = (
        "import rlprune, sys, gymnasium\n"
        "assert 'torch' not in sys.modules\n"
        "for name in ('rlprune/Distribution-v0', 'rlprune/Sequential-v0'):\n"
        "    assert name in gymnasium.registry\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_rules_and_tasks_do_not_wait_for_libraries_that_few_models_need() -> None:
    script = (
        "import sys, rlprune.rules\n"
        "from rlprune.vision import adapter, zoo\n"
        "assert len(rlprune.rules.RULES) > 20\n"
        "assert not {'torchvision', 'torch_pruning', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_from_a_model_to_a_saved_pruned_one(tmp_path: Path) -> None:
    model = build_model("cifar_resnet20", 10, arguments={"width": 8})
    example = torch.zeros(1, 3, 16, 16)
    space = rlprune.trace(model, example, ignore=("linear",))
    assert all(
        hasattr(space.groups[0], name) for name in ("name", "kind", "width", "unit", "minimum", "members")
    )
    groups = len(space.groups)
    assert space.widths.shape == (groups,)
    assert isinstance(space.cost(space.widths, "macs"), float)
    assert space.cost(np.stack([space.widths] * 3), "params").shape == (3,)
    scores = rlprune.importance.magnitude(model, space)
    context = rlprune.Context(space, model, importance=scores, budget=0.5, metric="macs", workload=None)
    distribution = rlprune.rules.uniform(context)
    assert distribution.shape == (groups,)
    with pytest.raises(rlprune.DataError):
        rlprune.rules.sensitivity(context)
    widths = space.project(np.stack([distribution, distribution]), 0.5, metric="macs")
    assert widths.shape == (2, groups)
    with pytest.raises(rlprune.BudgetError):
        space.project(distribution, 1e-9)
    plan = rlprune.make_plan(space, importance=scores, distribution=distribution, budget=0.5, metric="macs")
    assert np.array_equal(plan.widths, widths[0])
    assert [len(kept) for kept in plan.kept] == plan.widths.tolist()
    slim = rlprune.prune(model, plan)
    rlprune.save(slim, plan, tmp_path / "pruned")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(slim.eval()(x), rlprune.load(tmp_path / "pruned")(x))
        assert torch.equal(slim(x), rlprune.load(tmp_path / "pruned", base=model)(x))


def test_environments_take_a_workload(small_digits: Config) -> None:
    workload = rlprune.build_workload(small_digits)
    env = gymnasium.make("rlprune/Distribution-v0", workload=workload, budget=0.5)
    env.reset(seed=0)
    assert env.action_space.shape is not None
    _, _, ended, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert ended
    assert {"widths", "cost", "metric", "seconds"} <= set(info)


def test_the_wheel_holds_one_package() -> None:
    """The links at the root must not become packages: `agents` would overwrite somebody else's."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["rlprune*"]
    assert settings["project"]["version"] == rlprune.__version__
    assert (ROOT / "rlprune" / "py.typed").is_file()
