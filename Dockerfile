# bagssl in a box: `docker build -t bagssl .`, then
#   docker run --rm -v "$PWD/results:/home/reader/bagssl/results" bagssl                      every notebook, smoke
#   docker run --rm -p 127.0.0.1:8888:8888 bagssl make lab LAB="--no-browser --ip 0.0.0.0"    JupyterLab
# With CUDA: `docker build --build-arg TORCH= -t bagssl .`, and `docker run --gpus all`.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git make python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home reader && install -d -o reader -g reader /home/reader/bagssl
USER reader
WORKDIR /home/reader/bagssl
# what the environment follows from comes first, so that a change of code installs nothing again
COPY --chown=reader Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY --chown=reader bagssl/__init__.py bagssl/
ARG TORCH=cpu
RUN make .venv/.ready TORCH=$TORCH
COPY --chown=reader . .
EXPOSE 8888
CMD ["make", "reproduce"]
