"""The language workload: texts and their splits, loading, perplexity, the judge, and successive halving."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lm import tiny_lm
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import rlprune
from rlprune.config import Config, RecoveryConfig, ScoreConfig, load_config
from rlprune.errors import ArtifactError, BudgetError, ConfigError, DataError, GraphError, RlpruneError
from rlprune.evaluation import Evaluator
from rlprune.ledger import Account, Ledger, SearchSpent, candidate_of
from rlprune.pruning.importance import l2
from rlprune.pruning.plan import make_plan
from rlprune.workloads import SPLITS, LanguageWorkload, build_workload, load_causal, load_text
from rlprune.workloads.base import check_workload
from rlprune.workloads.causal import help_tokenizer
from rlprune.workloads.language import LanguageJudge, perplexity, scoring_dtype
from rlprune.workloads.text import IGNORED, TextData, TextRequest, help_texts, split_text
from rlprune.workloads.text import Text as TextOf

WORDS = "the quick brown fox jumps over the lazy dog while every good boy does fine "


def numbers(text: str) -> list[int]:
    """A tokenizer for tests: a token is a character, its id below 96."""
    return [ord(c) % 96 for c in text]


def positions(split) -> list[int]:
    """Every position of the token stream that a split reads."""
    return [p for s in split.starts for p in range(s, min(s + split.length, len(split.tokens)))]


def workload_of(model, *, sizes=(4, 6, 8, 5), length=16, seed=0, **options) -> LanguageWorkload:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 96, (1000,), generator=generator).tolist()
    request = TextRequest(length=length, sizes=sizes, seed=seed, **options)
    data = split_text("random", dict.fromkeys(SPLITS, TextOf("random", "x")), request, lambda _: ids)
    return LanguageWorkload(model, None, data)


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"))


# Splits


class TestSplits:
    @settings(max_examples=60, deadline=None)
    @given(
        tokens=st.integers(200, 900),
        length=st.integers(8, 24),
        test_length=st.one_of(st.none(), st.integers(8, 40)),
        overlap=st.integers(0, 7),
        seed=st.integers(0, 99),
        sizes=st.tuples(*[st.one_of(st.none(), st.integers(1, 4))] * 4),
    )
    def test_parts_of_one_text_are_disjoint(self, tokens, length, test_length, overlap, seed, sizes):
        stride = (test_length or length) - overlap
        request = TextRequest(length=length, test_length=test_length, stride=stride, sizes=sizes, seed=seed)
        try:
            data = load_text("help_texts", request, lambda text: list(range(tokens)))
        except DataError as error:
            assert "sequences" in str(error)
            return
        read = {split: positions(data.splits[split]) for split in SPLITS}
        for split in SPLITS:
            assert read[split] and max(read[split]) < tokens
            if split != "test":
                assert len(set(read[split])) == len(read[split])  # no token twice
            if (wanted := request.size(split)) is not None:
                assert len(data.splits[split]) == wanted
        together = [set(read[split]) for split in SPLITS]
        assert sum(len(s) for s in together) == len(set.union(*together))
        assert min(read["test"]) == 0 and sorted(data.splits["test"].starts) == list(
            data.splits["test"].starts
        )

    def test_the_size_of_one_split_changes_no_other(self):
        def starts(sizes):
            data = load_text("help_texts", TextRequest(length=16, sizes=sizes), lambda _: list(range(4000)))
            return {split: data.splits[split].starts for split in SPLITS}

        few, many = starts((3, 4, 5, 6)), starts((3, 4, 60, 6))
        assert few["calibration"] == many["calibration"] and few["test"] == many["test"]
        assert few["validation"] == many["validation"][-5:]
        assert starts((3, 40, 5, 6))["validation"] == few["validation"]
        assert starts((None, 4, 5, 6))["train"][:3] == few["train"]

    def test_seed_decides_what_is_drawn_and_not_the_test_split(self):
        one, same, other = (
            load_text("help_texts", TextRequest(length=16, seed=s, sizes=(5, 5, 5, 5)), numbers)
            for s in (1, 1, 2)
        )
        for split in SPLITS:
            assert one.splits[split].starts == same.splits[split].starts
        assert one.splits["calibration"].starts != other.splits["calibration"].starts
        assert one.splits["test"].starts == other.splits["test"].starts

    def test_test_split_of_its_own_file_is_its_first_blocks_in_order(self, tmp_path):
        (tmp_path / "valid.txt").write_text(WORDS * 40)
        (tmp_path / "test.txt").write_text(WORDS * 20)
        request = TextRequest(
            files={"calibration": "valid.txt", "test": "test.txt"},
            root=tmp_path,
            length=16,
            test_length=64,
            sizes=(None, 8, 9, 7),
        )
        data = load_text("text", request, numbers)
        assert data.splits["test"].starts == tuple(range(0, 7 * 64, 64))
        ids, targets = data.splits["test"].window(0, 7)
        assert ids.flatten().tolist() == numbers((WORDS * 20)[: 7 * 64]) and targets is ids
        parts = [set(positions(data.splits[s])) for s in ("calibration", "validation", "train")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(WORDS) * 40 // 16 * 16

    def test_one_file_under_two_names_is_one_text(self, tmp_path):
        (tmp_path / "a.txt").write_text(WORDS * 40)
        (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
        files = {"calibration": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")}
        data = load_text("text", TextRequest(files=files, length=16, sizes=(None, 4, 4, 5)), numbers)
        assert not set(positions(data.splits["test"])) & set(positions(data.splits["calibration"]))

    def test_jsonl_documents_are_joined_by_blank_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"body": WORDS, "n": i}) for i in range(30)) + "\n\n")
        seen = []
        request = TextRequest(files={"train": str(path)}, column="body", length=16)
        load_text("text", request, lambda text: seen.append(text) or numbers(text))
        assert seen == ["\n\n".join([WORDS] * 30)]

    def test_help_texts_are_plenty(self):
        assert len(help_texts()) > 200_000 and help_texts() == help_texts()


class TestTextErrors:
    def request(self, tmp_path, text: str | bytes = WORDS * 40, name="a.txt", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return TextRequest(files={"calibration": str(path)}, length=16, **options)

    @pytest.mark.parametrize(
        ("text", "name", "expected"),
        [
            ("", "a.txt", "holds no text"),
            (" \n\n\t", "a.txt", "holds no text"),
            (b"\xff\xfe\x00 a", "a.txt", "not UTF-8 text .byte 0."),
            ("{}\n", "a.jsonl", "line 1 has no text field 'text'"),
            ('{"txet": "a"}\n', "a.jsonl", "did you mean 'txet'"),
            ('{"text": 3}\n', "a.jsonl", "line 1 has no text field"),
            ('{"text": "a"}\nnonsense\n', "a.jsonl", "line 2 is not JSON"),
            ("[1]\n", "a.jsonl", "it is no object"),
            ("", "a.jsonl", "holds no text"),
        ],
    )
    def test_files(self, tmp_path, text, name, expected):
        with pytest.raises(DataError, match=expected) as caught:
            load_text("text", self.request(tmp_path, text, name), numbers)
        assert "\n" not in str(caught.value)

    def test_too_little_text_for_the_splits(self, tmp_path):
        request = self.request(tmp_path, WORDS, sizes=(None, 2, 2, 1))
        with pytest.raises(
            DataError, match=r"2 calibration \+ 2 validation sequences of 16 tokens do not fit"
        ):
            load_text("text", request, numbers)
        with pytest.raises(DataError, match="9 sequences of 16 tokens asked for, but .* has only 75 tokens"):
            load_text("text", self.request(tmp_path, WORDS, sizes=(None, None, None, 9)), numbers)
        with pytest.raises(DataError, match="1 sequences of 16 tokens"):
            load_text("text", self.request(tmp_path, "short"), numbers)

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, "data.files: required"),
            ({"test": "a.txt"}, "not for the test split alone"),
            ({"valid": "a.txt"}, "data.files.valid: unknown split.*did you mean 'validation'"),
            ({"train": 3}, "data.files.train: expected a path"),
            ({"train": "absent.txt"}, "absent.txt: no such file"),
            ({"train": "."}, "is a folder"),
        ],
    )
    def test_names_of_files(self, files, expected):
        with pytest.raises(RlpruneError, match=expected):
            load_text("text", TextRequest(files=files), numbers)

    def test_names_of_data(self):
        with pytest.raises(ConfigError, match="did you mean 'help_texts'"):
            load_text("help_text", TextRequest(), numbers)
        with pytest.raises(ConfigError, match="only data.name 'text' reads files"):
            load_text("help_texts", TextRequest(files={"train": "a"}), numbers)
        with pytest.raises(ConfigError, match=r"data.stride: 20 is more than the 16 tokens"):
            load_text("help_texts", TextRequest(length=16, stride=20), numbers)

    def test_hub_data_sets_need_leave_and_a_package(self, monkeypatch):
        with pytest.raises(DataError, match="data.download=true"):
            load_text("hub:Salesforce/wikitext", TextRequest(), numbers)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"pip install 'rlprune\[language\]'"):
            load_text("hub:Salesforce/wikitext", TextRequest(download=True), numbers)

    def test_hub_data_sets_that_cannot_be_fetched(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def refuse(*args, **options):
            raise ConnectionError("Couldn't reach the hub\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(DataError, match="cannot be fetched: ConnectionError: Couldn't reach") as caught:
            load_text("hub:Salesforce/wikitext:raw", TextRequest(download=True), numbers)
        assert "\n" not in str(caught.value)

    def test_hub_data_sets_give_their_own_splits(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        parts = {n: [{"text": f"{n} {WORDS}"}] * 30 for n in ("train", "validation", "test")}
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or parts)
        request = TextRequest(download=True, length=16, sizes=(None, 3, 3, 3))
        data = load_text("hub:org/name:raw", request, numbers)
        assert asked == [(("org/name", "raw"), {"streaming": True})]
        sources = {s: data.splits[s].source.rpartition(" ")[2] for s in SPLITS}
        assert sources == {
            "train": "train",
            "calibration": "validation",
            "validation": "validation",
            "test": "test",
        }
        with pytest.raises(DataError, match="no text field 'body'; it has text"):
            load_text("hub:org/name", TextRequest(download=True, column="body"), numbers)


# The workload's contract


class TestContract:
    def test_batches(self, workload):
        check_workload(workload)
        assert workload.language and workload.metric_name == "perplexity"
        assert workload.example_inputs.shape == (1, 16) and workload.example_inputs.dtype == torch.int64
        for split in SPLITS[:3]:
            once, again = list(workload.batches(split)), list(workload.batches(split))
            assert all(
                torch.equal(a[0], b[0]) and torch.equal(a[1], a[0]) for a, b in zip(once, again, strict=True)
            )
            assert sum(len(ids) for ids, _ in once) == workload.size(split)
            first = torch.cat([ids for ids, _ in workload.batches(split, 3)])
            assert torch.equal(first, torch.cat([ids for ids, _ in once])[:3])

    def test_test_split_is_closed(self, workload):
        with pytest.raises(DataError, match="closed"):
            workload.evaluate(workload.model, "test")
        with workload.test_opened():
            assert workload.evaluate(workload.model, "test").count == 5 * 15

    def test_training_epochs_are_shuffled_blocks_of_train(self, workload):
        def epoch(seed):
            batches = workload.train_batches(torch.Generator().manual_seed(seed), 2)
            return [ids for ids, _ in batches]

        assert len(epoch(0)) == workload.train_steps(2) == 2
        assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(0), strict=True))
        rows = {tuple(r) for batch in epoch(0) for r in batch.tolist()}
        assert rows == {tuple(r) for ids, _ in workload.batches("train") for r in ids.tolist()}

    def test_evaluation_leaves_the_model_as_it_was(self, workload):
        workload.model.train()
        workload.model.config.use_cache = True
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        workload.evaluate(workload.model, "validation")
        assert workload.model.training and workload.model.config.use_cache
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())
        workload.model.eval()

    def test_protocol_says_what_a_perplexity_means(self, workload):
        splits = workload.protocol()["splits"]
        assert splits["test"] == {
            "text": "random", "length": 16, "stride": 16, "sequences": 5, "tokens": 75
        }  # fmt: skip
        assert workload.stride == 16 and workload.length("validation") == 16
        assert json.loads(json.dumps(workload.protocol())) == workload.protocol()

    def test_base_rebuilds_the_architecture(self, workload):
        base = json.loads(json.dumps(workload.base))
        assert base["source"] == "transformers" and base["config"]["model_type"] == "llama"
        again = LlamaForCausalLM(LlamaConfig(**base["config"]))
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in workload.model.state_dict().items()
        }


# Oracles


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
        monkeypatch.setattr("rlprune.workloads.logits.CHUNK_TOKENS", 7)
        monkeypatch.setattr("rlprune.workloads.language._FORWARD_TOKENS", {"cpu": 33})
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
        monkeypatch.setattr("rlprune.workloads.logits.CHUNK_TOKENS", 40)
        ids = torch.cat([x for x, _ in workload.batches("validation")])
        with torch.no_grad():
            expected = float(workload.loss(model(ids), ids))
        assert workload.evaluate(model, "validation").loss == pytest.approx(expected, rel=1e-5)

    def test_no_tensor_of_tokens_times_vocabulary_is_made(self, workload, monkeypatch):
        monkeypatch.setattr("rlprune.workloads.logits.CHUNK_TOKENS", 20)
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
        monkeypatch.setattr("rlprune.workloads.logits.CHUNK_TOKENS", 11)
        monkeypatch.setattr("rlprune.workloads.language._FORWARD_TOKENS", {"cpu": 50})
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


# Evaluator


def evaluator_of(workload, *, rungs=(), dtype="float32", importance="l2", steps=("none",), **score):
    return Evaluator(
        workload,
        importance=importance,
        recovery=RecoveryConfig(steps=steps),
        score=ScoreConfig(rungs=rungs, dtype=dtype, top_k=20, **score),
        metric="params",
    )


def plans(evaluator, count, seed=0, budget=0.7):
    rng = np.random.default_rng(seed)
    groups = len(evaluator.space.groups)
    return [evaluator.space.project(d, budget, "block_params") for d in rng.random((count, groups))]


class TestEvaluator:
    @pytest.mark.parametrize("steps", [("none",), ("reconstruct",), ("bias", "reconstruct")])
    def test_scores_what_it_builds(self, workload, steps):
        evaluator = evaluator_of(workload, steps=steps)
        widths = plans(evaluator, 1)[0]
        candidate = evaluator.evaluate(widths)
        slim = evaluator.build(widths)
        quality = workload.evaluate(slim, "validation")
        assert candidate.loss == pytest.approx(quality.loss, rel=1e-5)
        assert candidate.metric == pytest.approx(quality.metric, rel=1e-4)
        assert candidate.score == pytest.approx(
            float(workload.judge("kl", top_k=20)(slim).scores.mean()), rel=1e-3
        )
        assert candidate.cost == evaluator.space.cost(widths, "params") and candidate.samples == 8
        assert candidate.cost == sum(
            p.numel() for p in rlprune.prune(workload.model, evaluator.plan(widths)).parameters()
        )

    @pytest.mark.parametrize("importance", ["l2", "wanda_sp", "obs"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_scoring_never_touches_the_dense_model_or_what_is_built_for_keeps(
        self, workload, dtype, importance
    ):
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        evaluator = evaluator_of(workload, dtype=dtype, importance=importance, steps=("bias", "reconstruct"))
        widths = plans(evaluator, 2)
        for w in [*widths, evaluator.space.widths]:
            evaluator.evaluate(w)
        slim = evaluator.build(widths[0])
        assert {p.dtype for p in slim.parameters()} == {torch.float32}
        own = {p.data_ptr() for p in workload.model.parameters()}
        assert not own & {p.data_ptr() for p in slim.parameters()}
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())
        assert {p.dtype for p in workload.model.parameters()} == {torch.float32}

    def test_candidates_share_what_no_plan_cuts(self, workload):
        evaluator = evaluator_of(workload, dtype="bfloat16")
        one, two = (evaluator._built((tuple(w),), scoring=True)[0] for w in plans(evaluator, 2))
        assert one.model.embed_tokens.weight.data_ptr() == two.model.embed_tokens.weight.data_ptr()
        assert one.model.embed_tokens.weight.dtype == torch.bfloat16
        assert set(evaluator._dense_stage.shared) == {"model.embed_tokens.weight", "lm_head.weight"}

    def test_a_candidate_that_is_trained_shares_nothing(self, workload):
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        evaluator = Evaluator(
            workload,
            importance="l2",
            recovery=RecoveryConfig(steps=("finetune",), finetune_steps=2, finetune_lr=0.01),
            score=ScoreConfig(dtype="float32"),
        )
        evaluator.evaluate(plans(evaluator, 1)[0])
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())

    def test_gram_matrices_are_collected_once_and_freed(self, workload, monkeypatch):
        from rlprune.pruning import grams

        collected = []

        def collect(*args, **options):
            collected.append(grams_collect(*args, **options))
            return collected[-1]

        grams_collect = grams.collect
        for module in ("grams", "recovery", "importance"):
            name = "collect" if module == "grams" else "collect_grams"
            monkeypatch.setattr(f"rlprune.pruning.{module}.{name}", collect)
        evaluator_of(workload, importance="obs", steps=("reconstruct",))
        assert len(collected) == 1 and len(collected[0]) == 0

    def test_statistics_are_shared_by_importance_and_rules(self, workload, monkeypatch):
        evaluator = evaluator_of(workload, importance="wanda_sp")
        monkeypatch.setattr("rlprune.pruning.statistics.collect", None)
        contexts = [evaluator.context(0.7, "block_params") for _ in range(2)]
        assert contexts[0].statistics() is contexts[1].statistics()

    def test_stages_of_incremental_pruning(self, workload):
        evaluator = evaluator_of(workload, importance="wanda_sp", steps=("reconstruct",))
        first = evaluator.space.project(np.ones(len(evaluator.space.groups)), 0.8, "block_params")
        last = evaluator.space.project(np.ones(len(evaluator.space.groups)), 0.6, "block_params")
        staged = evaluator.evaluate_staged((first, last))
        assert staged.cost == evaluator.evaluate(last).cost and math.isfinite(staged.score)
        plan = evaluator.staged_plan((first, last))
        shapes = {k: v.shape for k, v in rlprune.prune(workload.model, plan).state_dict().items()}
        assert {k: v.shape for k, v in evaluator.build((first, last)).state_dict().items()} == shapes
        with pytest.raises(BudgetError, match="do not fit"):
            evaluator.evaluate_staged((last, first))

    def test_fewer_sequences_in_the_search_than_for_the_choice(self, workload):
        evaluator = evaluator_of(workload, images=3)
        widths = plans(evaluator, 1)[0]
        assert evaluator.evaluate(widths).samples == 3 and evaluator.evaluate_full(widths).samples == 8

    def test_the_number_format_of_scores(self, workload, tmp_path, monkeypatch):
        assert scoring_dtype(workload, "float32") == torch.float32
        assert scoring_dtype(workload, "bfloat16") == torch.bfloat16
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
        clock = {"faster": torch.bfloat16}
        monkeypatch.setattr(
            "rlprune.workloads.language._product_seconds", lambda w, d: 1.0 if d == clock["faster"] else 3.0
        )
        assert scoring_dtype(workload, "auto") == torch.bfloat16
        clock["faster"] = torch.float32  # decided once: a resumed run scores as the first one did
        assert scoring_dtype(workload, "auto") == torch.bfloat16
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "other"))
        assert scoring_dtype(workload, "auto") == torch.float32


# Successive halving


class TestHalving:
    def test_a_pause_changes_nothing(self, workload):
        at_once, paused = (evaluator_of(workload, rungs=(2, 5)) for _ in range(2))
        widths = plans(at_once, 1)[0]
        steps = [
            paused.evaluate_partial(widths, 2),
            paused.evaluate_partial(widths, 5),
            paused.evaluate(widths),
        ]
        assert [c.samples for c in steps] == [2, 5, 8]
        whole = at_once.evaluate(widths)
        assert (whole.score, whole.loss, whole.error) == (steps[2].score, steps[2].loss, steps[2].error)
        assert steps[0].score != steps[1].score != steps[2].score

    def test_only_what_is_left_is_read(self, workload, monkeypatch):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        widths = plans(evaluator, 1)[0]
        evaluator.evaluate_partial(widths, 5)
        spans, judge = [], LanguageJudge.__call__

        def spy(self, model, start=0, stop=None):
            spans.append((start, stop))
            return judge(self, model, start, stop)

        monkeypatch.setattr(LanguageJudge, "__call__", spy)
        evaluator.evaluate(widths)
        assert spans == [(5, None)]

    def test_unknown_rungs_are_refused(self, workload):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        with pytest.raises(ConfigError, match="no rung of 3 samples; there are: 2, 5"):
            evaluator.evaluate_partial(evaluator.space.widths, 3)
        assert evaluator_of(workload, rungs=(2, 80)).rungs == (2,)

    def test_the_better_half_goes_on_and_every_plan_is_charged_once(self, workload, tmp_path):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        many = plans(evaluator, 7)
        path = tmp_path / "ledger.jsonl"
        account = Account(evaluator, Ledger(path), method="m", seed=0, limit=8)
        found = account.evaluate_many(many)
        first = sorted((evaluator.evaluate_partial(w, 2).score for w in many), reverse=True)
        assert sorted(c.samples for c in found) == [2, 2, 2, 5, 5, 8, 8]
        for widths, candidate in zip(many, found, strict=True):
            partial = evaluator.evaluate_partial(widths, 2).score
            assert (candidate.samples > 2) == (partial >= first[3])
        assert account.spent == 7 and len(account.plans) == 2 and len(account.dropped) == 5
        assert account.samples == 3 * 2 + 2 * 5 + 2 * 8
        assert account.best in found and account.best.samples == 8
        assert [r["samples"] for r in Ledger(path).rows] == [2] * 7 + [5] * 4 + [8] * 2
        assert account.evaluate_many(many) == found and account.spent == 7  # repeats are free
        assert len(account.evaluate_many(plans(evaluator, 3, seed=1))) == 1  # what is left can pay for one
        with pytest.raises(SearchSpent):
            account.evaluate_many(plans(evaluator, 1, seed=2))

    def test_a_dropped_plan_may_be_finished_without_another_charge(self, workload):
        evaluator = evaluator_of(workload, rungs=(2,))
        account = Account(evaluator, Ledger(), method="m", seed=0, limit=4)
        many = plans(evaluator, 4)
        found = account.evaluate_many(many)
        dropped = next(w for w, c in zip(many, found, strict=True) if c.samples == 2)
        before = account.samples
        assert account.evaluate(dropped).samples == 8 and account.spent == 4 and not account.left
        assert account.samples == before + 6

    def test_a_ledger_is_replayed(self, workload, tmp_path):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        many, path = plans(evaluator, 6), tmp_path / "ledger.jsonl"
        first = Account(evaluator, Ledger(path), method="m", seed=0, limit=9)
        expected = first.evaluate_many(many)
        whole = path.read_bytes()
        for keep in (3, 7, 11):  # killed in the first rung, in the second one, at the end
            path.write_bytes(b"".join(whole.splitlines(keepends=True)[:keep]))
            fresh = evaluator_of(workload, rungs=(2, 5))
            again = Account(fresh, Ledger(path), method="m", seed=0, limit=9)
            found = again.evaluate_many(many)
            assert [(c.widths, c.score, c.samples) for c in found] == [
                (c.widths, c.score, c.samples) for c in expected
            ]
            assert again.samples == first.samples and again.spent == first.spent
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert [(r["widths"], r["score"], r["samples"]) for r in rows] == [
                (r["widths"], r["score"], r["samples"]) for r in map(json.loads, whole.splitlines())
            ]

    def test_ledgers_of_the_first_version_are_read(self, workload, tmp_path):
        evaluator, path = evaluator_of(workload), tmp_path / "ledger.jsonl"
        widths = plans(evaluator, 1)[0]
        Account(evaluator, Ledger(path), method="m", seed=0, limit=9).evaluate(widths)
        row = json.loads(path.read_text())
        assert row.pop("samples") == 8
        path.write_text(json.dumps(row) + "\n")
        again = Account(evaluator_of(workload), Ledger(path), method="m", seed=0, limit=9)
        assert again.evaluate(widths).score == row["score"] and candidate_of(row).samples == 0
        assert len(path.read_text().splitlines()) == 1

    def test_without_rungs_a_batch_is_evaluated_one_by_one(self, workload):
        evaluator = evaluator_of(workload)
        account = Account(evaluator, Ledger(), method="m", seed=0, limit=3)
        found = account.evaluate_many(plans(evaluator, 5))
        assert len(found) == 3 and all(c.samples == 8 for c in found)
        with pytest.raises(SearchSpent):
            account.evaluate_many(plans(evaluator, 5)[3:])


# Loading


def save_tiny(folder: Path, model=None, vocabulary=300, **config) -> Path:
    """A tiny Llama and a tokenizer in a folder, as transformers saves them."""
    if model is None:
        torch.manual_seed(0)
        options = {
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
        }
        options |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
        model = LlamaForCausalLM(LlamaConfig(**(options | config)))
    model.save_pretrained(folder)
    help_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def config_of(name, *overrides) -> Config:
    given = {
        "model": {"name": str(name)},
        "data": {"name": "help_texts", "sequence_length": 32},
        "device": "cpu",
    }
    return Config.from_dict(given).override(["data.calibration=4", "data.validation=4", *overrides])


def refused(config, kind=RlpruneError) -> str:
    with pytest.raises(kind) as caught:
        build_workload(config)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


class TestLoading:
    def test_a_folder(self, tiny_folder):
        workload = build_workload(config_of(f"hf:{tiny_folder}"))
        expected = AutoModelForCausalLM.from_pretrained(tiny_folder)
        ids = workload.example_inputs
        with torch.no_grad():
            assert torch.equal(workload.model(ids).logits, expected(ids).logits)
        assert (
            workload.name == f"{tiny_folder.name} on help_texts"
            and workload.base["name"] == f"hf:{tiny_folder}"
        )
        assert workload.tokenizer.decode(ids[0])
        assert next(
            build_workload(config_of(f"hf:{tiny_folder}", "model.dtype=bfloat16")).model.parameters()
        ).dtype == (torch.bfloat16)

    def test_checkpoints_of_the_same_architecture(self, tiny_folder, tmp_path):
        other = save_tiny(tmp_path / "other", initializer_range=0.5)
        folder, file = (
            build_workload(config_of(f"hf:{tiny_folder}"), checkpoint=c)
            for c in (other, other / "model.safetensors")
        )
        expected = load_file(other / "model.safetensors")
        for workload in (folder, file):
            state = workload.model.state_dict()
            assert all(torch.equal(state[k], v) for k, v in expected.items())
            assert workload.base["name"] == f"hf:{tiny_folder}"
        tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
        assert "lm_head.weight" not in load_file(tied / "model.safetensors")
        build_workload(config_of(f"hf:{tied}"), checkpoint=tied / "model.safetensors")
        with pytest.raises(ArtifactError, match="missing 'lm_head.weight'"):
            build_workload(config_of(f"hf:{tiny_folder}"), checkpoint=tied / "model.safetensors")

    def test_code_in_a_folder_is_never_run(self, tmp_path):
        folder = save_tiny(tmp_path / "coded")
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "auto_map": {"AutoModelForCausalLM": "code.Mine", "AutoConfig": "code.Own"},
            "model_type": "mine",
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        refused(config_of(f"hf:{folder}"), ArtifactError)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hf:/nowhere/model", "no such folder, and not a hub id"),
            ("hf:./model", "no such folder"),
            ("hf:model.gguf", "no such file"),
            ("hf:", "no such folder"),
            ("hf:EMPTY", "the folder has no config.json"),
            ("hf:FILE", "give the folder with config.json"),
        ],
    )
    def test_places(self, tmp_path, name, expected):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.bin").write_bytes(b"x")
        name = name.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file.bin"))
        assert expected in refused(config_of(name), DataError)

    def test_a_hub_model_that_cannot_be_fetched(self, monkeypatch):
        def refuse(*args, **options):
            raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
        assert "cannot be fetched (OSError: We couldn't connect" in refused(
            config_of("hf:org/name"), DataError
        )

    def test_models_that_are_not_causal(self, tmp_path):
        bert = BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        folder = save_tiny(tmp_path / "bert", BertModel(bert))
        assert "BertModel (bert) is not a causal language model" in refused(
            config_of(f"hf:{folder}"), GraphError
        )
        config = json.loads((folder / "config.json").read_text())
        for change, expected in (
            ({"model_type": "lama"}, "config cannot be read"),
            ({"model_type": "bert", "architectures": None}, "no adapter for model_type 'bert'"),
            ({"model_type": "albert", "architectures": None}, "'albert' is not a causal language model"),
        ):
            (folder / "config.json").write_text(json.dumps(config | change))
            assert expected in refused(config_of(f"hf:{folder}"))

    def test_a_mixture_of_experts(self, tmp_path):
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
        folder = save_tiny(tmp_path / "moe", MixtralForCausalLM(config))
        text = refused(config_of(f"hf:{folder}"), GraphError)
        assert "'model.layers.0.mlp'" in text and "is a mixture of experts" in text

    def test_a_pruned_folder_is_no_dense_model(self, tmp_path):
        folder = save_tiny(tmp_path / "pruned")
        config = json.loads((folder / "config.json").read_text())
        config["per_layer_config"] = {"0": {"intermediate_size": 8}}
        (folder / "config.json").write_text(json.dumps(config))
        assert "pruned model already" in refused(config_of(f"hf:{folder}"), RlpruneError)

    def test_broken_files(self, tmp_path):
        folder = save_tiny(tmp_path / "tiny")
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        assert "its weights cannot be read" in refused(config_of(f"hf:{folder}"), ArtifactError)
        tensors = {k: v for k, v in load_tensors(whole, tmp_path).items() if "layers.1.mlp.up_proj" not in k}
        save_file(tensors, weights, {"format": "pt"})
        assert "'model.layers.1.mlp.up_proj.weight' among them" in refused(
            config_of(f"hf:{folder}"), ArtifactError
        )
        tensors = load_tensors(whole, tmp_path)
        tensors["model.norm.weight"][0] = math.nan
        save_file(tensors, weights, {"format": "pt"})
        assert "'model.norm.weight' holds NaN" in refused(config_of(f"hf:{folder}"), ArtifactError)
        weights.unlink()
        assert "weights cannot be read" in refused(config_of(f"hf:{folder}"), ArtifactError)
        weights.write_bytes(whole)
        (folder / "config.json").write_text("{")
        assert "config cannot be read" in refused(config_of(f"hf:{folder}"), ArtifactError)

    def test_a_tokenizer_that_does_not_fit(self, tmp_path):
        folder = save_tiny(tmp_path / "tiny", vocabulary=280)
        assert "the tokenizer does not fit: it gives the id 299" in refused(
            config_of(f"hf:{folder}"), ArtifactError
        )
        for file in folder.glob("token*"):
            file.unlink()
        assert "its tokenizer cannot be read" in refused(config_of(f"hf:{folder}"), ArtifactError)

    def test_sequences_longer_than_the_model(self, tiny_folder):
        text = refused(config_of(f"hf:{tiny_folder}", "data.sequence_length=65"), ConfigError)
        assert text == "data.sequence_length: 65 is longer than the model's 64 positions"
        assert "data.test_length: 128" in refused(
            config_of(f"hf:{tiny_folder}", "data.test_length=128"), ConfigError
        )

    def test_settings_of_other_workloads(self, tiny_folder):
        name = f"hf:{tiny_folder}"
        assert "model.weights: not for language" in refused(config_of(name, "model.weights=DEFAULT"))
        assert "model.arguments: only 'tiny_llama'" in refused(config_of(name, "model.arguments.layers=3"))
        assert "holds images, but" in refused(config_of(name, "data.name=digits"))
        assert "holds text, but 'cifar_resnet20' reads images" in refused(config_of("cifar_resnet20"))
        assert "no such model" in refused(config_of("cifar_resnet21"))
        assert "did you mean 'help_texts'" in refused(config_of(name, "data.name=help_text"))


def load_tensors(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "whole.safetensors"
    path.write_bytes(content)
    return {k: v.clone() for k, v in load_file(path).items()}


def write_gguf(path: Path) -> LlamaForCausalLM:
    """A tiny Llama as a GGUF file with float weights and a byte-level tokenizer; returns the model."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tokenizer = json.loads(help_tokenizer(300).backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda item: item[1])]
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names |= {f"model.layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in parts.items()}
    for name, parameter in model.named_parameters():
        values, stem = parameter.detach(), name.removesuffix(".weight")
        if stem.endswith(("q_proj", "k_proj")):  # llama.cpp keeps the rotary pairs side by side
            heads = 2 if stem.endswith("q_proj") else 1
            values = values.view(heads, 2, -1, 32).transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[stem]}.weight", values.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


class TestGGUF:
    def test_a_file_is_loaded_and_can_be_saved(self, tmp_path):
        pytest.importorskip("accelerate")
        expected = write_gguf(tmp_path / "tiny.gguf")
        workload = build_workload(config_of(f"hf:{tmp_path / 'tiny.gguf'}"))
        ids = workload.example_inputs
        with torch.no_grad():
            assert torch.allclose(workload.model(ids).logits, expected(ids).logits, atol=1e-5)
        text = json.dumps(workload.base) + workload.model.config.to_json_string()
        assert "quant" not in text.lower() and "gguf" not in json.dumps(workload.base["config"])
        workload.model.save_pretrained(tmp_path / "saved")
        workload.tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, workload.model(ids).logits)
        words = "def help(topic): return 'a string'"
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "saved")(words)["input_ids"]
            == workload.tokenizer(words)["input_ids"]
        )

    def test_broken_and_foreign_files(self, tmp_path):
        pytest.importorskip("accelerate")
        path = tmp_path / "tiny.gguf"
        write_gguf(path)
        whole = path.read_bytes()
        for share in (0.001, 0.3, 0.6, 0.95):
            path.write_bytes(whole[: max(8, int(len(whole) * share))])
            assert "truncated or unknown GGUF" in refused(config_of(f"hf:{path}"), ArtifactError)
        path.write_bytes(b"PK" + whole)
        assert "not a GGUF file" in refused(config_of(f"hf:{path}"), ArtifactError)
        path.write_bytes(whole)
        assert "it holds tiny.gguf: name that file" in refused(config_of(f"hf:{tmp_path}"), DataError)

    def test_missing_packages(self, tmp_path, monkeypatch):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"GGUF")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        text = refused(config_of(f"hf:{path}"), ConfigError)
        assert "needs gguf and accelerate: pip install 'rlprune[language]'" in text


def training(sequences: int, epochs: int, lr: float, batch: int) -> list[str]:
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch}
    return [f"data.train={sequences}", *(f"model.train.{key}={value}" for key, value in settings.items())]


class TestTinyLlama:
    SMALL = ("model.arguments={layers: 2, hidden: 16, heads: 2, kv_heads: 1, intermediate: 24, vocab: 300}",)

    def test_is_trained_once_and_always_the_same(self, tmp_path, monkeypatch):
        config = config_of("tiny_llama", *self.SMALL, *training(64, 2, 0.01, 8))
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "a"))
        steps = []
        start = build_workload(config, train=False)
        trained = build_workload(config, progress=lambda *seen: steps.append(seen))
        assert steps[-1][:3] == ("dense training", 16, 16)
        before, after = (w.evaluate(w.model, "validation").loss for w in (start, trained))
        assert after < before - 0.3
        cached = build_workload(config, progress=lambda *seen: pytest.fail("trained again"))
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "b"))
        again = build_workload(config)
        for other in (cached, again):
            assert all(
                torch.equal(a, b)
                for a, b in zip(trained.model.parameters(), other.model.parameters(), strict=True)
            )
        assert cached.model.lm_head.weight is cached.model.model.embed_tokens.weight
        shorter = config.override(["model.train.epochs=1"])
        assert build_workload(shorter).evaluate(trained.model, "validation").loss == after
        assert len(list((tmp_path / "b" / "dense").glob("*.safetensors"))) == 2

    def test_divergence_is_one_line(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
        text = refused(config_of("tiny_llama", *self.SMALL, *training(16, 40, 10, 2)))
        assert "model.train: training diverged" in text and "lower model.train.lr" in text

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("{layer: 2}", "model.arguments.layer: unknown .did you mean 'layers'"),
            ("{layers: 0}", "model.arguments.layers: must be a whole number"),
            ("{tied: 1}", "model.arguments.tied: must be true or false"),
            ("{heads: 3}", "hidden must be a multiple of 2"),
            ("{vocab: 200}", "model.arguments.vocab: must be at least 257"),
        ],
    )
    def test_arguments(self, arguments, expected):
        with pytest.raises(ConfigError, match=expected):
            load_causal("tiny_llama", arguments=Config.from_dict(
                {"model": {"name": "tiny_llama"}, "data": {"name": "help_texts"}}
            ).override([f"model.arguments={arguments}"]).model.arguments)  # fmt: skip

    def test_depth_and_seed_are_arguments(self):
        deep = load_causal("tiny_llama", arguments={"layers": 3, "vocab": 300}, seed=1).model
        other = load_causal("tiny_llama", arguments={"layers": 3, "vocab": 300}, seed=2).model
        assert len(deep.model.layers) == 3 and not torch.equal(
            deep.model.norm.weight + 0, deep.lm_head.weight[0]
        )
        assert not torch.equal(deep.lm_head.weight, other.lm_head.weight)

    def test_tokenizer_gives_back_any_text(self):
        tokenizer = help_tokenizer(300)
        text = "for x in range(3):\n\tprint('größe', 1 << 9)  # 数"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer) == 300


@pytest.mark.parametrize("name", ["tiny_llama", "smollm2_135m"])
def test_shipped_configs_are_valid(name):
    config = load_config(name, ["model.name=hf:model"] if name != "tiny_llama" else [])
    assert config.score.kind == "kl"


def test_a_plan_of_the_tiny_llama_is_built_and_generates(workload):
    space = rlprune.trace(workload.model, workload.example_inputs)
    widths = space.project(np.ones(len(space.groups)), 0.7, "block_params")
    slim = rlprune.prune(
        workload.model, make_plan(space, importance=l2(workload.model, space), widths=widths)
    )
    ids = workload.example_inputs[:, :5]
    made = [slim.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*made)


def test_text_data_is_frozen(workload):
    data = workload.data
    assert isinstance(data, TextData) and data.largest_id() < 96
    with pytest.raises(AttributeError):
        data.name = "other"
