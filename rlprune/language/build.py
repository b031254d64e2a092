"""From settings to a workload of a causal language model and a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..artifacts.checkpoint import load_checkpoint, put_weights
from ..artifacts.documents import PlanDocument
from ..config.config import Config, DataConfig
from ..errors import ArtifactError, ConfigError
from ..pruning.space import fingerprint
from ..tracing.trace import TraceOptions
from ..utils.memory import bound_kernel_caches, return_freed_memory
from ..workloads.base import CutFrom
from ..workloads.builder import Inspected, WorkloadBuilder
from ..workloads.checks import check_finite, run_forward
from . import describe
from .describe import context_length
from .families import FAMILIES
from .files import pretrained
from .files.without_plan import is_folder_of_ours, plan_against_base
from .loading import PREFIX, encoder, is_causal, list_causal, load_causal, read_config
from .text import TextData, TextRequest, is_text, list_text, read_text, split_text
from .workload import LanguageWorkload, base_of_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LanguageBuilder(WorkloadBuilder):
    """``hf:`` folders, GGUF files and hub ids, or the tiny Llama, over text."""

    wing = "language"
    data_noun = "text"

    def claims(self, model: str) -> bool:
        return is_causal(model)

    def models(self) -> list[tuple[str, str]]:
        return list_causal()

    def data_sets(self) -> list[tuple[str, str]]:
        return list_text()

    def families(self) -> list[tuple[str, str]]:
        rows = [(kind, describe.family_line(FAMILIES[kind])) for kind in sorted(FAMILIES)]
        return [
            *rows,
            ("(others)", "parts are found by shape and used where cuts prove exact: docs/families.md"),
        ]

    def holds(self, data: str) -> bool:
        return is_text(data)

    def wants(self) -> str:
        return f"is a language model; use {', '.join(name for name, _ in list_text())}"

    def build(self, config: Config, device: torch.device, checkpoint: str | Path | None) -> LanguageWorkload:
        return _language_workload(config, device, checkpoint)

    def inspected(self, config: Config, device: torch.device) -> Inspected:
        """A named model without its weights, however large, unless its latency is to be measured."""
        if not config.model.name.startswith(PREFIX) or config.budget.metric == "latency":
            return super().inspected(config, device)
        found = read_config(config.model.name)
        length, longest = config.data.sequence_length, context_length(found)
        if longest is not None and length > longest:
            raise ConfigError(
                f"data.sequence_length: {length} is longer than the model's {longest} positions"
            )
        return Inspected(pretrained.skeleton(found), torch.zeros(1, length, dtype=torch.long), None)

    def cut_files(
        self, config: Config, checkpoint: Path | None, document: PlanDocument, source: Path, out: Path
    ) -> bool:
        from .files.streaming import dense_skeleton, prune_shards, stored_as_held

        folder = _streamed(config, checkpoint)
        if folder is None or not stored_as_held(folder):
            return False
        if fingerprint(dense_skeleton(folder)) != document["fingerprint"]:
            raise ArtifactError("plan: made for another architecture (its fingerprint differs)")
        prune_shards(folder, source, out)
        return True


def _streamed(config: Config, checkpoint: Path | None) -> Path | None:
    """The folder of a language model that can be cut file by file: nothing but its own weights is needed."""
    formats = {config.model.dtype, config.finish.dtype}  # the files are cut in their own
    if config.recovery.steps != ("none",) or formats != {"auto"}:
        return None
    name = config.model.name
    if not name.startswith(PREFIX):
        return None
    folder = Path(checkpoint or config.model.checkpoint or name.removeprefix(PREFIX)).expanduser()
    if is_folder_of_ours(folder):
        return None  # read by rlprune itself, so that the plans of both cuts become one
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _language_workload(
    config: Config, device: torch.device, checkpoint: str | Path | None
) -> LanguageWorkload:
    """The language model and text of the settings, checked against each other; nothing is trained."""
    settings, request = config.model, _text_request(config.data)
    bound_kernel_caches()
    _check_device_map(config)
    if settings.weights is not None:
        raise ConfigError(
            "model.weights: not for language models; name the files in model.name, as hf:FOLDER"
        )
    texts = read_text(config.data.name, request)  # first: a missing file is said before weights are read
    source = str(checkpoint or settings.checkpoint or "")
    folder = bool(source) and (Path(source).is_dir() or source.endswith(".gguf"))
    if folder and settings.checkpoint_key is not None:
        raise ConfigError(
            "model.checkpoint_key: a folder or a GGUF file has one set of weights; leave it out"
        )
    name = f"{PREFIX}{source}" if folder else settings.name
    found: list[TextData] = []

    def split(tokenizer: PreTrainedTokenizerBase) -> None:
        found.append(split_text(config.data.name, texts, request, encoder(tokenizer), tokenizer))

    causal = load_causal(
        name,
        dtype=settings.dtype,
        device_map=settings.device_map,
        arguments=None if folder else settings.arguments,
        seed=settings.seed,
        check=split,
    )
    if source and not folder:
        put_weights(causal.model, load_checkpoint(source, settings.checkpoint_key), f"checkpoint {source!r}")
    (text,) = found
    _check_lengths(causal.longest, request, text.splits["train"].prompted_length)
    if text.largest_id() >= causal.vocabulary:
        raise ArtifactError(
            f"model {name!r}: the tokenizer does not fit: it gives the id {text.largest_id()}, but the model has "
            f"{causal.vocabulary} tokens"
        )
    check_finite(causal.model, name)
    return_freed_memory()  # of reading: a GGUF file's tensors, the parts of the text
    workload = LanguageWorkload(
        causal.model,
        causal.tokenizer,
        text,
        name=f"{Path(settings.name.removeprefix(PREFIX)).name} on {text.name}",
        batch_size=config.data.batch_size,
        device=device,
        base=base_of_model(causal.model, settings.name),
        stored=causal.stored,
    )
    if causal.pruned is not None:
        _follow(workload, causal.pruned, TraceOptions.of(config.prune))
    run_forward(workload, name)
    return workload


def _check_lengths(longest: int | None, request: TextRequest, prompted: int) -> None:
    """ConfigError where a sequence, one of the train split with its prompt too, has more tokens than positions."""
    if longest is None:
        return
    for field, length in (("sequence_length", request.length), ("test_length", request.test_length or 0)):
        if length > longest:
            raise ConfigError(f"data.{field}: {length} is longer than the model's {longest} positions")
    if prompted > longest:
        raise ConfigError(
            f"data.prompt: with it a sequence has {prompted} tokens, more than the model's {longest} positions; lower "
            "data.sequence_length"
        )


def _follow(workload: LanguageWorkload, document: PlanDocument, options: TraceOptions) -> None:
    """Tell the workload of a pruned model what that was cut from: the next plan is then one against the dense model."""
    workload.base = {**document["base"]}
    if fingerprint(workload.model) == document["fingerprint"]:
        return  # the dense model is not known: this one stands for it
    dense = pretrained.skeleton(pretrained.build_config(document["base"]["config"]))
    workload.cut_from = CutFrom(dense, plan_against_base(dense, document, options))


def _check_device_map(config: Config) -> None:
    """What goes with a model on several devices, and what does not."""
    if config.model.device_map is None:
        return
    if config.device != "auto":
        raise ConfigError("model.device_map: chooses the devices; leave device at auto, or leave the map out")
    if config.finish.steps:
        raise ConfigError(
            "finish.steps: a model on several devices (model.device_map) is not fine-tuned by the search; set it to 0 "
            "and fine-tune the result: accelerate launch -m rlprune.experiments.tune RUN/pruned CONFIG --out OUT "
            "--set model.device_map=null finish.steps=N"
        )


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
        format=data.format,
        answers_only=data.answers_only,
        packing=data.packing,
        prompt=data.prompt,
    )


BUILDER = LanguageBuilder()
