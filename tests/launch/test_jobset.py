"""The manifest for Google Kubernetes Engine."""

import math
import shlex
import subprocess

import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from tests.helpers.launching import LAUNCH, ROOT, executable


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def container(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (found,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_jobset_has_a_pod_for_each_host(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    selector = spec["template"]["spec"]["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container(jobset)["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"


def test_jax_joins_the_hosts_of_all_slices(monkeypatch):
    """From what GKE sets in the pods of each job; the manifest changes in one number."""
    slices = 2
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    jobset = yaml.safe_load(text.replace("    replicas: 1\n", f"    replicas: {slices}\n"))
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    # One job on one node pool, which is one slice.
    assert list(jobset["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    hosts, name = job["template"]["spec"]["completions"], f"{jobset['metadata']['name']}-{job['name']}"
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    # Where no variable says so, JAX asks the metadata server, which knows of no other slice.
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda _: None)
    joined = []
    for i in range(slices):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(f"{name}-{i}-{host}.xclip-jax" for host in range(hosts)))
        monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", f"{name}-0-0.xclip-jax")
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", str(slices))
        monkeypatch.setenv("MEGASCALE_SLICE_ID", str(i))
        for host in range(hosts):
            monkeypatch.setenv("TPU_WORKER_ID", str(host))
            pod = cloud_tpu_cluster.GkeTpuCluster
            joined.append((pod.get_process_count(), pod.get_coordinator_address(1, None), pod.get_process_id()))
    assert joined == [(slices * hosts, f"{name}-0-0.xclip-jax:8482", i) for i in range(slices * hosts)]


def test_jobset_does_not_count_what_was_stopped_as_a_failure(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    by_exit, by_condition = job["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = {"containerName": container(jobset)["name"], "operator": "In", "values": [75, 130, 143]}
    assert by_exit["onExitCodes"] == codes
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_jobset_trains_with_the_command(jobset):
    args = container(jobset)["args"]
    assert args[:6] == ["python", "-m", "xclip_jax.main", "--distributed", "--config", args[5]]
    assert (ROOT / args[5].partition(":")[0]).is_file()
    assert any(arg.startswith("--config.run=gs://") for arg in args)
    assert "kubectl apply --dry-run=client -f launch/gke_jobset.yaml" in (LAUNCH / "gke_jobset.yaml").read_text()


@pytest.mark.parametrize(
    ("training", "stop", "status"),
    [
        ("exit 3", False, 3),
        # Saves on SIGTERM, which takes a moment.
        ("trap 'sleep 0.2; echo saved; exit 75' TERM; echo started; while :; do sleep 0.05; done", True, 75),
        ("echo started; while :; do sleep 0.05; done", True, 75),
    ],
    ids=["failed", "evicted", "evicted early"],
)
def test_jobset_restarts_what_was_evicted(training, stop, status, jobset, tmp_path):
    executable(tmp_path / "python", f'printf "%q " "$@"; echo\n{training}')
    command = [*container(jobset)["command"], *container(jobset)["args"]]
    process = subprocess.Popen(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True)
    assert shlex.split(process.stdout.readline()) == container(jobset)["args"][1:]
    if stop:
        assert process.stdout.readline() == "started\n"
        process.terminate()
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert rest == ("saved\n" if "saved" in training else "")
