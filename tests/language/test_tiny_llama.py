"""The tiny Llama that is trained on the spot, its tokenizer, and the shipped configs of language models."""

from __future__ import annotations

import pytest
import torch

from helpers.language_settings import config_of, refused
from rlprune.config.config import Config, load_config
from rlprune.errors import ConfigError
from rlprune.experiments.build import build_workload
from rlprune.language.loading import help_tokenizer, load_causal
from rlprune.language.workload import LanguageWorkload


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
        fit = LanguageWorkload.train

        def diverging(self, *args, **options):
            # Weights that float32 cannot multiply: with the highest rate allowed, 10, some processors end in numbers.
            with torch.no_grad():
                self.model.lm_head.weight.mul_(1e38)
            return fit(self, *args, **options)

        monkeypatch.setattr(LanguageWorkload, "train", diverging)
        text = refused(config_of("tiny_llama", *self.SMALL, *training(16, 1, 10, 2)))
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


def test_smollm2_calibrates_and_scores_at_the_length_that_perplexity_is_reported_at():
    data = load_config("smollm2_135m").data
    assert data.sequence_length == data.test_length == 256
