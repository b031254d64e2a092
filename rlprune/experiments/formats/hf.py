"""A folder of transformers."""

from __future__ import annotations

from ...language.files.uniform import export_folder
from .base import Export, Written, export_format


@export_format("a folder of transformers; plain where all layers are alike (language models)", name="hf")
def _hf(job: Export) -> Written:
    """Checked by stock transformers' own logits (`language.files.uniform.export_folder`)."""
    path, needs = export_folder(job.directory, job.out)
    return Written(path, needs)
