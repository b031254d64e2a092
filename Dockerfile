# rlprune in a container: `docker build -t rlprune .` takes the index's own torch, which runs on a CPU and on NVIDIA GPUs.
# A build of torch for CPUs alone is a tenth of it: give the index that PyTorch's own page names,
# `--build-arg TORCH_INDEX=URL`.
# EXTRAS takes names of pyproject.toml, comma-separated: --build-arg EXTRAS=language,export
FROM python:3.12-slim

ARG TORCH_INDEX=""
ARG EXTRAS=""

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

# torchvision has to match torch, so pip chooses it.
# hadolint ignore=DL3013
RUN pip install "torch>=2.11,<3" torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rlprune ./rlprune
# hadolint ignore=DL3013
RUN pip install ".${EXTRAS:+[$EXTRAS]}" && rm -rf /src

# Runs are written into a mounted folder, by a user without rights.
RUN useradd --create-home --uid 1000 someone && mkdir /runs && chown someone /runs
USER 1000
WORKDIR /runs
ENTRYPOINT ["rlprune"]
CMD ["--help"]
