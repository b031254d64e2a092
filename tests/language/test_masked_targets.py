"""Tokens that are context only: no loss, score, statistic or training step counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlprune
from helpers.lm import tiny_lm, tokens
from helpers.lm_folder import write_config, write_folder
from rlprune.cli import main as cli
from rlprune.config.training import FinishConfig
from rlprune.language.calibration import fisher, grams, statistics
from rlprune.language.data.splits import IGNORED, TextData, TextSplit
from rlprune.language.tuning import trainer
from rlprune.language.tuning.finetune import tune
from rlprune.language.tuning.loss import TokenLoss, train_language
from rlprune.language.workload import LanguageWorkload

LENGTH = 12
ANSWERS = [[3, 4, 5], [8, 9], [2], [6, 7, 10], [4], [5, 6, 7, 8]]


def masked(count: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (B, L) and targets that name some tokens of each sequence."""
    ids = tokens(LENGTH, count, seed)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in zip(scored, ANSWERS, strict=False):
        row[places] = True
    return ids, torch.where(scored, ids, IGNORED)


def split(seed: int) -> TextSplit:
    ids, targets = masked(seed=seed)
    return TextSplit(
        "asked", ids.flatten(), tuple(range(0, ids.numel(), LENGTH)), LENGTH,
        answers=(targets != IGNORED).flatten(), examples={"format": "chat", "answers_only": True},
    )  # fmt: skip


def workload(name: str = "llama") -> LanguageWorkload:
    names = ("train", "calibration", "validation", "test")
    return LanguageWorkload(
        tiny_lm(name), None, TextData("asked", {n: split(i) for i, n in enumerate(names)})
    )


class TestLoss:
    @pytest.mark.parametrize("weights", [False, True])
    def test_it_is_transformers_loss_of_the_labels(self, weights: bool) -> None:
        model, (ids, targets) = tiny_lm(), masked()
        count = int((targets[:, 1:] != IGNORED).sum())
        each = torch.full((len(ids),), len(ids) / count) if weights else None
        assert float(TokenLoss(model)(ids, targets, each).detach()) == pytest.approx(
            float(model(ids, labels=targets).loss.detach()), abs=1e-6
        )

    def test_distillation_is_of_the_answers_only(self) -> None:
        model, teacher, (ids, targets) = tiny_lm(seed=1), tiny_lm(), masked()
        kept = targets[:, 1:] != IGNORED
        ours, theirs = (m(ids).logits[:, :-1][kept] for m in (model, teacher))
        soft = F.kl_div(
            (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        wanted = 0.25 * F.cross_entropy(ours, ids[:, 1:][kept]) + 0.75 * 4 * soft
        assert float(TokenLoss(model, teacher, 2.0)(ids, targets).detach()) == pytest.approx(
            float(wanted.detach()), rel=1e-5
        )

    def test_accumulated_passes_give_every_answer_the_same_say(self) -> None:
        model, (ids, targets) = tiny_lm(), masked()
        rows = trainer.Lessons(list(ids), list(targets)).rows(len(ids))
        for start, stop in ((0, 2), (2, 4), (4, 6)):
            batch = trainer._stacked(rows[start:stop])
            (trainer.Student(model, TokenLoss(model))(**batch)["loss"] / 3).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        model(ids, labels=targets).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-5)

    def test_a_batch_without_answers_has_no_loss(self) -> None:
        loss = TokenLoss(tiny_lm())(masked()[0], torch.full_like(masked()[0], IGNORED))
        loss.backward()
        assert float(loss.detach()) == 0.0


class TestTraining:
    def test_the_fine_tune_learns_answers_only(self) -> None:
        """What comes after the last answer of a sequence cannot change the result, and an answer does."""

        def tuned(change: int | None) -> dict[str, torch.Tensor]:
            ours = workload("llama-mha-tied")
            if change is not None:
                part = ours.data.splits["train"]
                for start in part.starts:
                    part.tokens[start + change] = (part.tokens[start + change] + 1) % 96
            settings = FinishConfig(method="full", steps=2, batch_size=4, lr=1e-3, distill=False)
            model = tiny_lm("llama-mha-tied")
            tune(ours, model, settings, seed=0)
            return model.state_dict()

        same, other, answer = tuned(None), tuned(11), tuned(5)
        assert all(torch.equal(same[n], other[n]) for n in same)
        assert not all(torch.equal(same[n], answer[n]) for n in same)

    def test_recovery_steps_learn_answers_only(self) -> None:
        ids, targets = masked()
        other = ids.clone()
        other[:, 11] = (other[:, 11] + 1) % 96
        found = []
        for some in (ids, other):
            model = tiny_lm()
            train_language(model, [(some, torch.where(targets == IGNORED, IGNORED, some))], steps=2, lr=1e-3)
            found.append(model.state_dict())
        assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


class TestJudging:
    def test_quality_is_the_mean_over_answers(self) -> None:
        ours = workload()
        ids, targets = masked(seed=2)
        quality = ours.evaluate(ours.model, "validation")
        assert quality.count == sum(map(len, ANSWERS)) == ours.data.splits["validation"].scored
        assert quality.loss == pytest.approx(float(ours.model(ids, labels=targets).loss.detach()), abs=1e-5)

    def test_scores_are_divergences_over_answers(self) -> None:
        ours, other = workload(), tiny_lm(seed=3)
        ids, targets = masked(seed=2)
        found = ours.judge("kl", top_k=96)(other)
        with torch.no_grad():
            dense, pruned = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (ours.model, other))
        each = (dense.exp() * (dense - pruned)).sum(-1)
        kept = targets[:, 1:] != IGNORED
        wanted = -(each * kept).sum(1) / kept.sum(1)
        torch.testing.assert_close(found.scores.double(), wanted, rtol=1e-4, atol=1e-6)
        assert found.outputs is not None and len(found.outputs) == int(kept.sum())

    def test_the_protocol_says_what_is_scored(self) -> None:
        ours = workload()
        assert ours.protocol()["splits"]["test"] | {"examples": None} == {
            "text": "asked", "length": 12, "stride": 12, "sequences": 6, "tokens": 14, "scored": "answers only",
            "examples": None,
        }  # fmt: skip
        assert ours.test_facts(14)["tokens"]["scored"] == "answers only"


class TestCalibration:
    """Statistics over sequences with something behind the last answer are those over sequences that end with it."""

    def cut(self, ids: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One batch a sequence, without what no scored prediction can see."""
        ends = [max(places) for places in ANSWERS]
        return [(ids[i : i + 1, :end], ids[i : i + 1, :end]) for i, end in enumerate(ends)]

    def space(self, model: Any) -> rlprune.PruningSpace:
        return rlprune.trace(model, tokens(), verify=False)

    def test_moments_and_cosines(self) -> None:
        model, batch = tiny_lm(), masked()
        space = self.space(model)
        found = statistics.collect(model, space, [batch])
        wanted = statistics.collect(model, space, self.cut(*batch))
        for name, moments in found.inputs.items():
            assert moments.count == wanted.inputs[name].count == sum(max(places) for places in ANSWERS)
            assert moments.second == pytest.approx(wanted.inputs[name].second, rel=1e-4, abs=1e-9)
        assert found.block_cosine == pytest.approx(wanted.block_cosine, abs=1e-5)
        assert found.ffn_cosine == pytest.approx(wanted.ffn_cosine, abs=1e-5)

    def test_gram_matrices(self) -> None:
        model, batch = tiny_lm(), masked()
        space = self.space(model)
        found, wanted = (grams.collect(model, space, batches) for batches in ([batch], self.cut(*batch)))
        for name in found.names:
            assert found[name].count == wanted[name].count
            torch.testing.assert_close(found[name].product, wanted[name].product, rtol=1e-4, atol=1e-6)

    def test_fisher_information_is_of_the_answers(self) -> None:
        model, (ids, targets) = tiny_lm(), masked()
        space = self.space(model)
        found = fisher.output_moments(model, space, [(ids, targets)])
        ends = [max(places) + 1 for places in ANSWERS]
        short = [(ids[i : i + 1, :end], targets[i : i + 1, :end]) for i, end in enumerate(ends)]
        wanted = fisher.output_moments(model, space, short)
        for name, moment in found.items():
            # Sums of float32 in another order; a target more or less changes the whole matrix.
            slack = 1e-5 * float(wanted[name].abs().max())
            torch.testing.assert_close(moment, wanted[name], rtol=1e-3, atol=slack)


def test_from_a_chat_file_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prune by a rule and evaluate, on conversations, as a person would type it."""
    folder = write_folder(tmp_path / "model", max_position_embeddings=256)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"is {n} odd"},
                {"role": "assistant", "content": str(n % 2)},
            ]
        }
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path / "c.yaml", folder)
    own = ["data.name=text", "data.sequence_length=64", f"data.files={{train: {tmp_path / 'chat.jsonl'}}}"]
    sets = [word for text in own for word in ("--set", text)]
    out = tmp_path / "pruned"
    assert cli.main(["prune", str(config), "--rule", "ffn_uniform", "--out", str(out), *sets]) == 0
    assert cli.main(["evaluate", str(out), str(config), *sets]) == 0
    text = capsys.readouterr().out
    assert (
        "chat.jsonl, 5 examples (chat) of at most 64 tokens, " in text
        and " tokens scored (answers only)" in text
    )
