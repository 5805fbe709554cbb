"""Devices and versions: whether JAX uses this machine's accelerator, and whether packages have the right versions."""

import os
import pathlib
import platform
from collections.abc import Iterator
from importlib import metadata

import jax
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import xclip_jax
from xclip_jax.commands.doctor.finding import FAIL, Finding, fail, warning
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError

_EXTRAS = {"NVIDIA GPU": "gpu", "TPU": "tpu"}
# Files that the drivers make.
_NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # the last of WSL
_GOOGLE = "0x1ae0"
# Of PCI; Google's network cards have the same vendor. As in jax._src.hardware_utils.
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def accelerator(root: str = "/") -> str:
    """Return "NVIDIA GPU" or "TPU" where this machine has one, whether or not JAX uses it; else "".

    Args:
      root: of the file system.
    """
    files = pathlib.Path(root)
    if any((files / name).exists() for name in _NVIDIA):
        return "NVIDIA GPU"
    for vendor in files.glob("sys/bus/pci/devices/*/vendor"):
        if vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS:
            return "TPU"
    return "TPU" if any(path.is_char_device() for path in files.glob("dev/accel[0-9]*")) else ""


def check_devices(root: str = "/") -> Iterator[Finding]:
    """Yield what JAX computes on, and whether the machine has something faster."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where no plugin of that platform is installed
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms}"  # ty: ignore[missing-attribute]
        reason = (str(error) or "nothing is installed for it").splitlines()[0]
        yield fail("devices", f"JAX has no device, {asked} ({reason})", "unset JAX_PLATFORMS, or set it to cpu")
        return
    kind = devices[0].device_kind
    text = f"{len(devices)} x {kind}, of {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"
    values = {"devices": len(devices), "kind": kind, "platform": devices[0].platform}
    present = accelerator(root) if devices[0].platform == "cpu" else ""
    if not present:
        yield Finding("devices", text, values=values)
    elif "cpu" in (jax.config.jax_platforms or ""):  # ty: ignore[missing-attribute]
        reason = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', 'cpu')} keeps JAX from this machine's {present}"
        yield warning("devices", f"{text}; {reason}", "unset it to train there", **values)
    else:
        remedy = f"pip install 'xclip_jax[{_EXTRAS[present]}]', and see the warnings of python -c 'import jax; "
        reason = f"this machine has a {present} that JAX does not use"
        yield fail("devices", f"{text}; {reason}", f"{remedy}jax.devices()'", **values)


def warn_of_idle_accelerator(root: str = "/") -> None:
    """Print a warning where JAX computes on the CPU of a machine that has a GPU or TPU, and was not asked to.

    JAX_PLATFORMS=cpu asks for it.

    Args:
      root: of the file system.

    Raises:
      UserError: JAX has no device.
    """
    for finding in check_devices(root):
        if finding.mark == FAIL and not finding.values:
            raise UserError(f"{finding.text}; {finding.remedy}.")
        if finding.mark == FAIL:
            log0(f"WARNING: computing on the CPU. {finding.text}: {finding.remedy}")


def check_versions() -> Iterator[Finding]:
    """Yield the versions of Python and of the packages that this one requires, and which are not those it allows."""
    try:
        requires, bounds = metadata.requires("xclip_jax") or [], metadata.metadata("xclip_jax")["Requires-Python"]
    except metadata.PackageNotFoundError:
        text = "xclip_jax is on the path and not installed, so the versions that it allows are unknown"
        yield warning("versions", text, "pip install -e . in its checkout")
        return
    wrong = [finding for line in requires if (finding := _check_requirement(Requirement(line)))]
    python = platform.python_version()
    if bounds and python not in SpecifierSet(bounds):
        wrong.append(fail("versions", f"Python is {python}, and xclip_jax needs {bounds}", "use another Python"))
    yield from wrong
    installed = {name: version for name in (*_SHOWN, *_PLUGINS) if (version := _version(name))}
    yield from (pairs := _check_pairs(installed))
    if not (wrong or pairs):
        packages = ", ".join(f"{name} {installed[name]}" for name in _SHOWN)
        own = xclip_jax.__version__
        values = {"python": python, "xclip_jax": own} | installed
        yield Finding("versions", f"Python {python}, {packages}: all as xclip_jax {own} needs them", values=values)


def _version(package: str) -> str:
    """Version of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _check_requirement(requirement: Requirement) -> Finding | None:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    version, install = _version(requirement.name), f"pip install '{requirement.name}{requirement.specifier}'"
    if not version:
        return fail("versions", f"{requirement.name} is not installed", install)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return fail("versions", f"{requirement.name} is {version}, and xclip_jax needs {requirement.specifier}", install)


def _check_pairs(installed: dict[str, str]) -> list[Finding]:
    """JAX's own packages among each other."""
    findings, jaxlib = [], installed.get("jaxlib", "0")
    for name in _PLUGINS:
        if name in installed and Version(installed[name]).release != Version(jaxlib).release:
            text = f"{name} is {installed[name]} and jaxlib {jaxlib}, so JAX does not use the GPU"
            cuda = name.split("-")[1]
            findings.append(fail("versions", text, f"pip install -U 'jax[{cuda}]=={installed['jax']}'"))
    if Version(installed.get("jax", "0")).release != Version(jaxlib).release:
        text = f"jax is {installed.get('jax')} and jaxlib {jaxlib}; they are released and tested as a pair"
        findings.append(warning("versions", text, f"pip install jaxlib=={installed.get('jax')}"))
    return findings
