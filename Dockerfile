# The agent's image. tools/image.sh builds it; `docker build .` and `buildah build .` work too.
#
# In: this directory as .dockerignore cuts it. Out: Python, libbpf and the agent, no compiler, no pip and no headers, for
# the architecture that it is built on. A value of PIP_INDEX_URL stays in the builder stage.
#
# Two builds of one source give the same files of the agent. Python packages are those of requirements.lock, by hash.
# Base and Debian packages are the newest of the suite unless both are pinned:
#   BASE_IMAGE=debian:trixie-slim@sha256:DIGEST   the base by what it holds, as a registry shows it
#   APT_SNAPSHOT=20260101T000000Z                 Debian's archive as it was then

ARG BASE_IMAGE=debian:trixie-slim
ARG APT_SNAPSHOT=

FROM ${BASE_IMAGE} AS builder

# apt knows where its archives have their snapshots. The base has no certificate authorities yet: what vouches for
# packages are the signatures that apt checks in any case. Without the snapshot nothing is installed.
ARG APT_SNAPSHOT
RUN options=${APT_SNAPSHOT:+"-o APT::Snapshot=${APT_SNAPSHOT} -o APT::Update::Error-Mode=any \
        -o Acquire::https::Verify-Peer=false"} \
    && apt-get ${options} update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get ${options} install -y -qq --no-install-recommends \
        ca-certificates clang gcc libbpf-dev libc6-dev make python3-dev python3-venv \
    && python3 -m venv /build/pip

WORKDIR /build/source
COPY . .
# A clone has the modes of its owner's umask.
RUN chmod -R u=rwX,go=rX .

# -o: the Makefile's own installation of packages is not wanted here.
RUN make -s -o .venv/.ready build

ARG PIP_INDEX_URL=
# 1980 is the oldest time that a wheel can hold.
ARG SOURCE_DATE_EPOCH=315532800
# Everything that could differ between two builds is fixed: times, the order of hashed constants, debug paths. The
# bytecode is checked by the source's hash and not by its time, which the layers of an image do not keep reliably.
# What packages bring for compiling against them, and the scripts that activate an environment, are left out.
RUN --mount=type=secret,id=ca_certificates \
    export SOURCE_DATE_EPOCH PYTHONHASHSEED=0 CFLAGS=-g0 LDFLAGS=-Wl,-s,--build-id=none \
    && export PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && if [ -n "${PIP_INDEX_URL}" ]; then export PIP_INDEX_URL; else unset PIP_INDEX_URL; fi \
    && if [ -s /run/secrets/ca_certificates ]; then export PIP_CERT=/run/secrets/ca_certificates; fi \
    && /build/pip/bin/pip install -q --no-cache-dir --only-binary :all: --require-hashes -r requirements-build.lock \
    && /build/pip/bin/pip wheel -q --no-index --no-build-isolation --no-deps --wheel-dir /build/wheel . \
    && python3 -m venv --without-pip /opt/spanloom \
    && install='/build/pip/bin/pip --python /opt/spanloom/bin/python install -q --no-cache-dir --no-compile' \
    && ${install} --only-binary :all: --require-hashes -r requirements.lock \
    && ${install} --no-index --no-deps /build/wheel/spanloom-*.whl \
    && /build/pip/bin/pip --python /opt/spanloom/bin/python check \
    && rm -f /opt/spanloom/lib/python3*/site-packages/spanloom-*.dist-info/direct_url.json \
    && find /opt/spanloom/bin -type f ! -name spanloom -delete \
    && find /opt/spanloom/lib -name '*.h' -delete \
    && /opt/spanloom/bin/python -m compileall -q --invalidation-mode checked-hash /opt/spanloom/lib \
    && chmod -R u=rwX,go=rX /opt/spanloom


FROM ${BASE_IMAGE}

# What apt leaves behind besides the packages differs with every run.
ARG APT_SNAPSHOT
RUN options=${APT_SNAPSHOT:+"-o APT::Snapshot=${APT_SNAPSHOT} -o APT::Update::Error-Mode=any \
        -o Acquire::https::Verify-Peer=false"} \
    && apt-get ${options} update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get ${options} install -y -qq --no-install-recommends libbpf1 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old \
        /var/lib/dpkg/*-old /var/log/* \
    && mkdir -p /etc/spanloom

COPY --from=builder /opt/spanloom /opt/spanloom

# Bytecode is complete: a read-only root file system loses nothing.
ENV PATH=/opt/spanloom/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1

ARG BASE_IMAGE
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="spanloom" \
      org.opencontainers.image.description="Zero-code distributed tracing for HTTP traffic, built on eBPF" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

# Root, because the kernel loads BPF programs only for root or for CAP_BPF and CAP_PERFMON, and naming the processes of
# other users needs CAP_SYS_PTRACE. No file needs it: all are readable by everybody, and none is written.
USER 0:0
STOPSIGNAL SIGTERM

# Settings: mount a file as /etc/spanloom/spanloom.yaml and run with
#   run --config /etc/spanloom/spanloom.yaml
# Without them the defaults and the OTEL_EXPORTER_OTLP_* variables hold.
ENTRYPOINT ["spanloom"]
CMD ["run"]
