"""The ranks of a test script, started by mpiexec or torchrun, with the few calls of mpi4py that such scripts make."""

import os

import parle_mpi


class Parle(parle_mpi.Parle):
    def __init__(self, params, comm, **settings):
        super().__init__(params, comm.group if isinstance(comm, TorchRanks) else comm, **settings)


class TorchRanks:
    """A process group of torch.distributed."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def allgather(self, value):
        from torch import distributed

        values = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def bcast(self, value):
        return self.allgather(value)[0]

    def Split(self, color):
        """Return the ranks with the same color, or None for the color None."""
        from torch import distributed

        colors = self.allgather(color)
        ranks = [rank for rank, other in enumerate(colors) if other == color]
        return None if color is None else TorchRanks(distributed.new_group(ranks, use_local_synchronization=True))

    def Abort(self, status):
        os._exit(status)


def start():
    """Start communication and return all ranks, and the one of this process alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch import distributed

        distributed.init_process_group("gloo")
        world = TorchRanks(distributed.group.WORLD)
        return world, world.Split(world.rank)
    from mpi4py import MPI

    return MPI.COMM_WORLD, MPI.COMM_SELF


def split(comm, color):
    """Return the ranks with the same color, or None for the color None."""
    if isinstance(comm, TorchRanks):
        return comm.Split(color)
    from mpi4py import MPI

    group = comm.Split(MPI.UNDEFINED if color is None else color)
    return None if group == MPI.COMM_NULL else group
