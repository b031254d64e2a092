"""Typed, validated settings: YAML files and command-line overrides become one frozen `Config`.

Every section is a frozen dataclass; every field carries one sentence of documentation and its allowed
range, and is checked when the section is built, from YAML or from Python. An error names the dotted
field and what is allowed: ``search.evaluations: must be at least 1, got 0``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from ..errors import ConfigError, near_miss
from ..utils.values import LARGEST, NO_DOUBLES
from .execution import ExecutionConfig
from .names import COST_METRICS, RUNTIMES, SCORE_KINDS
from .schema import (
    Section,
    Setting,
    apply_override,
    build,
    plain,
    section,
    setting,
    show,
    with_new_name,
    with_new_names,
)
from .schema import json_schema as _schema
from .schema import settings_reference as _reference
from .search import SearchConfig
from .training import FinishConfig, RecoveryConfig, RoundsConfig
from .yaml_files import dump_yaml, read_yaml

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TEXT_FORMATS = ("auto", "text", "chat", "instruction")
DTYPES = ("auto", "float32", "bfloat16")
AUTO = "auto"
"""The value of a setting that leaves the choice to what is known of the model and the data."""
RENAMED = {"score.images": "score.samples", "recovery.images": "recovery.samples"}
"""Old names of settings, which work for one more version."""
NAME_BYTES = 100
"""Length of a run's name: its folders are called so, with something added."""
_BUDGET_TEXT = re.compile(r"\s*(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*(%|ms|[kKmMgGtT]?)\s*")


@section
class TrainConfig(Section):
    """Dense training, used when the model comes without weights or its checkpoint needs a fine-tune."""

    prefix: ClassVar[str] = "model.train."

    epochs: int = setting(
        0, "Epochs of dense training on the train split; with given weights, of a dense fine-tune.", low=0
    )
    lr: float = setting(0.1, "Peak learning rate of SGD; it falls to zero by a cosine.", above=0, high=10)
    batch_size: int = setting(128, "Images in a batch.", low=1)
    weight_decay: float = setting(5e-4, "L2 penalty on every weight.", low=0, high=1)
    momentum: float = setting(0.9, "Nesterov momentum of SGD.", low=0, high=0.999)
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes.", low=0, high=0.9)


@section
class ModelConfig(Section):
    """The dense model that is pruned."""

    prefix: ClassVar[str] = "model."

    name: str = setting(
        "", "A name from `rlprune list models`, or `module:function` that returns a torch.nn.Module."
    )
    dtype: str = setting(
        "auto", "Number format of a language model's weights; `auto` takes float32.", choices=DTYPES
    )
    device_map: str | None = setting(
        None,
        "Language models: how accelerate spreads the weights over all GPUs; null for one device (`device`).",
        choices=DEVICE_MAPS,
    )
    arguments: dict[str, Any] = setting(dict, "Keyword arguments of the model's constructor.")
    weights: str | None = setting(None, "Name of published weights (torchvision, timm); null for none.")
    checkpoint: str | None = setting(
        None,
        "A file of weights to start from: safetensors, or what torch.save wrote of a training, without code; or the "
        "folder of a pruned model, to prune that further.",
    )
    checkpoint_key: str | None = setting(
        None,
        "Where the weights stand in the checkpoint, as a dotted path such as `state_dict_ema`; null finds them, and "
        "`.` is the top of the file.",
    )
    train: TrainConfig = setting(TrainConfig, "Dense training.")
    seed: int = setting(0, "Seed of the initial weights and of the dense training.", low=0, high=LARGEST)


@section
class DataConfig(Section):
    """The data set and its four disjoint splits."""

    prefix: ClassVar[str] = "data."

    name: str = setting("", "A name from `rlprune list data`.")
    root: str | None = setting(None, "Folder of the files; null for the data set's usual place.")
    files: dict[str, Any] = setting(
        dict,
        "Text: {split: path of a .txt, .jsonl or .json file, or a list of {path, weight}}; splits that share a file "
        "get disjoint parts of it.",
    )
    format: str = setting(
        "auto",
        "Text: what the rows of .jsonl and .json files are; `auto` finds it out from their fields.",
        choices=TEXT_FORMATS,
    )
    column: str = setting(
        "text",
        "Text: the field of a .jsonl line or of a hub data set that holds the text, or the messages of a chat.",
    )
    answers_only: bool = setting(
        True,
        "Chats and instructions: whether only answers are scored and learned; false counts prompts as well.",
    )
    prompt: str | None = setting(
        None,
        "Text: words before every sequence of the train split; they are read and not learned (as in Compresso).",
    )
    packing: bool = setting(
        False,
        "Chats and instructions: whether a sequence holds several examples (never in the test split); a later one sees "
        "the earlier ones.",
    )
    sequence_length: int = setting(128, "Text: tokens in a sequence.", low=8, high=10_000_000)
    test_length: int | None = setting(
        None, "Text: tokens in a sequence of the test split; null for data.sequence_length.", low=8
    )
    stride: int | None = setting(
        None, "Text: tokens between the starts of two test sequences; null for no overlap.", low=1
    )
    download: bool = setting(False, "Whether a missing data set may be fetched from the internet.")
    image_size: int | None = setting(
        None, "Side in pixels that images are scaled to; null keeps theirs.", low=1, high=16_384
    )
    resize: int | None = setting(
        None,
        "Image folders: pixels that the shorter side is scaled to before the centre of data.image_size is cut out; "
        "null for data.image_size.",
        low=1,
    )
    skip_corrupt: bool = setting(
        False,
        "Image folders: whether images that cannot be decoded are left out, with a warning that counts them.",
    )
    mean: tuple[float, ...] = setting(
        (), "Mean of each channel of images / 255; empty for the data set's own."
    )
    std: tuple[float, ...] = setting(
        (), "Standard deviation of each channel of images / 255; empty for the data set's own.", above=0
    )
    transform: str | None = setting(
        None,
        "`module:name` of a transform (as of torchvision.transforms.v2), or of a function that returns one, for every "
        "image, a uint8 tensor (C, H, W): what it gives as uint8 is normalised, floats are taken as they are.",
    )
    train_transform: str | None = setting(
        None, "The same for images of a training, instead of data.transform and the data set's augmentation."
    )
    train: int | None = setting(
        None, "Images (or sequences) of the train split; null for all that are left.", low=1
    )
    calibration: int | None = setting(None, "Images for importance and recovery; null for a default.", low=1)
    validation: int | None = setting(None, "Images that score candidates; null for a default.", low=1)
    test: int | None = setting(None, "Images of the test split, read once at the end; null for all.", low=1)
    seed: int = setting(0, "Seed of the splits.", low=0, high=LARGEST)
    batch_size: int = setting(256, "Images in a batch of an evaluation.", low=1)
    augment: bool = setting(True, "Whether training uses the data set's usual augmentation.")


@section
class BudgetConfig(Section):
    """What may be left of the model."""

    prefix: ClassVar[str] = "budget."

    target: str | float = setting(
        0.5, 'A share of the dense cost (0.5, "50%") or an absolute cost ("150M", for latency "3.5ms").'
    )
    metric: str = setting("macs", "The cost that the budget limits.", choices=COST_METRICS)
    batch_size: int = setting(
        1, "Latency: samples (or sequences of data.sequence_length) in a forward pass.", low=1
    )
    table: str | None = setting(
        None, "Latency: a table measured before (RUN/latency_table.json); null to measure on this machine."
    )

    def __post_init__(self) -> None:
        timed = self.metric == "latency"
        absolute = 'milliseconds such as "3.5ms"' if timed else 'an absolute cost such as "150M"'
        allowed = f'a ratio in (0, 1] such as 0.5 or "50%", or {absolute}'
        problem = ConfigError(f"budget.target: {show(self.target)} is not a budget; allowed: {allowed}")
        if isinstance(self.target, str):
            match = _BUDGET_TEXT.fullmatch(self.target)
            if not match:
                raise problem
            number = float(match[1] + (match[2] or "")) / (100 if match[3] == "%" else 1)
            share, plain = match[3] == "%", match[3] == ""
            if not (share or plain) and (match[3] == "ms") != timed:
                raise problem
        else:
            number, share, plain = float(self.target), False, True
        if not (math.isfinite(number) and number > 0) or (share and number > 1):
            raise problem
        # "1.5" is far more often a mistaken ratio than one and a half multiply-accumulates.
        if plain and number > 1 and number != int(number) and not timed:
            raise problem


@section
class PruneConfig(Section):
    """Which units go first, and what is never cut."""

    prefix: ClassVar[str] = "prune."

    importance: str = setting(
        AUTO,
        "How units are ranked within a group; see `rlprune list importances`. `auto`: obs_fisher where what cuts cost "
        "is known, else taylor; the log, the plan and results.json say which.",
    )
    ignore: tuple[str, ...] = setting((), "Name patterns (shell style) of layers that stay whole.")
    round_to: str | int = setting(
        "auto",
        "Kept channels or neurons are a multiple of this number (heads are not rounded). `auto`: 1 for models of "
        "images; for language models 32 where that leaves at least 8 steps, else the next smaller power of two that "
        "does. 256 for k-quants.",
        low=1,
    )
    minimum: int = setting(1, "Channels that every group keeps at least.", low=1)
    drop: bool = setting(
        False, "Language models: whether an attention or a feed-forward part may be removed whole."
    )
    hidden: bool = setting(
        False, "Language models: whether the hidden size is a group too (no exact cut: norms cross it)."
    )
    inexact: bool = setting(
        False,
        "Models of images: whether channels that a norm or a softmax runs over are cut too (no exact cut: what is "
        "kept changes).",
    )
    runtime: str = setting(
        "any",
        "Language models: where the pruned model will run; only what loads there is searched (`rlprune inspect` says "
        "what).",
        choices=RUNTIMES,
    )

    def __post_init__(self) -> None:
        if isinstance(self.round_to, str) and self.round_to != AUTO:
            raise ConfigError(
                f"prune.round_to: {show(self.round_to)} is no whole number of 1 and more; allowed: one, or auto"
            )


@section
class ScoreConfig(Section):
    """How a candidate is judged during the search; higher is better for every kind."""

    prefix: ClassVar[str] = "score."

    kind: str = setting(
        "kl",
        "`kl`: minus the divergence from the dense model, -KL(dense || pruned) of classes (see `rlprune list tasks`); "
        "`loss`: -validation loss; `accuracy`: the workload's metric.",
        choices=SCORE_KINDS,
    )
    samples: int | None = setting(
        None, "Validation samples (images, or sequences) used; null for all of the split.", low=1
    )
    unlabelled: str | int = setting(
        "auto",
        "Models of images, `kl`: training samples that are scored as well, without their labels, so that a search does "
        "not fit its plans to a small validation split. `auto`: as many as make 1,000 with a whole validation split "
        "that is smaller, where the model gives one row of outputs a sample and the training split is the same each "
        "time it is read; none with score.samples and score.rungs.",
        low=0,
    )
    top_k: int = setting(
        256,
        "Language models: largest dense probabilities kept for each token; the rest is one bucket.",
        low=1,
    )
    dtype: str = setting(
        "auto",
        "Number format of scored candidates; `auto` takes bfloat16 where it is faster, for models of images where a "
        "trial also ranks plans as float32 does. What is kept is float32.",
        choices=DTYPES,
    )
    rungs: tuple[int, ...] = setting(
        (), "Successive halving: sequences after which the worse half of a batch is dropped.", low=1
    )

    def __post_init__(self) -> None:
        if isinstance(self.unlabelled, str) and self.unlabelled != AUTO:
            raise ConfigError(
                f"score.unlabelled: {show(self.unlabelled)} is no whole number; allowed: 0 and more, or auto"
            )


@section
class Config(Section):
    """All settings of a run. Relative paths are relative to the folder the command runs in."""

    overridden: ClassVar[frozenset[str]] = frozenset()
    """Settings that were overridden after the others had been read: what those were for may be gone."""

    name: str = setting("run", "Name of the run, shown in reports.")
    workload: str | None = setting(
        None,
        "`module:name` of a Workload class, an object, or a function (with or without this Config) that returns one, "
        "instead of model and data.",
    )
    model: ModelConfig = setting(ModelConfig, "The dense model.")
    data: DataConfig = setting(DataConfig, "The data.")
    budget: BudgetConfig = setting(BudgetConfig, "The budget.")
    prune: PruneConfig = setting(PruneConfig, "What is cut.")
    recovery: RecoveryConfig = setting(RecoveryConfig, "Recovery before scoring.")
    score: ScoreConfig = setting(ScoreConfig, "The score.")
    search: SearchConfig = setting(SearchConfig, "The search.")
    rounds: RoundsConfig = setting(RoundsConfig, "Pruning in rounds, with training between them.")
    finish: FinishConfig = setting(FinishConfig, "The finish.")
    execution: ExecutionConfig = setting(ExecutionConfig, "Where it is computed.")
    seed: int = setting(0, "Seed of the search and of the final fine-tune.", low=0, high=LARGEST)
    device: str = setting("auto", "`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`.")
    threads: int | None = setting(None, "CPU threads of torch; null leaves torch's own choice.", low=1)

    def __post_init__(self) -> None:
        if not _is_name(self.name):
            raise ConfigError(
                f"name: must be the name of a folder, without / and \\ and of at most {NAME_BYTES} bytes, "
                f"got {show(self.name)}"
            )
        if self.workload is None:
            for path, value in (("model.name", self.model.name), ("data.name", self.data.name)):
                if not value:
                    raise ConfigError(f"{path}: required (or give a `workload`, as module:function)")
        elif not re.fullmatch(r"[\w.]+:\w+", self.workload):
            raise ConfigError(f"workload: must look like module:function, got {show(self.workload)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            why = f" ({NO_DOUBLES[self.device]})" if self.device in NO_DOUBLES else ""
            raise ConfigError(f"device: allowed are auto, cpu, cuda and cuda:N, got {show(self.device)}{why}")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build the settings from nested mappings, as a YAML file gives them; raises ConfigError."""
        return build(cls, with_new_names(values, RENAMED))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain dicts, lists and scalars; `from_dict` turns them back."""
        return plain(self)

    def to_yaml(self) -> str:
        """All settings as YAML text, defaults included."""
        return dump_yaml(self.to_dict())

    def override(self, overrides: Sequence[str]) -> Self:
        """A copy with ``a.b=c`` overrides applied; values are read as YAML. Raises ConfigError."""
        values = self.to_dict()
        for text in overrides:
            apply_override(type(self), values, with_new_name(text, RENAMED))
        return _overridden(type(self).from_dict(values), [*self.overridden, *overrides])


def _is_name(name: str) -> bool:
    """Whether a run's folder may be called so: what names another place, or nothing at all, may not be."""
    plain = (
        bool(name.strip()) and name not in (".", "..") and name.isprintable() and not set(name) & set("/\\")
    )
    return plain and len(name.encode()) <= NAME_BYTES


def settings_reference() -> Iterator[Setting]:
    """Every setting with its type, default and documentation, in the order of the YAML file."""
    return _reference(Config)


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, for editors: types, limits, choices, defaults, documentation."""
    return _schema(Config) | {"title": "Settings of rlprune"}


def shipped_configs() -> dict[str, Path]:
    """The YAML files that come with the package, by name; `FOLDER/NAME` in a folder below."""
    folder = Path(__file__).parent.parent / "configs"
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the shipped one of that name, and apply ``a.b=c`` overrides.

    Raises ConfigError: no such file or name, text that is not a mapping in YAML, or a wrong setting.
    """
    path = _find_config(path_or_name)
    values = with_new_names(read_yaml(path), RENAMED)
    for text in overrides:
        apply_override(Config, values, with_new_name(text, RENAMED))
    values.setdefault("name", path.stem if _is_name(path.stem) else "run")
    return _overridden(Config.from_dict(values), overrides)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def _overridden(config: AnyConfig, overrides: Sequence[str]) -> AnyConfig:
    paths = frozenset(
        with_new_name(text, RENAMED, warn=False).partition("=")[0].strip() for text in overrides
    )
    object.__setattr__(config, "overridden", paths)
    return config


def _find_config(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    shipped = shipped_configs()
    text = str(path_or_name)
    if text in shipped and not path.is_file():
        return shipped[text]
    if "\0" in text:
        raise ConfigError("config: a file name cannot hold a zero byte")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, not a config file")
    if not path.exists():
        own = [name for name in shipped if "/" not in name]
        hint = (
            _near_file(path)
            or near_miss(path.with_suffix("").as_posix(), shipped)
            or near_miss(path.stem, shipped)
            or f"; shipped ones: {', '.join(own)}, and published/NAME (`rlprune list configs`)"
        )
        raise ConfigError(f"config {show(text)}: no such file and no shipped config of that name{hint}")
    return path


def _near_file(path: Path) -> str:
    """Say which settings file of the same folder may be meant: ``my.yml`` for ``my.yaml``."""
    try:
        files = {file.stem: file for file in sorted(path.parent.glob("*.y*ml"))}
    except OSError:
        return ""
    found = difflib.get_close_matches(path.stem, files, n=1, cutoff=0.7)
    return f" (did you mean {str(files[found[0]])!r}?)" if found else ""
