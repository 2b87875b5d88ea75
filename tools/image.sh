#!/bin/sh
# Builds the agent's image with docker or buildah. Usage: tools/image.sh [TAG]     (default: spanloom:VERSION)
#
# Environment, all optional:
#   IMAGE_BUILDER      docker or buildah; by default docker when its engine answers, else buildah
#   IMAGE_BUILD_FLAGS  more flags for the build command, such as --no-cache
#   BASE_IMAGE         the base of both stages, pinned as debian:trixie-slim@sha256:DIGEST
#   APT_SNAPSHOT       Debian's archive as it was then, such as 20260101T000000Z; by default as it is now
#   PIP_INDEX_URL      where pip looks for packages
#   PIP_CERT           certificates to trust while pip downloads; they do not enter the image
#   SOURCE_DATE_EPOCH  the time of the image; by default that of the last commit
# Proxies (http_proxy, https_proxy, no_proxy) are passed on to the build and do not enter the image either.
set -eu
cd "$(dirname "$0")/.."

fail() {
	printf 'image: %s\n' "$*" >&2
	exit 1
}

builder=${IMAGE_BUILDER:-}
if [ -z "$builder" ]; then
	# A docker client without an engine is common; only the engine can build.
	if command -v docker >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
		builder=docker
	elif command -v buildah >/dev/null 2>&1; then
		builder=buildah
	else
		fail "neither a docker engine nor buildah is here: apt-get install buildah"
	fi
fi

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' agent/__init__.py)
[ -n "$version" ] || fail "agent/__init__.py has no line __version__ = \"...\""
tag=${1:-spanloom:$version}
# An archive of the source has no history: unknown, and 1980, the oldest time that a wheel can hold.
revision=unknown
epoch=${SOURCE_DATE_EPOCH:-315532800}
if [ -e .git ] && command -v git >/dev/null 2>&1; then
	revision=$(git rev-parse HEAD)
	[ -z "$(git status --porcelain)" ] || revision=$revision-dirty
	epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
fi
created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ 2>/dev/null) ||
	fail "SOURCE_DATE_EPOCH=$epoch: must be seconds since 1970"

set -- --file Dockerfile --tag "$tag" \
	--build-arg "SOURCE_DATE_EPOCH=$epoch" --build-arg "VERSION=$version" \
	--build-arg "REVISION=$revision" --build-arg "CREATED=$created"
[ -z "${BASE_IMAGE:-}" ] || set -- "$@" --build-arg "BASE_IMAGE=$BASE_IMAGE"
[ -z "${APT_SNAPSHOT:-}" ] || set -- "$@" --build-arg "APT_SNAPSHOT=$APT_SNAPSHOT"
[ -z "${PIP_INDEX_URL:-}" ] || set -- "$@" --build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"
if [ -n "${PIP_CERT:-}" ]; then
	[ -r "$PIP_CERT" ] || fail "PIP_CERT=$PIP_CERT: no such file"
	set -- "$@" --secret "id=ca_certificates,src=$PIP_CERT"
fi

printf 'image: building %s with %s\n' "$tag" "$builder" >&2
case $builder in
docker)
	# Names without values: docker takes them from the environment and keeps them out of the history.
	for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
		eval "[ -z \"\${$name:-}\" ]" || set -- "$@" --build-arg "$name"
	done
	# shellcheck disable=SC2086 # flags, split on purpose
	DOCKER_BUILDKIT=1 docker build "$@" ${IMAGE_BUILD_FLAGS:-} .
	;;
buildah)
	# shellcheck disable=SC2086
	buildah build --format oci --timestamp "$epoch" "$@" ${IMAGE_BUILD_FLAGS:-} .
	;;
*)
	fail "IMAGE_BUILDER=$builder: must be docker or buildah"
	;;
esac
