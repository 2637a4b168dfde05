"""What scikit-survival, lifelines and pandas say of small seeded cohorts, for tests that import none of them.

    python tests/references/make_survival.py

in an environment with scikit-survival and lifelines writes survival.json beside this file. The tests draw the
cohorts again from `cohort`; only the answers are stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).with_name("survival.json")
COHORTS = ("plain", "tied", "uncensored", "heavy")
AT = np.array([4.0, 8.0, 13.0])
PENALTY = 2.0  # of the Cox model, in scikit-survival's alpha


def cohort(name: str) -> dict[str, np.ndarray]:
    """120 patients with three covariates: risk, time and event, and survival predicted at AT.

    tied: whole months, and risks of one decimal, so that times, events and risks coincide. uncensored: all events.
    heavy: four in five censored.
    """
    rng = np.random.default_rng([20240917, COHORTS.index(name)])
    x = rng.normal(size=(120, 3))
    truth = x @ np.array([1.0, -0.5, 0.0])
    failure = rng.exponential(12 * np.exp(-truth))
    lost = rng.exponential({"heavy": 4.0}.get(name, 18.0), 120)
    if name == "uncensored":
        lost = np.full(120, np.inf)
    time, event = np.minimum(failure, lost) + 0.01, failure <= lost
    risk = truth + rng.normal(size=120)
    if name == "tied":
        time, risk = np.ceil(time), np.round(risk, 1)
    if name != "uncensored":
        time[np.argmax(time)] += (
            20.0  # followed longer than all of AT, so that every weight is known
        )
        event[np.argmax(time)] = False
    survival = np.exp(-AT / 12 * np.exp(0.5 * risk[:, None]))
    return {"x": x, "risk": risk, "time": time, "event": event.astype(int), "survival": survival}


def _answers(name: str) -> dict[str, Any]:
    import pandas as pd
    from lifelines import CoxPHFitter, KaplanMeierFitter
    from lifelines.statistics import multivariate_logrank_test
    from lifelines.utils import concordance_index
    from sksurv import metrics
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.linear_model.coxph import CoxPHOptimizer
    from sksurv.util import Surv

    c = cohort(name)
    time, event, risk = c["time"], c["event"], c["risk"]
    y = Surv.from_arrays(event.astype(bool), time)
    group = np.digitize(c["x"][:, 0], [-0.4, 0.6])
    km = KaplanMeierFitter().fit(time, event)
    table, interval = km.survival_function_.iloc[1:], km.confidence_interval_.iloc[1:]
    test = multivariate_logrank_test(time, group, event)
    auc, mean_auc = metrics.cumulative_dynamic_auc(y, y, risk, AT)
    alone = CoxPHOptimizer(risk[:, None], event.astype(bool), time, np.zeros(1), "breslow")
    cox = CoxPHSurvivalAnalysis(alpha=PENALTY, ties="breslow", tol=1e-12, n_iter=200).fit(c["x"], y)
    frame = pd.DataFrame(c["x"]).assign(time=time, event=event)
    bins = pd.qcut(pd.Series(time[event == 1]), 4, retbins=True, labels=False)[1]
    return {
        "km_times": table.index.to_numpy(),
        "km": table.to_numpy()[:, 0],
        "km_low": interval.to_numpy()[:, 0],
        "km_high": interval.to_numpy()[:, 1],
        "logrank": [test.test_statistic, test.p_value],
        "c_lifelines": concordance_index(time, -risk, event),
        "c_sksurv": metrics.concordance_index_censored(event.astype(bool), time, risk)[0],
        "auc": auc,
        "mean_auc": mean_auc,
        "brier": metrics.brier_score(y, y, c["survival"], AT)[1],
        "integrated_brier": metrics.integrated_brier_score(y, y, c["survival"], AT),
        "cox_nll_per_event": alone.nlog_likelihood(np.ones(1)) * len(time) / event.sum(),
        "cox_ridge": cox.coef_,
        "cox_lifelines": CoxPHFitter().fit(frame, "time", "event").params_.to_numpy(),
        "edges": bins[1:-1],
    }


def main() -> None:
    def plain(value: Any) -> Any:
        return np.round(np.asarray(value, float), 10).tolist()

    answers = {name: {k: plain(v) for k, v in _answers(name).items()} for name in COHORTS}
    STORED.write_text(json.dumps(answers, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
