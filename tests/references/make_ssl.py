"""What `lightly` says about small seeded inputs, for tests that must not import torch.

    python tests/references/make_ssl.py

in an environment with torch and lightly writes ssl_lightly.json beside this file. The inputs are drawn
again by the tests, from `inputs`; only lightly's answers are stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).with_name("ssl_lightly.json")
TEACHER_TEMPERATURE = 0.07
EPSILON = 0.05  # Sinkhorn's temperature


def inputs() -> dict[str, np.ndarray]:
    """Two teacher views and five student ones of four images; masks of three tokens, two and none;
    features; logits to assign. All fp32, prototypes last."""
    rng = np.random.default_rng(20240917)
    mask = np.zeros((3, 2, 3), bool)
    mask[0, 0], mask[2, :, 1] = True, True
    draws = {
        "teacher": rng.normal(size=(2, 4, 6)),
        "student": rng.normal(size=(5, 4, 6)),
        "centre": rng.normal(size=6) * 0.3,
        "patch_teacher": rng.normal(size=(mask.sum(), 6)),
        "patch_student": rng.normal(size=(mask.sum(), 6)),
        "features": rng.normal(size=(7, 5)) * 3,
        "logits": rng.normal(size=(10, 6)) * 0.4,
    }
    return {"mask": mask, **{name: x.astype(np.float32) for name, x in draws.items()}}


GRID, MASKED = (
    (14, 14),
    40,
)  # small enough that no rectangle is as long as the grid, which lightly refuses


def mask_draws() -> np.ndarray:
    """Uniform draws of five masks, 40 attempts each: area, aspect, top, left."""
    return np.random.default_rng(7).random((5, 40, 4)).astype(np.float32)


class Replay:
    """Stands in for `random`: one row of draws an attempt, whether or not all four are asked for."""

    def __init__(self, draws: np.ndarray):
        self.draws, self.attempt, self.asked = draws.astype(float), -1, 2

    def uniform(self, low: float, high: float) -> float:
        if self.asked >= 2:
            self.attempt, self.asked = self.attempt + 1, 0
        self.asked += 1
        return low + self.draws[self.attempt, self.asked - 1] * (high - low)

    def randint(self, low: int, high: int) -> int:
        self.asked += 1
        return low + int(self.draws[self.attempt, self.asked - 1] * (high - low + 1))


def block_masks() -> list[list[int]]:
    """Flat positions lightly's block masking paints from those draws (it may stop short of MASKED)."""
    from lightly.models import utils

    found = []
    for draws in mask_draws():
        utils.random = Replay(draws)  # type: ignore[assignment]
        mask = utils.random_block_mask_image(GRID, MASKED)
        found.append(np.flatnonzero(mask.numpy()).tolist())
    return found


def answers() -> dict[str, Any]:
    """lightly's losses, their gradients with respect to the student, and the centres afterwards."""
    import lightly
    import torch
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.loss.swav_loss import sinkhorn
    from lightly.utils.scheduler import cosine_schedule

    x = {name: torch.from_numpy(value) for name, value in inputs().items()}
    temperatures = {"teacher_temp": TEACHER_TEMPERATURE, "student_temp": 0.1}

    dino = DINOLoss(output_dim=6, **temperatures)
    dino.center.data[:] = x["centre"]
    student = x["student"].requires_grad_()
    dino_loss = dino(list(x["teacher"]), list(student))
    dino_loss.backward()

    ibot = IBOTPatchLoss(output_dim=6, **temperatures)
    ibot.center.center[:] = x["centre"]
    patch = x["patch_student"].requires_grad_()
    ibot_loss = ibot(x["patch_teacher"], patch, x["mask"])
    ibot_loss.backward()

    features = x["features"].requires_grad_()
    koleo_loss = KoLeoLoss()(features)
    koleo_loss.backward()

    found = {
        "dino": dino_loss,
        "dino_gradient": student.grad,
        "dino_centre": dino.center.reshape(-1),
        "ibot": ibot_loss,
        "ibot_gradient": patch.grad,
        "ibot_centre": ibot.center.value.reshape(-1),
        "koleo": koleo_loss,
        "koleo_gradient": features.grad,
        "sinkhorn": sinkhorn(x["logits"], iterations=3, epsilon=EPSILON),
    }
    # Its last step is max_steps - 1; ours is `steps`, one further.
    found["momentum"] = torch.tensor(
        [cosine_schedule(step, 101, 0.992, 1.0) for step in (0, 25, 50, 100)], dtype=torch.float64
    )
    masks = {"masks": block_masks()}
    told = {"versions": {"lightly": lightly.__version__, "torch": torch.__version__}}
    return (
        told | masks | {name: np.asarray(value.detach()).tolist() for name, value in found.items()}
    )


if __name__ == "__main__":
    STORED.write_text(json.dumps(answers()) + "\n")
