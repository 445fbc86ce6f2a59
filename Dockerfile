# One image for all roles: `rocyard api|controller|scheduler|node|autoscaler`. docs/kubernetes.md tells how it is used.
#
#   docker build -t REGISTRY/rocyard:0.1.0 .
#   docker build -t REGISTRY/rocyard:0.1.0-rocm --build-arg BASE_IMAGE=rocm/pytorch:TAG .
#   docker build -t REGISTRY/rocyard:0.1.0-cuda --build-arg BASE_IMAGE=pytorch/pytorch:TAG --build-arg EXTRAS=nvidia .
#
# The base needs Python 3.11 or newer as `python`. A torch that it has is used as it is: nothing is installed over it.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Extras of pyproject.toml, with commas between.
ARG EXTRAS=""
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY autoscaler/ autoscaler/
COPY manager/ manager/
COPY plugins/ plugins/
COPY rocyard/ rocyard/
# A virtual environment that sees the base's packages, also where the base's Python is itself in one. torch is not pinned: which
# build is right depends on the machine; and if one is there, it must be the same afterwards.
RUN python -m venv /opt/rocyard \
    && purelib='import sysconfig; print(sysconfig.get_path("purelib"))' \
    && torch='from importlib.util import find_spec as find; found = find("torch"); print(found and found.origin)' \
    && python -c "$purelib" > "$(/opt/rocyard/bin/python -c "$purelib")/base.pth" \
    && grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && /opt/rocyard/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt ".${EXTRAS:+[${EXTRAS}]}" \
    && before=$(python -c "$torch") && after=$(/opt/rocyard/bin/python -c "$torch") \
    && if [ "$before" != None ] && [ "$before" != "$after" ]; then echo "torch was $before and is $after: leave torch out of EXTRAS" >&2; exit 1; fi
# amdsmi must be of ROCm's own version: the copy that ROCm ships, where there is one.
RUN if [ -d /opt/rocm/share/amd_smi ]; then \
      cp -r /opt/rocm/share/amd_smi /tmp/amd_smi \
      && /opt/rocyard/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps /tmp/amd_smi; \
    fi

FROM ${BASE_IMAGE}
COPY --from=build /opt/rocyard /opt/rocyard
# Names for the user, which some libraries look up; the folder is a volume in Kubernetes, where the root is read-only.
RUN echo 'rocyard:x:10001:10001::/var/lib/rocyard:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'rocyard:x:10001:' >> /etc/group \
    && mkdir -m 0700 /var/lib/rocyard \
    && chown 10001:10001 /var/lib/rocyard
# PYTHONSAFEPATH: `manager` and `plugins` are plain names, and no folder that happens to be current may stand in for them.
ENV PATH=/opt/rocyard/bin:$PATH \
    HOME=/var/lib/rocyard \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/rocyard
STOPSIGNAL SIGTERM
ENTRYPOINT ["rocyard"]
CMD ["--help"]
