# The server in a container. On a CPU:
#     docker build -t frspec .
#     docker run --rm -p 8000:8000 -v "$PWD/checkpoints/smollm2:/model:ro" -v frspec-cache:/cache frspec
# On an NVIDIA GPU (driver and container toolkit on the host; CUDA comes with JAX's wheels):
#     docker build -t frspec-cuda --build-arg EXTRAS=serve,cuda12 .
#     docker run --rm --gpus all -p 8000:8000 -v "$PWD/checkpoints/smollm2:/model:ro" -v frspec-cache:/cache frspec-cuda
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG EXTRAS=serve
# The versions that all was measured with; "-" (an empty constraint) takes the newest.
ARG CONSTRAINTS=constraints.txt

WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY pallas_kernels ./pallas_kernels
COPY frspec_jax ./frspec_jax
COPY convert ./convert
COPY train ./train
COPY eval ./eval
RUN if [ "$CONSTRAINTS" = "-" ]; then : > none.txt; CONSTRAINTS=none.txt; fi; \
    pip install --no-cache-dir -c "$CONSTRAINTS" ".[$EXTRAS]"

# What is compiled is kept here: on a volume, a container that starts again is ready at once.
ENV FRSPEC_JAX_CACHE=/cache PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 frspec && mkdir /cache && chown frspec /cache
USER frspec
WORKDIR /home/frspec
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "frspec_jax.serve", "--host", "0.0.0.0"]
CMD ["--ckpt", "/model"]
