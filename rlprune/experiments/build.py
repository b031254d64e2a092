"""From settings to a workload: which builder, whose weights, and dense training where the model comes without."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..artifacts.checkpoint import load_checkpoint, put_weights
from ..config.config import Config, ModelConfig
from ..errors import ArtifactError, ConfigError, RlpruneError, described
from ..recovery.finetune import FitResult, Progress
from ..tracing.trace import TraceOptions
from ..utils.cache import cache_folder
from ..utils.checkpoints import forget
from ..utils.digest import hash_tensors
from ..utils.files import write_tensors_atomic
from ..utils.named_objects import named_object
from ..workloads.adapter import ModelAdapter, holds_pruned_model, read_pruned
from ..workloads.base import CutFrom, TrainedWorkload, Workload
from ..workloads.builder import builder_of, builders
from ..workloads.checks import check_finite, check_workload, run_forward

_CACHE_VERSION = 1  # part of every cache key: raise it when the training changes


def build_workload(
    config: Config,
    *,
    seed_override: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    train: bool = True,
) -> Workload:
    """The workload that the settings describe, its dense model trained and on the device.

    With ``model.train.epochs`` > 0 the dense model is trained, from its given weights where there are any
    (a fine-tune) and from scratch otherwise; the result is kept in the cache folder under a hash of
    everything that it depends on, and a killed training goes on where it was.

    Args:
        seed_override: instead of ``model.seed``: another dense model of the same settings.
        checkpoint: a finished dense model of the same architecture, used as it is: no training. It, or
            ``model.checkpoint``, may be the folder of a pruned model: that model is then the one to prune further.
        progress: called as progress("dense training", done, total, {"loss": mean}).
        train: False leaves the model with its initial weights (for `inspect`, which needs none).

    Raises ConfigError, DataError, ArtifactError, or GraphError for a model whose forward fails.
    """
    if seed_override is not None:
        config = replace(config, model=replace(config.model, seed=seed_override))
    _require_checkpoint_of_key(config, checkpoint)
    device = resolve_device(config.device)
    given = checkpoint or config.model.checkpoint
    if given is not None and holds_pruned_model(Path(given)):
        workload = _pruned_before(config, Path(given))
        if train and checkpoint is None and config.model.train.epochs > 0:
            train_dense(workload, config.model, progress)
        return workload
    if config.workload is not None:
        return _own_workload(config, checkpoint)
    builder = builder_of(config.model.name)
    if not builder.holds(config.data.name):
        _refuse_mixture(config)
    workload = builder.build(config, device, checkpoint)
    if train and checkpoint is None and config.model.train.epochs > 0:
        train_dense(workload, config.model, progress)
    return workload


def _pruned_before(config: Config, folder: Path) -> Workload:
    """The workload with the pruned model of a folder as the one to prune; the settings describe its dense model.

    Raises ArtifactError: it was cut from another architecture, or its groups are not those of the settings.
    """
    model = replace(config.model, checkpoint=None, weights=None)
    dense = build_workload(replace(config, model=model), train=False).before_any_cut()
    document = read_pruned(folder)
    plan = dense.adapter.plan_of(dense, document, TraceOptions.of(config.prune))
    workload = copy.copy(dense)  # an object of the user's own may be asked for again
    workload.cut_from = CutFrom(dense.model, plan)
    like = next(dense.model.parameters())
    workload.model = dense.adapter.load(folder, document, dense.model).to(dense.device, like.dtype)
    return workload


def expected_adapter(config: Config) -> ModelAdapter | None:
    """The adapter that the workload of the settings will have; None where only building it tells."""
    return None if config.workload is not None else builder_of(config.model.name).adapter


def train_dense(workload: Workload, settings: ModelConfig, progress: Progress | None = None) -> None:
    """Train the workload's own model in place by ``settings.train``, or take the cached result.

    The model is seen as dense only afterwards; nobody else trains it; a workload of a user's own brings its model
    trained and is left as it is. Raises RlpruneError when the training diverges.
    """
    if not isinstance(workload, TrainedWorkload):
        return
    key = _dense_key(workload, settings)
    path = cache_folder() / "dense" / f"{key}.safetensors"
    state = path.with_suffix(".state")
    if path.is_file():
        try:
            put_weights(workload.model, load_checkpoint(path), f"cached weights {path}")
            forget(state)  # a kill after the weights leaves it
            return
        except ArtifactError:
            path.unlink(missing_ok=True)  # a broken cache file is made again
    result = workload.train(settings, state, progress)
    if not math.isfinite(result.loss):
        state.unlink(missing_ok=True)
        raise _diverged(result, settings.train.lr)
    about = {"format": "rlprune-dense", "model": settings.name}
    try:
        write_tensors_atomic(path, workload.model.state_dict(), about)
    except ArtifactError:
        return  # the cache is a convenience: a full disk there costs time, not the run
    state.unlink(missing_ok=True)


def _diverged(result: FitResult, lr: float) -> RlpruneError:
    return RlpruneError(
        f"model.train: training diverged at step {result.steps} (the loss is {result.loss}); "
        f"lower model.train.lr, now {lr}"
    )


def resolve_device(name: str) -> torch.device:
    """The device of a setting: "auto" takes a CUDA GPU where there is one. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device: {name} asked for, but torch sees {count} CUDA devices")
        return torch.device("cuda", device.index or 0)  # with its number, as tensors report it
    return device


def list_models() -> list[tuple[str, str]]:
    """(name, one line) of every model that can be named."""
    return [row for builder in reversed(builders()) for row in builder.models()]


def list_families() -> list[tuple[str, str]]:
    """(model type, one line) of the families whose parts are known, and how others are treated."""
    return [row for builder in reversed(builders()) for row in builder.families()]


def list_data() -> list[tuple[str, str]]:
    """(name, one line) of every data set, images and text."""
    return [row for builder in reversed(builders()) for row in builder.data_sets()]


def _refuse_mixture(config: Config) -> None:
    """A model of one wing over the data of another; an unknown name is said first."""
    model, name = config.model.name, config.data.name
    ours = builder_of(model)
    theirs = next((found for found in builders() if found is not ours and found.holds(name)), None)
    if theirs is not None:
        ours.check_name(model)
        raise ConfigError(f"data.name {name!r}: holds {theirs.data_noun}, but {model!r} {ours.wants()}")


def _require_checkpoint_of_key(config: Config, checkpoint: str | Path | None) -> None:
    model = config.model
    weights = model.weights is not None and Path(model.weights).is_file()
    if model.checkpoint_key is None or checkpoint or model.checkpoint or config.search.checkpoints or weights:
        return
    raise ConfigError("model.checkpoint_key: no checkpoint is read, so it is not used; give model.checkpoint")


def _own_workload(config: Config, checkpoint: str | Path | None) -> Workload:
    """The workload that ``workload: module:name`` stands for: a class, an object, or a function that returns one."""
    assert config.workload is not None
    found = named_object(config.workload, "workload")
    try:
        workload = found if isinstance(found, Workload) or not callable(found) else _called(found, config)
    except RlpruneError:
        raise
    except Exception as error:
        raise ConfigError(f"workload {config.workload!r}: {described(error)}") from error
    if not isinstance(workload, Workload):
        raise ConfigError(
            f"workload {config.workload!r}: must {'return' if callable(found) else 'be'} a rlprune.Workload, "
            f"got {type(workload).__name__}"
        )
    if checkpoint is not None:
        weights = load_checkpoint(checkpoint, config.model.checkpoint_key)
        put_weights(workload.model, weights, f"checkpoint {str(checkpoint)!r}")
    workload.model.eval()
    check_finite(workload.model, config.workload)
    run_forward(workload, config.workload)
    return check_workload(workload)


def _called(maker: Callable[..., object], config: Config) -> object:
    """What a class or function makes; it gets the Config where it needs an argument or has one named `config`."""
    try:
        wanted = inspect.signature(maker)
        wanted.bind()
    except TypeError:
        return maker(config)
    return maker(config=config) if "config" in wanted.parameters else maker()


def _dense_key(workload: TrainedWorkload, settings: ModelConfig) -> str:
    """Hash of all that the trained weights depend on: settings, initial weights, data, the user's code."""
    about = {
        "version": _CACHE_VERSION,
        "base": workload.base,
        "train": asdict(settings.train),
        "seed": settings.seed,
        "device": workload.device.type,
    }
    facts, tensors = workload.training_facts()
    about |= facts
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
    hash_tensors(digest.update, tensors)
    hash_tensors(digest.update, workload.model.state_dict())
    if workload.base["source"] == "function":
        module = importlib.import_module(settings.name.partition(":")[0])
        file = getattr(module, "__file__", None)
        digest.update(Path(file).read_bytes() if file else b"")
    return digest.hexdigest()[:32]
