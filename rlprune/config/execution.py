"""Settings of where work runs."""

from __future__ import annotations

from typing import ClassVar

from .schema import Section, section, setting

ENGINES = ("serial", "processes", "ray")


@section
class ExecutionConfig(Section):
    """Where candidates, cells of a benchmark and fine-tunes of a fidelity study are computed; results are the same."""

    prefix: ClassVar[str] = "execution."

    engine: str = setting(
        "serial",
        "`serial`: in this process; `processes`: in several of this machine; `ray`: on a Ray cluster (extra `ray`).",
        choices=ENGINES,
    )
    workers: int | None = setting(
        None,
        "Workers; null for as many as there are CPU cores, of the machine or of the cluster.",
        low=1,
        high=100_000,
    )
    address: str | None = setting(
        None, "Ray: address of the cluster, such as `auto` or `host:6379`; null starts one on this machine."
    )
