"""What the operations of aten do to labels, by name. What has no rule here is taken for element by element where torch
says so, and protects its channels otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .channel_sets import CONSTANT
from .contractions import batched_product, convolution, deformable, linear, product
from .flow import Operand, Step, moved_right, tensors_in
from .labels import Labels, first_along, narrowed, settled
from .sizes import lists_of, numbers_of

FLEXIBLE = frozenset(
    {
        *(
            "zeros",
            "ones",
            "full",
            "empty",
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "empty_strided",
        ),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
    }
)
"""They make tensors of one value: whatever size is asked for, the model goes on to work."""


def _same(step: Step) -> None:
    """The same elements, copied or in another format."""
    out = next(tensors_in(step.out))
    found = step.flow.of(step.args[0])
    if len(found) == 1 and found[0].constant:
        found = [Labels(torch.full(out.shape, CONSTANT), frozenset())]
    step.flow.put(out, found)


def _nothing(step: Step) -> None:
    """Filled with one value, or asked for what says nothing of channels."""


def _read(step: Step) -> None:
    for tensor in step.given:
        for labels in step.flow.of(tensor):
            step.flow.fix(labels, f"its value decides what {step.flow.place()} does in Python")


def _reduced(step: Step, dims: Sequence[int], verb: str) -> None:
    """Over some dimensions, which the results keep or lose."""
    source = step.args[0]
    found = [step.along(labels, dims, verb) for labels in step.flow.of(source)]
    over = {d % source.ndim for d in dims}
    for out in tensors_in(step.out):
        results = []
        for labels in found:
            if labels.varies and labels.varies <= over:
                continue  # the channels themselves are gone
            of = first_along(labels.of, over)
            if out.ndim != source.ndim:
                of = of[tuple(0 if d in over else slice(None) for d in range(of.ndim))]
            results.append(settled(step.flow.sets, of, labels.origin))
        if out.ndim:
            step.flow.put(out, [r for r in results if r.varies or r.constant])


def _dims(step: Step, place: int) -> list[int]:
    given = step.kwargs.get("dim", step.args[place] if len(step.args) > place else None)
    if isinstance(given, int):
        return [given]
    return list(given) if given else list(range(step.args[0].ndim))


def _reduction(step: Step) -> None:
    if len(step.args) > 1 and isinstance(step.args[1], Tensor):
        step.pointwise()
    else:
        _reduced(step, _dims(step, 2 if "norm" in step.name else 1), "reduces over")


def _softmax(step: Step) -> None:
    step.flow.put(
        step.out, [step.along(s, [step.args[1]], "takes a softmax over") for s in step.flow.of(step.args[0])]
    )


def _scan(step: Step) -> None:
    """Sorted, summed up or picked along one dimension."""
    place = 2 if step.name == "topk" else 1
    dim = step.kwargs.get("dim", step.args[place] if len(step.args) > place else -1)
    found = [
        step.along(labels, [dim if isinstance(dim, int) else -1], "runs along")
        for labels in step.flow.of(step.args[0])
    ]
    for out in tensors_in(step.out):
        _spread(step, out, found)


def _spread(step: Step, out: Tensor, found: Sequence[Labels]) -> None:
    """Labels that keep their dimensions in a result of other sizes, where they do not vary along these."""
    results = []
    for labels in found:
        changed = [d for d in range(out.ndim) if out.shape[d] != labels.of.shape[d]]
        if labels.varies & set(changed):
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} changes their number")
            continue
        results.append(
            Labels(first_along(labels.of, changed).expand(out.shape), labels.varies, labels.origin)
        )
    step.flow.put(out, results)


def _spatial(step: Step) -> None:
    """Over windows of the last dimensions: pools, interpolation, padding by values of the image."""
    count = next(int(c) for c in step.name if c.isdigit())
    source = step.args[0]
    dims = list(range(source.ndim - count, source.ndim))
    found = [step.along(labels, dims, "runs over") for labels in step.flow.of(source)]
    for labels in found:
        if labels.varies & set(dims) and labels.varies - set(dims):
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} runs over them")
    for out in tensors_in(step.out):
        _spread(step, out, [f for f in found if not f.varies & set(dims)])
    _protect(step, [t for t in step.given if t is not source])


def _regions(step: Step) -> None:
    """Windows of a feature map (N, C, H, W) for each of K boxes: (K, C, h, w)."""
    source, boxes = step.args[0], step.args[1]
    results = []
    out = next(tensors_in(step.out))
    for labels in step.flow.of(source):
        if labels.varies == {1}:
            results.append(
                Labels(first_along(labels.of, (0, 2, 3)).expand(out.shape), labels.varies, labels.origin)
            )
        else:
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} cannot be followed")
    step.flow.put(out, results)
    _protect(step, [boxes])


def _protect(step: Step, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        for labels in step.flow.of(tensor):
            if labels.varies:
                step.flow.fix(labels, f"{step.full} in {step.flow.place()} reads them as places")


def _in_double(step: Step) -> None:
    """Moves that have no version for whole numbers."""
    outs = list(tensors_in(step.out))
    for out in outs[:1]:
        results = []
        for labels in step.flow.of(step.args[0]):
            moved = step.operation(labels.of.double(), *step.args[1:], **step.kwargs)
            results.append(settled(step.flow.sets, moved.round().long(), labels.origin))
        step.flow.put(out, results)
        step.flow.note_sizes(out, results)


def _padded(step: Step) -> None:
    """Constants around: new channels where channels are padded, more places of the same ones elsewhere."""
    source, pads = step.args[0], list(step.args[1])
    out, flow = step.out, step.flow
    around = {
        source.ndim - 1 - i // 2: pads[i : i + 2] for i in range(0, len(pads), 2) if any(pads[i : i + 2])
    }
    results = []
    for labels in flow.of(source):
        touched = labels.varies & set(around)
        of = labels.of
        if not touched:
            results.append(Labels(first_along(of, around).expand(out.shape), labels.varies, labels.origin))
            continue
        if len(labels.varies) > 1 or min(min(p) for p in around.values()) < 0:
            moved = step.operation(of, pads, CONSTANT)
            results.append(settled(flow.sets, moved))
            continue
        (dim,) = touched
        before, after = (flow.sets.new(n) for n in around[dim])
        row = np.concatenate([before, labels.along(dim), after])
        flow.pads[flow.stack[-1][0]] = (before, after)
        sizes = [1] * out.ndim
        sizes[dim] = len(row)
        results.append(settled(flow.sets, torch.from_numpy(row).view(sizes).expand(out.shape)))
    flow.put(out, results)


def _cat(step: Step) -> None:
    parts = [t for t in step.args[0] if t.ndim and t.numel()]
    dim = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else 0) % step.out.ndim
    _together(step, parts, lambda rows: torch.cat(rows, dim), dim)


def _stack(step: Step) -> None:
    dim = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else 0)
    _together(step, list(step.args[0]), lambda rows: torch.stack(rows, dim), None)


def _together(
    step: Step, parts: Sequence[Tensor], join: Callable[[list[Tensor]], Tensor], dim: int | None
) -> None:
    """Tensors side by side along ``dim``, or along a new dimension.

    What they share in the other dimensions stays equal, so that a channel goes from all of them.
    """
    flow = step.flow
    if not parts:
        return
    found = [flow.of(part) for part in parts]
    slots = max((len(f) for f in found), default=0)
    if slots > 1:
        # Which of them belong together is told by the dimensions that they vary along.
        kinds = sorted({tuple(sorted(labels.varies)) for f in found for labels in f if labels.varies})
        rows_of = [
            [next((s for s in f if tuple(sorted(s.varies)) == kind), None) for f in found] for kind in kinds
        ]
    else:
        rows_of = [[f[0] if f else None for f in found]]
    results = []
    for row in rows_of:
        tensors = []
        for part, labels in zip(parts, row, strict=True):
            if labels is None:
                tensors.append(torch.full(part.shape, CONSTANT, dtype=torch.int64))
            else:
                flow.used(labels, "pass")
                tensors.append(labels.of)
        if dim is None or not any(labels is not None and dim in labels.varies for labels in row):
            first = [t if dim is None else first_along(t, (dim,)) for t in tensors]
            for other in first[1:]:
                a, b = torch.broadcast_tensors(narrowed(first[0]), narrowed(other))
                flow.sets.join(a.contiguous().numpy(), b.contiguous().numpy())
        results.append(settled(flow.sets, join(tensors)))
    flow.put(step.out, results)
    flow.note_sizes(step.out, results)


def _picked(step: Step) -> None:
    """Places picked by their numbers, which would be those of other channels in a cut model."""
    source = step.args[0]
    if step.name in ("index", "_unsafe_index"):
        dims = {d for d, index in enumerate(step.args[1]) if index is not None}
    else:
        dims = {step.args[1] % source.ndim}
    for labels in step.flow.of(source):
        if labels.varies & dims:
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} picks them by their numbers")
    step.moved()


def _split(step: Step) -> None:
    """Pieces of one size stay of one size: a unit is a channel of each. Pieces by a list of sizes go their own ways."""
    step.moved()
    flow, pieces = step.flow, list(tensors_in(step.out))
    flow.note_sizes(step.args[0], flow.of(step.args[0]))  # a size that the pieces' is computed from
    by_list = step.name.endswith("_with_sizes")
    dim = step.kwargs.get("dim", step.args[2] if len(step.args) > 2 else 0) % step.args[0].ndim
    rows = [[labels for labels in flow.of(piece) if dim in labels.varies] for piece in pieces]
    if not all(len(row) == 1 for row in rows) or len(pieces) < 2:
        return
    sizes = tuple(int(piece.shape[dim]) for piece in pieces)
    name, module = flow.stack[-1]
    if by_list and (
        any(lists_of(module, sizes)) or len(set(sizes)) > 1 or not any(numbers_of(module, sizes[0]))
    ):
        flow.splits.append((name, sizes, [row[0].along(dim) for row in rows]))
    elif len(set(sizes)) == 1:
        flow.read |= {(name, path) for path in numbers_of(module, sizes[0])}
        for piece, row in zip(pieces[1:], rows[1:], strict=True):
            others = [labels for labels in flow.of(piece) if dim not in labels.varies]
            flow.put(piece, [*others, flow.join(rows[0][0], row[0])])


def _written(step: Step) -> None:
    """Values written to some places of a tensor, whose other places keep theirs."""
    flow, (target, indices, values) = step.flow, step.args[:3]
    places = tuple(slice(None) if index is None else index for index in indices)
    into, new = flow.of(target), [labels for labels in flow.of(values) if labels.varies]
    if len(into) > 1 or len(new) > 1 or any(step.kwargs.values()) or any(step.args[3:4]):
        step.unknown()
        return
    whole = into[0].of.clone() if into else torch.full(target.shape, CONSTANT)
    whole = whole.contiguous()
    whole[places] = new[0].of if new else CONSTANT
    flow.put(step.out, [settled(flow.sets, whole)])


def _pixel_shuffle(step: Step) -> None:
    """(N, C r r, H, W) -> (N, C, H r, W r): the r * r channels behind one go together."""
    source, factor = step.args[0], int(step.args[1]) ** 2
    results = []
    for labels in step.flow.of(source):
        n, c, h, w = source.shape
        split = settled(step.flow.sets, labels.of.reshape(n, c // factor, factor, h, w))
        joined = step.along(split, (2,), "shuffles")
        of = first_along(joined.of, (2, 3, 4))[:, :, 0]
        results.append(settled(step.flow.sets, of.expand(step.out.shape)))
    step.flow.put(step.out, results)


def _embedding(step: Step) -> None:
    results = []
    for labels in step.flow.of(step.args[0]):
        if labels.varies == {1}:
            step.flow.used(labels, "pass")
            row = torch.from_numpy(labels.along(1))
            results.append(Labels(row.expand(step.out.shape), frozenset({step.out.ndim - 1}), labels.origin))
    step.flow.put(step.out, results)


def _gated(step: Step) -> None:
    """One half times the sigmoid of the other."""
    dim = step.args[1] if len(step.args) > 1 else -1
    halves: list[list[Labels]] = [[], []]
    for labels in step.flow.of(step.args[0]):
        for half, part in zip(halves, labels.of.chunk(2, dim), strict=True):
            half.append(settled(step.flow.sets, part, labels.origin))
    shape = tuple(step.out.shape)
    step.flow.put(step.out, step.merged([Operand(half, shape) for half in halves]))


def _on_dim(step: Step, tensor: Tensor | None, dim: int, shape: Sequence[int]) -> Operand | None:
    """A vector's labels along one dimension of a shape."""
    if tensor is None or tensor.ndim != 1:
        return None
    sizes = [1] * len(shape)
    sizes[dim] = tensor.shape[0]
    found = [
        Labels(
            labels.of.reshape(sizes).expand(*shape), frozenset({dim} if labels.varies else ()), labels.origin
        )
        for labels in step.flow.of(tensor)
    ]
    return Operand(found, tuple(sizes))


def _batch_norm(step: Step) -> None:
    source, out = step.args[0], next(tensors_in(step.out))
    found = step.flow.of(source)
    vectors = [t for t in step.args[1:5] if isinstance(t, Tensor)]
    training = next((a for a in step.args[3:] if isinstance(a, bool)), False)
    if training:
        others = [d for d in range(source.ndim) if d != 1]
        found = [step.along(labels, others, "normalises over") for labels in found]
    operands = [Operand(found, tuple(source.shape)), *(_on_dim(step, v, 1, source.shape) for v in vectors)]
    step.flow.put(out, step.merged([o for o in operands if o is not None]))


def _layer_norm(step: Step) -> None:
    source, out = step.args[0], next(tensors_in(step.out))
    count = len(step.args[1])
    dims = list(range(source.ndim - count, source.ndim))
    found = [step.along(labels, dims, "normalises over") for labels in step.flow.of(source)]
    operands = [Operand(found, tuple(source.shape))]
    for weight in step.args[2:4]:
        if isinstance(weight, Tensor):
            shift = source.ndim - weight.ndim
            moved = [moved_right(labels, shift, source.shape) for labels in step.flow.of(weight)]
            operands.append(Operand(moved, (1,) * shift + tuple(weight.shape)))
    step.flow.put(out, step.merged(operands))


def _group_norm(step: Step) -> None:
    source, weight, bias, _, channels, _, groups = step.args[:7]
    out = next(tensors_in(step.out))
    found = []
    for labels in step.flow.of(source):
        split = labels.of.reshape(source.shape[0], groups, channels // groups, -1)
        inside = step.along(settled(step.flow.sets, split), (2, 3), "normalises over")
        found.append(settled(step.flow.sets, inside.of.reshape(source.shape), labels.origin))
        if labels.varies == {1}:
            row = found[-1].along(1)
            step.flow.sizes.append((step.flow.stack[-1][0], groups, row[:: channels // groups]))
    operands = [
        Operand(found, tuple(source.shape)),
        *(_on_dim(step, v, 1, source.shape) for v in (weight, bias)),
    ]
    step.flow.put(out, step.merged([o for o in operands if o is not None]))


_MOVES = """
    view _unsafe_view unsafe_view view_copy t transpose permute adjoint swapaxes movedim expand slice select narrow
    unbind squeeze unsqueeze squeeze_copy flip roll rot90 repeat unfold diagonal pixel_unshuffle channel_shuffle
    native_channel_shuffle tril triu alias detach
""".split()
_SAME = "clone _to_copy contiguous lift_fresh lift_fresh_copy native_dropout _pin_memory to".split()
_REDUCTIONS = """
    mean sum amax amin max min var std var_mean std_mean prod any all norm linalg_vector_norm logsumexp argmax argmin
    nansum nanmean median count_nonzero
""".split()
_SPATIAL = """
    max_pool1d max_pool2d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d
    mkldnn_adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d grid_sampler_2d grid_sampler_3d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
""".split()
# Element by element, where torch does not say so.
_POINTWISE = """
    masked_fill copy where _prelu_kernel lerp addcmul addcdiv hardswish hardsigmoid hardtanh elu leaky_relu silu mish
    relu relu6 gelu softplus softshrink hardshrink log_sigmoid_forward threshold celu selu rrelu clamp square
""".split()
_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm cudnn_batch_norm
    miopen_batch_norm _batch_norm_no_update _batch_norm_with_update
""".split()
RULES: dict[str, Callable[[Step], None]] = {
    **dict.fromkeys(_MOVES, Step.moved),
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes"), _split),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_SPATIAL, _spatial),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "topk", "logcumsumexp", "argsort", "kthvalue"), _scan),
    **dict.fromkeys(
        ("fill", "zero", "sym_size", "sym_numel", "_assert_async", "_assert_tensor_metadata"), _nothing
    ),
    **dict.fromkeys(("_local_scalar_dense", "equal", "is_nonzero"), _read),
    **dict.fromkeys(_POINTWISE, Step.pointwise),
    **dict.fromkeys(("index", "_unsafe_index", "index_select", "gather"), _picked),
    "im2col": _in_double,
    **dict.fromkeys(("index_put", "_index_put_impl"), _written),
    **dict.fromkeys(("roi_align", "ps_roi_align", "roi_pool"), _regions),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "pixel_shuffle": _pixel_shuffle,
    "constant_pad_nd": _padded,
    "cat": _cat,
    "stack": _stack,
    "glu": _gated,
    "embedding": _embedding,
    "convolution": convolution,
    "_convolution": convolution,
    "deform_conv2d": deformable,
    "linear": linear,
    **dict.fromkeys(("mm", "addmm", "_addmm_activation"), product),
    **dict.fromkeys(("bmm", "baddbmm"), batched_product),
}
