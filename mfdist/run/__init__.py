"""A run directory: who holds it, and its checkpoints.

Enters: tensors and state of a rank. Leaves: ``RUN/checkpoints/step-*/``, which exist when their COMMIT does.
May import: ``data``, ``cluster`` and the top level.
"""
