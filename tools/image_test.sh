#!/bin/sh
# Prepares the image test, as root: installs buildah and debootstrap when they are missing, makes a Debian base with
# debootstrap from the mirror that apt uses here, and imports it under the name that the Dockerfile gives its base.
# Usage: CONTAINERS_STORAGE_CONF=FILE tools/image_test.sh
#
# The base is kept below ${XDG_CACHE_HOME:-/var/cache}/spanloom, named by what it was made from: the signed index of the
# suite, this script and the architecture. A point release of the suite or a change here makes a new one and removes
# the old one.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'image test: %s\n' "$*" >&2; }
fail() {
	say "$*"
	exit 1
}

[ "$(id -u)" = 0 ] || fail "must run as root: debootstrap and buildah's chroot isolation need it"
base=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)
suite=$(printf '%s' "$base" | sed -n 's/^debian:\([a-z]*\)-slim$/\1/p')
[ -n "$suite" ] || fail "the Dockerfile's BASE_IMAGE is '$base', not debian:SUITE-slim: change this script with it"

packages=
command -v buildah >/dev/null 2>&1 || packages="$packages buildah"
command -v debootstrap >/dev/null 2>&1 || packages="$packages debootstrap"
# buildah only recommends it, and from Debian 13 on does nothing without it.
[ -e /usr/lib/podman/netavark ] || packages="$packages netavark"
if [ -n "$packages" ]; then
	say "installing$packages"
	apt-get update -qq || fail "apt-get update failed: is the mirror reachable?"
	# shellcheck disable=SC2086 # a list
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null ||
		fail "cannot install$packages"
fi

# The first source of packages called main, in either of apt's notations; the one of security updates has no base. apt
# knows the origin of a source only once its index is here.
find_mirror() {
	apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
		awk '$1 == "Debian" && $2 == "main" && $3 !~ /security/ {print $3; exit}'
}
mirror=$(find_mirror)
[ -n "$mirror" ] || {
	apt-get update -qq || fail "apt-get update failed: is the mirror reachable?"
	mirror=$(find_mirror)
}
[ -n "$mirror" ] || fail "no Debian mirror among apt's sources: see /etc/apt/sources.list*"

cache=${XDG_CACHE_HOME:-/var/cache}/spanloom
mkdir -p "$cache"
scratch=$(mktemp -d "$cache/work.XXXXXX")
# debootstrap mounts /proc and /sys inside and may be interrupted before it has unmounted them.
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT TERM

# apt's own downloader knows apt's proxies and certificates. debootstrap checks the signature; here it is only a key.
/usr/lib/apt/apt-helper -qq -o APT::Sandbox::User=root download-file \
	"${mirror}dists/$suite/InRelease" "$scratch/InRelease" >/dev/null ||
	fail "the mirror has no suite $suite, or cannot be reached"
architecture=$(dpkg --print-architecture)
key=$({ cat "$scratch/InRelease" "tools/image_test.sh"; echo "$architecture"; } | sha256sum | cut -c1-16)
archive=$cache/base-$suite-$architecture-$key.tar

if [ ! -e "$archive" ]; then
	say "making the base: debootstrap $suite"
	debootstrap --variant=minbase "$suite" "$scratch/root" "$mirror" >"$scratch/log" 2>&1 || {
		tail -n 20 "$scratch/log" "$scratch/root/debootstrap/debootstrap.log" >&2 2>/dev/null || true
		fail "debootstrap failed"
	}
	# Slim as the official image is: no documentation, now and for packages to come.
	mkdir -p "$scratch/root/etc/dpkg/dpkg.cfg.d"
	for path in doc groff info linda lintian locale man; do
		echo "path-exclude /usr/share/$path/*"
		find "$scratch/root/usr/share/$path" -mindepth 1 -delete 2>/dev/null || true
	done >"$scratch/root/etc/dpkg/dpkg.cfg.d/slim"
	find "$scratch/root/var/cache/apt" "$scratch/root/var/lib/apt/lists" "$scratch/root/var/log" \
		-type f -delete
	tar -C "$scratch/root" --numeric-owner --one-file-system -cf "$scratch/base.tar" --exclude './dev/*' .
	rm -f "$cache"/base-*.tar
	mv "$scratch/base.tar" "$archive"
fi

container=$(buildah from scratch)
root=$(buildah mount "$container")
tar -C "$root" --numeric-owner -xpf "$archive"
buildah umount "$container" >/dev/null
buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit -q --rm "$container" "$base" >/dev/null
say "the base $base is there, $(($(stat -c %s "$archive") / 1000000)) MB"
