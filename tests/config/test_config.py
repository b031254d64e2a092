"""Settings: round trips, overrides, and one clear line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlprune.config.config import (
    BudgetConfig,
    Config,
    FinishConfig,
    ModelConfig,
    RecoveryConfig,
    load_config,
    settings_reference,
    shipped_configs,
)
from rlprune.config.search import PPOConfig
from rlprune.errors import ConfigError

REFERENCE = list(settings_reference())
PATHS = [item.path for item in REFERENCE]

WRITABLE = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
NAMED = st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"])
# Ten aliases of ten aliases of ...: a few lines that stand for a million values.
BOMB = "a0: &a0 1\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 7))


def message(*overrides: str, config: str = "digits") -> str:
    """The error of a config with these overrides; it has to be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_load_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name.rpartition("/")[2]
    assert Config.from_dict(config.to_dict()) == config
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "copy.yaml") == config


def test_written_yaml_is_complete() -> None:
    """RUN/config.yaml names every setting, so that later defaults do not change an old run."""
    values = yaml.safe_load(load_config("digits").to_yaml())
    for path in PATHS:
        target = values
        for key in path.split("."):
            assert key in target, path
            target = target[key]


def test_reference_documents_every_field() -> None:
    assert len(PATHS) == len(set(PATHS))
    for item in REFERENCE:
        assert item.doc.endswith("."), item.path
        assert item.type, item.path


@given(
    evaluations=st.integers(1, 10**6),
    lr=st.floats(1e-12, 10, allow_nan=False),
    name=st.text(NAMED, min_size=1, max_size=20).filter(lambda text: text.isprintable() and text.strip(" .")),
    steps=st.lists(st.sampled_from(["reconstruct", "bn"]), unique=True, min_size=1),
    ignore=st.lists(st.text(alphabet="abc.*?0", max_size=8), max_size=4),
    arguments=st.dictionaries(
        st.text(max_size=5),
        st.integers(-(10**18), 10**18)
        | st.booleans()
        | st.none()
        | st.text(WRITABLE, max_size=5)
        | st.sampled_from(["1e5", "no", "1:30"]),
        max_size=3,
    ),
)
def test_round_trip_of_any_values(
    evaluations: int, lr: float, name: str, steps: list[str], ignore: list[str], arguments: dict[str, object]
) -> None:
    values = {
        "name": name,
        "model": {"name": "m", "arguments": arguments},
        "data": {"name": "d"},
        "prune": {"ignore": ignore},
        "recovery": {"steps": steps},
        "search": {"evaluations": evaluations},
        "finish": {"lr": lr},
    }
    config = Config.from_dict(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config
    assert config.search.evaluations == evaluations
    assert config.finish.lr == lr
    assert set(config.recovery.steps) == set(steps)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(path=st.sampled_from(PATHS), value=json_like)
def test_any_value_in_any_field_is_taken_or_refused_by_name(path: str, value: object) -> None:
    values = load_config("digits").to_dict()
    target = values
    keys = path.split(".")
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    try:
        config = Config.from_dict(values)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert keys[0] in str(error)
    else:
        assert Config.from_dict(config.to_dict()) == config


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_as_a_file_give_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "random.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
@example(text="0\n0=\x1b")  # a path of two lines, and a value that is no YAML
def test_any_override_is_taken_or_refused(text: str) -> None:
    try:
        load_config("digits", [text])
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.evalutions=3", "search.evalutions: unknown field (did you mean 'evaluations'?)"),
        ("serch.evaluations=3", "serch: unknown field (did you mean 'search'?)"),
        ("search=3", "search: is a section"),
        ("seed.x=3", "seed: is a value"),
        ("seed", "must look like"),
        ("seed=true", "seed: expected whole number, got True"),
        ("seed=1.5", "seed: expected whole number, got 1.5"),
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("finish.lr=fast", "finish.lr: expected number or null, got 'fast'"),
        ("finish.lr=.nan", "finish.lr: must be a finite number"),
        ("finish.lr=0", "finish.lr: must be above 0"),
        ("model.name=null", "model.name: expected text, got None"),
        ("model.name=''", "model.name: required"),
        ("score.kind=kll", "(did you mean 'kl'?)"),
        ("recovery.steps=[bn,finetun]", "recovery.steps[1]: 'finetun' is not one of"),
        ("recovery.steps=[bn,bn]", "names a step twice"),
        ("recovery.steps=[none,bn]", "'none' stands alone"),
        ("recovery.steps=[finetune]", "needs at least 1 gradient step"),
        ("recovery.finetune_steps=5", "only that step uses them"),
        ("search.budget_range=[0.7,0.3]", "search.budget_range: expected two ratios"),
        ("device=gpu", "device: allowed are auto"),
        ("workload=mine", "workload: must look like module:function"),
        ("search.ppo=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_name_the_field(override: str, expected: str) -> None:
    assert expected in message(override)


@pytest.mark.parametrize(
    "target", ["0", "1.5", "abc", "-0.5", "150%", "0%", "5Q", "true", "[1]", ".inf", "''"]
)
def test_wrong_budgets(target: str) -> None:
    text = message(f"budget.target={target}")
    assert text.startswith("budget.target: ")


@pytest.mark.parametrize("target", [0.5, 1, "50%", "150M", "1.5e8", "0.5", 2_000_000, "12.5%", "1.5G"])
def test_right_budgets(target: object) -> None:
    assert BudgetConfig(target=target).target == target  # type: ignore[arg-type]


def test_a_latency_budget_may_be_a_fraction_of_milliseconds() -> None:
    assert BudgetConfig(target=1.5, metric="latency").target == 1.5


def test_sections_are_checked_when_built_in_python() -> None:
    with pytest.raises(ConfigError, match=r"search\.ppo\.n_steps: must be at least 2, got 0"):
        PPOConfig(n_steps=0)
    with pytest.raises(ConfigError, match=r"finish\.temperature"):
        FinishConfig(temperature=float("inf"))
    with pytest.raises(ConfigError, match=r"model\.arguments"):
        ModelConfig(name="m", arguments={"f": object()})


def test_configs_are_frozen_and_copied() -> None:
    arguments = {"width": 8}
    model = ModelConfig(name="m", arguments=arguments)
    arguments["width"] = 9
    assert model.arguments == {"width": 8}
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.name = "n"  # type: ignore[misc]


def test_recovery_steps_run_in_their_fixed_order() -> None:
    assert RecoveryConfig(steps=("bn", "reconstruct")).steps == ("reconstruct", "bn")
    assert RecoveryConfig(steps=()).steps == ("none",)


def test_overrides_reach_free_arguments_and_keep_the_rest() -> None:
    config = load_config("digits", ["model.arguments.width=8", "finish.lr=1e-3", "budget.target=30%"])
    assert config.model.arguments == {"width": 8}
    assert config.finish.lr == 1e-3
    assert config.budget.target == "30%"
    assert config.override(["seed=3"]) == dataclasses.replace(config, seed=3)


def test_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'digits'" in message(config="digit")
    assert "did you mean 'digits'" in message(config=str(tmp_path / "digitss.yaml"))
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    for typed in ("mine.yml", "mine", "mime.yaml"):
        assert f"did you mean '{tmp_path / 'mine.yaml'}'" in message(config=str(tmp_path / typed))
    assert "shipped ones: " in message(config=str(tmp_path / "elsewhere.yaml"))
    assert "is a folder" in message(config=str(tmp_path))
    # A file of the user's comes before a shipped name.
    (tmp_path / "digits").write_text("model: {name: mine}\ndata: {name: mine}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("digits").model.name == "mine"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "holds a list"),
        ("just text", "holds a str"),
        ("model: {name: a}\nmodel: {name: b}\n", "'model' is given twice"),
        ("model: [a]\n", "model: must be a mapping of fields, got ['a']"),
        ("model:\n  name: a\n bad: b\n", "line 3: not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: &a [*a]\n", "an alias stands for what holds it"),
        (BOMB, "its aliases stand for over 500,000 values"),
        ("data: {name: digits}\n", "model.name: required"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
    ],
)
def test_absurd_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "absurd.yaml"
    path.write_text(text)
    assert expected in message(config=str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("name: " + "x" * 1_000_001)
    assert "too large" in message(config=str(path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(random.Random(0).randbytes(100) + b"\xff\xfe")
    assert "not a text file" in message(config=str(binary))
    if os.name == "posix" and os.geteuid() != 0:
        path.chmod(0)
        assert "cannot be read" in message(config=str(path))
