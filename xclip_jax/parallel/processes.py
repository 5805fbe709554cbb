"""Several processes as one run: one a host, each with the devices of its host."""

import jax

from xclip_jax.errors import UserError


def join(distributed: bool, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins `jax.distributed` where asked to; must come before the first use of a device.

    Args:
      distributed: let JAX find the others, as it can on TPU pods, GKE, Slurm and MPI.
      coordinator: "HOST:PORT" of process 0, where JAX cannot find it.
      processes, process: how many there are, and the number of this one; with `coordinator` alone.

    Raises:
      UserError: arguments that do not fit together, or others that cannot be found or reached.
    """
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and (not all(given) or process >= processes):
        raise UserError(
            f"--coordinator={coordinator!r}, --processes={processes} and --process={process} belong together: "
            "HOST:PORT of process 0, how many processes there are, and the number of this one, from 0."
        )
    if not distributed and not coordinator:
        return
    try:
        if coordinator:
            jax.distributed.initialize(coordinator, processes, process)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"this process cannot join the others ({reason}). Where they cannot be found by themselves, start each "
            "with --coordinator=HOST:PORT --processes=N --process=I."
        ) from error
