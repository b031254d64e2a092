"""The loss of language models in training: that of transformers, distillation, chunks of logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.echo import FAMILIES, Echo, logits, pruned, same
from helpers.lm import VOCABULARY, tiny_lm, tokens
from rlprune.errors import RlpruneError
from rlprune.language.tuning.loss import CHUNK_TOKENS, TokenLoss, train_language

# The loss


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "bloom", "cohere", "granite", "opt-project"])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    model, ids = tiny_lm(family), tokens(12, batch=3)
    expected = model(ids, labels=ids).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = TokenLoss(model)(ids)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_the_distillation_is_the_formula_and_leaves_the_teacher_alone() -> None:
    student, teacher = pruned(), tiny_lm("llama-mha-tied", seed=2)
    teacher.train()
    ids, t, soft = tokens(40, batch=9), 3.0, 0.6  # 351 tokens: two chunks
    loss = TokenLoss(student, teacher, t, soft)(ids)
    loss.backward()
    s, d = student(ids).logits[:, :-1].flatten(0, 1), logits(teacher, ids)[:, :-1].flatten(0, 1)
    hard = F.cross_entropy(s, ids[:, 1:].flatten())
    p, q = (d / t).softmax(-1), (s / t).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(
        float(((1 - soft) * hard + soft * t * t * kl).detach()), rel=1e-4
    )
    assert all(p.grad is None for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())


def test_logits_exist_for_a_chunk_at_a_time() -> None:
    model, seen = tiny_lm("llama-mha-tied"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(out.numel() // VOCABULARY))
    TokenLoss(model, tiny_lm("llama-mha-tied"))(tokens(101, batch=8)).backward()
    assert max(seen) == CHUNK_TOKENS
    assert len(seen) >= 2 * 4  # four chunks, each made again in the backward pass


def test_a_model_that_cannot_be_split_is_run_whole() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    model, ids = Plain(), torch.randint(20, (3, 9))
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(TokenLoss(model)(ids).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    with pytest.raises(RlpruneError, match="no next token"):
        TokenLoss(model)(ids[:, :1])


# The short recovery


def test_the_loop_of_the_recovery_learns_and_repeats() -> None:
    workload = Echo()
    batches = list(workload.batches("train"))
    first, again = pruned("gpt2"), pruned("gpt2")  # GPT-2 has dropout
    before = workload.evaluate_loss(first)
    result = train_language(first, batches, steps=20, lr=3e-3, seed=1)
    torch.manual_seed(5)
    kept = torch.get_rng_state()
    train_language(again, batches, steps=20, lr=3e-3, seed=1)
    assert torch.equal(kept, torch.get_rng_state())
    assert same(first, again) and not first.training and result.steps == 20
    assert workload.evaluate_loss(first) < before - 0.2
    with pytest.raises(RlpruneError, match="no batch"):
        train_language(first, [], steps=1)
