# One image for training and serving; docs/container.md has the commands.
#
# The default is the CUDA build of torch, which also runs on a CPU: it is what the package index gives on Linux. With
# TORCH_INDEX, an index of CPU builds, the image is some GB smaller.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY requirements.txt ./
COPY serving/requirements.txt ./serving/
# A pip.conf names another index, or one that needs a password, without leaving a trace in the image. torch comes first
# and alone: the pin in requirements.txt is then met by the build of that index, and all else is from pip's own. One
# command for each file: what a file says of wheels and sources would hold for both.
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if [ -n "$TORCH_INDEX" ]; then \
        python -m pip install --no-deps --only-binary=:all: --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)"; \
    fi \
    && python -m pip install --requirement requirements.txt \
    && python -m pip install --requirement serving/requirements.txt

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS code
ARG USER_ID=1000
RUN useradd --create-home --uid "$USER_ID" app && install --directory --owner app --group app /app
# torch.compile on a GPU builds small C programs while it runs; the CPU image does without.
ARG TORCH_INDEX=
# hadolint ignore=DL3008
RUN if [ -z "$TORCH_INDEX" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=packages /opt/venv /opt/venv
# The container's log is to have each line at once; progress bars in it are for nobody.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TQDM_MININTERVAL=20
WORKDIR /app
COPY --chown=app:app . ./
USER $USER_ID
# Neither git nor a repository is in the image.
RUN dvc config --local core.no_scm true

# `docker build --target sagemaker`: SageMaker runs the image as `docker run IMAGE train` and `docker run IMAGE serve`.
FROM code AS sagemaker
# SageMaker wants containers whose user is root: it mounts /opt/ml as root, and isolates the machine itself.
# hadolint ignore=DL3002
USER 0
ENTRYPOINT ["python", "-m", "serving.sagemaker"]
CMD ["serve"]

FROM code
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "serving.api", "--host", "0.0.0.0"]
