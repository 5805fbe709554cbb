"""Keys that the scripts for TPUs bring to the workers (ENV_FILE), and what needs them."""

import re
import time

import pytest

from tests.helpers.launching import TRAINING, read


def keys(folder, text, mode=0o600):
    path = folder / "my keys"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_keys_reach_training_and_nothing_else(script, cloud):
    text = "# mine\nWANDB_API_KEY=secret-1\n\nHF_TOKEN=secret/2=\n"
    env = {"EXTRAS": "tpu,wandb", "ENV_FILE": keys(cloud.path, text).name, "folder": cloud.path}
    more = ["--config.log.trackers=('wandb',)", "--config.init.weights=hf:org/name"]
    scenario = ['echo "$WANDB_API_KEY $HF_TOKEN" >"$CLOUD/obtained"; finish; exit 0']
    dry = cloud.launch(script, "--dry-run", *TRAINING, *more, **env)
    born = {"tpu_vm.sh": "READY", "tpu_pod.sh": "ACTIVE"}[script]
    done = cloud.launch(script, *TRAINING, *more, born=born, scenario=scenario, KEEP="1", **env)
    assert (dry.returncode, done.returncode) == (0, 0), done.stderr
    deadline = time.monotonic() + 10
    while not read(cloud.path / "obtained") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read(cloud.path / "obtained") == "secret-1 secret/2=\n"
    copy = cloud.path / "home" / ".xclip_jax.env"
    assert copy.read_text() == text and copy.stat().st_mode & 0o777 == 0o600
    log = cloud.path / "home" / "xclip_jax" / "train.log"
    shown = (dry.stdout, dry.stderr, done.stdout, done.stderr, read(cloud.path / "calls"), read(log))
    assert not any("secret" in text for text in shown) and "gated" not in done.stderr


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("HF_TOKEN=x\n", 0o640, r"error: others may read ENV_FILE=.*my keys; chmod 600 .*my keys"),
        ("A=1\nHF_TOKEN='secret'\n", 0o600, r"error: ENV_FILE=.*my keys, line 2 is not NAME=VALUE, or has spaces"),
        ("A=$(touch secret)\n", 0o600, r"error: ENV_FILE=.*my keys, line 1 is not NAME=VALUE"),
    ],
)
def test_a_file_of_keys_that_is_not_safe_is_one_sentence(text, mode, message, cloud):
    done = cloud.launch("tpu_vm.sh", *TRAINING, ENV_FILE=str(keys(cloud.path, text, mode)))
    assert done.returncode == 2 and re.search(message, done.stderr) and "secret" not in done.stderr
    assert cloud.verbs() == []
