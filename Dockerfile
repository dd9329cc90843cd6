# sparseport for CPU: reads checkpoints, exports to OpenVINO and ONNX Runtime, verifies.
#
#   docker build -t sparseport .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" sparseport export --base base --target openvino --output out
#
# --user: the image's own user (uid 10001) may not write into a folder of yours that is mounted as /data.
#
# Extras in the image: `openvino`, `onnx`, `pack`. Not in it: `train` (GGUF files, and with them `sparseport demo`), `search`, `distributed`, `hub`, `docs` and `dev`.
#
# PyTorch's default Linux build carries CUDA. For a smaller image give the CPU build:
#   docker build --build-arg TORCH_INSTALL='torch==2.13.0 --index-url URL-OF-THE-CPU-WHEELS' -t sparseport .

FROM python:3.11-slim AS builder
ARG TORCH_INSTALL="torch==2.13.0"
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH
WORKDIR /build
RUN python -m venv /opt/venv
# The large layer first: it changes only with the pins.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INSTALL}
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[openvino,onnx,pack]" && pip check

FROM python:3.11-slim AS runtime
LABEL org.opencontainers.image.title="sparseport" \
      org.opencontainers.image.description="Exports sparse and sparse-INT4 fine-tuned language models bit for bit" \
      org.opencontainers.image.licenses="Apache-2.0"
# HOME is fixed, and open to all readers, so that `docker run --user` finds the same one.
ENV HOME=/home/sparseport \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NNCF_CI=1 \
    PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false
# The file is OpenVINO's record of consent to usage data: 0 is no.
RUN useradd --create-home --uid 10001 --user-group sparseport && \
    mkdir -p /home/sparseport/intel /data && \
    printf 0 > /home/sparseport/intel/openvino_telemetry && \
    chmod 755 /home/sparseport /home/sparseport/intel && \
    chown 10001:10001 /data
COPY --from=builder /opt/venv /opt/venv
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["sparseport"]
CMD ["--help"]
