# The toolkit with the versions it was tested with. PyTorch brings CUDA, so the host needs NVIDIA's driver alone.
#
#   docker build -t pretrain .
#   docker run --rm --gpus all --shm-size=16g -v "$PWD:$PWD" -w "$PWD" pretrain \
#       python -m launch local configs/small.yaml
#
# --shm-size: decoding processes hand batches over in /dev/shm, of which Docker gives 64 MB.
# For Slurm: enroot import -o pretrain.sqsh dockerd://pretrain, or apptainer build pretrain.sif docker-daemon://pretrain:latest
FROM python:3.11-slim

# What NCCL loads for InfiniBand, where there is any.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pretrain
COPY constraints.txt ./
# By itself, so that a change of the code need not install it again.
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY slurm slurm
COPY data_pipelines data_pipelines
COPY launch launch
COPY pretrain pretrain
RUN pip install --no-cache-dir --constraint constraints.txt '.[remote]'
