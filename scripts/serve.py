#!/usr/bin/env python
"""A small web service over an exported model: an example to begin with. Needs fastapi: pip install 'mfdist[serve]'

    python scripts/serve.py --run-dir runs/advanced                         # its pages: http://127.0.0.1:8000/docs
    curl 127.0.0.1:8000/recommend --json '{"user_ids": ["A2CX7LUOHB2NDG"], "k": 5}'
    curl 127.0.0.1:8000/predict --json '{"user_ids": ["A2CX7LUOHB2NDG"], "item_ids": ["0132793040"]}'
    curl 127.0.0.1:8000/fold_in --json '{"item_ids": ["0132793040", "B00004SABB"], "ratings": [5, 2], "k": 5}'

A run directory or the folder of a model suffices; what reads training ratings (`exclude_seen`, `user_id` of fold-in)
wants the dataset as well. It listens to this machine alone and knows no passwords: put a server that does before it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from mfdist import load
from mfdist.api import Model
from mfdist.errors import MfdistError, exit_code_of

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
except ImportError:
    sys.exit("error: scripts/serve.py needs fastapi and uvicorn: pip install 'mfdist[serve]'.")

MOST = 10_000
Ids = Annotated[list[str], Field(min_length=1, max_length=MOST)]
Length = Annotated[int, Field(ge=1, le=1000)]


class Asked(BaseModel):
    """An unknown field is a mistake of the caller's."""

    model_config = ConfigDict(extra="forbid")


class Pairs(Asked):
    user_ids: Ids
    item_ids: Ids


class Users(Asked):
    user_ids: Ids
    k: Length = 10
    exclude_seen: bool = False


class Ratings(Asked):
    """Ratings of one user; ``predict_ids``: items whose ratings to predict beside."""

    item_ids: Annotated[list[str], Field(max_length=MOST)]
    ratings: Annotated[list[FiniteFloat], Field(max_length=MOST)]
    user_id: str | None = None
    k: Length = 10
    predict_ids: Annotated[list[str], Field(max_length=MOST)] = []


def service(model: Model, data: str | None = None) -> FastAPI:
    """The application; ``data``: the dataset directory, where the run does not say it or it has moved."""
    app = FastAPI(title="mfdist")

    @app.exception_handler(MfdistError)
    def mistaken(request: Request, error: MfdistError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422 if error.exit_code == 2 else 500)

    @app.get("/health")
    def health() -> dict[str, Any]:
        exported = model.exported
        return {"model": exported.config["model"], "users": exported.num_users, "items": exported.num_items}

    @app.post("/predict")
    def predict(asked: Pairs) -> dict[str, Any]:
        return {"predictions": model.predict(asked.user_ids, asked.item_ids).tolist()}

    @app.post("/recommend")
    def recommend(asked: Users) -> dict[str, Any]:
        table = model.recommend(asked.user_ids, asked.k, exclude_seen=asked.exclude_seen, data=data)
        return {"recommendations": table.to_pylist()}

    @app.post("/fold_in")
    def fold_in(asked: Ratings) -> dict[str, Any]:
        user = model.fold_in(asked.item_ids, asked.ratings, user_id=asked.user_id, data=data)
        return {"recommendations": user.recommend(asked.k).to_pylist(),
                "predictions": user.predict(asked.predict_ids).tolist()}  # fmt: skip

    return app


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="run directory, or the folder of an exported model")
    parser.add_argument("--data", help="dataset directory of the training ratings, where it has moved")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen to (default %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0: any that is free (default %(default)s)")
    flags = parser.parse_args(argv)
    model = load(flags.run_dir)
    model.fold_in([], []).recommend(1)  # items are made ready and kernels compiled before anybody asks
    uvicorn.run(service(model, flags.data), host=flags.host, port=flags.port, log_level="info", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
