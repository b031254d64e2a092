"""A vision transformer of transformers: heads and MLP neurons are cut, the class stays ViTForImageClassification.

    python examples/hf_vit.py

`ViTForImageClassification.from_pretrained(...)` goes the same way; a small one is trained on digits here.
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import ViTConfig, ViTForImageClassification

import rlprune


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 8 - 1).float().view(-1, 1, 8, 8), torch.tensor(labels))
    parts = random_split(data, [1000, 197, 300, 300], torch.Generator().manual_seed(0))
    names = ("train", "calibration", "validation", "test")
    loaders = {
        name: DataLoader(part, 50, shuffle=name == "train") for name, part in zip(names, parts, strict=True)
    }
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=96, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(10):
        for inputs, targets in loaders["train"]:
            optimizer.zero_grad()
            model(inputs, labels=targets).loss.backward()
            optimizer.step()
    result = rlprune.search(
        model.eval(), torch.zeros(1, 1, 8, 8), loaders=loaders, budget="60%", evaluations=40,
        settings={"finish": {"epochs": 3, "lr": 0.01}, "search": {"baselines": []}},
    )  # fmt: skip
    for group in zip(result.plan.space.groups, result.plan.widths, strict=True):
        print(f"{group[0].name:<48} {group[0].kind:<12} {group[1]:>4} of {group[0].width}")
    assert isinstance(result.model, ViTForImageClassification)
    rows = {row["method"]: row for row in result.table}
    dense, ours = rows["dense"], rows["ppo"]
    print(
        f"ViT: {ours['macs'] / dense['macs']:.1%} of the MACs, test accuracy {ours['test_finetuned']:.3f} "
        f"(dense {dense['test_finetuned']:.3f})"
    )


if __name__ == "__main__":
    main()
