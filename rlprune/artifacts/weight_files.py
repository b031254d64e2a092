"""What a file of weights holds: safetensors, torch files without code, shards and their index.

Nothing of a file is run. Torch files go through torch's weights-only reader; the classes of settings and metadata
that trainers leave in them (`argparse.Namespace`, paths, numpy scalars, configs of Lightning, mmengine, omegaconf)
are on a list, and all of them but numpy's arrays become blanks that hold nothing.
"""

from __future__ import annotations

import fnmatch
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ArtifactError, first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".th")
"""File names that are read as checkpoints; what a file is, its first bytes tell."""
_INDEX = ".index.json"
_SAVE = "save the state dict alone: torch.save(model.state_dict(), 'weights.pt'), or best as .safetensors"


def read_weight_file(path: str | Path) -> object:
    """All that a file of weights holds, on the CPU: nested dicts and lists with tensors and plain values.

    Raises ArtifactError in one line: no such file, a folder, empty, truncated, another kind of file (a TorchScript or
    torch.export archive, .npz, HDF5, a page of HTML, a pointer of git-lfs, ...), or pickled objects beyond the list.
    """
    path = Path(path)
    _require_file(path)
    if path.name.endswith(_INDEX):
        return _shards(path)
    with _one_line(path):
        with path.open("rb") as file:
            head = file.read(512)
        _refuse_foreign(path, head)
    # Downloads often carry the suffix of the other format.
    return _safetensors(path) if _is_safetensors(head) or path.suffix == ".safetensors" else _torch(path)


class _one_line:
    """Errors of reading as one ArtifactError that names the file."""

    def __init__(self, path: Path, what: str = "a torch checkpoint") -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArtifactError) or not isinstance(error, Exception):
            return
        raise ArtifactError(
            f"checkpoint {str(self._path)!r}: truncated or not {self._what} ({first_line(error, 160)})"
        ) from error


def _require_file(path: Path) -> None:
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES or p.name.endswith(_INDEX))
        hint = f"name the file in it, as {names[0]!r}" if names else "name a file of weights"
        raise ArtifactError(f"checkpoint {str(path)!r}: is a folder; {hint}")
    if not path.is_file():
        raise ArtifactError(f"checkpoint {str(path)!r}: no such file")


# First bytes of files that are met in the place of a checkpoint, and what to do about them.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of git-lfs, not the weights; fetch them by `git lfs pull`"),
    (b"\x89HDF", "is an HDF5 file (Keras?); convert it to a state dict of PyTorch"),
    (b"\x93NUMPY", f"is a numpy array, which has no names; {_SAVE}"),
    (b"GGUF", "is a GGUF file; only language models are read from one"),
    (b"\x1f\x8b", "is packed by gzip; unpack it first"),
    (b"BZh", "is packed by bzip2; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"%PDF", "is a PDF file"),
)


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Say what the file is where it is no checkpoint."""

    def refuse(reason: str) -> NoReturn:
        raise ArtifactError(f"checkpoint {str(path)!r}: {reason}")

    if not head:
        refuse("is empty (0 bytes); was its download or copy cut off?")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        refuse("is a page of HTML, not weights: the download failed, or wants a login")
    for start, reason in _FOREIGN:
        if head.startswith(start):
            refuse(reason)
    if text.startswith((b'{"', b"{\n")) and not _is_safetensors(head):
        refuse("is a text in JSON, not weights")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            reason = _foreign_archive(archive.namelist())
        if reason:
            refuse(reason)


def _foreign_archive(names: list[str]) -> str:
    """What a zip file is where it is no torch checkpoint; "" for one."""
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        return f"is a TorchScript archive, which holds code; in the program that made it, {_SAVE}"
    if "serialized_exported_program.json" in last or "archive_format" in last:
        return f"is an archive of torch.export (.pt2), a program rather than weights; {_SAVE}"
    if "data.pkl" in last:
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "is a numpy archive (.npz); save its arrays as tensors: safetensors.torch.save_file"
    if "model.weights.h5" in last:
        return "is a Keras archive; convert it to a state dict of PyTorch"
    first = f" (it holds {names[0]!r})" if names else " (it is empty)"
    return f"is a zip file, but no torch checkpoint{first}; unpack it first"


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and 2 <= int.from_bytes(head[:8], "little") < 1 << 30 and head[8:9] == b"{"


def _safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        with _one_line(path, "a safetensors file"):
            raise error


def _shards(path: Path) -> object:
    """The tensors of all shards that an index names; they lie next to it."""
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"checkpoint {str(path)!r}: is no index of shards (no weight_map)") from error
    tensors: dict[object, object] = {}
    for name in sorted(map(str, names)):
        if Path(name).name != name or name.endswith(_INDEX):
            raise ArtifactError(
                f"checkpoint {str(path)!r}: names the shard {name!r}, which is no plain file name"
            )
        part = read_weight_file(path.parent / name)
        tensors |= part if isinstance(part, dict) else {}
    return tensors


class _Blank:
    """Stands for an object of a listed class: takes everything, keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> _Blank:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Mapping:
    """Stands for a subclass of dict: its items may hold the weights, so they are kept, in an ordinary dict."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


class _Sequence:
    """Stands for a subclass of list."""

    def __new__(cls, *_: object, **__: object) -> list[object]:  # type: ignore[misc]
        return []


_LISTED: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        _Mapping,
        (
            "collections.defaultdict",
            "*.AttributeDict",  # Lightning's hyper-parameters
            "easydict.EasyDict",
            "yacs.config.CfgNode",
            "*.config.*CfgNode",  # fvcore, detectron2
            "mm*.config.ConfigDict",
            "addict.*.Dict",
            "ml_collections.*.ConfigDict",
            "munch.Munch",
            "transformers.utils.generic.ModelOutput",
        ),
    ),
    (_Sequence, ("collections.deque", "collections.UserList")),
    (
        _Blank,
        (
            "argparse.Namespace",
            "types.SimpleNamespace",
            "typing.*",
            "pathlib.*Path",
            "datetime.*",
            "decimal.Decimal",
            "fractions.Fraction",
            "uuid.UUID",
            "builtins.slice",
            "builtins.range",
            "builtins.frozenset",
            *(
                f"builtins.{name}"
                for name in ("int", "float", "bool", "str", "bytes", "list", "tuple", "dict")
            ),
            "builtins.object",
            "copyreg._reconstructor",
            "numpy.random.*",
            "omegaconf.*",
            # Lightning 1.x names the state of a callback by its class.
            "pytorch_lightning.callbacks.*",
            "lightning.pytorch.callbacks.*",
            "pytorch_lightning.utilities.enums.*",
            "lightning.*.utilities.*",
            "mmengine.logging.*",
            "mmcv.runner.*",
            "torch.optim.lr_scheduler.*",
            "transformers.*.PretrainedConfig",
            "transformers.training_args.*",
            "transformers.trainer_utils.*",
            "torch.torch_version.TorchVersion",
        ),
    ),
)
"""Classes of settings and metadata, by patterns of their whole names; no code of theirs is imported or run."""


def _numpy_globals() -> Iterator[tuple[object, str]]:
    """What numpy's arrays and scalars are rebuilt by, under the module names of both major versions."""
    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        yield array, f"{module}._reconstruct"
        yield scalar, f"{module}.scalar"
    yield np.ndarray, "numpy.ndarray"
    yield np.dtype, "numpy.dtype"
    for code in "?bBhHiIlLqQefdgFDGSUVmM":
        kind = type(np.dtype(code))
        yield kind, f"numpy.dtypes.{kind.__name__}"
        yield np.dtype(code).type, f"numpy.{np.dtype(code).type.__name__}"


def _allowed(names: list[str]) -> list[tuple[object, str]]:
    """What stands for each of the listed ones of these names."""
    found = list(_numpy_globals())
    for name in names:
        stand_in = next(
            (kind for kind, patterns in _LISTED if any(fnmatch.fnmatchcase(name, p) for p in patterns)), None
        )
        if stand_in is not None:
            found.append((stand_in, name))
    return found


_PLAIN = [p for _, patterns in _LISTED for p in patterns if "*" not in p]
_PATHS = [
    f"{m}.{n}" for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath", "PurePosixPath")
]
_DATES = [f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")]


def _names_in(path: Path) -> list[str]:
    """Names of the classes and functions that a torch file asks for; of the oldest format, those often met."""
    if not zipfile.is_zipfile(path):
        return [*_PLAIN, *_PATHS, *_DATES]
    return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))


def _torch(path: Path) -> object:
    with _one_line(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about unusual pickles, which are refused right below
                with torch.serialization.safe_globals(_as_globals(_allowed(_names_in(path)))):
                    return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if name is None and not zipfile.is_zipfile(path):
                raise
            what = f" ({name[1]!r})" if name else ""
            raise ArtifactError(
                f"checkpoint {str(path)!r}: holds pickled code or objects{what}, which is refused, since reading "
                f"them could run code; {_SAVE}"
            ) from error


def _as_globals(
    found: list[tuple[object, str]],
) -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    return [(stand_in, name) for stand_in, name in found if callable(stand_in)]
