# The command resnet-jax on a CPU:
#   docker build --tag resnet-jax .
#   docker run --rm --volume resnet-jax:/home/trainer resnet-jax train --config quickstart
# The volume keeps the runs, the data and the compiled programs. For a GPU, add a
# line before USER: RUN python -m pip install '.[cuda]'
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/resnet_jax
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY requirements.txt ./
RUN python -m pip install --no-deps --requirement requirements.txt
COPY pyproject.toml setup.py README.md LICENSE launch.py ./
COPY configs configs
COPY weights weights
COPY resnet_jax resnet_jax
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home trainer

USER trainer
WORKDIR /home/trainer
ENTRYPOINT ["resnet-jax"]
CMD ["--help"]
