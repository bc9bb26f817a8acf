"""The arithmetic of a training step on packed rows: one interface, a plain torch reference and fast ones."""
