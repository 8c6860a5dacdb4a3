#!/usr/bin/env bash
# Fully static programs with musl, for what routers have: no file but the program is needed there
#
#     scripts/static.sh TARGET build --release -p nfqnl   # any command of cargo's
#
# TARGET is one of rustc's for musl, such as mips-unknown-linux-musl. Where rustup has a standard library for it, that is
# used, with the linker that comes with rustc: no C compiler is needed. Else (mips, mipsel, s390x and others) Debian's rustc
# builds the standard library from its sources, and zig links; that is for Debian on x86-64, and installs what it needs
# there and into ${XDG_CACHE_HOME:-$HOME/.cache}/nfqnl-static. `test` and `run` use qemu-user for another processor's
# programs. What cargo prints on standard output is all that comes there.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-} command=${2:-}
case $target in
*-linux-musl*) shift ;;
*) sed -n '2,/^set/s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nfqnl-static
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/static}
variable=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$target")

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
# Installs packages unless there is what they bring
need() {
    [ -e "$1" ] || command -v "$1" >/dev/null || {
        as_root apt-get -o DPkg::Lock::Timeout=600 update -q
        as_root apt-get -o DPkg::Lock::Timeout=600 install -yq --no-install-recommends "${@:2}"
    } >&2
}

case $target in
"$(uname -m)"-* | i686-*) emulator= ;;
armv*) emulator=qemu-arm-static ;;
*) emulator=qemu-${target%%-*}-static ;;
esac
[ -z "$emulator" ] || export "${variable}_RUNNER=$emulator"

cargo=(cargo) options=()
if command -v rustup >/dev/null && rustup --quiet target add "$target" 2>/dev/null; then
    export "${variable}_LINKER=rust-lld"
else
    need /usr/lib/rustlib/src/rust/library rustc-web rust-web-src
    if [ ! -e "$cache/zig/complete" ]; then
        echo "installing zig into $cache" >&2
        need python3 python3
        python3 -m ensurepip --version >/dev/null 2>&1 || need /nowhere python3-venv
        python3 -m venv --clear "$cache/zig"
        "$cache/zig/bin/pip" install --quiet ziglang==0.15.2 cargo-zigbuild >&2
        touch "$cache/zig/complete"
    fi
    export PATH=$cache/zig/bin:$PATH RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
    cargo=(cargo-zigbuild) options=(-Zbuild-std=std,panic_abort)
    # Where rustc would link a musl of its own, zig's is enough.
    case $target in
    x86_64-* | i686-* | aarch64-* | arm*) export RUSTFLAGS="${RUSTFLAGS:-} -Clink-self-contained=no" ;;
    esac
fi
# Runs a command of cargo's for the target
run() {
    local command=$1
    [ "${cargo[0]} $1" != "cargo-zigbuild build" ] || command=zigbuild
    "${cargo[@]}" "$command" "${options[@]}" --target "$target" "${@:2}"
}

case $command in test | run) [ -z "$emulator" ] || need "$emulator" qemu-user-static ;; esac
run "$@"
