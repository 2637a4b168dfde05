"""The published protocols by name: what each fits and measures on frozen features, and where every setting is from."""

from __future__ import annotations

import dataclasses

from pathme_jax.evaluation.fewshot import SimpleShot
from pathme_jax.evaluation.linear_probe import LBFGS, AdamW
from pathme_jax.evaluation.retrieval import Retrieval


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """A vote of the nearest training rows.

    Attributes:
        k: neighbours that vote, each number measured.
            vote: "equal", of centred features of unit length by distance; "softmax", of the cosine over 0.07 (DINO).
    """

    k: tuple[int, ...]
    vote: str


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is fitted and measured; None: not part of it.

    Attributes:
        with_validation: the validation part is trained on too; else it only chooses, or lies idle.
        sources: setting to where it is from.
    """

    linear: LBFGS | AdamW
    neighbours: Neighbours | None
    fewshot: SimpleShot | None
    retrieval: Retrieval | None
    with_validation: bool
    sources: dict[str, str]


_UNI = "github.com/mahmoodlab/UNI, uni/downstream/eval_patch_features"
_GPFM = "github.com/birkhoffkiki/GPFM, ROI_tasks"
_EVA = "github.com/kaiko-ai/eva, configs/vision/pathology/offline/classification/crc.yaml"
_PATHO = "github.com/mahmoodlab/Patho-Bench, patho_bench"

PROTOCOLS = {
    "uni": Protocol(
        linear=LBFGS(cost=None, balanced=False, max_iter=1000, penalty="norm"),
        neighbours=Neighbours(k=(20,), vote="equal"),
        fewshot=SimpleShot(shots=(1, 2, 4, 8, 16), episodes=1000),
        retrieval=Retrieval(standardise=True, top=(1, 3, 5)),
        with_validation=True,
        sources={
            "linear": f"{_UNI}/linear_probe.py, logistic_regression.py: C = features x classes / 100, 1000 iterations, "
            "the norm not squared",
            "neighbours": f"{_UNI}/fewshot.py eval_knn: k 20, centred, unit length, scikit-learn's equal votes",
            "fewshot": f"{_UNI}/fewshot.py eval_fewshot: 1000 episodes, all classes and test rows; its 256 shots are "
            "more than most slide cohorts have, the paper's powers of two are used up to 16",
            "retrieval": "not in UNI's released code; GPFM's",
            "with_validation": f"{_UNI}/linear_probe.py combine_trainval=True",
        },
    ),
    "eva": Protocol(
        linear=AdamW(
            *(3e-4, 3e-4, 1e-2),
            batch=256,
            steps=12500,
            patience=400,
            criterion="balanced_accuracy",
            initial=None,
            runs=5,
        ),
        neighbours=None,
        fewshot=None,
        retrieval=None,
        with_validation=False,
        sources={
            "linear": f"{_EVA}: AdamW 3e-4 constant (decay 0.01 and first weights PyTorch's defaults), batch 256, 12,500 "
            "steps, best val/MulticlassAccuracy, 5 runs; patience in epochs as in bach.yaml, a set of slide cohorts' size",
            "neighbours": "not part of it",
            "fewshot": "not part of it",
            "retrieval": "not part of it",
            "with_validation": f"{_EVA}: the validation split chooses the checkpoint",
        },
    ),
    "patho-bench": Protocol(
        linear=LBFGS(cost=0.5, balanced=True, max_iter=10000, penalty="squared"),
        neighbours=None,
        fewshot=None,
        retrieval=Retrieval(standardise=False, top=(1, 5, 10)),
        with_validation=False,
        sources={
            "linear": f"{_PATHO}/experiments/LinearProbeExperiment.py: scikit-learn; max_iter from "
            "ExperimentFactory.linprobe; cost 0.5, balanced as its published runs (the code's defaults are 1, not)",
            "neighbours": "not part of it",
            "fewshot": "not part of it",
            "retrieval": f"{_PATHO}/ExperimentFactory.py retrieval: l2, top 1, 5, 10, no centring",
            "with_validation": f"{_PATHO}/ExperimentFactory.py COMBINE_TRAIN_VAL = False",
        },
    ),
    "gpfm": Protocol(
        linear=AdamW(
            *(5e-4, 1e-5, 1e-5), batch=256, epochs=100, criterion="auroc", initial=0.01, runs=1
        ),
        neighbours=Neighbours(k=(1, 20), vote="softmax"),
        fewshot=None,
        retrieval=Retrieval(standardise=True, top=(1, 3, 5)),
        with_validation=False,
        sources={
            "linear": f"{_GPFM}/linear.py: AdamW 5e-4 to 1e-5 by cosine, decay 1e-5, batch 256, 100 epochs, best "
            "validation AUC; weights normal(0.01), bias 0",
            "neighbours": f"{_GPFM}/knn.py: k 1 and 20, temperature 0.07; its softmax is over the 20 nearest for k 1 "
            "too, which changes no order",
            "fewshot": "not part of it",
            "retrieval": f"{_GPFM}/roi_retrieval.py: z-scores of the training part, Euclidean, weights 1, 0.9, …; "
            "recall@K, mvacc and map are added",
            "with_validation": f"{_GPFM}/linear.py: the validation part chooses the epoch",
        },
    ),
}
