#!/bin/sh
# Installs what is missing and nothing else. Usage: tools/setup.sh base|test|fuzz PYTHON
#
# base: compiler, libbpf and Python for the agent and the demo; test: the servers and clients of the end-to-end tests;
# fuzz: the fuzzer. Everything is skipped that is there already, so a second run is quick.
set -eu
stage=$1
python=$2
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

# need_command COMMAND PACKAGE, need_file FILE PACKAGE: note a package when what it brings is missing.
packages=
need_command() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }
need_file() { [ -e "$1" ] || packages="$packages $2"; }

install_packages() {
	[ -n "$packages" ] || return 0
	if [ "$(id -u)" != 0 ]; then
		say "these packages are missing:$packages"
		say "run as root, or install them with: apt-get install$packages"
		exit 1
	fi
	say "installing$packages"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
}

# The version of OpenSSL that Debian has left with bullseye, for the tests of TLS. Its files are kept in a cache
# (SPANLOOM_CACHE, else ~/.cache/spanloom); the packages of this machine and where they come from stay as they are.
fetch_openssl_1_1() {
	kept=${SPANLOOM_CACHE:-$HOME/.cache/spanloom}/openssl-1.1
	[ ! -e "$kept" ] || return 0
	mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
		sed -nE '/^ *#/d; s,.*(https?://[^ ]*/debian)/?( .*|$),\1,p' | head -n 1)
	[ -n "$mirror" ] || { say "no Debian mirror in /etc/apt, which OpenSSL 1.1 is fetched from"; exit 1; }
	say "fetching OpenSSL 1.1 into $kept"
	mkdir -p "$(dirname "$kept")"
	scratch=$(mktemp -d "$kept.XXXXXX")
	mkdir -p "$scratch/state/lists/partial" "$scratch/cache/archives/partial" "$scratch/files"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" >"$scratch/sources.list"
	set -- -qq -o Dir::Etc::SourceList="$scratch/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State="$scratch/state" -o Dir::Cache="$scratch/cache" -o APT::Sandbox::User=root
	apt-get "$@" update
	(cd "$scratch" && apt-get "$@" download libssl1.1)
	dpkg -x "$scratch"/libssl1.1_*.deb "$scratch/files"
	mv "$scratch/files" "$kept"
	rm -rf "$scratch"
}

case $stage in
base)
	need_command clang clang
	need_command llvm-strip llvm
	need_command gcc gcc
	need_file /usr/include/bpf/libbpf.h libbpf-dev
	need_file /usr/include/libelf.h libelf-dev
	need_file /usr/include/zlib.h zlib1g-dev
	need_file "/usr/include/$(uname -m)-linux-gnu/asm/types.h" linux-libc-dev
	need_file "$python" python3
	"$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
	"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		2>/dev/null || packages="$packages python3-dev"
	need_command nginx nginx-light
	need_command curl curl
	install_packages
	[ -x .venv/bin/python ] || "$python" -m venv .venv
	say "installing the agent into .venv"
	.venv/bin/python -m pip install -q --disable-pip-version-check setuptools==84.2.1 cffi==2.1.1
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e .
	;;
test)
	need_command nginx nginx-light
	need_command apache2 apache2-bin
	need_command wrk wrk
	need_command node nodejs
	need_command javac default-jdk-headless
	need_command ip iproute2
	need_command openssl openssl
	need_command nghttp nghttp2-client
	need_command h2load nghttp2-client
	need_command nghttpd nghttp2-server
	need_command nghttpx nghttp2-proxy
	need_command strace strace
	need_command wget wget
	need_command git git
	need_file "/usr/lib/$(uname -m)-linux-gnu/android/libssl.so.0" android-libboringssl
	install_packages
	fetch_openssl_1_1
	say "installing the test tools into .venv"
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test]'
	;;
fuzz)
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,fuzz]'
	;;
esac
