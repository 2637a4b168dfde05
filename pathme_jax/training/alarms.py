"""Alarms on what a training step logs: each names what is seen, the likely cause and the cure."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something that looks wrong. `str` is one line for the screen."""

    name: str
    seen: str
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. Likely {self.cause}. {self.cure}"


class Alarms:
    """Rules on logged values. None stops a run.

    Collapse is judged by the median of the last five logged values, and only after `settle` steps: a ViT fresh
    from its initialisation gives nearly the same features for all images (LayerScale 1e-5) and is not ill.
    After a resume the medians start anew.

    What they cannot see: features confined to few directions that are not the axes (`feature_std` stays 1),
    and features that are rich but of no use. The probes see both.
    """

    RECENT, HISTORY = 5, 50

    def __init__(self, settle: int, prototypes: int | None = None, every: int = 50):
        """
        Args:
            settle: steps until a healthy run has left its initial state; a good value is the longer of the
                warm-ups of learning rate and teacher temperature.
            prototypes: k, or None where the method logs it as "prototypes".
            every: an alarm of one name is given again after that many logged steps at the earliest.
        """
        self.settle, self.prototypes, self.every = settle, prototypes, every
        self._past: dict[str, collections.deque[float]] = {}
        self._given: dict[str, int] = {}
        self._logged = 0

    def __call__(
        self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]
    ) -> list[Alarm]:
        """The alarms of one logged step. Values that are not there raise none."""
        found = _exploding(metrics.get("grad_norm"), self._past.get("grad_norm", ()))
        for name, value in {**metrics, **timing}.items():
            past = self._past.setdefault(name, collections.deque(maxlen=self.HISTORY))
            past.append(value)
        now = {
            name: statistics.median([*past][-self.RECENT :])
            for name, past in self._past.items()
            if len(past) >= self.RECENT
        }
        found += _starving(now)
        if step >= self.settle:
            k = metrics.get("prototypes", self.prototypes)
            found += _collapsed(now) + _one_sided(now, k) + _sharpness(now, k)
        self._logged += 1
        fresh = [
            a for a in found if self._logged - self._given.get(a.name, -self.every) >= self.every
        ]
        self._given.update({alarm.name: self._logged for alarm in fresh})
        return fresh


def _collapsed(now: Mapping[str, float]) -> list[Alarm]:
    std = now.get("feature_std", 1.0)
    if std > 0.1:
        return []
    return [
        Alarm(
            "collapse",
            # Of unit vectors, the mean cosine of a pair is 1 - the total variance, and that is ≥ std².
            f"feature_std {std:.3g}: features of two images have a cosine of up to {1 - std**2:.3f}",
            "complete collapse: the encoder answers the same whatever it sees",
            "Lower the learning rate or lengthen its warm-up, lower the teacher's temperature, start its momentum"
            " higher, check that centring or Sinkhorn is on and that the views are not blank (views.png)",
        )
    ]


def _one_sided(now: Mapping[str, float], k: float | None) -> list[Alarm]:
    usage = now.get("prototype_usage", 1.0)
    if usage > 0.2:
        return []
    count = f", about {k**usage:.0f} of {k:.0f} prototypes" if k else ""
    return [
        Alarm(
            "few_prototypes",
            f"prototype_usage {usage:.3g}{count}",
            "one-sided collapse: most images fall to the same prototypes",
            "Use Sinkhorn targets instead of centring, raise the teacher's temperature or the batch, or train the"
            " heads' last layer later",
        )
    ]


def _sharpness(now: Mapping[str, float], k: float | None) -> list[Alarm]:
    if k is None or "teacher_entropy" not in now:
        return []
    entropy, most = now["teacher_entropy"], math.log(k)
    seen = f"teacher_entropy {entropy:.3g} of at most {most:.3g} nats"
    if entropy > 0.98 * most:
        return [
            Alarm(
                "uniform_teacher",
                seen,
                "collapse to uniform targets: the teacher prefers no prototype, so there is nothing to learn",
                "Lower the teacher's temperature or warm it up longer, let global crops overlap more",
            )
        ]
    if entropy < 0.01 * most:
        return [
            Alarm(
                "hard_teacher",
                seen,
                "a teacher's temperature too low: its targets are one prototype each",
                "Raise the teacher's temperature; if prototype_usage is low too, see few_prototypes",
            )
        ]
    return []


def _exploding(norm: float | None, past: Iterable[float]) -> list[Alarm]:
    past = list(past)
    if norm is None or len(past) < 10:
        return []
    usual = statistics.median(past)
    if norm <= 10 * usual:
        return []
    return [
        Alarm(
            "gradient",
            f"grad_norm {norm:.3g}, {norm / max(usual, 1e-30):.0f} times its median",
            "a learning rate too high for this stage, or a broken batch",
            "Once does no harm where gradients are clipped; if it returns, lower the learning rate, lengthen its"
            " warm-up or clip lower",
        )
    ]


def _starving(now: Mapping[str, float]) -> list[Alarm]:
    share = now.get("data_wait", 0.0)
    if share <= 0.2:
        return []
    return [
        Alarm(
            "data_wait",
            f"{share:.0%} of the time is spent waiting for data",
            "a host that decodes too slowly",
            "Raise config.data.workers, cut more windows from each field, or move the data to a faster disk",
        )
    ]
