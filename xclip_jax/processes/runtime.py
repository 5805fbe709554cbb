"""Several processes as one run: one for each host, with the host's devices."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import jax

# Not public in JAX: the client that processes talk through, and whether devices are initialised already.
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge

from xclip_jax.core.errors import EXIT_RESUMABLE, UserError, exit_now
from xclip_jax.processes.peers import HEARTBEAT_SECONDS, Peers

# How long a process that has done its work waits for the others, when process 0 has done its own.
_SHUTDOWN_SECONDS = 300
# After the end of its work a process exits within this time, whatever thread hangs.
_EXIT_SECONDS = 30

_peers: Peers | None = None


def join(distributed: bool, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Initialise `jax.distributed` if asked to; must be called before the first use of a device.

    Args:
      distributed: let JAX discover the other processes, as it can on TPU pods, GKE, Slurm and MPI.
      coordinator, processes, process: elsewhere "HOST:PORT" of process 0, their number, and the index of this one.
    """
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and (not all(given) or process >= processes):
        raise UserError(
            f"--coordinator={coordinator!r}, --processes={processes} and --process={process} belong together: "
            "HOST:PORT of process 0, the number of processes, and the index of this one, from 0."
        )
    if not distributed and not coordinator:
        return
    if xla_bridge.backends_are_initialized():
        raise UserError(
            "the recipe has looked at this machine's devices before the processes joined: give the recipe small "
            "device=cpu, gpu or tpu, and call no jax.devices() in your get_config."
        )
    given_or_found = (coordinator, processes, process) if coordinator else ()
    try:
        jax.distributed.initialize(
            *given_or_found,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"this process cannot join the others ({reason}). Where JAX cannot discover them, start each with "
            "--coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    global _peers
    state = jax_distributed.global_state
    if state.client is not None and state.num_processes > 1:
        _peers = Peers(state.client, state.process_id, state.num_processes)


def peers() -> Peers | None:
    """Return the other processes, or None in a run of one process, or before `join`."""
    return _peers


@contextlib.contextmanager
def ends_all() -> Iterator[None]:
    """End all processes, with the reason, if this context fails in one of them."""
    try:
        yield
    except SystemExit as stop:
        if _peers is not None and stop.code not in (None, 0, EXIT_RESUMABLE):
            _peers.fail(stop)
        raise
    except BaseException as error:
        if _peers is not None and not isinstance(error, GeneratorExit):
            _peers.fail(error)
        raise


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Run a whole command in `ends_all`; afterwards the process exits in time, even if a thread hangs.

    A single process that was stopped exits at once: XLA may still compile for an evaluation that it has left.
    """
    status = 1
    try:
        with ends_all():
            yield
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status == EXIT_RESUMABLE and _peers is None:
            exit_now(status)
        raise
    finally:
        if _peers is not None and status in (0, EXIT_RESUMABLE):
            _peers.await_first()
        limit = _EXIT_SECONDS + (_SHUTDOWN_SECONDS if _peers is not None else 0)
        threading.Thread(target=_exit_after, args=(limit, status), daemon=True).start()


def _exit_after(seconds: float, status: int) -> None:
    # Python waits at its exit for threads that read, for ever where a disk does not answer.
    time.sleep(seconds)
    os._exit(status)
