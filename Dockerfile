# The pipeline with the pinned set of packages.
#   docker build -t ray-pipeline .                                                                     CPU
#   docker build -t ray-pipeline:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://pypi.org/simple .                                              CUDA
#   docker run --rm -v "$PWD/runs:/app/runs" ray-pipeline run --gpus 3 --pp-size 3
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/app/runs" ray-pipeline:cuda run --config configs/small.yaml
# With CUDA the base is a -devel image of the version that torch's wheels are built for: DeepSpeed asks for nvcc.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && { python3 -c "import ensurepip" 2>/dev/null || apt-get install -y --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model model
COPY ray_pipeline ray_pipeline
COPY modal_gpu modal_gpu
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt torch --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir -c constraints.txt -e ".[llama,gym,eval,serve,replicas,tensorboard,watch]"
# Ray passes objects through shared memory; give the container more of it for large runs (--shm-size).
ENTRYPOINT ["python", "-m", "ray_pipeline.cli"]
CMD ["--help"]
