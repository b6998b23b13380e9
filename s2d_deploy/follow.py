"""`s2d-deploy condition` on many processes: the first does everything, the others train along.

    torchrun --nproc-per-node 2 -m s2d_deploy.cli condition RECIPE

The first process owns the run folder and every other stage. When it comes to the training steps it tells the others to
begin, and where the trained weights lie (one machine, or a shared file system); where there is nothing to train, it
sends them home.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2d_deploy.recipe import Recipe


def rank() -> int:
    """This process's number, as torchrun and ``accelerate launch`` set it; 0 without them."""
    return int(os.environ.get("RANK", "0"))


def tell(order: dict[str, Any]) -> None:
    """First process: send an order to all others. A no-op where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _exchange(order)


def follow(recipe: Recipe) -> bool:
    """Other processes: wait for the order, and train along. Returns whether there was something to train."""
    order = _exchange({})
    if not order["train"]:
        return False
    from s2d_deploy.console import Display
    from s2d_deploy.models import load_model
    from s2d_deploy.pipeline import Pipeline

    checkpoint = None if order["checkpoint"] is None else Path(order["checkpoint"])
    Pipeline.trained_along(recipe, load_model(recipe.model, checkpoint=checkpoint), Display(quiet=True))
    return True


def _exchange(order: dict[str, Any]) -> dict[str, Any]:
    import torch

    from s2d_deploy.loop import make_accelerator

    make_accelerator()  # joins the process group
    box = [order]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
