# syntax=docker/dockerfile:1
# Images for CPUs and for NVIDIA GPUs: `docker build --target cpu --tag llm-srec:cpu .`, or `cuda`. How to use them is in
# docs/start/containers.md. Not built yet: tests check what can be checked without docker.
FROM python:3.11-slim-bookworm AS base
# A C++ compiler: Triton and DeepSpeed build their kernels when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORKDIR /opt/llm-srec
COPY requirements/constraints.txt requirements/constraints.txt

# torch comes in a layer of its own, which a change of the sources does not rebuild. An index of PyTorch's own has its
# builds as 2.x+cpu or 2.x+cu126, which pip prefers to the 2.x of PyPI.
FROM base AS cpu
RUN pip install --constraint requirements/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY shards shards
COPY launchers launchers
COPY ds_configs ds_configs
RUN pip install --constraint requirements/constraints.txt .
ENV DS_ACCELERATOR=cpu
WORKDIR /workspace
ENTRYPOINT ["llm-srec"]

# The wheels of torch bring the CUDA libraries; the host brings the driver (525 or later for CUDA 12) and NVIDIA's
# container toolkit, which reads the two variables.
FROM base AS cuda
ARG CUDA=cu126
RUN pip install --constraint requirements/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/${CUDA} torch
COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY shards shards
COPY launchers launchers
COPY ds_configs ds_configs
RUN pip install --constraint requirements/constraints.txt ".[cuda]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
ENTRYPOINT ["llm-srec"]
