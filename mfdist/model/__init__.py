"""The two models, their embedding tables, loss, optimizers and training steps.

Enters: a rank's rows of a global batch (user, item, rating).
Leaves: updated tables, sums of squared errors; item rows travel between ranks by ``exchange``.
May import: ``data``, ``cluster``, ``kernels`` and the top level.
"""
