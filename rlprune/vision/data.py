"""Image data sets by name, as uint8 tensors in four fixed disjoint splits.

A test split is the data set's official one where it has one. The other three are drawn from its train
part by a seed: validation first, then calibration, then train, so that the size of the train split does
not change what the other two hold.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.names import DATA_SETS
from ..errors import ConfigError, DataError, near_miss
from ..utils.cache import cache_folder
from ..utils.registry import Named, named_errors
from ..workloads.base import SPLITS
from .image_files import UndecodableImage, open_image
from .image_folder import DataWarning as DataWarning
from .image_folder import FolderSource, listed, read_folder
from .image_source import Augment as Augment
from .image_source import ImageSource as ImageSource
from .image_source import Request as Request
from .image_source import Source, completed, resized, shares
from .image_source import Split as Split
from .image_source import data_set as data_set

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionData:
    """A data set: its splits by name, class names, per-channel mean and std of the images / 255."""

    name: str
    splits: dict[str, Split]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment

    @property
    def channels(self) -> int:
        return self.splits["train"].images.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width


def list_data() -> list[tuple[str, str]]:
    """(name, one line) of every data set of images."""
    DATA_SETS.complete()
    return [(name, found.summary) for name, found in DATA_SETS.items() if found.wing == "vision"]


def load_data(name: str, request: Request | None = None) -> VisionData:
    """Load a data set by name and split it.

    Raises ConfigError for an unknown name, DataError where files are missing or broken, a split would
    be empty, or more images are asked for than there are.
    """
    known = [own for own, _ in list_data()]
    if name not in known:
        raise ConfigError(
            f"data.name {name!r}: unknown; use one of {', '.join(known)}{near_miss(name, known)}"
        )
    request = request or Request()
    if request.root is not None and name != "digits" and not request.root.is_dir():
        raise DataError(f"data.root {str(request.root)!r}: no such folder")
    with named_errors("data_set", name):
        found = DATA_SETS.source(name)(request)
    source = found if isinstance(found, Source) else completed(name, found, request)
    if not isinstance(source.train, FolderSource):
        for field in ("resize", "skip_corrupt"):
            if getattr(request, field):
                raise ConfigError(f"data.{field}: only for folders of images, so {name!r} does not use it")
    _warn_of_single_images(source)
    return _split(source, request)


def _warn_of_single_images(source: Source) -> None:
    counts = torch.bincount(source.train.labels, minlength=len(source.classes)).tolist()
    single = [name for name, count in zip(source.classes, counts, strict=False) if count == 1]
    if single:
        names = listed([repr(name) for name in single])
        what = (
            f"the classes {names} have one image each"
            if len(single) > 1
            else f"the class {names} has one image"
        )
        message = f"{source.name}: {what}: it is in one split only, so it is learned or measured, never both"
        warnings.warn(message, DataWarning, stacklevel=3)


def _split(source: Source, request: Request) -> VisionData:
    """Draw the four splits; see the module's text for the order."""
    generator = torch.Generator().manual_seed(request.seed)
    pool = torch.randperm(len(source.train.labels), generator=generator)
    defaults: dict[str, int | None] = {"validation": source.validation, "calibration": source.calibration}
    defaults |= {"train": None, "test": None if source.test is not None else source.held_out}
    chosen: dict[str, Tensor] = {}
    order = ("test", "validation", "calibration", "train")
    for split in order:
        asked = request.size(split)
        size = defaults[split] if asked is None else asked
        official = split == "test" and source.test is not None
        if official:
            assert source.test is not None
            available = torch.randperm(len(source.test.labels), generator=generator)
        else:
            available = pool
        size = len(available) if size is None else size
        if size > len(available):
            raise DataError(
                f"data.{split}: {size} images asked for, {len(available)} available in {source.name}"
            )
        if size < 1:
            raise DataError(
                f"data.{split}: the split is empty; {len(available)} images available in {source.name}"
            )
        chosen[split] = available[:size]  # in drawn order: the first images of a split are of all classes
        if not official:
            pool = pool[size:]
    splits, broken = {}, set[Path]()
    for name in SPLITS:
        part = source.test if name == "test" and source.test is not None else source.train
        if isinstance(part, FolderSource):
            images, labels, lost = part.decode(chosen[name])
            broken.update(lost)
            splits[name] = Split(images, labels)
        else:
            splits[name] = Split(part.images[chosen[name]], part.labels[chosen[name]])
    if broken:
        _refuse_or_report(source.name, sorted(broken), request.skip_corrupt)
    empty = next((name for name in SPLITS if not len(splits[name].labels)), None)
    if empty is not None:
        raise DataError(f"data.{empty}: none of {len(chosen[empty])} images can be decoded")
    return VisionData(source.name, splits, source.classes, source.mean, source.std, source.augment)


def _refuse_or_report(name: str, broken: list[Path], skip: bool) -> None:
    """DataError for images that cannot be decoded, or a DataWarning where they are left out."""
    head = f"{name}: {len(broken)} image{'s' * (len(broken) > 1)} cannot be decoded"
    names = listed([str(path) for path in broken])
    if skip:
        warnings.warn(f"{head}, left out: {names}", DataWarning, stacklevel=4)
        return
    reason = ""
    try:
        open_image(broken[0])
    except UndecodableImage as error:
        reason = str(error).partition(": cannot be decoded")[2]
    raise DataError(f"{head}: {names}{reason}; set data.skip_corrupt=true to leave them out")


def _digits(request: Request) -> Source:
    """1,797 handwritten digits of 8x8 pixels inside of scikit-learn (grey levels 0..16, scaled by 15)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images * 15.0).round().to(torch.uint8)[:, None]
    images = resized(images, request.image_size)
    train = Split(images, torch.from_numpy(raw.target).long())
    names = tuple(str(i) for i in range(10))
    mean, std = (0.2873,), (0.3539,)
    return Source("digits", train, None, names, mean, std, Augment(1, False), 400, 200, held_out=397)


_FASHION_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def _fashion_mnist(request: Request) -> Source:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): the four idx files, gzipped or not."""
    cached = cache_folder() / "data"
    roots = [request.root] if request.root else [_DEBIAN_FASHION, cached]
    folder = _fashion_folder(roots)
    if folder is None and request.download:
        _download("FashionMNIST", request.root or cached)
        folder = _fashion_folder(roots)
    if folder is None:
        where = " or ".join(str(r) for r in roots)
        raise DataError(
            f"fashion_mnist: train-images-idx3-ubyte.gz and its three companions not found in {where}; install "
            "the Debian package dataset-fashion-mnist, set data.root, or set data.download=true"
        )
    parts = []
    for images_name, labels_name in _FASHION_FILES:
        images = resized(_idx(folder, images_name, 3)[:, None], request.image_size)
        labels = _idx(folder, labels_name, 1).long()
        if len(images) != len(labels):
            raise DataError(f"fashion_mnist: {len(images)} images but {len(labels)} labels in {folder}")
        parts.append(Split(images, labels))
    return Source(
        "fashion_mnist", parts[0], parts[1], _FASHION_CLASSES, (0.286,), (0.353,), Augment(2, True), 5000, 1000
    )  # fmt: skip


def _fashion_folder(roots: list[Path]) -> Path | None:
    for root in roots:
        for folder in (root, root / "FashionMNIST" / "raw"):
            names = [n for pair in _FASHION_FILES for n in pair]
            if all((folder / n).is_file() or (folder / f"{n}.gz").is_file() for n in names):
                return folder
    return None


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Read an idx file of unsigned bytes: 2 zero bytes, 8, number of dimensions, their sizes, the data."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated or not a gzip file ({error})") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: not an idx file of {dimensions} dimensions of bytes")
    shape = np.frombuffer(content, ">i4", dimensions, 4).astype(int)
    if len(content) != start + int(shape.prod()):
        raise DataError(f"{path}: truncated ({len(content)} bytes, expected {start + int(shape.prod())})")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _cifar(kind: str) -> Callable[[Request], Source]:
    """CIFAR-10 or CIFAR-100: torchvision's python batches (checksums verified), or an image folder."""

    def read(request: Request) -> Source:
        name = kind.lower()
        root = request.root or cache_folder() / "data"
        if (root / "train").is_dir():
            return _folder_source(name, root, request, Augment(4, True))
        if request.download:
            _download(kind, root)
        parts, classes = _cifar_batches(kind, root, request)
        return Source(
            name, parts[0], parts[1], classes, IMAGENET_MEAN, IMAGENET_STD, Augment(4, True), 5000, 1000
        )

    return read


def _cifar_batches(kind: str, root: Path, request: Request) -> tuple[list[Split], tuple[str, ...]]:
    from torchvision import datasets

    folder = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[kind]
    parts = []
    classes: tuple[str, ...] = ()
    for train in (True, False):
        try:
            # torchvision checks the md5 of every file before it unpickles it.
            raw = getattr(datasets, kind)(str(root), train=train, download=False)
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(
                f"{kind.lower()}: {root} holds neither {folder} (complete, from torchvision) nor the folders "
                "train/<class> and test/<class>; set data.root, or set data.download=true"
            ) from error
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Split(resized(images, request.image_size), torch.tensor(raw.targets)))
        classes = tuple(raw.classes)
    return parts, classes


def _download(kind: str, root: Path) -> None:
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        getattr(datasets, kind)(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{kind}: the download into {root} failed: {str(error).splitlines()[0]}") from error


def _image_folder(request: Request) -> Source:
    """A folder of images: <class>/*.jpg, or train/<class>/ and test/<class>/ (or val/<class>/)."""
    if request.root is None:
        raise DataError("image_folder: set data.root to the folder that holds train/<class>/ or <class>/")
    return _folder_source("image_folder", request.root, request, None)


def _folder_source(name: str, root: Path, request: Request, augment: Augment | None) -> Source:
    cache = cache_folder() / "data"
    official = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    has_train = (root / "train").is_dir()
    read = partial(
        read_folder,
        image_size=request.image_size,
        cache=cache,
        shorter=request.resize,
    )
    train = read(root / "train" if has_train else root)
    test = read(official) if has_train and official else None
    if test is not None and test.classes != train.classes:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise DataError(f"{name}: {root}: {odd[0]!r} is a class of only one of train and {official}")
    if augment is None:
        augment = Augment(max(1, train.size // 8), True)
    count = len(train.labels)
    return Source(
        name, train, test, train.classes, IMAGENET_MEAN, IMAGENET_STD, augment, **shares(count)
    )  # fmt: skip


for _name, _summary, _read in (
    ("digits", "1,797 handwritten digits, 8x8, inside of scikit-learn", _digits),
    (
        "fashion_mnist",
        "70,000 grey 28x28 images of clothes (Debian package or torchvision)",
        _fashion_mnist,
    ),
    (
        "cifar10",
        "60,000 colour 32x32 images, 10 classes (torchvision's files or an image folder)",
        _cifar("CIFAR10"),
    ),
    ("cifar100", "60,000 colour 32x32 images, 100 classes (the same)", _cifar("CIFAR100")),
    (
        "image_folder",
        "your own images: data.root with train/<class>/ and test/<class>/, or <class>/",
        _image_folder,
    ),
):
    DATA_SETS[_name] = Named(_name, _summary, _read, "vision")
