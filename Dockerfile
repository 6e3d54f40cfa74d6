# syntax=docker/dockerfile:1
# echodistill with CUDA, as a user without rights. Weights and runs live in volumes, so that the image has none.
#   docker build --tag echodistill .
#   docker run --rm --gpus all -v "$PWD:/work" -v echodistill-cache:/cache echodistill train photos --class-name dog
# The user is 1000:1000; for another, add: --user "$(id -u):$(id -g)"
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

# Python 3.12 is this system's own, at whatever patch it has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/echodistill \
    PATH=/opt/echodistill/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    HOME=/tmp \
    PYTHONUNBUFFERED=1

# torch comes first, in a layer of its own: it is most of the image and changes least.
ARG TORCH=torch==2.11.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
# The version stands in TORCH.
# hadolint ignore=DL3013
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

COPY pyproject.toml README.md LICENSE /source/
COPY echodistill /source/echodistill
COPY echodistill_cli /source/echodistill_cli
RUN pip install --no-cache-dir "/source[heic]" \
    && mkdir --parents /work /cache \
    && chmod 1777 /work /cache

USER 1000:1000
WORKDIR /work
VOLUME ["/cache"]
# Ctrl-C and `docker stop` save the run before the container ends.
STOPSIGNAL SIGTERM
ENTRYPOINT ["echodistill"]
CMD ["--help"]
