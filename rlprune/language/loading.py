"""Causal language models by name: a hub id, a local folder, a GGUF file, or a tiny Llama of our own.

Code that comes with a model is never run (``trust_remote_code`` stays off), and what cannot be pruned is
refused before its weights are read.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import ArtifactError, ConfigError, DataError, GraphError, near_miss
from ..utils.files import read_json
from ..utils.hub import HUB_ID, local_config, quiet
from ..utils.values import are_texts, show_value
from ..workloads.adapter import read_pruned
from .families import UnsupportedModel, family_of
from .files import pretrained
from .files.mark import is_pruned
from .files.pretrained import load_tokenizer
from .files.reading import load_folder
from .files.without_plan import is_folder_of_ours
from .linear import tensor_of
from .stored import Stored, stored_folder, stored_weights
from .structure import settle
from .text import help_texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..artifacts.documents import PlanDocument

PREFIX = "hf:"
TINY = "tiny_llama"
TINY_ARGUMENTS = {
    "layers": 6,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 176,
    "vocab": 512,
    "context": 512,
    "tied": True,
}
Found = TypeVar("Found")
_END = "<|endoftext|>"
_GGUF_PACKAGES = ("gguf", "accelerate")
# Sizes in a config.json, under the names of most families and of GPT-2's.
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *(
        "vocab_size",
        "intermediate_size",
        "max_position_embeddings",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
    ),
)
_CAUSAL_NAMES = ("ForCausalLM", "LMHeadModel")
_WHOLE_NAMES = (*_CAUSAL_NAMES, "ForConditionalGeneration")  # of models whose language part is one of several
_NAMES = {
    "hf:PATH": "a transformers causal language model: folder with config.json, or a .gguf file",
    "hf:ID": "the same by hub id; it is downloaded where it is not cached",
    TINY: f"small Llama, trained on the spot; arguments: {', '.join(f'{k} ({v})' for k, v in TINY_ARGUMENTS.items())}",
}


@dataclass(frozen=True)
class Causal:
    """A causal LM in eval mode on the CPU, and its tokenizer; ``pruned`` is the plan by which it was cut before."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pruned: PlanDocument | None = None
    stored: Stored | None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence, None where positions have no end."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: token ids are below it."""
        return int(tensor_of(self.model.get_input_embeddings(), "weight").shape[0])

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text; the special tokens are those that the tokenizer adds by itself."""
        return encoder(self.tokenizer)(text)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """What gives the token ids of a whole text, with the special tokens that the tokenizer adds by itself."""

    def encode(text: str) -> list[int]:
        found = tokenizer(text, verbose=False, return_attention_mask=False, return_token_type_ids=False)
        ids: list[int] = found["input_ids"]
        return ids

    return encode


def list_causal() -> list[tuple[str, str]]:
    """(name, one line) of every way to name a language model."""
    return list(_NAMES.items())


def is_causal(name: str) -> bool:
    """Whether a model's name stands for a causal language model."""
    return name == TINY or (name.startswith(PREFIX) and not _reads_images(name.removeprefix(PREFIX)))


def _reads_images(place: str) -> bool:
    """Whether a type's name, a folder or a cached hub id stands for an image classifier of transformers."""
    content = local_config(place)
    return _is_image_type(place if content is None else content.get("model_type"))


def _near_type(place: str) -> str:
    """The near miss of what may be a misspelt type of an image classifier."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGES

    return "" if "/" in place else near_miss(place, IMAGES)


def _is_image_type(kind: object) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGES

    return kind in IMAGES and kind not in CAUSAL


def load_causal(
    name: str,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    arguments: Mapping[str, object] | None = None,
    seed: int = 0,
    check: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> Causal:
    """Load a language model and its tokenizer by name; ``auto`` is float32.

    With ``device_map`` (a name that accelerate knows) the weights are spread over all GPUs, else they are on the CPU.
    ``check`` sees the tokenizer before the weights are read: what it refuses is refused at once.

    Raises ConfigError (name, arguments, missing packages), DataError (no such file, no download),
    ArtifactError (broken files, missing weights), GraphError (not a causal LM of a supported family).
    """
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with quiet():
        if device_map is not None:
            _require_accelerate(name)
        if name == TINY:
            tiny = _tiny(dict(arguments or {}), seed, torch_dtype)
            if check is not None:
                check(tiny.tokenizer)
            return tiny
        if arguments:
            raise ConfigError(f"model.arguments: only {TINY!r} takes any, not {name!r}")
        place, file = _place(name)
        if not file and is_folder_of_ours(Path(place)):
            return _pruned(name, Path(place), torch_dtype, device_map, check)
        options: Mapping[str, object] = {"gguf_file": file} if file else {}
        config = _config(name, place, options)
        stored = stored_weights(place, file, config)  # loading gives the config the format it loads in
        tokenizer = _tokenizer(name, place, options)
        if check is not None:
            check(tokenizer)
        spread = {} if device_map is None else {"device_map": device_map}
        model = _weights(name, place, config, {**options, **spread}, torch_dtype)
        _refuse_offloaded(model)
        for method in ("to", "cuda"):  # accelerate ties them to this very model: a copy's would move it
            vars(model).pop(method, None)
        _refuse_unsupported(name, model)
    if file:
        _forget_quantisation(model, place)
    return Causal(model.eval(), tokenizer, stored=stored)


def _pruned(
    name: str,
    folder: Path,
    dtype: torch.dtype,
    device_map: str | None,
    check: Callable[[PreTrainedTokenizerBase], None] | None,
) -> Causal:
    """The model of an rlprune folder, to be pruned further; none of its code is run."""
    if device_map is not None:
        raise ConfigError(
            "model.device_map: a pruned model is read by rlprune itself, onto one device; leave it out"
        )
    _refuse_quantised(name, pretrained.read_fields(folder).get("quantization_config"))
    document = read_pruned(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ArtifactError(
            f"model.name {name!r}: its tokenizer cannot be read (the folder has no file of one); copy those of the "
            "dense model into it"
        )
    if check is not None:
        check(tokenizer)
    model: Any = load_folder(folder, document)
    stored = stored_folder(folder, model.dtype)
    return Causal(model.to(dtype).eval(), tokenizer, document, stored)


def _require_accelerate(name: str) -> None:
    if name == TINY:
        raise ConfigError(f"model.device_map: {TINY!r} fits on one device; leave it out")
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("model.device_map: needs accelerate; pip install 'rlprune[language]'")


def _refuse_offloaded(model: PreTrainedModel) -> None:
    """A layer that accelerate has put on the disk or the CPU has no weights here that could be cut."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ConfigError(
            f"model.device_map: {len(away)} tensors ({away[0]!r} among them) do not fit on the devices; candidates "
            "need all weights there: more or larger devices, or model.dtype=bfloat16"
        )


def read_config(name: str) -> PreTrainedConfig:
    """The config of a model named ``hf:...``, without its weights; refuses what `load_causal` refuses by it."""
    with quiet():
        place, file = _place(name)
        if not file and is_folder_of_ours(Path(place)):
            path = Path(place)
            return pretrained.read_config(pretrained.read_fields(path), path / "config.json")
        return _config(name, place, {"gguf_file": file} if file else {})


def _place(name: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file in it or None); DataError where a local one is not there."""
    text = name.removeprefix(PREFIX)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"model.name {name!r}: no such file")
        missing = [p for p in _GGUF_PACKAGES if importlib.util.find_spec(p) is None]
        if missing:
            raise ConfigError(
                f"model.name {name!r}: a GGUF file needs {' and '.join(missing)}: pip install 'rlprune[language]'"
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ArtifactError(f"model.name {name!r}: not a GGUF file")
        return str(path.parent), path.name
    if text and path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {files[0]}: name that file" if files else ""
            if (path / "adapter_config.json").is_file():
                hint = "; it holds a PEFT adapter: merge that first (model.merge_and_unload()) and save the model"
            raise DataError(f"model.name {name!r}: the folder has no config.json{hint}")
        if (path / "adapter_config.json").is_file():
            raise GraphError(
                f"model.name {name!r}: holds a PEFT adapter (adapter_config.json); merge it into its model "
                "(merge_and_unload) and give that folder"
            )
        for settings in ("config.json", "generation_config.json"):
            if (path / settings).exists():
                _table(name, path / settings)
        _check_sizes(name, _table(name, path / "config.json"))
        return str(path), None
    if path.is_file():
        raise DataError(f"model.name {name!r}: give the folder with config.json, or a .gguf file")
    if not HUB_ID.fullmatch(text) or text[:1] == ".":
        raise DataError(f"model.name {name!r}: no such folder, and not a hub id (ORGANISATION/NAME)")
    return text, None


def _table(name: str, path: Path) -> dict[str, Any]:
    """A settings file of a model's folder; ArtifactError where it is no table."""
    try:
        fields = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"model.name {name!r}: its config cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"model.name {name!r}: its {path.name} must be a table, got {show_value(fields)}")
    return fields


def _check_sizes(name: str, fields: Mapping[str, Any]) -> None:
    """ArtifactError for a size below 1: some are divided by, others build a model of nothing."""
    inner = fields.get("text_config")
    for owner in (fields, inner if isinstance(inner, Mapping) else {}):
        for size in _SIZES:
            value = owner.get(size)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ArtifactError(
                    f"model.name {name!r}: its config's {size} must be at least 1, got {value}"
                )


def _config(name: str, place: str, options: Mapping[str, object]) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    from .modeling_rlprune import reads_pictures

    config = _read(
        lambda: AutoConfig.from_pretrained(place, trust_remote_code=False, **options), name, "config", options
    )
    kind, classes = config.model_type, getattr(config, "architectures", None) or []
    if not are_texts(classes):
        raise ArtifactError(f"model.name {name!r}: its config's architectures must be a list of names")
    fields = config.to_dict()
    if is_pruned(fields):  # of a hub id
        raise GraphError(
            f"model.name {name!r}: is a pruned model already; download its folder and name that, or give the dense one"
        )
    if pretrained.is_uneven(fields):
        raise GraphError(
            f"model.name {name!r}: config.json: per_layer_config: {kind} of transformers has no layers of different "
            "sizes, and rlprune has not written it (it would have the field 'rlprune')"
        )
    pictures = reads_pictures(config)
    ends = _WHOLE_NAMES if pictures else _CAUSAL_NAMES
    if not (pictures or kind in CAUSAL) or (classes and not any(c.endswith(ends) for c in classes)):
        what = f"{classes[0]} ({kind})" if classes else f"model type {kind!r}"
        # A hub id counts as a language model's until its config is in the cache.
        again = "; it classifies images and its config is cached now: run this again"
        again = again if _is_image_type(kind) else ""
        raise GraphError(f"model.name {name!r}: {what} is not a causal language model{again}")
    if "gguf_file" not in options:  # which is dequantised on reading
        _refuse_quantised(name, getattr(config, "quantization_config", None))
    _refuse_unsupported(name, config)
    return config


def _refuse_quantised(name: str, settings: Any) -> None:
    if settings is None:
        return
    fields = settings if isinstance(settings, Mapping) else vars(settings)
    method = fields.get("quant_method")
    how = f" by {getattr(method, 'value', method)}" if method is not None else ""
    raise GraphError(f"model.name {name!r}: its weights are quantised{how}; give the unquantised model")


def _refuse_unsupported(name: str, model_or_config: PreTrainedModel | PreTrainedConfig) -> None:
    try:
        settle(model_or_config if isinstance(model_or_config, torch.nn.Module) else _outline(model_or_config))
        family_of(model_or_config)
    except (UnsupportedModel, GraphError) as error:
        raise GraphError(f"model.name {name!r}: {error}") from None


def _outline(config: PreTrainedConfig) -> torch.nn.Module:
    """The model of a config without memory for its weights."""
    from .files.pretrained import named_field
    from .modeling_rlprune import stock_class

    try:
        with torch.device("meta"):
            return stock_class(config)(config)  # type: ignore[no-any-return]
    except Exception as error:  # any kind of model, any kind of failure
        reason = named_field(error, config).partition("\n")[0]
        raise UnsupportedModel(f"no {config.model_type} model fits its config: {reason}") from error


def _weights(
    name: str, place: str, config: PreTrainedConfig, options: Mapping[str, object], dtype: torch.dtype
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from .modeling_rlprune import reads_pictures

    auto: Any = AutoModelForImageTextToText if reads_pictures(config) else AutoModelForCausalLM

    def load() -> Any:
        return auto.from_pretrained(
            place, trust_remote_code=False, dtype=dtype, output_loading_info=True, **options
        )

    model, report = _read(load, name, "weights", options)
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ArtifactError(
            f"model.name {name!r}: the files lack {len(missing)} of the model's tensors, {missing[0]!r} among them"
        )
    return model


def _tokenizer(name: str, place: str, options: Mapping[str, object]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return _read(
        lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options),
        name,
        "tokenizer",
        options,
    )


def _read(read: Callable[[], Found], name: str, what: str, options: Mapping[str, object]) -> Found:
    """What ``read`` returns; whatever the libraries raise for broken files becomes one line."""
    try:
        return read()
    except Exception as error:
        line = _line(error)
        if "gguf_file" in options:
            raise ArtifactError(f"model.name {name!r}: truncated or unknown GGUF file ({line})") from error
        if not Path(name.removeprefix(PREFIX)).expanduser().is_dir():
            hint = _near_type(name.removeprefix(PREFIX))
            raise DataError(f"model.name {name!r}{hint}: its {what} cannot be fetched ({line})") from error
        raise ArtifactError(f"model.name {name!r}: its {what} cannot be read ({line})") from error


def _forget_quantisation(model: PreTrainedModel, place: str) -> None:
    """The weights of a GGUF file were dequantised on reading; nothing but marks is left to say otherwise."""
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer  # save_pretrained refuses a model that has one
    for mark in ("is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.config._name_or_path = place


def _tiny(given: Mapping[str, object], seed: int, dtype: torch.dtype) -> Causal:
    from transformers import LlamaConfig, LlamaForCausalLM

    for key, value in given.items():
        if key not in TINY_ARGUMENTS:
            known = ", ".join(TINY_ARGUMENTS)
            raise ConfigError(
                f"model.arguments.{key}: unknown{near_miss(key, TINY_ARGUMENTS)}; allowed: {known}"
            )
        wanted = bool if key == "tied" else int
        if type(value) is not wanted or (wanted is int and value < 1):
            what = "true or false" if wanted is bool else "a whole number of 1 and more"
            raise ConfigError(f"model.arguments.{key}: must be {what}, got {value!r}")
    sizes: dict[str, Any] = {**TINY_ARGUMENTS, **given}
    if sizes["hidden"] % (2 * sizes["heads"]) or sizes["heads"] % sizes["kv_heads"]:
        raise ConfigError(
            "model.arguments: hidden must be a multiple of 2 * heads and heads one of kv_heads, got "
            f"{sizes['hidden']}, {sizes['heads']} and {sizes['kv_heads']}"
        )
    tokenizer = help_tokenizer(sizes["vocab"])
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=sizes["context"],
        tie_word_embeddings=sizes["tied"],
        # The usual 0.02 suits widths of thousands; here the blocks would add nothing for hundreds of steps.
        initializer_range=sizes["hidden"] ** -0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        model = model.to(dtype).eval()
    return Causal(model, tokenizer)


@functools.lru_cache(maxsize=2)
def help_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens, trained on Python's help texts; always the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise ConfigError(f"model.arguments.vocab: must be at least {len(alphabet) + 1}, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(help_texts().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
