# Shared by the launch scripts: a virtual environment with this checkout in it. Source it, then call `setup EXTRAS`.
#
# PYTHON  interpreter to build the environment with (default: python3; 3.11 to 3.13)
# VENV    where it lies (default: .venv in the checkout, one for each version of Python)

# XLA maps its buffers anew in each step; on a CPU a fifth of the demo's time would go into page faults of small pages.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

setup() {
  local python=${PYTHON:-python3} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "error: $python is no Python; set PYTHON=python3.11 (3.11 to 3.13)" >&2
    exit 2
  }
  case $version in
    3.11 | 3.12 | 3.13) ;;
    *)
      echo "error: $python is Python $version; set PYTHON to one of 3.11 to 3.13" >&2
      exit 2
      ;;
  esac
  VENV=${VENV:-.venv-$version}
  if [ ! -x "$VENV/bin/python" ]; then
    echo "making $VENV"
    "$python" -m venv "$VENV"
  fi
  # The stamp holds what was installed: a changed setup.py installs again, an unchanged one starts at once.
  local stamp="$VENV/.installed" wanted
  wanted="$1 $(cksum setup.py)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing xclip_jax[$1] into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    echo "$wanted" >"$stamp"
  fi
}
