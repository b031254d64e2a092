# rlprune in a container: `docker build -t rlprune .`, or with `--build-arg TORCH=cuda` for NVIDIA GPUs.
# EXTRAS takes names of pyproject.toml, comma-separated: --build-arg EXTRAS=language,export
FROM python:3.12-slim

ARG TORCH=cpu
ARG EXTRAS=""

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

# PyPI's torch for Linux brings CUDA's libraries along; the CPU build is a tenth of it.
RUN if [ "$TORCH" = cpu ]; then \
      pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu; \
    else \
      pip install torch torchvision; \
    fi

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rlprune ./rlprune
RUN pip install ".${EXTRAS:+[$EXTRAS]}" && rm -rf /src

# Runs are written into a mounted folder, by a user without rights.
RUN useradd --create-home --uid 1000 someone && mkdir /work && chown someone /work
USER someone
WORKDIR /work
ENTRYPOINT ["rlprune"]
CMD ["--help"]
