"""Settings that make a shipped config short enough for one core, where several scripts measure the same workload."""

from __future__ import annotations

FASHION = (
    *("data.train=6000", "data.validation=500", "data.test=2000", "score.samples=300"),
    "model.train.epochs=6",
)
CIFAR = (
    *("model.train.epochs=3", "model.train.lr=0.01", "data.train=3000", "data.calibration=128"),
    *("data.validation=500", "data.test=2000", "score.samples=300"),
)
