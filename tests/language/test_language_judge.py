"""Loss, perplexity and divergence of language models against plain readings of their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from helpers.language_workload import workload_of
from helpers.lm import tiny_lm
from rlprune.config.config import ScoreConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.language.judge import perplexity
from rlprune.language.text import IGNORED, TextRequest, split_text
from rlprune.language.text import Text as TextOf
from rlprune.language.workload import LanguageWorkload
from rlprune.workloads import SPLITS


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"))


FAMILIES = ("llama", "llama-mha-tied", "gemma2", "gpt2", "opt-project", "gpt_neox", "bloom", "phi3")


class TestLoss:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_is_the_one_of_transformers_and_chunks_change_nothing(self, name, monkeypatch):
        workload = workload_of(tiny_lm(name).eval())
        ids = torch.cat([x for x, _ in workload.batches("validation")])
        with torch.no_grad():
            outputs = workload.model(ids, labels=ids)
            expected = float(outputs.loss)
        assert float(workload.loss(outputs, ids)) == pytest.approx(expected, rel=1e-6)
        assert float(workload.loss(outputs.logits, ids)) == pytest.approx(expected, rel=1e-6)
        whole = workload.evaluate(workload.model, "validation")
        assert whole.loss == pytest.approx(expected, rel=1e-5) and whole.count == 8 * 15
        assert whole.metric == pytest.approx(math.exp(expected), rel=1e-4)
        monkeypatch.setattr("rlprune.language.logits.CHUNK_TOKENS", 7)
        monkeypatch.setattr("rlprune.language.workload.FORWARD_TOKENS", {"cpu": 33})
        assert workload.rows("validation") == 2
        assert workload.evaluate(workload.model, "validation").loss == pytest.approx(whole.loss, rel=1e-6)

    def test_a_head_that_does_something_else_is_run_whole(self, monkeypatch):
        class Doubling(LlamaForCausalLM):
            def forward(self, *args, **options):
                outputs = super().forward(*args, **options)
                outputs.logits = 2 * outputs.logits
                return outputs

        model = Doubling(tiny_lm("llama").config).eval()
        workload = workload_of(model)
        monkeypatch.setattr("rlprune.language.logits.CHUNK_TOKENS", 40)
        ids = torch.cat([x for x, _ in workload.batches("validation")])
        with torch.no_grad():
            expected = float(workload.loss(model(ids), ids))
        assert workload.evaluate(model, "validation").loss == pytest.approx(expected, rel=1e-5)

    def test_no_tensor_of_tokens_times_vocabulary_is_made(self, workload, monkeypatch):
        monkeypatch.setattr("rlprune.language.logits.CHUNK_TOKENS", 20)
        sizes = []
        handle = workload.model.lm_head.register_forward_hook(lambda m, i, o: sizes.append(o.numel()))
        workload.evaluate(workload.model, "validation")
        workload.judge("kl")(workload.model)
        handle.remove()
        assert max(sizes) <= 20 * 96

    @pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (20, 8), (16, 1)])
    @pytest.mark.parametrize("tokens", [100, 101, 117])
    def test_strided_perplexity_is_that_of_a_plain_reading(self, length, stride, tokens):
        """The sliding window of transformers' guide, read token by token."""
        model = tiny_lm("llama").eval()
        stream = torch.randint(0, 96, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        request = TextRequest(length=8, test_length=length, stride=stride)
        texts = {s: TextOf("a" if s == "test" else "b", s) for s in SPLITS}
        data = split_text("two", texts, request, lambda text: stream if text == "test" else list(range(96)))
        workload = LanguageWorkload(model, None, data)
        losses, done, begin = [], 0, 0
        with torch.no_grad():
            while True:
                end = begin + length
                if end > tokens and stride == length:
                    break  # blocks leave the rest out
                end = min(end, tokens)
                logs = F.log_softmax(model(torch.tensor([stream[begin:end]])).logits[0], dim=-1)
                for position in range(max(done, begin + 1), end):
                    losses.append(-float(logs[position - begin - 1, stream[position]]))
                done, begin = end, begin + stride
                if end == tokens:
                    break
        with workload.test_opened():
            quality = workload.evaluate(model, "test")
        assert quality.count == len(losses) == workload.protocol()["splits"]["test"]["tokens"]
        assert quality.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert workload.stride == stride

    def test_context_tokens_are_left_out_of_the_targets(self):
        workload = workload_of(tiny_lm("llama"), test_length=20, stride=8)
        with workload.test_opened():
            targets = torch.cat([t for _, t in workload.batches("test")])
        assert (targets[0] != IGNORED).all() and (targets[1:, :12] == IGNORED).all()
        assert (targets[1:, 12:] != IGNORED).all()

    def test_huge_losses_do_not_overflow(self):
        assert perplexity(1e9) == math.inf and math.isnan(perplexity(math.nan))


def other_model(model, scale=0.05):
    """The same model with noise on every weight."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return twin


class TestJudge:
    def full(self, workload, model):
        """Mean KL over the scored tokens of each validation sequence, from whole logits."""
        ids = torch.cat([x for x, _ in workload.batches("validation")])
        with torch.no_grad():
            p = F.log_softmax(workload.model(ids).logits.double(), -1)[:, :-1]
            q = F.log_softmax(model(ids).logits.double(), -1)[:, :-1]
        return (p.exp() * (p - q)).sum(-1).mean(1), p, q

    def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(self, workload):
        model = other_model(workload.model)
        expected, _, _ = self.full(workload, model)
        judgement = workload.judge("kl", top_k=96)(model)
        assert judgement.scores.tolist() == pytest.approx((-expected).tolist(), rel=1e-4)
        assert workload.judge("kl", top_k=500)(model).scores.tolist() == judgement.scores.tolist()
        quality = workload.evaluate(model, "validation")
        assert (judgement.loss, judgement.metric, judgement.count) == pytest.approx(
            (quality.loss, quality.metric, quality.count), rel=1e-6
        )

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_the_rest_is_one_bucket(self, workload, k):
        model = other_model(workload.model)
        full, p, q = self.full(workload, model)
        top = p.topk(k, dim=-1).indices
        pk, qk = p.gather(-1, top).exp(), q.gather(-1, top).exp()
        rest_p, rest_q = 1 - pk.sum(-1), 1 - qk.sum(-1)
        expected = (pk * (pk / qk).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
        scores = workload.judge("kl", top_k=k)(model).scores
        assert scores.tolist() == pytest.approx((-expected.mean(1)).tolist(), rel=1e-3)
        assert (-scores <= full + 1e-6).all() and (scores < 0).all()  # a coarser view diverges less

    def test_dense_is_zero_and_loss_is_the_loss(self, workload):
        assert workload.judge("kl", top_k=9)(workload.model).scores.abs().max() < 1e-6
        judgement = workload.judge("loss")(workload.model)
        assert float(judgement.scores.mean()) == pytest.approx(-judgement.loss, rel=1e-6)

    def test_chunks_and_batches_change_nothing(self, workload, monkeypatch):
        model = other_model(workload.model)
        whole = workload.judge("kl", top_k=9)(model)
        fresh = workload_of(workload.model)
        monkeypatch.setattr("rlprune.language.logits.CHUNK_TOKENS", 11)
        monkeypatch.setattr("rlprune.language.workload.FORWARD_TOKENS", {"cpu": 50})
        other = fresh.judge("kl", top_k=9)(model)
        assert other.scores.tolist() == pytest.approx(whole.scores.tolist(), rel=1e-4)

    def test_parts_are_the_whole(self, workload):
        model, judge = other_model(workload.model), workload.judge("kl", 7, top_k=9)
        whole, parts = judge(model), [judge(model, 0, 3), judge(model, 3, 4), judge(model, 4)]
        joint = judge.merge(parts)
        assert len(whole.scores) == 7 and whole.count == joint.count == 7 * 15
        assert joint.scores.tolist() == pytest.approx(whole.scores.tolist(), rel=1e-5)
        assert (joint.loss, joint.metric) == pytest.approx((whole.loss, whole.metric), rel=1e-6)

    def test_accuracy_is_refused_in_one_line(self, workload):
        with pytest.raises(ConfigError, match=r"score.kind: 'accuracy' .* kl, loss"):
            Evaluator(workload, score=ScoreConfig(kind="accuracy"), importance="l2")

    def test_bfloat16_scores_are_near(self, workload):
        model = other_model(workload.model)
        exact = workload.judge("kl", top_k=40)(model)
        rough = workload.judge("kl", top_k=40)(model.to(torch.bfloat16))
        assert rough.loss == pytest.approx(exact.loss, rel=0.02)
        assert float(rough.scores.mean()) == pytest.approx(float(exact.scores.mean()), rel=0.2)


def test_the_test_split_has_outcomes_by_sequence_that_add_up(workload: LanguageWorkload) -> None:
    with workload.test_opened():
        quality = workload.evaluate(workload.model, "test")
    found = quality.outcomes
    assert (
        found is not None and found.kind == "loss" and not workload.higher_is_better and workload.exp_of_loss
    )
    assert int(found.weights.sum()) == quality.count and len(found.values) == workload.size("test")
    assert found.mean == pytest.approx(quality.loss, rel=1e-9)
    assert workload.evaluate(workload.model, "validation").outcomes is None
