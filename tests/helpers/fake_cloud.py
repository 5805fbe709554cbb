"""A cloud of TPUs that is made of shell scripts.

In it `gcloud compute tpus tpu-vm ssh` executes the command in a folder that stands for the home of all workers: what
arrives there, quoting included, is what would arrive on a TPU VM.
"""

import shlex
import shutil
import subprocess

from tests.helpers.launching import ROOT, executable, launch, read

REQUIRED = {"PROJECT": "some-project", "ZONE": "some-zone"}

# $CLOUD/state is the state of the TPU, $CLOUD/home the home of its workers, $CLOUD/bucket what is in gs://.
GCLOUD = r"""
echo "gcloud $(printf '%q ' "$@")" >>"$CLOUD/calls"
flag() { local a; for a in "${words[@]}"; do [[ $a != "$1="* ]] || echo "${a#"$1="}"; done; }
words=("$@")
case "$*" in
  *" create "*)
    mkdir -p "$CLOUD/home/.local/bin"
    cp "$CLOUD/uv" "$CLOUD/home/.local/bin/uv"
    cat "$CLOUD/born" >"$CLOUD/state"
    ;;
  *" delete "*)
    kill "$(cat "$CLOUD/home/xclip_jax/train.pid")" 2>/dev/null
    rm -rf "$CLOUD/home" "$CLOUD/state"
    ;;
  *" describe "*)
    [ -e "$CLOUD/state" ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    cat "$CLOUD/state"
    ;;
  # New files are readable to all, as by a copy that does not keep their modes.
  *" scp "*) cat "$5" >"$CLOUD/home/${6#*:}" ;;
  *" ssh "*)
    cd "$CLOUD/home" 2>/dev/null || exit 255
    echo "SSH: connecting" >&2
    HOME=$PWD bash -c "$(flag --command)"
    ;;
  # In a bucket, unlike in a folder, a name with two slashes is another one.
  "storage "*" gs://"*//*) echo "ERROR: (gcloud.storage) One or more URLs matched no objects." >&2; exit 1 ;;
  "storage ls gs://bucket") [ -z "${LOGGED_OUT:-}" ] || { echo "ERROR: (gcloud) no account" >&2; exit 1; } ;;
  "storage ls "*'*'*) compgen -G "$CLOUD/bucket/${3#gs://}" | sed "s#^$CLOUD/bucket/#gs://#" ;;
  "storage ls "*)
    [ -e "$CLOUD/bucket/${3#gs://}" ] ||
      { echo "ERROR: (gcloud.storage.ls) One or more URLs matched no objects." >&2; exit 1; }
    [[ $3 != */ ]] || (cd "$CLOUD/bucket" && printf 'gs://%s\n' "${3#gs://}"*/)
    ;;
  "storage cp --no-clobber - "*) mkdir -p "$CLOUD/bucket/$(dirname "${5#gs://}")" && cat >"$CLOUD/bucket/${5#gs://}" ;;
  "storage cp "*) mkdir -p "$CLOUD/bucket/$(dirname "${4#gs://}")" && cp "$3" "$CLOUD/bucket/${4#gs://}" ;;
  "storage cat "*)
    [ -e "$CLOUD/bucket/${3#gs://}" ] ||
      { echo "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:" >&2; exit 1; }
    cat "$CLOUD/bucket/${3#gs://}"
    ;;
  *) exit 64 ;;
esac
"""
# `uv venv` puts a python there that notes its arguments and then does what the scenario says for this start.
UV = r"""
echo "uv $(printf '%q ' "$@")" >>"$CLOUD/calls"
if [ "$1" = venv ]; then mkdir -p .venv/bin; cp "$CLOUD/python" .venv/bin/python; fi
if [ "$2" = freeze ]; then echo "jax==1.2.3"; fi
if [[ $* == *--constraint=pinned.txt* ]]; then cat pinned.txt >>"$CLOUD/pinned"; fi
"""
PYTHON = r"""
echo "python $(printf '%q ' "$@")" >>"$CLOUD/calls"
n=$(($(cat "$CLOUD/starts" 2>/dev/null || echo 0) + 1)); echo "$n" >"$CLOUD/starts"
put() { mkdir -p "$CLOUD/bucket/bucket/runs/mine"; echo "$2" >"$CLOUD/bucket/bucket/runs/mine/$1"; }
finish() { put results.json '{"results": {}}'; }
echo "line of the log"
eval "$(sed -n "${n}p" "$CLOUD/scenario")"
"""


def make_checkout(path):
    """Makes a repository of two commits with what the scripts send to the workers, whatever this one is."""
    for name in (".gitattributes", ".git_archival.txt", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, path)
    for name in ("configs", "launch", "studies", "xclip_jax"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    commit = ["commit", "--quiet", "--allow-empty", "--message=x"]
    for arguments in (["init", "--quiet"], ["add", "--all"], commit, commit):
        subprocess.run([*git, *arguments], cwd=path, check=True)
    return path


class Cloud:
    """The fake cloud of one test."""

    def __init__(self, path, checkout):
        self.path, self.checkout = path, checkout
        (path / "bin").mkdir()
        executable(path / "bin" / "gcloud", GCLOUD)
        for name, body in {"uv": UV, "python": PYTHON}.items():
            executable(path / name, body)

    def launch(self, script, *args, born="ACTIVE", scenario=(), folder=None, **env):
        (self.path / "born").write_text(born + "\n")
        (self.path / "scenario").write_text("".join(f"{line}\n" for line in scenario))
        env = REQUIRED | {"CLOUD": str(self.path), "POLL": "0.02"} | env
        return launch(script, *args, env=env, cwd=self.checkout, path=[self.path / "bin"], folder=folder)

    @property
    def calls(self):
        return [shlex.split(line) for line in read(self.path / "calls").splitlines()]

    def verbs(self):
        """("create", "delete", "python") as they came, without looks at states and commands over ssh."""
        words = [call[0] if call[0] != "gcloud" else (call[4] if call[1] == "compute" else "") for call in self.calls]
        return [word for word in words if word in ("create", "delete", "python")]
