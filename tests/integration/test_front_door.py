"""The front door: `rlprune.search` and `rlprune.train` on models and data of a user's, from Python."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.small import SMALL_RUN
from rlprune.config.config import load_config
from rlprune.errors import ConfigError, DataError
from rlprune.workloads.loaders import LoaderWorkload

QUICK = {
    "search": {"batch": 4, "baselines": ["random"], "ppo": {"surrogate_steps": 64, "surrogate_envs": 8}},
    "finish": {"candidates": 2, "rules": False},
    "device": "cpu",
}


class Small(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.head = nn.Conv2d(width, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def loaders(
    channels: int = 1, side: int = 8, shuffle: bool = True, **sizes: int
) -> dict[str, DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in ("train", "calibration", "validation", "test"):
        x = torch.randn(sizes.get(name, 24), channels, side, side, generator=generator)
        y = torch.randint(3, (len(x),), generator=generator)
        found[name] = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle and name == "train")
    return found


class Watcher(rlprune.Callback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.events: list[Any] = []
        self.asked = 0
        self._stop_after = stop_after

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_progress(self, event: Any) -> None:
        self.events.append(event)

    def should_stop(self) -> bool:
        self.asked += 1
        return self._stop_after is not None and self.asked > self._stop_after


def check(result: rlprune.PruningResult, dense: nn.Module, share: float, metric: str = "macs") -> None:
    space = result.plan.space
    assert space.cost(result.plan.widths, metric) <= share * space.dense_cost(metric)
    rows = {row["method"]: row for row in result.table}
    assert {"dense", "ppo", "random"} <= set(rows)
    assert rows["ppo"]["widths"] == result.plan.widths.tolist()
    parameters = sum(p.numel() for p in result.model.parameters())
    assert parameters == space.cost(result.plan.widths, "params") < sum(p.numel() for p in dense.parameters())


class TestModels:
    def test_a_small_network_of_ones_own(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model, watcher = Small(), Watcher()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result = rlprune.search(
            model,
            torch.zeros(1, 1, 8, 8),
            loaders=loaders(),
            budget="60%",
            evaluations=12,
            settings=QUICK | {"finish": {"epochs": 1, "rules": False}},
            callback=watcher,
        )
        check(result, model, 0.6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert any("best rule" in note for note in watcher.notes)
        assert {"rules", "ppo", "random"} <= {event.phase for event in watcher.events}
        lines = str(result).splitlines()
        assert any(line.startswith("ppo *") for line in lines) and max(map(len, lines)) <= 100
        assert "Asked for at most 60.0% of the dense MACs" in str(result)
        saved = result.save(tmp_path / "run")
        assert {"pruned", "policy", "results.json", "report.html", "ledger.jsonl"} <= {
            path.name for path in saved.iterdir()
        }
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(rlprune.load(saved / "pruned", base=model)(x), result.model(x))
        assert "<html" in result.report(tmp_path / "new" / "page.html").read_text().lower()
        again = rlprune.PruningResult.read(saved, result.workload)
        assert again.plan.to_dict()["widths"] == result.plan.to_dict()["widths"]
        assert torch.equal(again.model(x), result.model(x)) and len(again.table) == len(result.table)
        assert result.policy is not None and again.policy is not None
        plan = result.policy.plan(result.workload, budget=0.7)
        assert plan.space.cost(plan.widths, "macs") <= 0.7 * plan.space.dense_cost("macs")
        with pytest.raises(ConfigError, match="save: .* exists already"):
            result.save(saved)

    @pytest.mark.slow
    def test_a_resnet_of_torchvision(self) -> None:
        torch.manual_seed(0)
        model = resnet18(num_classes=3)
        parts = loaders(3, 32, train=8, calibration=8, validation=8, test=8)
        result = rlprune.search(
            model, torch.zeros(1, 3, 32, 32), loaders=parts, evaluations=10, settings=QUICK, agent="ppo"
        )
        check(result, model, 0.5)

    def test_a_llama_in_a_workload_of_ones_own(self) -> None:
        workload = Sentences()
        result = rlprune.search(workload, budget=0.7, metric="block_params", evaluations=10, settings=QUICK)
        check(result, workload.model, 0.7, "block_params")
        assert workload.adapter.wing == "language" and workload.metric_name == "perplexity"
        out = result.model(tokens(12)).logits
        assert out.shape[-1] == workload.model.config.vocab_size

    def test_the_folder_goes_with_the_result(self) -> None:
        result = rlprune.search(
            Small(), torch.zeros(1, 1, 8, 8), loaders=loaders(), evaluations=6, settings=QUICK, agent="random"
        )
        folder = result.folder
        assert folder.is_dir() and result.policy is None
        del result
        assert not folder.exists()


class Sentences(rlprune.Workload):
    """A transformers model, nothing but batches: everything else comes from its adapter."""

    def __init__(self) -> None:
        self.model = tiny_lm("llama", num_hidden_layers=2)
        self.example_inputs = tokens(12)
        self.parts = {name: tokens(12, 8, seed) for seed, name in enumerate(rlprune.workloads.SPLITS, 1)}

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for ids in self.parts[split].split(4):  # takes no notice of the limit
            yield ids, ids


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    def run(callback: rlprune.Callback | None = None, **options: Any) -> rlprune.PruningResult:
        torch.manual_seed(0)
        return rlprune.search(
            Small(24),
            torch.zeros(1, 1, 8, 8),
            loaders=loaders(),
            evaluations=18,
            settings=QUICK | {"threads": 1},
            callback=callback,
            **options,
        )

    class Killed(Watcher):
        def on_progress(self, event: Any) -> None:
            if event.phase == "ppo" and event.done >= 5:
                raise KeyboardInterrupt

    whole = run(out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Killed(), out=tmp_path / "killed")
    resumed = run(out=tmp_path / "killed", resume=True)
    assert resumed.plan.widths.tolist() == whole.plan.widths.tolist()
    ledgers = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        for lines in ((r.folder / "ledger.jsonl").read_text().splitlines() for r in (whole, resumed))
    ]
    assert ledgers[0] == ledgers[1]


def test_a_callback_ends_the_search_early() -> None:
    watcher = Watcher(stop_after=25)
    result = rlprune.search(
        Small(), torch.zeros(1, 1, 8, 8), loaders=loaders(), evaluations=40, settings=QUICK, callback=watcher
    )
    spent = {row["method"]: row["evaluations"] for row in result.table}
    assert 0 < spent["ppo"] < 40
    check(result, Small(), 0.5)


def test_train_returns_the_same_kind_of_result(tmp_path: Path) -> None:
    config = load_config("digits", [*SMALL_RUN, "search.evaluations=6"])
    result = rlprune.train(config, tmp_path / "run")
    check(result, result.workload.model, 0.5)
    again = rlprune.train(config, tmp_path / "run", resume=True)
    assert again.table == result.table
    with pytest.raises(ConfigError, match="search.stages"):
        rlprune.train(config.override(["search.stages=3", "search.agent=random"]), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("search.agent=cma_es", "optuna", "benchmark"),
        ("search.baselines=[tpe]", "optuna", "benchmark"),
        ("search.tensorboard=true", "torch.utils.tensorboard", "tensorboard"),
        ("search.trackers=[wandb]", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_trained(
    setting: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'rlprune\[{extra}\]'"):
        rlprune.train(load_config("digits", [setting]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TestLoaders:
    def test_only_the_first_samples_of_a_limit(self) -> None:
        workload = LoaderWorkload(Small(), torch.zeros(1, 1, 8, 8), loaders())
        assert [len(y) for _, y in workload.batches("validation", 11)] == [8, 3]
        assert sum(len(y) for _, y in Sentences().batches("validation", 5)) == 5

    def test_calibration_may_be_left_out(self) -> None:
        parts = loaders(train=40)
        del parts["calibration"]
        workload = LoaderWorkload(Small(), torch.zeros(1, 1, 8, 8), parts)
        first, again = (torch.cat([x for x, _ in workload.batches("calibration")]) for _ in range(2))
        assert torch.equal(first, again) and len(first) == 40

    def test_an_epoch_follows_its_generator_and_nothing_else(self) -> None:
        workload = LoaderWorkload(Small(), torch.zeros(1, 1, 8, 8), loaders())

        def epoch(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            parts = []
            for x, _ in workload.train_batches(generator):
                torch.rand(3)  # what the caller draws in between changes nothing
                parts.append(x)
            return torch.cat(parts)

        torch.manual_seed(1)
        one = epoch(5)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(one, epoch(5)) and not torch.equal(one, epoch(6))
        torch.set_rng_state(state)
        drawn = torch.rand(2)
        torch.set_rng_state(state)
        list(workload.batches("train"))
        assert torch.equal(drawn, torch.rand(2))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"validaton": []}, "loaders: unknown split 'validaton' \\(did you mean 'validation'\\?\\)"),
            ({"test": None}, "loaders: the split 'test' is missing"),
            (
                {"validation": [(torch.zeros(2, 1, 8, 8), torch.zeros(2), 1)]},
                "a batch must be \\(inputs, targets\\)",
            ),
            ({"validation": []}, "the split 'validation' is empty"),
        ],
    )
    def test_wrong_loaders_are_one_line(self, change: dict[str, Any], words: str) -> None:
        parts: dict[str, Any] = {k: v for k, v in (loaders() | change).items() if v is not None}
        with pytest.raises(DataError, match=words) as error:
            rlprune.search(Small(), torch.zeros(1, 1, 8, 8), loaders=parts, evaluations=4)
        assert "\n" not in str(error.value)

    def test_a_shuffled_validation_split_is_refused(self) -> None:
        parts = loaders() | {"validation": loaders()["train"]}
        with pytest.raises(DataError, match=r"loaders\['validation'\]: shuffles"):
            rlprune.search(Small(), torch.zeros(1, 1, 8, 8), loaders=parts)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Small(),), {}, "example_inputs: needed with a model"),
        ((Small(), torch.zeros(1, 1, 8, 8)), {}, "loaders: needed with a model"),
        (([],), {}, "model: expected .* an empty sequence"),
        ((object(),), {}, "expected a rlprune.Workload, got object"),
    ],
)
def test_wrong_calls_are_one_line(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        rlprune.search(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"agent": "pppo"}, "search.agent: unknown .*did you mean 'ppo'"),
        ({"budget": "150%"}, "budget.target"),
        ({"metric": "mac"}, "budget.metric: 'mac' is not one of .*did you mean 'macs'"),
        ({"evaluations": 0}, "search.evaluations: must be at least 1"),
        ({"settings": {"finish": {"epoch": 3}}}, "finish.epoch: unknown field .*did you mean 'epochs'"),
        ({"settings": {"search": {"stages": 3, "mode": "surrogate"}}}, "search.stages"),
        ({"settings": {"data": {"name": "digits"}}}, "settings.data: the model and its data"),
        ({"resume": True}, "resume: needs the folder"),
    ],
)
def test_wrong_settings_are_one_line(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        rlprune.search(Small(), torch.zeros(1, 1, 8, 8), loaders=loaders(), **options)
    assert "\n" not in str(error.value)


OWN = """
import torch
from torch import nn
import rlprune

class Own(rlprune.Workload):
    def __init__(self):
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        self.example_inputs = torch.zeros(1, 1, 8, 8)
    def batches(self, split, limit=None):
        for _ in range(3):
            yield torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)

own = Own()
def plain():
    return Own()
def configured(config):
    assert config.seed == 3
    return Own()
number = 7
"""


@pytest.mark.parametrize("name", ["Own", "own", "plain", "configured"])
def test_a_workload_is_named_in_four_ways(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "front_door_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = rlprune.Config.from_dict({"workload": f"front_door_own:{name}", "seed": 3})
    assert type(rlprune.build_workload(config)).__name__ == "Own"
    with pytest.raises(ConfigError, match=r"must be a rlprune\.Workload, got int"):
        rlprune.build_workload(config.override(["workload=front_door_own:number"]))
    with pytest.raises(ConfigError, match="has no 'owm' .did you mean 'own'"):
        rlprune.build_workload(config.override(["workload=front_door_own:owm"]))


def test_a_policy_is_applied_to_a_workload_of_ones_own() -> None:
    torch.manual_seed(0)
    first = rlprune.search(
        Small(12), torch.zeros(1, 1, 8, 8), loaders=loaders(), evaluations=8, settings=QUICK
    )
    other = LoaderWorkload(Small(12), torch.zeros(1, 1, 8, 8), loaders())
    for policy in (first.policy, first.folder):
        assert policy is not None
        applied = rlprune.apply(policy, other, budget="60%")
        space = applied.plan.space
        assert space.cost(applied.plan.widths, "macs") <= 0.6 * space.dense_cost("macs")
        assert sum(p.numel() for p in applied.model.parameters()) == space.cost(applied.plan.widths, "params")
        assert "policy" in str(applied) and "uniform" in str(applied)
    refined = rlprune.apply(first.folder, other, 0.6, refine=6)
    assert "policy + 6 evaluations" in str(refined)
    with pytest.raises(ConfigError, match="budget: needed with a Workload"):
        rlprune.apply(first.folder, other)


def test_a_policy_saves_what_it_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLPRUNE_PROGRESS", "lines")  # shown without a callback, as on a terminal
    result = rlprune.search(
        Small(12), torch.zeros(1, 1, 8, 8), loaders=loaders(), evaluations=8, settings=QUICK
    )
    other = LoaderWorkload(Small(12), torch.zeros(1, 1, 8, 8), loaders())
    assert "ppo: best score" in capsys.readouterr().err
    applied = rlprune.apply(result.folder, other, 0.5)
    x = torch.randn(2, 1, 8, 8)
    loaded = rlprune.load(applied.save(tmp_path / "pruned"), base=other.model)
    assert torch.equal(loaded(x), applied.model.eval()(x))


def test_a_benchmark_from_python(tmp_path: Path) -> None:
    watcher = Watcher()
    config = load_config("digits", [*SMALL_RUN, "search.evaluations=6"])
    found = rlprune.benchmark(config, ["uniform", "random"], seeds=1, out=tmp_path / "run", callback=watcher)
    assert {row["method"] for row in found["rows"]} == {"dense", "uniform", "random"}
    assert watcher.events and (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        rlprune.benchmark(config, ["uniforn"], out=tmp_path / "other")
