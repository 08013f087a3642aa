# The pipeline with the pinned set of packages.
#   docker build -t ray-pipeline .                                      CPU
#   docker build -t ray-pipeline --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .    CUDA
#   docker run --rm -v "$PWD/runs:/app/runs" ray-pipeline run --gpus 3 --pp-size 3
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/app/runs" ray-pipeline run --config configs/small.yaml
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model model
COPY ray_pipeline ray_pipeline
COPY modal_gpu modal_gpu
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt torch --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir -c constraints.txt -e ".[llama,gym,eval]"
# Ray passes objects through shared memory; give the container more of it for large runs (--shm-size).
ENTRYPOINT ["python", "-m", "ray_pipeline.cli"]
CMD ["--help"]
