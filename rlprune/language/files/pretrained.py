"""Folders of pruned language models: what stands in them apart from plan.json, and how a model is built from them.

Such a folder is read by two loaders, ours and transformers' ``AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)``, which have to agree to the bit. Ours builds the model from classes of this package
and of transformers only, chosen by ``model_type`` among the supported families; no code of the folder is run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...artifacts.safetensors import Entry, entry_of
from ...errors import ArtifactError, described
from ...pruning.space import fingerprint
from ...utils.files import read_json, write_json_atomic
from ...utils.values import show_value
from ...workloads.adapter import TokenizerSource
from .. import families
from ..linear import tensor_of
from ..sizes import layer_sizes
from .mark import MARK, is_pruned
from .tokenizers import has_tokenizer, why_unreadable, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SOURCE = "transformers"
CONFIG, GENERATION = "config.json", "generation_config.json"
CODE = ("modeling_rlprune.py", "families.py", "experts.py", "linear.py", "dropped.py", "sizes.py")
# What differs between config.json and the dense configuration in plan.json, or has no part in the outputs.
SAID_TWICE = ("added_biases", "pruned_hidden_size")
SIZES = ("per_layer_config", "pruned_layers")  # of which a pruned model has one
_SIZES = (*SIZES, *SAID_TWICE)
OWN = (*_SIZES, "pruned_family", "auto_map", "architectures", MARK)
IDLE = (
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "use_cache",
    "quantization_config",
    "_attn_implementation",
)


def is_language_model(model: object) -> bool:
    """Whether a model is a transformers model of a family that we support (transformers is not imported for it)."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return model.config.model_type in families.FAMILIES and model.get_output_embeddings() is not None


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The model under its type in transformers, which the language adapter has made sure of (`is_language_model`)."""
    return cast("PreTrainedModel", model)


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as JSON-able fields, without what only says where it came from (a GGUF file, say)."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {name: value for name, value in fields.items() if name not in IDLE}


def dense_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`plain_config` without what a pruned model adds to the dense one's, nor the number format."""
    return dense_fields_of(plain_config(config))


def dense_fields_of(fields: Mapping[str, object]) -> dict[str, Any]:
    """`dense_fields` for the content of a config.json."""
    return {name: value for name, value in fields.items() if name not in (*OWN, "dtype")}


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the dense model: the same object where it is a stock one."""
    return build_config(dense_fields(config)) if isinstance(config, _modeling().PerLayerConfig) else config


def read_fields(folder: Path) -> dict[str, Any]:
    """The content of config.json; raises ArtifactError where it is no table."""
    fields = read_json(folder / CONFIG)
    if not isinstance(fields, dict):
        raise ArtifactError(f"{folder / CONFIG}: not a configuration")
    return fields


def build_config(fields: Mapping[str, object]) -> PreTrainedConfig:
    """The configuration object of saved fields; the stock class where all layers are alike.

    Raises ArtifactError for a model type that is not supported and for fields that transformers refuses.
    """
    model_type = fields.get("model_type")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ArtifactError(
            f"model_type: {model_type!r} is not supported{families.near_types(str(model_type))}"
        )
    if "pruned_family" in fields:
        try:
            families.remember(model_type, families.family_from(fields["pruned_family"]))
        except families.UnsupportedModel as error:
            raise ArtifactError(str(error)) from error
    uneven = is_uneven(fields)
    if uneven and model_type not in families.FAMILIES:
        raise ArtifactError(
            f"model_type: {model_type!r} is not supported for a pruned model without pruned_family"
        )
    cls = _modeling().config_class(model_type) if uneven else CONFIG_MAPPING[model_type]
    kept = {name: value for name, value in fields.items() if name not in ("auto_map", *IDLE)}
    try:
        return cls.from_dict(_floats(kept))
    except Exception as error:  # validators of transformers raise errors of many kinds
        raise ArtifactError(f"{model_type} configuration refused: {described(error)}") from error


def _floats(value: object) -> Any:
    """A configuration as transformers writes it into JSON, with infinity and NaN as numbers again."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _floats(entry) for key, entry in value.items()}
    return [_floats(entry) for entry in value] if isinstance(value, list) else value


def is_uneven(fields: Mapping[str, object]) -> bool:
    """Whether a configuration is one of our classes'; transformers gives `per_layer_config` to some families too."""
    if is_pruned(fields) or any(name in fields for name in ("pruned_layers", *SAID_TWICE)):
        return True
    return "per_layer_config" in fields and not _has_sizes_of_its_own(str(fields.get("model_type")))


@functools.cache
def _has_sizes_of_its_own(model_type: str) -> bool:
    """Whether transformers itself gives the configurations of a family a ``per_layer_config``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return bool(CONFIG_MAPPING[model_type]().to_dict().get("per_layer_config"))


def uneven_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of a configuration that give layers sizes of their own; empty for a stock configuration."""
    return {name: fields[name] for name in _SIZES if name in fields} if is_uneven(fields) else {}


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without memory for its weights (on ``meta``), in eval mode."""
    try:
        with torch.device("meta"):
            return class_of(config)(config).eval()
    except Exception as error:  # families raise whatever their layers raise
        raise ArtifactError(
            f"no {config.model_type} model fits the configuration: {named_field(error, config)}"
        ) from error


def named_field(error: Exception, config: PreTrainedConfig) -> str:
    """An error of building a model, with the fields that hold the name which a family's table does not know."""
    if not isinstance(error, KeyError) or not error.args:
        return described(error)

    def fields(values: Mapping[str, object], above: str) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from fields(value, f"{above}{name}.")
            elif isinstance(value, str) and value == error.args[0]:
                yield above + name

    found = list(fields(config.to_dict(), ""))
    return f"{' and '.join(found)}: unknown name {error.args[0]!r}" if found else described(error)


def stored_entries(model: nn.Module) -> dict[str, Entry]:
    """Name -> shape and format of what is stored for a model; of tied tensors the first name only."""
    seen: set[int] = set()
    entries = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name in model.state_dict():
        if id(tensors[name]) not in seen:
            seen.add(id(tensors[name]))
            entries[name] = entry_of(tensors[name])
    return entries


def dense_config(slim: PreTrainedModel, dense_fingerprint: str) -> dict[str, Any]:
    """The fields of the dense model's configuration, found from the pruned model's; ArtifactError when it is another.

    The pruned model may be the stock class as `rlprune.prune` made it, or one that was loaded from a folder of
    ours, whose configuration has layers of their own; the dense model of a second pruning has them as well.
    """
    candidates = [dense_fields(slim.config)]
    fields = plain_config(slim.config)
    if is_uneven(fields):
        candidates.append(
            {name: value for name, value in fields.items() if name not in ("auto_map", "dtype", MARK)}
        )
    for candidate in candidates:
        twin = skeleton(build_config(candidate))
        if fingerprint(twin) == dense_fingerprint:
            return candidate | {"architectures": [type(twin).__name__]}
    raise ArtifactError(
        f"save: the plan was made for another architecture than the configuration of {type(slim).__name__} describes"
    )


def pruned_config(slim: PreTrainedModel, base: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json: the dense fields, the sizes of the layers that differ, added biases, the classes."""
    sizes = layer_sizes(slim)
    fields = {name: value for name, value in base.items() if name not in OWN}
    family = families.family_of(slim)
    if family.listed:
        fields |= {"pruned_layers": sizes}
    else:
        fields |= {"per_layer_config": _sparse(sizes, fields)}
    if slim.config.model_type in families.FOUND:
        fields["pruned_family"] = families.family_fields(family)
    fields["dtype"] = one_dtype(slim)
    hidden = tensor_of(slim.get_input_embeddings(), "weight").shape[1]
    if hidden < base.get("hidden_size", hidden) and "word_embed_proj_dim" not in base:
        fields["pruned_hidden_size"] = hidden
    names = set(stored_entries(skeleton(build_config(fields))))
    extra = [name for name in stored_entries(slim) if name not in names]
    if any(not name.endswith(".bias") for name in extra):
        raise ArtifactError(f"save: the tensor {extra[0]!r} is none of the architecture's")
    if extra:
        fields["added_biases"] = [name.removesuffix(".bias") for name in extra]
    config = build_config(fields)
    config.architectures = [
        _modeling().model_class(config.model_type, _modeling().main_auto(config)).__name__
    ]
    return plain_config(with_classes(config))


def with_classes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a pruned model with the classes that read it, so that ``save_pretrained`` names them too."""
    config.auto_map = _modeling().auto_map(config.model_type)
    return config


def plan_fields(slim: nn.Module, config: Mapping[str, object]) -> dict[str, Any]:
    """What plan.json says again of config.json, so that a change in one of the two shows."""
    fields: dict[str, Any] = {"layers": layer_sizes(slim)}
    return fields | {name: config[name] for name in SAID_TWICE if name in config}


def write_side_files(
    folder: Path,
    config: Mapping[str, object],
    slim: PreTrainedModel,
    tokenizer: TokenizerSource | None = None,
) -> None:
    """Write config.json, generation_config.json, the code for other loaders, and the tokenizer's files."""
    write_tokenizer(folder, tokenizer)
    write_json_atomic(folder / CONFIG, dict(config))
    generation = getattr(slim, "generation_config", None)
    if generation is not None:
        write_json_atomic(folder / GENERATION, json.loads(generation.to_json_string()))
    for name in CODE:
        shutil.copyfile(Path(__file__).parent.parent / name, folder / name)
    own = slim.config.model_type
    if own in families.OTHERS:  # which the copy does not know
        with (folder / "families.py").open("a", encoding="utf-8") as file:
            file.write(f"\n\nregister({own!r}, {families.FAMILIES[own]!r})\n")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a pruned model's folder, or None where it has none; no code of the folder is run.

    ``AutoTokenizer.from_pretrained(folder)`` looks at config.json first, and some stock families refuse that.
    """
    path = Path(folder)
    if not has_tokenizer(path):
        return None
    from transformers import AutoTokenizer

    config = read_config(dense_fields_of(read_fields(path)), path / CONFIG)
    try:
        return AutoTokenizer.from_pretrained(
            path, config=config, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files raise whatever their parser raises
        raise ArtifactError(f"{path}: the tokenizer cannot be read: {why_unreadable(path, error)}") from error


def published_name(model_type: str, name: str) -> str:
    """How checkpoints of a family name a tensor on disk, where transformers renames it while loading."""
    module, _, last = name.rpartition(".")
    renamed = dict(families.FAMILIES[model_type].renamed)
    return f"{renamed.get(module, module)}.{last}" if module else name


def model_of(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a configuration with these weights, on the CPU, in eval mode."""
    with quiet_loading():
        model: PreTrainedModel = class_of(config).from_pretrained(None, config=config, state_dict=state)
    return model


def put_generation(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the generation settings of a folder, where it has some; ArtifactError where they are none."""
    path = folder / GENERATION
    if not path.exists():
        return
    from transformers import GenerationConfig

    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path}: must be a table of settings, got {show_value(fields)}")
    try:
        model.generation_config = GenerationConfig.from_dict(fields)
    except Exception as error:  # its validators raise errors of many kinds
        raise ArtifactError(f"{path}: generation settings refused: {described(error)}") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers while weights are put in."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_nan(name: str, tensor: Tensor, where: str) -> None:
    """Raise ArtifactError for a tensor with NaN or infinite values."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(f"{where}: the tensor {name!r} holds NaN or infinite values")


def read_config(fields: Mapping[str, object], path: Path, prefix: str = "") -> PreTrainedConfig:
    try:
        return build_config(fields)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {prefix}{error}") from error


def _sparse(sizes: Sequence[Mapping[str, int]], fields: Mapping[str, object]) -> dict[str, dict[str, int]]:
    """{layer: sizes that differ from the whole's}; a size that the whole does not state is given for every layer."""
    plain = build_config(fields)
    table: dict[str, dict[str, int]] = {}
    for index, layer in enumerate(sizes):
        changed = {name: size for name, size in layer.items() if getattr(plain, name, None) != size}
        if changed:
            table[str(index)] = changed
    return table


def one_dtype(model: nn.Module) -> str:
    """The name of the number format of all floating-point tensors; loaders know one for a whole model."""
    found: dict[torch.dtype, str] = {}
    for name, entry in stored_entries(model).items():
        if entry.dtype.is_floating_point:
            found.setdefault(entry.dtype, name)
    if len(found) > 1:
        (first, a), (second, b), *_ = found.items()
        raise ArtifactError(
            f"save: {a!r} is {short_dtype(first)} and {b!r} {short_dtype(second)}; convert the model to one number "
            "format"
        )
    return short_dtype(next(iter(found)))


def class_of(config: PreTrainedConfig) -> Any:
    modeling = _modeling()
    if isinstance(config, modeling.PerLayerConfig):
        return modeling.model_class(config.model_type, modeling.main_auto(config))
    return modeling.stock_class(config)


def _modeling() -> ModuleType:
    from .. import modeling_rlprune

    return modeling_rlprune


def short_dtype(dtype: torch.dtype | str | None) -> str:
    return str(dtype).removeprefix("torch.")
