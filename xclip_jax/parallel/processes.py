"""Several processes as one run: one for each host, with the host's devices."""

import jax

from xclip_jax.errors import UserError


def join(distributed: bool, coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Initialise `jax.distributed` if asked to; must be called before the first use of a device.

    Args:
      distributed: let JAX discover the other processes, as it can on TPU pods, GKE, Slurm and MPI.
      coordinator: "HOST:PORT" of process 0, elsewhere.
      processes, process: the number of processes, and the index of this one; only with `coordinator`.

    Raises:
      UserError: incomplete arguments, or processes that cannot be discovered or reached.
    """
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and (not all(given) or process >= processes):
        raise UserError(
            f"--coordinator={coordinator!r}, --processes={processes} and --process={process} belong together: "
            "HOST:PORT of process 0, the number of processes, and the index of this one, from 0."
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
            f"this process cannot join the others ({reason}). Where JAX cannot discover them, start each with "
            "--coordinator=HOST:PORT --processes=N --process=I."
        ) from error
