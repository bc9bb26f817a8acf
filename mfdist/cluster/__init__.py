"""The ranks of a run: the World and its collectives, memory that a host's ranks share, the launcher.

Enters: torchrun's environment. Leaves: :class:`~mfdist.cluster.world.World`, the only caller of process groups.
May import: ``kernels`` and the top level.
"""
