"""From settings to a workload: data, model, weights, and dense training where the model comes without."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, DataConfig, ModelConfig
from ..errors import ArtifactError, ConfigError, GraphError, RlpruneError
from ..files import write_tensors_atomic
from ..memory import bound_kernel_caches, return_freed_memory
from ..pruning.finetune import FitResult, Progress, fit
from ..pruning.language_training import train_language
from . import data as vision_data
from . import zoo
from .base import Workload, check_workload
from .causal import PREFIX, is_causal, list_causal, load_causal
from .checkpoint import load_checkpoint, put_weights
from .data import Request, VisionData, cache_folder, load_data
from .language import LanguageWorkload, base_of_model
from .text import TextRequest, is_text, list_text, read_text, split_text
from .vision import VisionWorkload
from .zoo import base_of, build_model, model_function

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
        checkpoint: a finished dense model of the same architecture, used as it is: no training.
        progress: called as progress("dense training", done, total, {"loss": mean}).
        train: False leaves the model with its initial weights (for `inspect`, which needs none).

    Raises ConfigError, DataError, ArtifactError, or GraphError for a model whose forward fails.
    """
    if seed_override is not None:
        config = replace(config, model=replace(config.model, seed=seed_override))
    device = resolve_device(config.device)
    if config.workload is not None:
        return _own_workload(config, checkpoint)
    if is_causal(config.model.name) != is_text(config.data.name):
        _refuse_mixture(config)
    if is_causal(config.model.name):
        language = _language_workload(config, device, checkpoint)
        if train and checkpoint is None and config.model.train.epochs > 0:
            train_dense(language, config.model, progress)
        return language
    data = _load(config.data.name, _request(config.data))
    settings = config.model
    base = base_of(settings.name, len(data.classes), data.channels, settings.arguments, settings.weights)
    model = build_model(
        settings.name,
        len(data.classes),
        data.channels,
        arguments=settings.arguments,
        weights=None if checkpoint else settings.weights,
        checkpoint=checkpoint or settings.checkpoint,
        seed=settings.seed,
    )
    _check_finite(model, settings.name)
    workload = VisionWorkload(
        model,
        data,
        name=f"{settings.name.replace(':', '.')} on {data.name}",
        batch_size=config.data.batch_size,
        device=device,
        augment=config.data.augment,
        base=base,
    )
    _check_forward(workload, settings.name, len(data.classes))
    if train and checkpoint is None and settings.train.epochs > 0:
        train_dense(workload, settings, progress)
    return workload


def train_dense(workload: Workload, settings: ModelConfig, progress: Progress | None = None) -> None:
    """Train the workload's own model in place by ``settings.train``, or take the cached result.

    Classifiers are trained with SGD, language models with AdamW. The model is seen as dense only
    afterwards; nobody else trains it; workloads of other kinds are left as they are. Raises RlpruneError
    when the training diverges.
    """
    if not isinstance(workload, VisionWorkload | LanguageWorkload):
        return
    key = _dense_key(workload, settings)
    path = cache_folder() / "dense" / f"{key}.safetensors"
    if path.is_file():
        try:
            put_weights(workload.model, load_checkpoint(path), f"cached weights {path}")
            return
        except ArtifactError:
            path.unlink(missing_ok=True)  # a broken cache file is made again
    if isinstance(workload, VisionWorkload):
        _train(workload, settings, path.with_suffix(".state"), progress)
    else:
        _train_language(workload, settings, progress)
    about = {"format": "rlprune-dense", "model": settings.name}
    try:
        write_tensors_atomic(path, workload.model.state_dict(), about)
    except ArtifactError:
        return  # the cache is a convenience: a full disk there costs time, not the run
    path.with_suffix(".state").unlink(missing_ok=True)


def _train(workload: VisionWorkload, settings: ModelConfig, state: Path, progress: Progress | None) -> None:
    options = settings.train

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=options.label_smoothing)

    run = functools.partial(
        fit,
        workload.model,
        lambda generator: workload.train_batches(generator, options.batch_size),
        loss,
        epochs=options.epochs,
        steps_per_epoch=workload.train_steps(options.batch_size),
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        mixed_precision=True,
        progress=progress,
        phase="dense training",
        checkpoint=state,
        save_seconds=30.0,
    )
    try:
        result = run(generator=torch.Generator().manual_seed(settings.seed))
    except ArtifactError:
        state.unlink(missing_ok=True)  # left by a kill in the middle of another version's run
        result = run(generator=torch.Generator().manual_seed(settings.seed))
    if result.loss != result.loss or result.loss == float("inf"):
        state.unlink(missing_ok=True)
        raise _diverged(result, options.lr)


def _train_language(workload: LanguageWorkload, settings: ModelConfig, progress: Progress | None) -> None:
    options = settings.train
    generator = torch.Generator().manual_seed(settings.seed)
    epochs = (workload.train_batches(generator, options.batch_size) for _ in range(options.epochs))
    result = train_language(
        workload.model,
        [batch for epoch in epochs for batch in epoch],
        steps=options.epochs * workload.train_steps(options.batch_size),
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=settings.seed,
        progress=progress,
        phase="dense training",
    )
    if not math.isfinite(result.loss):
        raise _diverged(result, options.lr)


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
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: mps asked for, but torch sees no such device")
    return device


@functools.lru_cache(maxsize=2)
def _load(name: str, request: Request) -> VisionData:
    """Several checkpoints of one data set share its tensors."""
    return load_data(name, request)


def _request(data: DataConfig) -> Request:
    return Request(
        root=Path(data.root).expanduser() if data.root is not None else None,
        download=data.download,
        image_size=data.image_size,
        sizes=(data.train, data.calibration, data.validation, data.test),
        seed=data.seed,
    )


def list_models() -> list[tuple[str, str]]:
    """(name, one line) of every model that can be named."""
    return [*zoo.list_models(), *list_causal()]


def list_data() -> list[tuple[str, str]]:
    """(name, one line) of every data set, images and text."""
    return [*vision_data.list_data(), *list_text()]


def _refuse_mixture(config: Config) -> None:
    """A classifier over text, or a language model over images; an unknown name is said first."""
    model, name = config.model.name, config.data.name
    if is_causal(model) and name in [n for n, _ in vision_data.list_data()]:
        texts = ", ".join(n for n, _ in list_text())
        raise ConfigError(f"data.name {name!r}: holds images, but {model!r} is a language model; use {texts}")
    if is_text(name) and base_of(model, 2):
        raise ConfigError(f"data.name {name!r}: holds text, but {model!r} reads images")


def _language_workload(
    config: Config, device: torch.device, checkpoint: str | Path | None
) -> LanguageWorkload:
    """The language model and text of the settings, checked against each other; nothing is trained."""
    settings, request = config.model, _text_request(config.data)
    bound_kernel_caches()
    if settings.weights is not None:
        raise ConfigError(
            "model.weights: not for language models; name the files in model.name, as hf:FOLDER"
        )
    texts = read_text(config.data.name, request)  # first: a missing file is said before weights are read
    source = str(checkpoint or settings.checkpoint or "")
    folder = bool(source) and (Path(source).is_dir() or source.endswith(".gguf"))
    name = f"{PREFIX}{source}" if folder else settings.name
    causal = load_causal(
        name, dtype=settings.dtype, arguments=None if folder else settings.arguments, seed=settings.seed
    )
    if source and not folder:
        put_weights(causal.model, _with_tied(causal.model, load_checkpoint(source)), f"checkpoint {source!r}")
    for field, length in (("sequence_length", request.length), ("test_length", request.test_length or 0)):
        if causal.longest is not None and length > causal.longest:
            raise ConfigError(f"data.{field}: {length} is longer than the model's {causal.longest} positions")
    text = split_text(config.data.name, texts, request, causal.encode)
    if text.largest_id() >= causal.vocabulary:
        raise ArtifactError(
            f"model {name!r}: the tokenizer does not fit: it gives the id {text.largest_id()}, but the model has "
            f"{causal.vocabulary} tokens"
        )
    _check_finite(causal.model, name)
    return_freed_memory()  # of reading: a GGUF file's tensors, the parts of the text
    workload = LanguageWorkload(
        causal.model,
        causal.tokenizer,
        text,
        name=f"{Path(settings.name.removeprefix(PREFIX)).name} on {text.name}",
        batch_size=config.data.batch_size,
        device=device,
        base=base_of_model(causal.model, settings.name),
    )
    _run_forward(workload, name)
    return workload


def _with_tied(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file stores tied tensors once; the model names them twice."""
    own = model.state_dict()
    given = {own[name].data_ptr(): tensor for name, tensor in tensors.items() if name in own}
    absent = {n: given[t.data_ptr()] for n, t in own.items() if n not in tensors and t.data_ptr() in given}
    return tensors | absent


def _text_request(data: DataConfig) -> TextRequest:
    return TextRequest(
        files=data.files,
        root=Path(data.root).expanduser() if data.root is not None else None,
        column=data.column,
        length=data.sequence_length,
        test_length=data.test_length,
        stride=data.stride,
        sizes=(data.train, data.calibration, data.validation, data.test),
        seed=data.seed,
        download=data.download,
    )


def _own_workload(config: Config, checkpoint: str | Path | None) -> Workload:
    """The workload that the user's ``module:function`` returns for these settings."""
    assert config.workload is not None
    function = model_function(config.workload, "workload")
    try:
        workload = function(config)
    except RlpruneError:
        raise
    except Exception as error:
        raise ConfigError(
            f"workload {config.workload!r}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(workload, Workload):
        raise ConfigError(
            f"workload {config.workload!r}: must return a rlprune.Workload, got {type(workload).__name__}"
        )
    if checkpoint is not None:
        put_weights(workload.model, load_checkpoint(checkpoint), f"checkpoint {str(checkpoint)!r}")
    workload.model.eval()
    _check_finite(workload.model, config.workload)
    _run_forward(workload, config.workload)
    return check_workload(workload)


def _check_finite(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"model {name!r}: tensor {key!r} holds NaN or infinite values")


def _check_forward(workload: Workload, name: str, classes: int) -> None:
    outputs = _run_forward(workload, name)
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (1, classes):
        raise ConfigError(
            f"model.name {name!r}: gives {shape} for one image, but the data has {classes} classes, "
            f"so (1, {classes}) is needed; see model.arguments"
        )


def _run_forward(workload: Workload, name: str) -> Any:
    try:
        with torch.no_grad():
            return workload.model(workload.example_inputs)
    except Exception as error:
        raise GraphError(
            f"model {name!r}: its forward raises on an input of shape "
            f"{tuple(workload.example_inputs.shape)}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def _dense_key(workload: VisionWorkload | LanguageWorkload, settings: ModelConfig) -> str:
    """Hash of all that the trained weights depend on: settings, initial weights, data, the user's code."""
    about = {
        "version": _CACHE_VERSION,
        "base": workload.base,
        "train": asdict(settings.train),
        "seed": settings.seed,
        "device": workload.device.type,
    }
    if isinstance(workload, VisionWorkload):
        about |= {"mean": workload.data.mean, "std": workload.data.std, "augment": workload.augmentation}
        train = workload.data.splits["train"]
        tensors = {"images": train.images, "labels": train.labels}
    else:
        text = workload.data.splits["train"]
        about["text"] = [text.length, list(text.starts)]
        tensors = {"tokens": text.tokens}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
    _hash_tensors(digest.update, tensors)
    _hash_tensors(digest.update, workload.model.state_dict())
    if workload.base["source"] == "function":
        module = importlib.import_module(settings.name.partition(":")[0])
        file = getattr(module, "__file__", None)
        digest.update(Path(file).read_bytes() if file else b"")
    return digest.hexdigest()[:32]


def _hash_tensors(update: Callable[[bytes], object], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
