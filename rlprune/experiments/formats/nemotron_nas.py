"""A checkpoint of NVIDIA's Llama-Nemotron family, which vLLM, TensorRT-LLM, SGLang and mlx-lm read."""

from __future__ import annotations

from pathlib import Path

from ...errors import ArtifactError
from ...language.files.nemotron_nas import write_nemotron_nas
from ...language.files.pretrained import SOURCE, pretrained_model
from ...workloads.adapter import read_pruned
from .base import Export, Written, export_format


@export_format("block_configs of nemotron-nas, for vLLM and others (language models)", name="nemotron-nas")
def _nemotron_nas(job: Export) -> Written:
    """Read again by the public rules of ``block_configs``; the logits are equal to the bit."""
    document = read_pruned(job.directory)
    if document["base"].get("source") != SOURCE:
        raise ArtifactError(f"--to {job.to}: {job.directory} holds no language model of transformers")
    slim = pretrained_model(job.adapter().load(job.directory, document, job.base))
    target = job.directory / "nemotron-nas" if job.out is None else Path(job.out)
    told = write_nemotron_nas(slim, target, tokenizer=job.directory)
    return Written(target, told.needs, notes=told.notes)
