#!/usr/bin/env bash
# Builds fully static programs with musl for routers: a program needs no other file
#
#     scripts/static.sh TARGET                          # the example accept_all, and its size
#     scripts/static.sh TARGET build --release ...      # any command of cargo
#     scripts/static.sh all                             # accept_all for six targets, for the table in docs/static-binaries.md
#
# TARGET is a musl target of rustc, such as mips-unknown-linux-musl. If rustup has a standard
# library for it, the script uses this library and rustc's own linker, and needs no C compiler.
# Otherwise (mips, mipsel, s390x and others) Debian's rustc builds the standard library from source,
# and zig links. This needs Debian on x86-64, and installs packages there and into
# ${XDG_CACHE_HOME:-$HOME/.cache}/nfqnl-static. Programs for other processors run under qemu-user.
# Standard output has only the output of cargo.
#
# The script builds accept_all in an empty project with the settings of docs/static-binaries.md. For this
# machine's processor it also runs the program at full rate, to measure its memory. It fails above
# 410 KiB of program for x86-64, or 1024 KiB of memory.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
need=$PWD/scripts/need
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nfqnl-static
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/static}

fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# Finds out how to build for a target
prepare() {
    variable=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$target")
    case $target in
    "$(uname -m)"-* | i686-*) emulator= ;;
    armv*) emulator=qemu-arm-static ;;
    *) emulator=qemu-${target%%-*}-static ;;
    esac
    [ -z "$emulator" ] || export "${variable}_RUNNER=$emulator"
    if command -v rustup >/dev/null && rustup --quiet target add "$target" 2>/dev/null; then
        library="rustup's" cargo=(cargo) options=()
        export "${variable}_LINKER=rust-lld"
        return
    fi
    library='built for size' cargo=(cargo-zigbuild) options=(-Zbuild-std=std,panic_abort)
    "$need" /usr/lib/rustlib/src/rust/library rustc-web rust-web-src
    mkdir -p "$cache"
    (
        flock 9 # against a simultaneous installation
        [ ! -e "$cache/zig/complete" ] || exit 0
        echo "installing zig into $cache" >&2
        "$need" python3 python3
        python3 -c 'import ensurepip' 2>/dev/null || "$need" /nowhere python3-venv
        python3 -m venv --clear "$cache/zig"
        "$cache/zig/bin/pip" install --quiet ziglang==0.15.2 cargo-zigbuild >&2
        touch "$cache/zig/complete"
    ) 9>"$cache/lock"
    export PATH=$cache/zig/bin:$PATH RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
    # zig links its own musl, so rustc must not link another one.
    case $target in
    x86_64-* | i686-* | aarch64-* | arm*) export RUSTFLAGS="${RUSTFLAGS:-} -Clink-self-contained=no" ;;
    esac
}

# Runs a cargo command for the target
run() {
    local command=$1
    # The small profile also optimizes the standard library for size. The option replaces the
    # default features of the standard library.
    [[ ${cargo[0]} != cargo-zigbuild || " $* " != *" --profile router "* ]] ||
        options+=(-Zbuild-std-features=optimize_for_size)
    case ${cargo[0]}-$1 in
    cargo-zigbuild-build) command=zigbuild ;;
    *-test | *-run) [ -z "$emulator" ] || "$need" "$emulator" qemu-user-static ;;
    esac
    "${cargo[@]}" "$command" "${options[@]}" --target "$target" "${@:2}"
}

# Prints the content of a file from docs/static-binaries.md: the code block beginning with the file's name
block() {
    awk -v name="$1" '
        /^```/ { inside = 0; begins = $0 != "```"; next }
        begins { inside = index($0, name) > 0 }
        { begins = 0 }
        inside' docs/static-binaries.md | grep . || fail "docs/static-binaries.md has no $1"
}

# Builds accept_all in an empty project and checks the program; prints a line of the table in
# docs/static-binaries.md
accept_all() {
    local project=$CARGO_TARGET_DIR/accept_all program=$CARGO_TARGET_DIR/$target/router/accept_all said size headers needed memory=
    rm -rf "$project"
    mkdir -p "$project"/{src,.cargo}
    cp examples/accept_all.rs "$project/src/main.rs"
    cp Cargo.lock "$project"
    cat >"$project/Cargo.toml" <<END
package = { name = "accept_all", edition = "2024" }
dependencies.nfqnl = { path = "$PWD", default-features = false }
workspace = {}

$(block Cargo.toml)
END
    if [ "$library" = "rustup's" ]; then
        unset "${variable}_LINKER" # The README names one.
        block .cargo/config.toml >"$project/.cargo/config.toml"
        block small.ld >"$project/small.ld"
    fi
    (cd "$project" && run build --profile router) >&2

    "$need" readelf binutils
    headers=$(readelf -lW "$program")
    needed=$(readelf -dW "$program")
    [[ $headers == *LOAD* && $headers != *INTERP* && $needed != *NEEDED* ]] || fail "$program is not static"
    size=$(stat -c %s "$program")
    case $target in x86_64-*) [ "$size" -le $((410 * 1024)) ] || fail "$program has $size bytes" ;; esac
    if [ -z "$emulator" ]; then
        memory=$(CARGO_TARGET_DIR=target cargo run --quiet --release -p nfqnl-testkit --example resident -- "$program" 1)
        [ "$memory" -le 1024 ] || fail "$program takes $memory KiB of memory"
        memory+=' KiB'
    else
        # The emulator does not support netfilter sockets, and the program reports EPROTONOSUPPORT.
        "$need" "$emulator" qemu-user-static
        said=$("$emulator" "$program" 1 2>&1) || true
        [[ $said == *EPROTONOSUPPORT* ]] || fail "$program said: $said"
    fi
    echo "$program" >&2
    echo "| \`$target\` | $library | $(((size + 1023) / 1024)) KiB | ${memory:-not measured} |"
}

case ${1:-} in
all)
    rows=
    for target in {x86_64,aarch64}-unknown-linux-musl armv7-unknown-linux-musleabihf {mips,mipsel,s390x}-unknown-linux-musl; do
        rows+=$(prepare; accept_all)$'\n'
    done
    awk -v rows="$rows" '
        /^\| `.*-linux-musl/ { printf "%s", rows; rows = ""; next }
        { print }' docs/static-binaries.md >"$CARGO_TARGET_DIR/table.md"
    cp "$CARGO_TARGET_DIR/table.md" docs/static-binaries.md
    ;;
*-linux-musl*)
    target=$1
    prepare
    if [ $# -gt 1 ]; then run "${@:2}"; else accept_all; fi
    ;;
*) sed -n '2,/^set/s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
