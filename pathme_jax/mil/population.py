"""Fits a whole population of heads (folds × seeds × settings) as one compiled program.

Members share the bags and their order, and differ in targets, in the weight of each bag, in first weights, in
learning rate and weight decay, and in the standardisation of their training part. A bag that a member does not
train on weighs nothing and moves nothing of it. Member i of a population is the member trained alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from pathme_jax.mil.buckets import Bucket
from pathme_jax.mil.folds import TRAIN, VALIDATION
from pathme_jax.mil.heads import absorb
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.tasks import Tasks

Array = jax.Array
EACH, ALL = PartitionSpec("members"), PartitionSpec()
STEPS = PartitionSpec(None, "members")
RUN = 16  # steps in one program; the order of bags is shuffled in runs of bags of one size
LARGE = 256  # instances of a bag from which on members that hold it out are not computed at all
GROUP_BYTES = 2 << 30  # of hidden activations at once on a device; members beyond that take turns


@dataclasses.dataclass
class Members:
    """What the p members differ in, over n bags.

    Attributes:
        parts: (p, n) UNUSED, TRAIN, VALIDATION or TEST.
        targets: (p, n, t) float32, see `tasks`.
        weights: (p, n) weight of each bag in the loss; zero off the training part.
        seeds: (p,) of the first weights.
        rates: (p,) peak learning rate. decays: (p,) weight decay of AdamW.
    """

    parts: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    seeds: np.ndarray
    rates: np.ndarray
    decays: np.ndarray

    def __len__(self) -> int:
        return len(self.parts)

    def take(self, which: Any) -> Members:
        """Some of them."""
        return Members(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and in what portions.

    Attributes:
        epochs: at most. batch: bags a step.
        patience: epochs without a better validation loss after which a member rests; 0: none does.
        seed: of the order of bags and of dropout, which members share.
    """

    epochs: int
    batch: int = 1
    patience: int = 0
    seed: int = 0


@dataclasses.dataclass
class Population:
    """Fitted members.

    Attributes:
        params: tree of (p, ...) arrays: heads that take raw features.
        losses: (steps, p) of each step, NaN where a member trained on none of its bags.
        history: (p, epochs, 2) mean training and validation loss, NaN where there is none.
        best: (p,) epoch whose parameters were kept.
    """

    head: Any
    tasks: Tasks
    params: Any
    losses: np.ndarray
    history: np.ndarray
    best: np.ndarray


def fit(
    head: Any,
    tasks: Tasks,
    buckets: Sequence[Bucket],
    members: Members,
    schedule: Schedule,
    *,
    name: str = "mil",
    progress: bool = True,
) -> Population:
    """Trains all members with AdamW and a cosine to zero, spread over this process's devices.

    A member with a validation part keeps the parameters of the epoch of least validation loss, others the last.
    """
    count, mesh = len(members), jax.make_mesh((jax.local_device_count(),), ("members",), (AUTO,))
    members = members.take(np.resize(np.arange(count), -(-count // mesh.size) * mesh.size))

    def put(tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    mean, std = standardisation(buckets, members.parts)
    fixed = put({"mean": mean, "std": std, "decay": np.float32(members.decays)}, EACH)
    state = put(_init(head, len(mean[0]), jnp.asarray(members.seeds)), EACH)
    bags = [put(bucket.arrays(), ALL) for bucket in buckets]
    group = [_group(state, bucket, schedule.batch, mesh.size) for bucket in buckets]
    active = [_active(members, bucket, schedule.batch, mesh.size) for bucket in buckets]
    steps = sum(-(-len(bucket.index) // schedule.batch) for bucket in buckets) * schedule.epochs
    key = jax.random.key(schedule.seed)

    validated = (members.parts == VALIDATION).any(1)
    best = jax.tree.map(jnp.copy, state["params"])  # the state itself is given away each run
    least = np.full(len(members), np.inf)
    kept, resting = np.zeros(len(members), int), np.zeros(len(members), bool)
    history = np.full((len(members), schedule.epochs, 2), np.nan)
    losses: list[np.ndarray] = []
    epochs = tqdm(
        range(schedule.epochs), desc=name, unit="epoch", leave=False, disable=not progress
    )
    for epoch in epochs:
        begun = []
        for which, rows in _order(buckets, schedule, epoch):
            index, real = buckets[which].index[rows], (rows >= 0).any(1)
            step = sum(map(len, losses)) + sum(int(r.sum()) for _, _, r in begun) + np.cumsum(real)
            decay = (1 + np.cos(np.pi * (step - 1) / steps)) / 2
            weights = np.where(rows >= 0, members.weights[:, index], 0).swapaxes(0, 1)
            weights = np.where(resting[:, None], 0, weights).astype(np.float32)
            plan = {
                "targets": members.targets[:, index].swapaxes(0, 1),
                "weights": weights,
                "rate": np.float32(members.rates * decay[:, None]),
            }
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(step - 1)
            plan["active"] = _first(weights.sum(2) > 0, active[which], mesh.size)
            common = {"rows": np.maximum(rows, 0), "real": real, "key": keys}
            run = _compiled(
                _run,
                mesh,
                (head, tasks, group[which]),
                (EACH, EACH, ALL, STEPS, ALL),
                (EACH, STEPS),
            )
            state, loss = run(state, fixed, bags[which], put(plan, STEPS), put(common, ALL))
            begun.append((loss, weights.sum(2), real))
        epoch_losses = np.concatenate([np.asarray(loss)[real] for loss, _, real in begun])
        epoch_weights = np.concatenate([weight[real] for _, weight, real in begun])
        history[:, epoch, 0] = _mean(epoch_losses.sum(0), epoch_weights.sum(0))
        losses.append(_mean(epoch_losses, epoch_weights))
        if not validated.any():
            best, kept[:] = state["params"], epoch
            continue
        logits = _all_logits(head, mesh, state["params"], fixed, bags, buckets, group)
        found = _validation_loss(tasks, logits, members)
        history[:, epoch, 1] = np.where(resting, np.nan, found)
        better = ~resting & (~validated | (found < least))
        least, kept = np.where(better, found, least), np.where(better, epoch, kept)
        best = _select(put(better, EACH), state["params"], best)
        if schedule.patience:
            resting |= validated & (epoch - kept >= schedule.patience)
            if resting.all():
                break
    raw = jax.vmap(absorb)(best, fixed["mean"], fixed["std"])
    return Population(
        head,
        tasks,
        jax.tree.map(lambda leaf: np.asarray(leaf)[:count], raw),
        np.concatenate(losses)[:, :count],
        history[:count],
        kept[:count],
    )


AUTO = jax.sharding.AxisType.Auto


def _mean(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def standardisation(buckets: Sequence[Bucket], parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, d) mean and standard deviation over the instances of each member's training bags."""
    train = (parts == TRAIN).astype(np.float64)
    sums = np.zeros((3, train.shape[1], buckets[0].features.shape[-1]))
    for bucket in buckets:
        for i, features, mask in zip(bucket.index, bucket.features, bucket.mask, strict=True):
            mine = features[mask].astype(np.float64)
            sums[0, i], sums[1, i], sums[2, i] = len(mine), mine.sum(0), (mine**2).sum(0)
    count, total, square = (train @ each for each in sums)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    std[std <= 1e-4 * np.abs(mean) + 1e-8] = 1  # a constant feature must not be blown up
    return mean.astype(np.float32), std.astype(np.float32)


def _order(
    buckets: Sequence[Bucket], schedule: Schedule, epoch: int
) -> list[tuple[int, np.ndarray]]:
    """One epoch: runs of (bucket, rows (k, b)), shuffled within a bucket and between; -1 fills up."""
    rng = np.random.default_rng([schedule.seed, 4, epoch])
    runs = []
    for which, bucket in enumerate(buckets):
        steps = -(-len(bucket.index) // schedule.batch)
        count = -(-steps // RUN)
        rows = np.full(count * -(-steps // count) * schedule.batch, -1)
        rows[: len(bucket.index)] = rng.permutation(len(bucket.index))
        runs += [(which, part) for part in rows.reshape(count, -1, schedule.batch)]
    return [runs[i] for i in rng.permutation(len(runs))]


# ---- on the devices ---------------------------------------------------------------------------------


def _init(head: Any, width: int, seeds: Array) -> dict[str, Any]:
    """First weights from each member's seed: members of one seed start alike."""
    bag = Bag(jnp.zeros((1, width)), jnp.ones(1, bool), jnp.zeros((1, 2), jnp.int32))

    @jax.jit
    @jax.vmap
    def one(seed: Array) -> dict[str, Any]:
        params = head.init(jax.random.key(seed), bag)["params"]
        return {"params": params, "moments": optax.scale_by_adam().init(params)}

    return one(seeds)


def _group(state: Any, bucket: Bucket, batch: int, devices: int) -> int:
    """How many members a device works on at once, so that what they hold of a step's bags fits."""
    params = state["params"]
    hidden = params["embed"]["kernel"].shape[-1] if "embed" in params else 64
    held = 6 * 4 * batch * bucket.features.shape[1] * hidden
    return max(1, min(len(jax.tree.leaves(params)[0]) // devices, GROUP_BYTES // held))


def _active(members: Members, bucket: Bucket, batch: int, devices: int) -> int:
    """How many members of a device a step must work on. Fewer than all where every bag is held out of some, and
    large enough that taking them apart costs less than it saves."""
    here = len(members) // devices
    if batch > 1 or bucket.mask.shape[1] < LARGE:
        return here
    training = (members.weights[:, bucket.index] > 0).reshape(devices, here, -1)
    return int(training.sum(1).max())


def _first(training: np.ndarray, count: int, devices: int) -> np.ndarray:
    """(k, devices * count) int32: of each step and device `count` of its members, those that train first.

    training: (k, p) bool.
    """
    by_device = training.reshape(len(training), devices, -1)
    order = np.argsort(~by_device, axis=2, kind="stable")[..., :count]
    return order.reshape(len(training), -1).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _compiled(function: Any, mesh: Any, static: tuple, takes: tuple, gives: Any) -> Any:
    mapped = jax.shard_map(
        functools.partial(function, *static),
        mesh=mesh,
        in_specs=takes,
        out_specs=gives,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if function is _run else ())


def _run(
    head: Any,
    tasks: Tasks,
    group: int,
    state: Any,
    fixed: Any,
    bags: Bag,
    plan: Any,
    common: Any,
) -> tuple[Any, Array]:
    """k steps of all members here on bags of one size; returns (state, (k, p) summed weighted loss)."""

    def step(state: Any, now: Any) -> tuple[Any, Array]:
        plan, common = now
        seen = jax.tree.map(lambda x: x[common["rows"]], bags)

        def update(one: Any) -> Any:
            state, fixed, plan = one
            return _update(head, tasks, seen, common["key"], state, fixed, plan)

        nothing = jnp.zeros(len(plan["rate"]))

        some = plan["active"]
        own = {key: value for key, value in plan.items() if key != "active"}

        def do(state: Any) -> Any:
            if len(some) == len(nothing):
                return jax.lax.map(update, (state, fixed, own), batch_size=group)
            mine = jax.tree.map(lambda x: x[some], (state, fixed, own))
            new, loss = jax.lax.map(update, mine, batch_size=group)
            state = jax.tree.map(lambda x, y: x.at[some].set(y), state, new)
            return state, nothing.at[some].set(loss)

        def rest(state: Any) -> Any:
            return state, nothing

        return jax.lax.cond(common["real"], do, rest, state)

    return jax.lax.scan(step, state, (plan, common))


def _update(
    head: Any, tasks: Tasks, bags: Bag, key: Array, state: Any, fixed: Any, plan: Any
) -> tuple[Any, Array]:
    """One step of one member on a batch of bags. The key is every member's: one dropout mask for all."""
    split, drop = jax.random.split(key)
    count = len(bags.mask)
    rngs = {"split": jax.random.split(split, count), "dropout": jax.random.split(drop, count)}

    def loss(params: Any) -> tuple[Array, Array]:
        raw = absorb(params, fixed["mean"], fixed["std"])

        def apply(bag: Bag, rngs: Any) -> Any:
            return head.apply({"params": raw}, bag, train=True, rngs=rngs)

        out = jax.vmap(apply)(bags, rngs)
        total = jnp.zeros(())
        for weight, logits in out.streams:
            total += tasks.loss(logits, plan["targets"], plan["weights"] * weight)
        if hasattr(head, "extra") and tasks.has_classes:
            own = jax.vmap(head.extra)(out, tasks.label(plan["targets"]))
            total += (own * plan["weights"]).sum()
        return total / count, total

    gradient, total = jax.grad(loss, has_aux=True)(state["params"])
    direction, moments = optax.scale_by_adam().update(gradient, state["moments"])
    params = jax.tree.map(
        lambda p, u: p - plan["rate"] * (u + fixed["decay"] * p), state["params"], direction
    )
    # A batch without a training bag must not move the member.
    seen = plan["weights"].sum() > 0
    new = {"params": params, "moments": moments}
    return jax.tree.map(lambda a, b: jnp.where(seen, a, b), new, state), total


@jax.jit
def _select(better: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


# ---- answers ----------------------------------------------------------------------------------------


def _answer(head: Any, group: int, params: Any, fixed: Any, bags: Bag) -> Array:
    """(b, p, o) logits of all members on all bags of one size, one bag after another."""

    def of_bag(bag: Bag) -> Array:
        def one(member: Any) -> Array:
            params, fixed = member
            return head.apply({"params": absorb(params, fixed["mean"], fixed["std"])}, bag).logits

        return jax.lax.map(one, (params, fixed), batch_size=group)

    return jax.lax.map(of_bag, bags)


def _all_logits(
    head: Any,
    mesh: Any,
    params: Any,
    fixed: Any,
    bags: Sequence[Bag],
    buckets: Sequence[Bucket],
    groups: Sequence[int],
) -> np.ndarray:
    """(p, n, o)"""
    found: Any = None
    for bag, bucket, group in zip(bags, buckets, groups, strict=True):
        answer = _compiled(_answer, mesh, (head, group), (EACH, EACH, ALL), STEPS)
        logits = np.asarray(answer(params, fixed, bag))
        if found is None:
            n = sum(len(b.index) for b in buckets)
            found = np.zeros((logits.shape[1], n, logits.shape[2]), np.float32)
        found[:, bucket.index] = logits.swapaxes(0, 1)
    return found


def _validation_loss(tasks: Tasks, logits: np.ndarray, members: Members) -> np.ndarray:
    """(p,) loss of each member's validation part, every class weighing the same; NaN without one."""
    losses = np.full(len(members), np.nan)
    for i in range(len(members)):
        held = np.flatnonzero(members.parts[i] == VALIDATION)
        if len(held):
            targets = members.targets[i, held]
            weight = balance(tasks, targets)
            parts = (jnp.asarray(x) for x in (logits[i, held], targets, weight))
            total = tasks.loss(*parts)
            losses[i] = float(total) / weight.sum()
    return losses


def balance(tasks: Tasks, targets: np.ndarray) -> np.ndarray:
    """(n,) weights of mean 1 by which every class of the first task that has classes weighs the same."""
    weight = np.ones(len(targets), np.float32)
    if tasks.has_classes:
        labels = np.asarray(tasks.label(jnp.asarray(targets)))
        for label in np.unique(labels):
            weight[labels == label] = 1 / (labels == label).sum()
    return weight / weight.mean()


def test_logits(population: Population, buckets: Sequence[Bucket], pairs: np.ndarray) -> np.ndarray:
    """(q, o) logits of (q, 2) pairs of member and bag, all members run on every bag: without attention."""
    found = np.zeros((len(pairs), population.tasks.outputs), np.float32)
    for bucket in buckets:
        everything = np.asarray(_every(population.head, population.params, bucket.arrays()))
        row_of = np.full(pairs[:, 1].max() + 1, -1)
        known = bucket.index <= pairs[:, 1].max()
        row_of[bucket.index[known]] = np.flatnonzero(known)
        here = row_of[pairs[:, 1]] >= 0
        found[here] = everything[row_of[pairs[here, 1]], pairs[here, 0]]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _every(head: Any, params: Any, bags: Bag) -> Array:
    """(b, p, o)"""

    def of_bag(bag: Bag) -> Array:
        return jax.vmap(lambda params: head.apply({"params": params}, bag).logits)(params)

    return jax.lax.map(of_bag, bags)


def predict(
    population: Population, buckets: Sequence[Bucket], pairs: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Answers of given members on given bags, all instances used.

    Args:
        pairs: (q, 2) member and bag.

    Returns:
        (q, o) logits, and q arrays (a, m) of attention over the bag's instances.
    """
    logits = np.zeros((len(pairs), population.tasks.outputs), np.float32)
    attention: list[np.ndarray] = [np.empty(0)] * len(pairs)
    for bucket in buckets:
        arrays = bucket.arrays()
        row_of = {bag: row for row, bag in enumerate(bucket.index.tolist())}
        for i in np.flatnonzero(np.isin(pairs[:, 1], bucket.index)):
            member, bag = pairs[i].tolist()
            mine = jax.tree.map(lambda leaf, member=member: leaf[member], population.params)
            this = jax.tree.map(lambda leaf, row=row_of[bag]: leaf[row], arrays)
            out = _one(population.head, mine, this)
            logits[i] = out.logits
            attention[i] = np.asarray(out.attention)[:, np.asarray(this.mask)]
    return logits, attention


@functools.partial(jax.jit, static_argnums=0)
def _one(head: Any, params: Any, bag: Bag) -> Any:
    return head.apply({"params": params}, bag)
