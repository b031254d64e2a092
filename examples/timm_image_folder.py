"""A model of timm on a folder of images, from settings alone: no code of a model, no loader.

    python examples/timm_image_folder.py [FOLDER]

Needs the extra `timm`. For your images replace `write_images` by the path of a folder with `train/<class>/` and
`test/<class>/`, and `model.train` by `model.checkpoint`: a file of your trainer, or `model.weights`: published ones.
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import rlprune

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/timm")


def write_images(root: Path, classes: int = 4) -> Path:
    """The digits 0 to 3 as PNG files of 32 x 32 pixels, in a folder a class."""
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        if label < classes:
            split = "test" if number % 5 == 0 else "train"
            path = root / split / f"digit{label}" / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = (pixels.reshape(8, 8) * 15).astype("uint8")
            Image.fromarray(grey).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(path)
    return root


def main() -> None:
    config = rlprune.Config.from_dict(
        {
            "name": "timm-digits",
            "model": {
                "name": "timm:test_resnet",
                "train": {"epochs": 6, "lr": 0.02, "batch_size": 32},
            },
            "data": {
                "name": "image_folder",
                "root": str(write_images(FOLDER / "images")),
                "image_size": 32,
                "calibration": 64,
                "validation": 100,
            },
            "budget": {"target": "50%", "metric": "macs"},
            "search": {"evaluations": 40, "baselines": ["random"]},
            "finish": {"epochs": 2, "candidates": 2},
            "threads": 1,
        }
    )
    result = rlprune.train(config, FOLDER / "run", resume=True)
    print(result)
    rows = {row["method"]: row for row in result.table}
    dense, ours = rows["dense"], rows["ppo"]
    print(
        f"{config.model.name}: {ours['macs'] / dense['macs']:.1%} of the MACs, test accuracy "
        f"{ours['test_finetuned']:.3f} (dense {dense['test_finetuned']:.3f})"
    )


if __name__ == "__main__":
    main()
