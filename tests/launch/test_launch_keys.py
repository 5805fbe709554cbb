"""Keys that the scripts for TPUs bring to the workers (ENV_FILE), and what needs them."""

import re
import time

import pytest

from tests.helpers.launching import TRAINING, executable, read

CHECK = r"""
[ "$1" = -c ] || printf 'the config is valid\nextras: hub,wandb\n'
"""


def test_extras_that_the_config_needs_are_enough(cloud):
    executable(cloud.path / "checks", CHECK)
    refused = cloud.launch("tpu_vm.sh", *TRAINING, PYTHON=str(cloud.path / "checks"), EXTRAS="tpu,wandb")
    assert refused.returncode == 2 and "set EXTRAS=tpu,wandb,hub\n" in refused.stderr and cloud.verbs() == []
    extras = {"PYTHON": str(cloud.path / "checks"), "EXTRAS": "hub,tpu,wandb"}
    without = cloud.launch("tpu_vm.sh", *TRAINING, **extras)
    assert without.returncode == 2 and "the workers have no key" in without.stderr and cloud.verbs() == []
    extras["ENV_FILE"] = str(keys(cloud.path, "WANDB_MODE=offline\n"))
    offline = cloud.launch("tpu_vm.sh", *TRAINING, **extras)
    assert offline.returncode == 2 and "would keep the metrics on the workers' disks" in offline.stderr
    extras["ENV_FILE"] = str(keys(cloud.path, "WANDB_API_KEY=x\n"))
    done = cloud.launch("tpu_vm.sh", *TRAINING, born="READY", **extras)
    assert done.returncode == 0, done.stderr
    assert "extras: hub,wandb\n" in done.stdout and cloud.verbs()[0] == "create"
    assert "gated or private need HF_TOKEN=" in done.stderr


def keys(folder, text, mode=0o600):
    path = folder / "my keys"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_keys_reach_training_and_nothing_else(script, cloud):
    text = "# mine\nWANDB_API_KEY=secret-1\n\nHF_TOKEN=secret/2=\n"
    env = {"EXTRAS": "tpu,wandb", "ENV_FILE": keys(cloud.path, text).name, "folder": cloud.path}
    more = ["--config.log.to=('wandb',)", "--config.init.weights=hf:org/name"]
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
        ("export HF_TOKEN=secret\n", 0o600, r"error: ENV_FILE=.*my keys, line 1 is not NAME=VALUE"),
        ("A=$(touch secret)\n", 0o600, r"error: ENV_FILE=.*my keys, line 1 is not NAME=VALUE"),
    ],
)
def test_a_file_of_keys_that_is_not_safe_is_one_sentence(text, mode, message, cloud):
    done = cloud.launch("tpu_vm.sh", *TRAINING, ENV_FILE=str(keys(cloud.path, text, mode)))
    assert done.returncode == 2 and re.search(message, done.stderr) and "secret" not in done.stderr
    assert cloud.verbs() == []


def test_a_database_on_a_worker_is_warned_of(cloud):
    for text, warned in (("", True), ("TRACKIO_SPACE_ID=me/mine\n", False)):
        env = {"EXTRAS": "tpu,trackio", "ENV_FILE": str(keys(cloud.path, text))}
        done = cloud.launch("tpu_pod.sh", "--dry-run", *TRAINING, "--config.log.to=trackio", **env)
        assert done.returncode == 0 and ("warning: trackio's database is on the first worker" in done.stderr) == warned


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_a_recipe_that_the_workers_will_not_have_is_refused(script, cloud):
    (cloud.checkout / "configs" / "mine.py").write_text("")
    try:
        for file, message in (
            ("/elsewhere/mine.py:a=b", "outside the checkout"),
            ("configs/mine.py", "is not committed"),
        ):
            for form in ([f"--config={file}"], ["--config", file]):
                done = cloud.launch(script, "--dry-run", *TRAINING, *form)
                assert done.returncode == 2 and message in done.stderr, done.stderr
        assert (
            cloud.launch(script, "--dry-run", *TRAINING, "--config=./configs/pretrain.py:objective=clip").returncode
            == 0
        )
    finally:
        (cloud.checkout / "configs" / "mine.py").unlink()


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", ["--config.log.to=('my_lab.wandb_more:Class',)"], ""),
        ("", ["--config.log.to=()", "--config.data.dir=wandb-x"], ""),
        ("", ["--config.log.to", '("tensorboard", "trackio")'], "names trackio, which the workers would lack; set EX"),
        ("OLD_WANDB_API_KEY=x\n", ["--config.log.to=wandb"], "names wandb, for which the workers have no key"),
        ("WANDB_API_KEY=x\n", ["--config.log.to=wandb"], ""),
        ("WANDB_MODE=offline\n", ["--config.log.to=wandb"], "would keep the metrics on the workers' disks"),
        ("MY_HF_TOKEN=x\n", ["--config.init.weights=hf-hub:org/name"], "need HF_TOKEN=... in the file ENV_FILE"),
    ],
)
def test_what_needs_which_key(text, more, message, cloud):
    env = {"EXTRAS": "tpu,wandb", "ENV_FILE": str(keys(cloud.path, text))}
    done = cloud.launch("tpu_vm.sh", "--dry-run", *TRAINING, *more, **env)
    assert done.returncode == (2 if "workers" in message else 0)
    assert message in done.stderr and ("log.to" in done.stderr or "HF_TOKEN" in done.stderr) == bool(message)
