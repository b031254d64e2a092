"""Wrong cuts that look right at first sight: the proof has to see each of them, or the tracer has to follow it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlprune
from rlprune.errors import GraphError
from rlprune.pruning import PruningSpace
from rlprune.pruning.cost_terms import OUTSIDE
from rlprune.pruning.plan import Plan
from rlprune.tracing import count_macs
from rlprune.tracing.proof import Proof


class Rolled(nn.Module):
    """Channels that wrap around: exact as long as the last one stays."""

    def __init__(self, ban: bool = False, zero: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.ban = ban
        if zero:
            nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.second(self.first(x).roll(1, 1))))
        return y.masked_fill(torch.tensor([True, *[False] * 4]), -torch.inf) if self.ban else y


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(8, 4), nn.Linear(2, 5), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        half = x.shape[1] // 2
        return self.a(x[:, :half]) + self.b(x[:, half:])


class Tile(nn.Module):
    """A number that equals a width by chance, and that the example does not make it read."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 32
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > self.longest:
            x = F.interpolate(x, size=(self.longest, self.longest))
        return self.b(torch.relu(self.a(x)))


def names(space: PruningSpace) -> list[str]:
    return [group.name for group in space.groups]


def cut(space: PruningSpace, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    widths = np.maximum(space.minimums, space.widths // 2)
    kept = tuple(np.sort(rng.permutation(g.width)[:w]) for g, w in zip(space.groups, widths, strict=True))
    return Plan(space, widths, kept)


@pytest.mark.parametrize("made", [{}, {"ban": True}, {"zero": True}], ids=["plain", "infinite", "zero head"])
def test_channels_that_wrap_around_are_protected(made: dict[str, bool]) -> None:
    space = rlprune.trace(Rolled(**made), torch.randn(4, 8))
    assert names(space) == ["second"]
    assert space.protected["first"] == "the cut model differs from the masked dense model"


def test_halves_that_have_to_stay_even_are_protected() -> None:
    model, x = Halves().double(), torch.randn(3, 8).double()
    space = rlprune.trace(model, x)
    assert names(space) == ["first"] and space.protected["first"].startswith(
        "2 of 4 channels: the cut model fails"
    )
    plan = Plan(space, np.array([1]), (np.array([1]),))
    torch.testing.assert_close(rlprune.prune(model, plan)(x), rlprune.masked(model, plan)(x))


def test_a_number_that_is_not_needed_is_not_touched() -> None:
    model = Tile().double()
    space = rlprune.trace(model, torch.randn(1, 3, 16, 16).double())
    slim = rlprune.prune(model, cut(space))
    assert slim.longest == 32
    large = torch.randn(1, 3, 64, 64).double()
    torch.testing.assert_close(slim(large), rlprune.masked(model, cut(space))(large))


def test_a_fixed_matrix_in_a_buffer_is_cut_along() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.register_buffer("matrix", torch.randn(5, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.first(x)), self.matrix)

    model, x = Fixed().double().eval(), torch.randn(3, 8).double()
    space = rlprune.trace(model, x)
    slim = rlprune.prune(model, cut(space))
    assert slim.matrix.shape == (5, 8)
    torch.testing.assert_close(slim(x), rlprune.masked(model, cut(space))(x))


def test_a_transformer_encoder_takes_padded_batches_after_the_cut() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    x, padding = torch.randn(2, 6, 16).double(), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    before = copy.deepcopy(model)
    for inputs in ((x,), {"src": x, "src_key_padding_mask": padding}):
        space = rlprune.trace(model, inputs)
        assert sorted({g.kind for g in space.groups}) == ["attention", "linear"]
        slim = rlprune.prune(model, cut(space))
        masked = rlprune.masked(model, cut(space))
        with torch.no_grad():
            got, wanted = (m(x, src_key_padding_mask=padding) for m in (slim, masked))
        torch.testing.assert_close(got[~padding], wanted[~padding])
    # The model itself is as it was: its attention is torch's own.
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.use_nested_tensor == before.use_nested_tensor


@pytest.mark.parametrize("weights", [False, True], ids=["without weights", "with weights"])
def test_an_attention_whose_input_is_cut_runs(weights: bool) -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.attention(x, x, x, need_weights=weights)[0])

    model, x = Attentive().double().eval(), torch.randn(2, 5, 8).double()
    space = rlprune.trace(model, x)
    assert set(names(space)) == {"first", "attention", "attention.out_proj"}
    for group in range(len(space.groups)):
        widths = space.widths.copy()
        widths[group] //= 2
        plan = Plan(space, widths, tuple(np.arange(w) for w in widths))
        slim = rlprune.prune(model, plan)
        torch.testing.assert_close(slim(x), rlprune.masked(model, plan)(x))
        heads = {"first": (4, 8), "attention": (2, 16)}.get(space.groups[group].name, (4, 16))
        assert (slim.attention.num_heads, slim.attention.embed_dim) == heads


def test_a_detector_that_finds_nothing_is_compared_inside() -> None:
    class Finder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.scores = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.scores(torch.relu(self.second(self.first(x).roll(1, 1))))
            return scores[scores > 1e6]

    space = rlprune.trace(Finder(), torch.randn(4, 8))
    assert names(space) == ["second"]


def test_a_model_that_cannot_be_copied_and_one_that_fails_later_are_one_line() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.numbers = nn.Linear(3, 3), (n for n in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.calls = nn.Linear(3, 6), nn.Linear(6, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 4:
                raise SystemExit("enough")
            return self.last(self.first(x))

    with pytest.raises(GraphError, match="Held cannot be copied: TypeError"):
        rlprune.trace(Held(), torch.randn(1, 3))
    with pytest.raises(GraphError, match="tracing failed: SystemExit: enough"):
        rlprune.trace(Once(), torch.randn(1, 3))


def test_training_modes_are_put_back_by_the_modules_own_way() -> None:
    from rlprune.utils.modes import evaluating

    class Merged(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Merged:
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merged(3, 3), nn.Linear(3, 3)).train()
    model[1].eval()
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged and model[0].training and not model[1].training


class Attention(nn.Module):
    """Written as in timm: the width of all heads stands in an attribute of its own, and equals that of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.attn_dim = heads * self.head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * self.attn_dim), nn.Linear(self.attn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(mixed.reshape(b, n, self.inner(x)))

    def inner(self, x: Tensor) -> int:
        return self.attn_dim


class Stubborn(Attention):
    """Counts on as many channels in its heads as come in: it can lose none."""

    def inner(self, x: Tensor) -> int:
        return x.shape[-1]


class Blocks(nn.Module):
    def __init__(self, attention: type[Attention], depth: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList(attention(12, 3) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 12)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(self.norm(x))
            x = x + mlp(self.norm(x))
        return self.head(x.mean(dim=1))


def test_several_attributes_follow_the_heads_together() -> None:
    model = Blocks(Attention, 2).double()
    space = rlprune.trace(model, torch.randn(1, 4, 12).double())
    assert names(space) == ["attention.0.qkv", "mlp.0.0", "attention.1.qkv", "mlp.1.0"]
    plan = rlprune.make_plan(
        space, importance=[np.arange(g.width) for g in space.groups], widths=[1, 3, 2, 4]
    )
    slim = rlprune.prune(model, plan)
    first = slim.get_submodule("attention.0")
    assert (first.num_heads, first.head_dim, first.attn_dim) == (1, 4, 4)
    x = torch.randn(2, 4, 12).double()
    torch.testing.assert_close(slim(x), rlprune.masked(model, plan)(x), rtol=0, atol=1e-9)


def test_what_is_wrong_in_every_block_is_found_in_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    depth, count = 24, 0
    compare = Proof._difference

    def counted(self: Proof, space: PruningSpace, plan: Plan, groups: Sequence[int]) -> str | None:
        nonlocal count
        count += 1
        return compare(self, space, plan, groups)

    monkeypatch.setattr(Proof, "_difference", counted)
    space = rlprune.trace(Blocks(Stubborn, depth), torch.randn(1, 4, 12))
    assert names(space) == [f"mlp.{i}.0" for i in range(depth)]
    assert "is invalid" in space.protected["attention.7.qkv"]
    assert count < 40


def test_a_parameter_may_be_handed_to_a_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, token: Tensor) -> Tensor:
            return x + token

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 16))
            self.first, self.inner, self.last = nn.Linear(8, 16), Inner(), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.first(x), self.token))

    assert names(rlprune.trace(Outer(), torch.randn(2, 8))) == ["first"]


class Finder(nn.Module):
    """Works on as many rows as it finds, as a detector of two stages does: its cost depends on its weights."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.body, self.score, self.head, self.last = (
            nn.Linear(6, 12), nn.Linear(12, 1), nn.Linear(12, 9), nn.Linear(9, 4)
        )  # fmt: skip
        self.honest = honest

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        found = x[self.score(x)[:, 0] > 0]
        hidden = torch.relu(self.head(found))
        if not self.honest and self.head.out_features < 9:
            self.head(found)
        return self.last(hidden).sum(dim=0, keepdim=True)


def test_costs_may_depend_on_what_a_model_finds() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    assert names(rlprune.trace(Finder(), x)) == ["body", "head"]
    space = rlprune.trace(Finder(honest=False), x)
    assert "its macs do not follow the formula" in space.protected["head"]


class Frames(nn.Module):
    """Folds the frames of a film into the batch: its convolutions see more samples than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        x = self.up(torch.relu(self.second(torch.relu(self.first(x.flatten(0, 1))))))
        return self.head(x.mean(dim=(2, 3)).reshape(n, t, -1).mean(dim=1))


@pytest.mark.parametrize("batch", [1, 3])
def test_frames_count_for_the_sample_that_they_are_of(batch: int) -> None:
    x = torch.randn(batch, 5, 3, 8, 8)
    space = rlprune.trace(Frames(), x)
    assert names(space) == ["first", "second", "up"]
    assert space.dense_cost("macs") == count_macs(Frames(), x)
    assert not [part for part in space.protected_shares("macs") if part.name == OUTSIDE]
