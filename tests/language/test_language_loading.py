"""Loading language models from folders and from the hub, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from helpers.language_settings import config_of, refused
from rlprune.errors import ArtifactError, ConfigError, DataError, GraphError
from rlprune.experiments.build import build_workload
from rlprune.language.loading import help_tokenizer


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
            ({"model_type": "bert", "architectures": None}, "BertLMHeadModel: nothing of it c"),
            ({"model_type": "albert", "architectures": None}, "'albert' is not a causal language model"),
        ):
            (folder / "config.json").write_text(json.dumps(config | change))
            assert expected in refused(config_of(f"hf:{folder}"))

    def test_a_mixture_of_experts_without_an_adapter(self, tmp_path):
        from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

        sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = GraniteMoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
        folder = save_tiny(tmp_path / "moe", GraniteMoeForCausalLM(config))
        text = refused(config_of(f"hf:{folder}"), GraphError)
        assert "'model.layers.0.block_sparse_moe.experts'" in text and "is a mixture of experts" in text

    def test_layers_of_different_sizes_that_rlprune_has_not_written(self, tmp_path):
        folder = save_tiny(tmp_path / "pruned")
        config = json.loads((folder / "config.json").read_text())
        config["per_layer_config"] = {"0": {"intermediate_size": 8}}
        (folder / "config.json").write_text(json.dumps(config))
        line = refused(config_of(f"hf:{folder}"), GraphError)
        assert "per_layer_config: llama of transformers has no layers of different sizes" in line

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
