"""What a flag is called elsewhere, and the known flag that an unknown one means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

MEANINGS = {
    "lr": "learning-rate rate eta alpha step-size lr-rate",
    "lr-schedule": "schedule scheduler lr-scheduler learning-rate-schedule lr-decay",
    "emb-dim factors": "embedding-dim embedding-size emb-size dim dims k rank latent latent-dim factors emb-dim "
    "num-factors n-factors no-components components hidden hidden-size",
    "batch-size": "bs batch batchsize global-batch-size minibatch train-batch-size",
    "epochs": "num-epochs n-epochs max-epochs iterations iters n-iter num-iterations passes",
    "weight-decay": "wd decay",
    "l2": "reg regularization regularisation lambda l2-reg lambda-reg penalty",
    "seed": "random-state random-seed rng-seed",
    "device": "gpu gpus cuda use-cuda accelerator",
    "optimizer": "optim opt solver algorithm optimiser",
    "model": "arch architecture model-name",
    "data": "dataset data-dir data-path train-data train input input-dir",
    "run-dir": "run rundir output-dir out-dir save-dir model-dir log-dir checkpoint-dir logdir model model-path",
    "out": "output o out-dir output-dir output-file dest destination target out-file save-to",
    "top-k": "topk k n top-n topn num-items num-recommendations at-k",
    "resume": "resume-from continue load-checkpoint from-checkpoint",
    "init-from": "pretrained warm-start init init-model finetune fine-tune",
    "checkpoint-every": "save-every checkpoint-interval save-interval ckpt-every save-steps",
    "keep": "keep-last max-checkpoints save-total-limit",
    "patience": "early-stopping early-stop",
    "max-minutes": "time-limit timeout max-time",
    "val-fraction": "test-size val-size validation-fraction test-fraction val-split validation-split test-ratio",
    "val": "validation test test-file val-file valid",
    "columns": "cols names header column-names schema",
    "users": "user-ids user-file users-file",
    "include-seen": "with-seen no-exclude-seen keep-seen",
    "max-rejected": "max-errors on-bad-lines skip-bad-lines",
    "memory max-memory": "mem ram memory-limit max-mem max-memory memory",
    "sample-users": "sample fraction frac",
    "format": "type output-format kind",
    "rows": "num-rows n n-rows num-ratings size",
    "trials": "n-trials num-trials max-trials budget",
    "minutes": "max-minutes time-limit timeout max-time",
    "splits": "folds n-folds cv n-splits",
    "search": "space search-space params parameters lr epochs emb-dim l2 row-l2",
    "training": "train-config base start",
    "spark-master": "master cluster",
    "ranks": "world-size nproc num-ranks num-gpus",
}
"""Flags -> what they are called elsewhere; of several flags the first that a job has is meant."""


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known flag or key that means the same, else at the one that is spelt most alike."""
    plain = {each.lstrip("-"): each for each in known}
    word = name.lstrip("-").lower().replace("_", "-")
    meant = [
        plain[each]
        for flags, names in MEANINGS.items()
        if word in names.split()
        for each in flags.split()
        if each in plain
    ]
    close = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
