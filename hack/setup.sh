# What hack/run, hack/test, hack/bench and hack/vm share: packages by apt, a virtual environment, one directory of our own. Source it.
#   CRI_SHIM_HACK   where all of it is kept    default /var/cache/cri-shim
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HACK=${CRI_SHIM_HACK:-/var/cache/cri-shim}
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
say() { echo "== $*"; }
need_root() { [ "$(id -u)" = 0 ] || die "needs root: sudo hack/$(basename "$0")"; }

# need_packages PACKAGE...: install what is missing. Debian and Ubuntu.
need_packages() {
  local missing=() p
  command -v dpkg-query >/dev/null || die "not a Debian or Ubuntu machine: install by hand: $*"
  for p in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} = 0 ] && return 0
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -q --no-install-recommends "${missing[@]}" >"$HACK/apt.log" 2>&1 && return 0
  apt-get update -q >>"$HACK/apt.log" 2>&1
  apt-get install -y -q --no-install-recommends "${missing[@]}" >>"$HACK/apt.log" 2>&1 || { tail -5 "$HACK/apt.log" >&2; die "apt-get failed: $HACK/apt.log"; }
}

# newest_python: a Python that is new enough and can make virtual environments; empty if there is none.
newest_python() {
  local p
  for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    "$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$p"; return; }
  done
}

# need_venv EXTRA: $PYTHON becomes the interpreter of a virtual environment with the dependencies in setup.cfg (and those of EXTRA). It is
# made once per list of dependencies and interpreter, so that another clone or branch gets its own.
need_venv() {
  local base list key
  base=$(newest_python)
  [ -n "$base" ] || need_packages python3 python3-venv
  base=$(newest_python)
  if [ -z "$base" ]; then need_packages python3.11 python3.11-venv; base=$(newest_python); fi  # Ubuntu 22.04
  [ -n "$base" ] || die "no Python 3.11 or newer with venv"
  list=$("$base" - "$REPO/setup.cfg" "${1:-}" <<'P'
import configparser, sys
c = configparser.ConfigParser(); c.read(sys.argv[1])
print(c["options"]["install_requires"].strip())
if sys.argv[2]: print(c["options.extras_require"][sys.argv[2]].strip())
P
)
  key=$( { "$base" -c 'import sys; print(sys.version, sys.base_prefix)'; echo "$list"; } | sha256sum | cut -c1-12)
  PYTHON=$HACK/venv-$key/bin/python
  [ -e "$HACK/venv-$key/ready" ] && return 0
  say "virtual environment for $("$base" --version) in $HACK/venv-$key"
  rm -rf "$HACK/venv-$key"
  "$base" -m venv "$HACK/venv-$key" || die "no virtual environment"
  # shellcheck disable=SC2086  # one requirement per word
  "$PYTHON" -m pip install -q --disable-pip-version-check $list >"$HACK/pip.log" 2>&1 || { tail -5 "$HACK/pip.log" >&2; die "pip failed: $HACK/pip.log"; }
  touch "$HACK/venv-$key/ready"
}

mkdir -p "$HACK" 2>/dev/null || true
