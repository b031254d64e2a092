"""Detection as a task: boxes with classes, compared by what a detector's heads say before boxes are chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..utils.pytrees import Inputs, call, to_device
from ..workloads.metrics import Meter, Read, Targets, TorchMeter, TorchMetric, make
from ..workloads.tasks.base import Outputs, Scale, TaskType, bernoulli_divergence, task_type
from ..workloads.tasks.outputs import Choice

# Imported by the functions that need it: it takes seconds, and every command loads the tasks.
if TYPE_CHECKING:
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

Boxes = list[dict[str, Tensor]]
_HOME = "torchvision.models.detection"
# Of a proposal or anchor that the dense model takes for background next to certainly.
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Stage:
    """What one head of a detector says of the anchors or proposals of each image.

    ``logits`` (A, K) and ``boxes`` (A, B), one pair an image; ``softmax``: whether the K classes exclude each other,
    the first of them being the background.
    """

    softmax: bool
    logits: list[Tensor]
    boxes: list[Tensor]


@dataclass(frozen=True)
class Detected:
    """A detector's answer, boxes for each image or its losses, and what its heads said on the way.

    ``proposals`` are those of a detector of two stages, for which its second one was asked.
    """

    answer: Any
    stages: list[Stage] = field(default_factory=list)
    proposals: list[Tensor] = field(default_factory=list)


@task_type(
    "boxes: images in, a list of dicts {boxes, labels, scores} out (torchvision's detectors)",
    name="detection",
)
class Detection(TaskType):
    """A list of images in; out come boxes (``{boxes, labels, scores}`` an image), in train mode a dict of losses.

    The divergence compares, anchor by anchor, what the heads say before boxes are chosen: KL(dense || pruned) of the
    classes, once as the mean over all anchors and once over those that the dense model takes for objects, and the
    squared difference of the box offsets, over their variance on the validation split. A second stage (Faster R-CNN) is
    asked for the dense model's proposals. Of a detector that is none of torchvision's, the dense model's boxes are
    looked for among the pruned one's: 1 - IoU, with the difference of their scores. The loss is the sum of the model's
    losses, the metric mAP by torchmetrics (extra `metrics`). Distillation is the divergence of the heads; masks and
    key points are learned and measured by the losses only.
    """

    metric_name = "mAP"
    own_pass = True

    def forward(self, model: nn.Module, inputs: Inputs, like: Outputs = None) -> Outputs:
        return _asked(model, lambda: call(model, inputs), like)

    def forward_for_loss(
        self, model: nn.Module, inputs: Inputs, targets: Targets, like: Outputs = None
    ) -> Outputs:
        with _losing(model):
            return _asked(model, lambda: _losses(model, inputs, targets), like)

    def plain(self, outputs: Outputs) -> Outputs:
        return outputs.answer if isinstance(outputs, Detected) else outputs

    def read(self, outputs: Outputs, choice: Choice | None = None) -> Read:
        if choice is not None:
            raise DataError(
                f"output={choice!r}: the task 'detection' reads all that a detector returns; leave it out"
            )
        return outputs

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        answer = self.plain(read)
        if not _are_boxes(answer, "boxes", "labels", "scores"):
            return (
                "the task 'detection' needs a list of dicts {boxes, labels, scores} from the model in eval mode, got "
                f"{type(answer).__name__}"
            )
        if not own_loss and not _are_boxes(targets, "boxes", "labels"):
            return "the task 'detection' needs a list of dicts {boxes, labels} as targets, one an image"
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        losses = self.plain(read)
        if not isinstance(losses, Mapping):
            raise DataError(
                "task 'detection': the model gives losses in train mode only; see Workload.batch_loss"
            )
        return torch.stack(list(losses.values())).sum()

    def metric(self, read: Read, targets: Targets) -> Tensor:
        meter = self.meter()
        meter.update(read, targets, len(targets))
        return torch.tensor(meter.value() * len(targets))

    def meter(self) -> Meter:
        chosen = TorchMetric("mAP")
        # That only the first 100 boxes of an image count is what mAP means.
        found = make(chosen, {})
        found.warn_on_many_detections = False
        return TorchMeter(found, self.for_metric, chosen.picked, chosen.name)

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        host = torch.device("cpu")
        return to_device(self.plain(read), host), to_device(targets, host)

    def kept(self, read: Read) -> Read:
        return read

    def part(self, kept: Read, samples: slice) -> Read:
        stages = [Stage(s.softmax, s.logits[samples], s.boxes[samples]) for s in kept.stages]
        return Detected(kept.answer[samples], stages, kept.proposals[samples])

    def scale(self, kept: Sequence[Read]) -> Scale:
        """The variance of each stage's box offsets; `kept` are `Detected`."""
        found = []
        for number in range(len(kept[0].stages)):
            every = torch.cat([boxes.flatten() for part in kept for boxes in part.stages[number].boxes])
            found.append(float(every.double().var(unbiased=False)) if every.numel() else 1.0)
        return [value if value > 0 else 1.0 for value in found]

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        if not dense.stages:
            return torch.stack([_missed(a, b) for a, b in zip(dense.answer, self.plain(read), strict=True)])
        return _apart(dense.stages, read.stages, scale)

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        if not teacher.stages:
            raise DataError(
                "task 'detection': only torchvision's detectors can be distilled; set finish.distill=false"
            )
        return _apart(teacher.stages, read.stages, self.scale([teacher]), temperature).mean()


def _asked(model: nn.Module, run: Callable[[], Outputs], like: Outputs) -> Detected:
    """The answer of a detector with what its heads say; ``like`` is the dense model's."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.ssd import SSD

    if isinstance(model, GeneralizedRCNN):
        return _two_stages(model, run, like)
    if not isinstance(model, (SSD, RetinaNet, FCOS)):
        return Detected(run())
    with _noting(model.head) as seen:
        answer = run()
    heads = cast("dict[str, Tensor]", seen[0][1])
    boxes = heads["bbox_regression"]
    stages = [Stage(isinstance(model, SSD), list(heads["cls_logits"]), list(boxes))]
    if "bbox_ctrness" in heads:
        stages.append(Stage(False, list(heads["bbox_ctrness"]), list(boxes[..., :0])))
    return Detected(answer, stages)


def _two_stages(model: GeneralizedRCNN, run: Callable[[], Outputs], like: Outputs) -> Detected:
    from torchvision.models.detection.roi_heads import RoIHeads

    with _noting(model.rpn.head) as first, _noting(model.roi_heads) as second:
        answer = run()
    objectness, offsets = cast("tuple[list[Tensor], list[Tensor]]", first[0][1])
    features, proposals, shapes = second[0][0][:3]
    wanted = cast("list[Tensor]", proposals if like is None else like.proposals)
    roi = model.roi_heads
    assert isinstance(roi, RoIHeads)
    found = roi.box_predictor(roi.box_head(roi.box_roi_pool(features, wanted, shapes)))
    counts = [len(part) for part in wanted]
    logits, boxes = (list(part.split(counts)) for part in found)
    first_stage = Stage(False, _flat(objectness, 1), _flat(offsets, 4))
    return Detected(answer, [first_stage, Stage(True, logits, boxes)], [p.detach() for p in wanted])


def _flat(maps: Sequence[Tensor], size: int) -> list[Tensor]:
    """Maps (N, A * size, H, W) of all levels as one (anchors, size) an image."""
    levels = [m.unflatten(1, (-1, size)).movedim(2, -1).flatten(1, -2) for m in maps]
    return list(torch.cat(levels, dim=1))


@contextlib.contextmanager
def _noting(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], object]]]:
    """The arguments and the outputs of each call of a module."""
    seen: list[tuple[tuple[Any, ...], object]] = []
    handle = module.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs, outputs)))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _losing(model: nn.Module) -> Iterator[None]:
    """While active a detector in eval mode gives losses: norms and dropout stay as they are, and what it samples does
    not depend on what was drawn before."""
    if model.training:
        yield
        return
    modules = [m for m in model.modules() if m is model or type(m).__module__.startswith(_HOME)]
    before = [m.training for m in modules]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for module in modules:
                module.training = True
            yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _losses(model: nn.Module, inputs: Inputs, targets: Targets) -> Outputs:
    if isinstance(inputs, dict):
        return model(**inputs, targets=targets)
    return model(*(inputs if isinstance(inputs, tuple) else (inputs,)), targets)


def _are_boxes(answer: object, *names: str) -> bool:
    return isinstance(answer, (list, tuple)) and all(
        isinstance(image, Mapping) and all(name in image for name in names) for image in answer
    )


def _apart(
    dense: Sequence[Stage],
    other: Sequence[Stage],
    variances: Sequence[float] | None,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of each image, (N,), summed over the stages."""
    total = []
    for number, (a, b) in enumerate(zip(dense, other, strict=True)):
        variance = 1.0 if variances is None else variances[number]
        images = zip(a.logits, b.logits, a.boxes, b.boxes, strict=True)
        found = [
            _stage_apart(a.softmax, logits, ours, boxes, other_boxes, variance, temperature)
            for logits, ours, boxes, other_boxes in images
        ]
        total.append(torch.stack(found))
    return torch.stack(total).sum(dim=0)


def _stage_apart(
    softmax: bool,
    dense: Tensor,
    other: Tensor,
    boxes: Tensor,
    other_boxes: Tensor,
    variance: float,
    temperature: float,
) -> Tensor:
    """The divergence of one stage on one image: logits (A, K), boxes (A, B)."""
    if not len(dense):
        return other.sum() * 0.0
    dense, t = dense.float(), temperature
    if softmax:
        logs = F.log_softmax(dense / t, dim=-1)
        each = (logs.exp() * (logs - F.log_softmax(other.float() / t, dim=-1))).sum(dim=-1)
        weight = 1 - dense.softmax(dim=-1)[:, 0]
    else:
        each = bernoulli_divergence(dense / t, other / t).sum(dim=-1)
        weight = dense.sigmoid().amax(dim=-1)
    weight = weight.detach().clamp_min(_LEAST_WEIGHT)
    weight = weight / weight.sum()
    apart = each.mean() * t**2 + (weight * each).sum() * t**2
    if boxes.shape[1]:
        apart = apart + (weight * (other_boxes.float() - boxes.float()).square().mean(dim=1)).sum() / variance
    return apart


def _missed(dense: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """How much of the dense model's boxes on an image is not among another's, 0 to 1, weighted by their scores."""
    from torchvision.ops import box_iou

    scores = dense["scores"].double()
    if not len(scores) or not len(other["scores"]):
        return torch.ones((), dtype=torch.float64) * (len(scores) != len(other["scores"]))
    same = dense["labels"][:, None] == other["labels"][None]
    near = 1 - (scores[:, None] - other["scores"].double()[None]).abs()
    found = (box_iou(dense["boxes"], other["boxes"]).double() * near * same).amax(dim=1)
    return (scores * (1 - found)).sum() / scores.sum().clamp_min(1e-12)
